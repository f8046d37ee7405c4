"""ADMM's passes on a GPU: a thread a scope, and for the right-hand side one an element."""

from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.scope import samples, scope_defines, scope_grid, thread_defines, unrolls

SOURCE = Path(__file__).with_suffix(".cu")
# Threads of a block that takes single elements, and the most blocks of them.
ELEMENTS, MAX_BLOCKS = 256, 2**16


def project_update(B, V, D, mask, rho, layout):
    if not unrolls(layout):
        return NotImplemented
    real = B.dtype.type
    return _launch("project_update", (B, V, D, mask, real(rho), real(1 / rho)), B, layout)


def project_mask(B, mask, layout):
    if not unrolls(layout):
        return NotImplemented
    return _launch("project_mask", (B, mask), B, layout)


def ridge_right_side(D, V, G, rho, out, B=None):
    kernel = loader.kernel_for(SOURCE, "right_side", _element_defines, D.dtype.name)
    blocks = min(-(-D.size // ELEMENTS), MAX_BLOCKS)
    kernel((blocks,), (ELEMENTS,), (D, V, G, loader.NULL if B is None else B, D.dtype.type(rho),
                                    out, np.int64(D.size)))


def _launch(name, args, B, layout):
    """Launch a thread for each scope; returns the count of changed elements."""
    m, n = B.shape[0] // layout.rows, B.shape[1] // layout.columns
    changed = cupy.zeros((), np.uint64)
    kernel = loader.kernel_for(SOURCE, name, _scope_defines, layout, B.dtype)
    grid, block = scope_grid(m, n)
    kernel(grid, block, (*args, np.int32(m), np.int32(n), changed))
    return int(changed)


def _scope_defines(layout, dtype):
    return scope_defines(layout, dtype) | thread_defines()


def _element_defines(dtype):
    return {"REAL": loader.real(dtype), "THREADS": ELEMENTS}


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for dtype in ("float32", "float64"):
        yield _element_defines(dtype)
    for layout, dtype in samples():
        if unrolls(layout):
            yield _scope_defines(layout, dtype)
