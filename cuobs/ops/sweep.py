"""Left-to-right sweeps over the scopes of a weight."""

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops.masked_solve import masked_solve
from cuobs.ops.selection import block_sums, expand, prune_lowest

# Columns that a sweep finishes before it updates those to the right by one product.
BLOCK = 128


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
    xp = namespace(W)
    M, n = W.shape
    c = layout.blocks.shape[1]
    solutions = xp.zeros_like(W)
    for a in range(0, n, block_width(c)):
        b = min(a + block_width(c), n)
        block = W[:, a:b] - solutions[:, :a] @ C[:a, a:b] if a else W[:, a:b]
        solutions[:, a:b] = _scope_solutions(block, C[a:b, a:b], mask[:, a:b], c)
    return solutions


def _scope_solutions(W, C, mask, c):
    """`scope_solutions` of one block, with rows last so that each column is contiguous."""
    xp = namespace(W)
    # A copy even of a single row, whose transpose is contiguous as it is.
    w = xp.array(W.T, order="C")
    pruned = xp.ascontiguousarray(~mask.T)
    for a in range(0, len(w), c):
        b = a + c
        w[a:b] = masked_solve(C[a:b, a:b, None], w[a:b], pruned[a:b])
        if b < len(w):
            w[b:] -= C[b:, a:b] @ w[a:b]
    return w.T


def sparsegpt_block(W, S, F, scale, layout):
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
        Compensation from the columns left of the block.
    F : array, shape (n, n)
        The block of R / diag(R): unit upper triangular.
    scale : array, shape (n,)
        diag(R)²: the score of a value v is v² · scale.
    layout : Layout

    Returns
    -------
    mask : array of bool, shape (M, n)
        True = kept.
    E : array, shape (M, n)
        Deviations W − weight; the weight is W − E where kept and 0 where pruned.
    """
    xp = namespace(W)
    M, n = W.shape
    r, c = layout.blocks.shape
    n_pruned = layout.n_blocks - layout.keep
    # Rows last: every column is contiguous.
    w = xp.ascontiguousarray(W.T)
    s = xp.array(S.T, order="C")
    e = xp.empty_like(w)
    pruned = xp.empty(w.shape, bool)
    for a in range(0, n, c):
        b = a + c
        f = F[a:b, a:b]
        values = w[a:b] + _keep_all(s[a:b], f)
        scores = (values * values * scale[a:b, None]).reshape(c, -1, r, 1)
        blocks = prune_lowest(block_sums(scores, layout), n_pruned)
        pruned[a:b] = expand(blocks, layout).reshape(M, c).T
        for j in range(a, b):
            e[j] = xp.where(pruned[j], w[j], -s[j])
            for i in range(j + 1, b):
                s[i] += F[j, i] * e[j]
        if b < n:
            s[b:] += F[a:b, b:].T @ e[a:b]
    return ~pruned.T, e.T


def _keep_all(s, F):
    """The compensation that each column of a scope has when all before it are kept."""
    s = s.copy()
    for j in range(len(s)):
        for i in range(j + 1, len(s)):
            s[i] -= F[j, i] * s[j]
    return s
