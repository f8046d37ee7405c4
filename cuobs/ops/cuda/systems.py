"""Systems of the scopes on a GPU, a thread a scope."""

from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.scope import MAX_PLACES, scope_grid, thread_defines

SOURCE = Path(__file__).with_suffix(".cu")


def scope_compensation(W, C, mask):
    (M, K), (c, _, n) = W.shape, C.shape
    if c > MAX_PLACES:
        return NotImplemented
    W, C, mask = map(cupy.ascontiguousarray, (W, C, mask))
    out = cupy.empty((M, K), W.dtype)
    kernel = loader.kernel_for(SOURCE, "scope_compensation", _defines, c, W.dtype)
    grid, block = scope_grid(M, n)
    kernel(grid, block, (W, C, mask, out, np.int32(M), np.int32(n)))
    return out


def _defines(c, dtype):
    return {"REAL": loader.real(dtype), "PLACES": c} | thread_defines()


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for c in (2, 3, 4, 8, 12, 16):
        for dtype in ("float32", "float64"):
            yield _defines(c, dtype)
