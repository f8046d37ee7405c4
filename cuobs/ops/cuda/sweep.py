"""Sweeps on a GPU: a warp a row group goes through a block of columns held in shared memory."""

from functools import lru_cache
from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.scope import MAX_PLACES, samples, scope_defines, unrolls
from cuobs.ops.products import matmul
from cuobs.ops.sweep import block_width, rest_of_spans

SOURCE = Path(__file__).with_suffix(".cu")
WARP = 32
# Rows of a block of threads: as many row groups share a held matrix.
ROWS = 8
# Shared memory that a span of columns may take as one block: less than any device has.
SHARED = 96 * 1024
# Diagonal blocks up to this width are inverted as a batch.
BATCHED = 512


def solved_width(W, c):
    # A whole span where it fits.
    n = W.shape[1]
    return n if _shared(n, c, W.itemsize, _warps(1)) <= SHARED else block_width(c)


def solve_scopes(W, C, mask, c):
    M, n = W.shape
    shared = _shared(n, c, W.itemsize, _warps(1))
    if c > MAX_PLACES or shared > loader.largest_shared():
        return NotImplemented
    _launch(_solve_kernel(c, W.dtype), M, _warps(1), shared, (W, _in_rows(C), _in_rows(mask)),
            (np.int32(M), np.int32(n)))


def sparsegpt_block(W, S, F, scale, layout, mask):
    M, n = W.shape
    r, c = layout.blocks.shape
    shared = _shared(n, c, W.itemsize, 2 * r * _warps(r))
    if not unrolls(layout) or shared > loader.largest_shared():
        return NotImplemented
    _launch(_block_kernel(layout, W.dtype), M // r, _warps(r), shared,
            (_in_rows(W), S, _in_rows(F)),
            (cupy.ascontiguousarray(scale), mask, loader.strides(mask)[0], np.int32(M // r),
             np.int32(n)))


def span_inverses(R, width, precision="fp32"):
    from cupyx.scipy.linalg import solve_triangular

    count = len(R) // width
    spans = []
    if width <= BATCHED and count:
        whole = count * width
        tiles = R[:whole, :whole].reshape(count, width, count, width)
        blocks = cupy.ascontiguousarray(tiles.diagonal(0, 0, 2).transpose(2, 0, 1))
        eye = cupy.broadcast_to(cupy.eye(width, dtype=R.dtype), blocks.shape)
        U = solve_triangular(blocks, eye)
        spans = list(zip(U, matmul(U.transpose(0, 2, 1), U, precision), strict=True))
    return rest_of_spans(spans, R, width, precision)


def _in_rows(matrix):
    """The matrix, copied where its rows are no runs of memory."""
    piece = matrix.shape[1] == 1 or matrix.strides[1] == matrix.itemsize
    return matrix if piece else cupy.ascontiguousarray(matrix)


def _warps(r):
    """Warps of a block of threads, each with a row group of r rows."""
    return max(1, ROWS // r)


def _shared(n, c, itemsize, rows):
    """Shared memory of a sweep's kernel: half a matrix (n, n), `rows` rows and a word a scope."""
    return (n * (n + c) // 2 + rows * n) * itemsize + ROWS * (n // c) * 4


def _launch(kernel, groups, warps, shared, matrices, rest):
    args = [part for matrix in matrices for part in (matrix, loader.strides(matrix)[0])]
    loader.launch(kernel, (-(-groups // warps),), (WARP, warps), (*args, *rest), shared)


@lru_cache(maxsize=64)
def _block_kernel(layout, dtype):
    return loader.kernel(SOURCE, "sparsegpt_block", **_block_defines(layout, dtype))


def _block_defines(layout, dtype):
    return scope_defines(layout, dtype) | {"WARPS": _warps(layout.rows), "WARP": WARP}


@lru_cache(maxsize=64)
def _solve_kernel(c, dtype):
    return loader.kernel(SOURCE, "solve_scopes", **_solve_defines(c, dtype))


def _solve_defines(c, dtype):
    return {"REAL": loader.real(dtype), "PLACES": c, "WARPS": _warps(1), "WARP": WARP}


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for layout, dtype in samples():
        if unrolls(layout):
            yield _block_defines(layout, dtype)
            yield _solve_defines(layout.columns, dtype)
