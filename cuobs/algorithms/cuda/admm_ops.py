"""ADMM's passes on a GPU: a thread a scope, and for the right-hand side one an element."""

from pathlib import Path

import cupy
import cupyx
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.projection import launch_projection, projection_defines
from cuobs.ops.cuda.scope import samples, unrolls

SOURCE = Path(__file__).with_suffix(".cu")
# Threads of a block that takes single elements, and the most blocks of them.
ELEMENTS, MAX_BLOCKS = 256, 2**16


def project_update(B, V, D, mask, rho, layout):
    if not unrolls(layout):
        return NotImplemented
    real = B.dtype.type
    args = B, V, D, mask, real(rho), real(1 / rho)
    return Count(launch_projection(SOURCE, "project_update", args, B, layout))


class Count:
    """A number that a GPU still counts: `int` waits for that, and for nothing launched since."""

    def __init__(self, number):
        self._number = cupyx.empty_pinned((), number.dtype)
        number.get(out=self._number, blocking=False)
        self._counted = cupy.cuda.Event(disable_timing=True)
        self._counted.record()

    def __int__(self):
        self._counted.synchronize()
        return int(self._number)


def ridge_right_side(D, V, G, B, product, rho, out):
    kernel = loader.kernel_for(SOURCE, "right_side", _element_defines, D.dtype.name)
    blocks = min(-(-D.size // ELEMENTS), MAX_BLOCKS)
    places = (out, loader.NULL) if out.dtype == D.dtype else (loader.NULL, out)
    kernel((blocks,), (ELEMENTS,), (D, V, G, B, product, D.dtype.type(rho), *places,
                                    np.int64(D.size)))


def _element_defines(dtype):
    return {"REAL": loader.real(dtype), "THREADS": ELEMENTS}


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for dtype in ("float32", "float64"):
        yield _element_defines(dtype)
    for layout, dtype in samples():
        if unrolls(layout):
            yield projection_defines(layout, dtype)
