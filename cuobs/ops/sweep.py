"""Left-to-right sweeps over the scopes of a weight."""

from functools import lru_cache

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops import cuda
from cuobs.ops.cholesky import upper_inverse
from cuobs.ops.gemm import gemm
from cuobs.ops.masked_solve import masked_solve
from cuobs.ops.selection import block_sums, expand, prune_lowest

# Columns that a sweep finishes before it updates those to the right by one product.
BLOCK = 128
# A GPU takes a whole span of columns as one block where it fits the shared memory of any device.
SHARED = 96 * 1024
# Diagonal blocks up to this width are inverted as a batch.
BATCHED = 512


def block_width(c):
    """Columns of a block: whole scopes of c columns, about `BLOCK` in all."""
    return max(1, BLOCK // c) * c


def scope_solutions(W, C, mask, layout):
    """The multipliers λ of the scopes' pruned weights, found one scope after the other.

    For each scope from left to right, with w as the scopes before have left it,
    λ_P = w_P (C_PP)⁻¹ and w −= λ_P C_P,: to the right.

    Parameters
    ----------
    W : array, shape (M, n)
        Columns of a weight, whole scopes.
    C : array, shape (n, n)
        The inverse Hessian of those columns, frozen.
    mask : array of bool, shape (M, n)
        True = kept.
    layout : Layout

    Returns
    -------
    array, shape (M, n)
        λ, 0 where kept. The compensated weight is W − λ C.
    """
    c = layout.blocks.shape[1]
    n = W.shape[1]
    solutions = W.copy()
    fits = _shared(n, c, W.itemsize, _warps(1)) <= SHARED
    width = n if fits and namespace(W) is not np else block_width(c)
    for a in range(0, n, width):
        b = min(a + width, n)
        solve_scopes(solutions[:, a:b], C[a:b, a:b], mask[:, a:b], c)
        gemm(solutions[:, a:b], C[a:b, b:], solutions[:, b:], alpha=-1, beta=1)
    return solutions


def solve_scopes(W, C, mask, c):
    """`scope_solutions` of one block of columns, in place.

    Parameters
    ----------
    W : array, shape (M, n)
        Overwritten by λ.
    C : array, shape (n, n)
    mask : array of bool, shape (M, n)
        True = kept.
    c : int
        Columns of a scope.
    """
    xp = namespace(W)
    M, n = W.shape
    if xp is not np and c <= cuda.MAX_PLACES:
        _launch(_solve_kernel(c, W.dtype), M, _warps(1), _shared(n, c, W.itemsize, _warps(1)),
                (W, C, mask), (np.int32(M), np.int32(n)))
        return
    # Rows last: every column is contiguous.
    w = xp.ascontiguousarray(W.T)
    pruned = xp.ascontiguousarray(~mask.T)
    for a in range(0, n, c):
        b = a + c
        w[a:b] = masked_solve(C[a:b, a:b, None], w[a:b], pruned[a:b])
        if b < n:
            w[b:] -= C[b:, a:b] @ w[a:b]
    W[...] = w.T


def sparsegpt_block(W, S, F, scale, layout, mask):
    """SparseGPT on one block of columns, in the form of one factor.

    With F = R / diag(R) and the deviations e of the columns to the left, s_j = Σ e_i F_ij is the
    compensation of column j. A pruned column deviates by its target, e = w; a kept one takes the
    compensation, e = −s. A scope's mask is chosen at its first column, by the values that its
    columns would have if all of them were kept.

    Parameters
    ----------
    W : array, shape (M, n)
        The target.
    S : array, shape (M, n)
        Compensation from the columns left of the block. Overwritten by the deviations
        W − weight; the weight is W − S where kept and 0 where pruned.
    F : array, shape (n, n)
        The block of R / diag(R): unit upper triangular.
    scale : array, shape (n,)
        diag(R)²: the score of a value v is v² · scale.
    layout : Layout
    mask : array of bool, shape (M, n)
        True = kept. Overwritten.
    """
    xp = namespace(W)
    M, n = W.shape
    r, c = layout.blocks.shape
    kernel = None if xp is np else _block_kernel(layout, W.dtype)
    if kernel is not None:
        _launch(kernel, M // r, _warps(r), _shared(n, c, W.itemsize, 2 * r * _warps(r)),
                (W, S, F), (xp.ascontiguousarray(scale), mask, cuda.strides(mask)[0],
                            np.int32(M // r), np.int32(n)))
        return
    n_pruned = layout.n_blocks - layout.keep
    # Rows last: every column is contiguous. d = −s is how a column deviates if it is kept.
    w = xp.ascontiguousarray(W.T)
    d = xp.ascontiguousarray(-S.T)
    e = xp.empty_like(w)
    pruned = xp.empty(w.shape, bool)
    for a in range(0, n, c):
        b = a + c
        values = w[a:b] - _keep_all(d[a:b], F[a:b, a:b])
        values *= values
        values *= scale[a:b, None]
        scores = block_sums(values.reshape(c, -1, r, 1), layout)
        blocks = prune_lowest(scores, n_pruned)
        pruned[a:b] = expand(blocks, layout).transpose(3, 0, 1, 2).reshape(c, M)
        for j in range(a, b):
            e[j] = xp.where(pruned[j], w[j], d[j])
            d[j + 1 : b] -= F[j, j + 1 : b, None] * e[j]
        if b < n:
            d[b:] -= F[a:b, b:].T @ e[a:b]
    S[...] = e.T
    mask[...] = ~pruned.T


def _keep_all(d, F):
    """How each column of a scope deviates when all before it are kept."""
    d = d.copy()
    for j in range(len(d) - 1):
        d[j + 1 :] -= F[j, j + 1 :, None] * d[j]
    return d


def span_inverses(R, width):
    """For each diagonal block of an upper triangular matrix, its inverse U and C = UᵀU.

    Parameters
    ----------
    R : array, shape (K, K)
    width : int
        Columns of a block; the last may be narrower.

    Returns
    -------
    list of (array, array), both of shape (width, width)
    """
    xp = namespace(R)
    K = len(R)
    whole = K // width * width
    spans = []
    if xp is not np and width <= BATCHED and whole:
        from cupyx.scipy.linalg import solve_triangular

        tiles = R[:whole, :whole].reshape(whole // width, width, whole // width, width)
        blocks = xp.ascontiguousarray(tiles.diagonal(0, 0, 2).transpose(2, 0, 1))
        eye = xp.broadcast_to(xp.eye(width, dtype=R.dtype), blocks.shape)
        U = solve_triangular(blocks, eye)
        spans = list(zip(U, U.transpose(0, 2, 1) @ U, strict=True))
    for a in range(len(spans) * width, K, width):
        U = upper_inverse(R[a : a + width, a : a + width])
        spans.append((U, U.T @ U))
    return spans


def _warps(r):
    """Warps of a block of threads, each with a row group of r rows."""
    return max(1, 8 // r)


def _shared(n, c, itemsize, rows):
    """Shared memory of a sweep's kernel: half a matrix (n, n), `rows` rows and a word a scope."""
    return (n * (n + c) // 2 + rows * n) * itemsize + 8 * (n // c) * 4


def _launch(kernel, groups, warps, shared, matrices, rest):
    args = [part for matrix in matrices for part in (matrix, cuda.strides(matrix)[0])]
    cuda.launch(kernel, (-(-groups // warps),), (32, warps), (*args, *rest), shared)


@lru_cache(maxsize=64)
def _block_kernel(layout, dtype):
    """The kernel for a layout, or None where a scope is too large for one."""
    if cuda.unrolls(layout):
        return cuda.kernel("sweep.cu", "sparsegpt_block", **_block_defines(layout, dtype))


def _block_defines(layout, dtype):
    return cuda.scope_defines(layout, dtype) | {"WARPS": _warps(layout.blocks.shape[0])}


@lru_cache(maxsize=64)
def _solve_kernel(c, dtype):
    return cuda.kernel("sweep.cu", "solve_scopes", **_solve_defines(c, dtype))


def _solve_defines(c, dtype):
    return {"REAL": cuda.real(dtype), "PLACES": c, "WARPS": _warps(1)}


def variants():
    """What the kernels here compile for some patterns."""
    for layout, dtype in cuda.samples():
        if cuda.unrolls(layout):
            yield "sweep.cu", _block_defines(layout, dtype)
            yield "sweep.cu", _solve_defines(layout.blocks.shape[1], dtype)
