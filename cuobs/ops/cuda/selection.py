"""Mask selection on a GPU, a thread a scope."""

from functools import lru_cache
from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.scope import (
    MAX_PLACES,
    samples,
    scope_defines,
    scope_grid,
    thread_defines,
    unrolls,
)

SOURCE = Path(__file__).with_suffix(".cu")
# Scopes with more candidate masks are left to array operations; a kernel is unrolled over them.
MAX_UNROLLED = 128
# Slices of rows that are summed apart; scopes side by side and rows of threads in a block.
SLICES, LANES, DEPTH = 16, 32, 8


def factor_scope_blocks(U, c):
    if c > MAX_PLACES:
        return NotImplemented
    U = cupy.ascontiguousarray(U)
    K = len(U)
    parts = cupy.empty((min(SLICES, K), c, c, K // c), U.dtype)
    kernel = loader.kernel(SOURCE, "factor_scope_blocks", **_blocks_defines(c, U.dtype))
    kernel((-(-K // c // LANES), len(parts)), (LANES, DEPTH),
           (U, np.int64(K), np.int32(K), parts))
    return parts.sum(0)


def select(w, C, layout):
    if not _fits(layout):
        return NotImplemented
    _, m, _, n = w.shape
    blocks = cupy.empty((layout.n_blocks, m, n), bool)
    best, gap = cupy.empty((2, m, n), w.dtype)
    _launch(w, C, layout, blocks, loader.NULL, np.int64(0), best, gap)
    return blocks, best, gap


def select_mask(w, C, layout, out):
    if not _fits(layout):
        return NotImplemented
    _launch(w, C, layout, loader.NULL, out, loader.strides(out)[0], loader.NULL, loader.NULL)


def _fits(layout):
    return unrolls(layout) and len(layout.candidates) <= MAX_UNROLLED


@lru_cache(maxsize=64)
def _kernel(layout, dtype):
    return loader.kernel(SOURCE, "select", **_defines(layout, dtype))


def _launch(w, C, layout, blocks, mask, mask_row, best, gap):
    _, m, _, n = w.shape
    if C.ndim == 3:
        C = C[:, :, None, None]
    C = cupy.broadcast_to(C, (len(w), *w.shape))
    grid, block = scope_grid(m, n)
    _kernel(layout, w.dtype)(grid, block, (w, *loader.strides(w), C, *loader.strides(C),
                                           np.int32(m), np.int32(n), blocks, mask, mask_row, best,
                                           gap))


def _defines(layout, dtype):
    bits = 1 << np.arange(32)
    return scope_defines(layout, dtype) | thread_defines() | {
        "N_CANDIDATES": len(layout.candidates),
        "PRUNED": (layout.candidates * bits[: layout.blocks.shape[1]]).sum(2).ravel(),
        "CHOICE": layout.candidate_blocks.T @ bits[: layout.n_blocks],
        "ENUMERATED": layout.enumerated,
    }


def _blocks_defines(c, dtype):
    return {"REAL": loader.real(dtype), "PLACES": c, "LANES": LANES, "DEPTH": DEPTH}


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for layout, dtype in samples():
        if _fits(layout):
            yield _defines(layout, dtype)
            yield _blocks_defines(layout.columns, dtype)
