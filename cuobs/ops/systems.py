"""Systems restricted to a set of places of each row: many small ones, or one large one a row."""

from typing import Any

import numpy as np
import scipy

from cuobs.arrays import namespace
from cuobs.ops.checks import boolean, real, same_dtype, shaped, square
from cuobs.ops.dispatch import twinned
from cuobs.ops.pieces import pieces

# Systems up to this order are solved by unrolled array operations over the batch.
UNROLLED = 16


def masked_solve(C: Any, w: Any, mask: Any) -> Any:
    """Solve λ_P C_PP = w_P for every system of a batch, with λ = 0 outside its set P.

    Parameters
    ----------
    C : array, shape (c, c, ...)
        Symmetric positive definite, broadcast against the batch.
    w : array, shape (c, ...)
    mask : array of bool, shape (c, ...)
        The set P.

    Returns
    -------
    array, shape (c, ...)

    Raises
    ------
    ValueError, TypeError
        Shapes or dtypes do not belong together.
    """
    real("w", w)
    same_dtype("w", w, "C", C)
    boolean("mask", mask)
    shaped("mask", mask, w.shape)
    xp = namespace(w)
    c = len(w)
    if C.shape[:2] != (c, c):
        raise ValueError(f"C: found shape {C.shape}, expected ({c}, {c}, ...)")
    keep = mask.astype(w.dtype)
    if c > UNROLLED:
        eye = xp.eye(c, dtype=w.dtype)
        full = xp.moveaxis(xp.broadcast_to(C, (c, *w.shape)), (0, 1), (-2, -1))
        m = xp.moveaxis(keep, 0, -1)
        A = full * m[..., None] * m[..., None, :] + eye * (1 - m)[..., None]
        right = (xp.moveaxis(w, 0, -1) * m)[..., None]
        return xp.moveaxis(xp.linalg.solve(A, right)[..., 0], -1, 0)

    # L D Lᵀ with unit L; a row outside P is decoupled and has pivot 1.
    L = [[None] * c for _ in range(c)]
    pivot = [None] * c
    x = [None] * c
    for i in range(c):
        value = w[i] * keep[i]
        diagonal = C[i, i] * keep[i] + (1 - keep[i])
        scaled = []
        for j in range(i):
            entry = C[i, j] * (keep[i] * keep[j])
            for k in range(j):
                entry = entry - scaled[k] * L[j][k]
            scaled.append(entry)
            L[i][j] = entry / pivot[j]
            diagonal = diagonal - entry * L[i][j]
            value = value - L[i][j] * x[j]
        pivot[i] = diagonal
        x[i] = value
    out = xp.empty_like(w)
    for i in reversed(range(c)):
        value = x[i] / pivot[i]
        for j in range(i + 1, c):
            value = value - L[j][i] * out[j]
        out[i] = value
    return out


def _check_scope_compensation(W, C, mask):
    real("W", W)
    same_dtype("W", W, "C", C)
    boolean("mask", mask)
    shaped("mask", mask, W.shape)
    if C.ndim != 3 or C.shape[0] != C.shape[1] or C.shape[0] * C.shape[2] != W.shape[1]:
        raise ValueError(
            f"C: found shape {C.shape}, expected (c, c, n) where c n = {W.shape[1]}, W's columns"
        )


@twinned(_check_scope_compensation)
def scope_compensation(W: Any, C: Any, mask: Any) -> Any:
    """Compensate the loss of each scope's pruned weights by the rest of that scope.

    w − λ C in each scope, with λ_P C_PP = w_P at the pruned places, and 0 there.

    Parameters
    ----------
    W : array, shape (M, K)
        Whole scopes.
    C : array, shape (c, c, n)
        The diagonal blocks of the inverse Hessian.
    mask : array of bool, shape (M, K)
        True = kept.

    Returns
    -------
    array, shape (M, K)
    """
    c, _, n = C.shape
    out = W.copy()
    for rows in pieces(namespace(W), len(W), n * solve_bytes(c, W.dtype.itemsize)):
        pruned = ~_placed(mask[rows], c)
        multipliers = masked_solve(C[:, :, None], _placed(W[rows], c), pruned)
        w = _placed(out[rows], c)
        for i in range(c):
            for j in range(c):
                w[i] -= multipliers[j] * C[j, i]
    out *= mask
    return out


def _placed(array, c):
    """A view (c, rows, n) of an array (rows, n c), the place in a scope first."""
    return array.reshape(len(array), -1, c).transpose(2, 0, 1)


def solve_bytes(c, itemsize):
    """Bytes that `masked_solve` makes on the way for a system of order c, its solution among them.
    """
    arrays = c * (c + 1) // 2 + 5 * c if c <= UNROLLED else 3 * c * c + 4 * c
    return arrays * itemsize + 2 * c


def _check_factor_solve(A, B, mask, out):
    square("A", A)
    real("A", A)
    shaped("B", B, (len(B), len(A)))
    boolean("mask", mask)
    for name, array in ("mask", mask), ("out", out):
        shaped(name, array, B.shape)


def masked_factor_solve(A: Any, B: Any, mask: Any, out: Any) -> None:
    """Solve X_S A_SS = B_S by a factor for each row, with X = 0 outside its set S.

    Parameters
    ----------
    A : ndarray, shape (K, K)
        Symmetric positive definite.
    B : ndarray, shape (M, K)
    mask : ndarray of bool, shape (M, K)
        True = in S.
    out : ndarray, shape (M, K)
        Overwritten where in S.

    Raises
    ------
    numpy.linalg.LinAlgError
        A block A_SS is not positive definite; says of which row.
    """
    _check_factor_solve(A, B, mask, out)
    for m in range(len(B)):
        kept = mask[m].nonzero()[0]
        if not kept.size:
            continue
        solution, info = _solved_row(A, B[m, kept], kept)
        if info:
            raise np.linalg.LinAlgError(
                f"H: found a block that is not positive definite in row {m}, expected more damping"
            )
        out[m, kept] = solution


def _solved_row(A, right, kept):
    posv = scipy.linalg.get_lapack_funcs("posv", (A,))
    block = A.take(kept, axis=0).take(kept, axis=1)
    _, solution, info = posv(block.T, right, lower=1, overwrite_a=True)
    return solution, info


def factor_solve_bytes(kept, K, itemsize):
    """Bytes that `masked_factor_solve` takes for a row that keeps so many of K columns."""
    return kept * ((K + kept) * itemsize + 32)
