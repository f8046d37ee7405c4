"""Left-to-right sweeps over the scopes of a weight."""

from typing import Any

from cuobs.arrays import namespace
from cuobs.ops.checks import (
    boolean,
    precise,
    real,
    rows_in_a_piece,
    same_dtype,
    shaped,
    square,
)
from cuobs.ops.dispatch import twinned
from cuobs.ops.factors import upper_inverse
from cuobs.ops.products import gemm, matmul
from cuobs.ops.selection import block_sums, expand, prune_lowest
from cuobs.ops.systems import masked_solve, solve_bytes

# Columns that a sweep finishes before it updates those to the right by one product.
BLOCK = 128


def block_width(c):
    """Columns of a block: whole scopes of c columns, about `BLOCK` in all."""
    return max(1, BLOCK // c) * c


def scope_solutions(W: Any, C: Any, mask: Any, layout: Any, precision: str = "fp32") -> Any:
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
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (M, n)
        λ, 0 where kept. The compensated weight is W − λ C.
    """
    c = layout.columns
    _check_scopes(W, C, mask, c)
    precise(precision)
    n = W.shape[1]
    solutions = W.copy()
    width = solved_width(W, c)
    for a in range(0, n, width):
        b = min(a + width, n)
        solve_scopes(solutions[:, a:b], C[a:b, a:b], mask[:, a:b], c)
        gemm(solutions[:, a:b], C[a:b, b:], solutions[:, b:], alpha=-1, beta=1,
             precision=precision)
    return solutions


def solutions_bytes(size, n):
    """Bytes that `scope_solutions` takes for n columns of a weight, λ among them."""
    (M, K), c, s = size.layout.shape, size.layout.columns, size.itemsize
    width = min(block_width(c), n)
    block = M * (width * (2 * s + 2) + solve_bytes(c, s))
    return n * size.weight // K + max(block, (n - width) * size.product // K)


def _check_scopes(W, C, mask, c):
    square("C", C)
    real("W", W)
    same_dtype("W", W, "C", C)
    shaped("W", W, (len(W), len(C)))
    shaped("mask", mask, W.shape)
    boolean("mask", mask)
    if len(C) % c:
        raise ValueError(f"W: found {len(C)} columns, expected whole scopes of {c}")


@twinned()
def solved_width(W, c):
    """Columns that `solve_scopes` takes at a time."""
    return block_width(c)


def _check_solve_scopes(W, C, mask, c):
    _check_scopes(W, C, mask, c)
    rows_in_a_piece("W", W)


@twinned(_check_solve_scopes)
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
    xp, n = namespace(W), W.shape[1]
    # Rows last: every column is contiguous.
    w = xp.ascontiguousarray(W.T)
    pruned = xp.ascontiguousarray(~mask.T)
    for a in range(0, n, c):
        b = a + c
        w[a:b] = masked_solve(C[a:b, a:b, None], w[a:b], pruned[a:b])
        if b < n:
            gemm(C[b:, a:b], w[a:b], w[b:], alpha=-1, beta=1)
    W[...] = w.T


def _check_sparsegpt_block(W, S, F, scale, layout, mask):
    r, c = layout.blocks.shape
    square("F", F)
    real("W", W)
    shaped("W", W, (len(W), len(F)))
    shaped("scale", scale, (len(F),))
    boolean("mask", mask)
    for name, array in ("S", S), ("mask", mask):
        shaped(name, array, W.shape)
    for name, array in ("S", S), ("F", F), ("scale", scale):
        same_dtype("W", W, name, array)
    for name, array in ("S", S), ("mask", mask):
        rows_in_a_piece(name, array)
    if len(W) % r or len(F) % c:
        raise ValueError(f"W: found shape {W.shape}, expected whole scopes of {r} x {c}")


@twinned(_check_sparsegpt_block)
def sparsegpt_block(W: Any, S: Any, F: Any, scale: Any, layout: Any, mask: Any) -> None:
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
            gemm(F[a:b, b:].T, e[a:b], d[b:], alpha=-1, beta=1)
    S[...] = e.T
    mask[...] = ~pruned.T


def _keep_all(d, F):
    """How each column of a scope deviates when all before it are kept."""
    d = d.copy()
    for j in range(len(d) - 1):
        d[j + 1 :] -= F[j, j + 1 :, None] * d[j]
    return d


def _check_span_inverses(R, width, precision="fp32"):
    square("R", R)
    real("R", R)
    precise(precision)


@twinned(_check_span_inverses)
def span_inverses(R: Any, width: int, precision: str = "fp32") -> list:
    """For each diagonal block of an upper triangular matrix, its inverse U and C = UᵀU.

    Parameters
    ----------
    R : array, shape (K, K)
    width : int
        Columns of a block; the last may be narrower.
    precision : {"tensor", "fp32"}

    Returns
    -------
    list of (array, array), both of shape (width, width)
    """
    return rest_of_spans([], R, width, precision)


def rest_of_spans(spans, R, width, precision):
    """`span_inverses` of what lies behind those that are there."""
    for a in range(len(spans) * width, len(R), width):
        U = upper_inverse(R[a : a + width, a : a + width], precision)
        spans.append((U, matmul(U.T, U, precision)))
    return spans
