"""ADMM's passes on a GPU: a thread a scope, and for the right-hand side one an element."""

from pathlib import Path

import cupy
import cupyx
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.projection import prepare_projection, projection_defines
from cuobs.ops.cuda.scope import samples, unrolls

SOURCE = Path(__file__).with_suffix(".cu")
# Threads of a block that takes single elements, and the most blocks of them.
ELEMENTS, MAX_BLOCKS = 256, 2**16


def project_update(B, V, D, mask, operand, layout, rho):
    update = prepare_project_update(B, V, D, mask, operand, layout)
    return update if update is NotImplemented else update(rho)


def prepare_project_update(B, V, D, mask, operand, layout):
    if not unrolls(layout):
        return NotImplemented
    changed, real = cupy.zeros((), np.uint64), B.dtype.type
    arrays = B, V, D, mask, loader.NULL if operand is None else operand
    launch = prepare_projection(SOURCE, "project_update", B, layout)
    count = Count(changed)

    def update(rho):
        changed.fill(0)
        launch((*arrays, real(rho), real(1 / rho)), changed)
        return count.again()

    return update


class Count:
    """A number that a GPU still counts: `int` waits for that, and for nothing launched since.

    Parameters
    ----------
    array : array, shape ()
        Where it is counted.
    """

    def __init__(self, array):
        self._array, self._number = array, cupyx.empty_pinned((), array.dtype)
        self._counted = cupy.cuda.Event(disable_timing=True)

    def again(self):
        """What is counted by what was launched so far."""
        self._array.get(out=self._number, blocking=False)
        self._counted.record()
        return self

    def __int__(self):
        self._counted.synchronize()
        return int(self._number)


def ridge_right_side(D, V, G, B, product, out, rho):
    prepare_ridge_right_side(D, V, G, B, product, out)(rho)


def prepare_ridge_right_side(D, V, G, B, product, out):
    kernel = loader.kernel_for(SOURCE, "right_side", _element_defines, D.dtype.name)
    blocks = min(-(-D.size // ELEMENTS), MAX_BLOCKS)
    places = (out, loader.NULL) if out.dtype == D.dtype else (loader.NULL, out)
    arrays, size, real = (D, V, G, B, product), np.int64(D.size), D.dtype.type

    def launch(rho):
        kernel((blocks,), (ELEMENTS,), (*arrays, real(rho), *places, size))

    return launch


def _element_defines(dtype):
    return {"REAL": loader.real(dtype), "THREADS": ELEMENTS}


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for dtype in ("float32", "float64"):
        yield _element_defines(dtype)
    for layout, dtype in samples():
        if unrolls(layout):
            yield projection_defines(layout, dtype)
