"""Systems restricted to a set of places of each row: many small ones, or one large one a row."""

import numpy as np
import scipy.linalg

from cuobs.arrays import namespace
from cuobs.ops import cuda

# Systems up to this order are solved by unrolled array operations over the batch.
UNROLLED = 16


def masked_solve(C, w, mask):
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
    """
    xp = namespace(w)
    c = len(w)
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


def scope_compensation(W, C, mask):
    """Compensate the loss of each scope's pruned weights by the rest of that scope.

    w − λ C in each scope, with λ_P C_PP = w_P at the pruned places, and 0 there.

    Parameters
    ----------
    W : array, shape (M, K)
        Whole scopes.
    C : array, shape (c, c, G)
        The diagonal blocks of the inverse Hessian.
    mask : array of bool, shape (M, K)
        True = kept.

    Returns
    -------
    array, shape (M, K)
    """
    xp = namespace(W)
    M, K = W.shape
    c, _, G = C.shape
    if xp is not np and c <= UNROLLED:
        W, C, mask, out = *map(xp.ascontiguousarray, (W, C, mask)), xp.empty((M, K), W.dtype)
        kernel = cuda.kernel(
            "masked_solve.cu", "scope_compensation", REAL=cuda.real(W.dtype), PLACES=c
        )
        grid = -(-G // 32), min(-(-M // 16), 65535)
        kernel(grid, (32, 4), (W, C, mask, out, np.int32(M), np.int32(G)))
        return out
    w = W.reshape(M, G, c).transpose(2, 0, 1)
    pruned = ~mask.reshape(M, G, c).transpose(2, 0, 1)
    multipliers = masked_solve(C[:, :, None], w, pruned)
    out = W.copy()
    scoped = out.reshape(M, G, c).transpose(2, 0, 1)
    for i in range(c):
        for j in range(c):
            scoped[i] -= multipliers[j] * C[j, i]
    out *= mask
    return out


def masked_factor_solve(A, B, mask, out):
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
    """
    posv = scipy.linalg.get_lapack_funcs("posv", (A,))
    for m in range(len(B)):
        kept = np.flatnonzero(mask[m])
        if not kept.size:
            continue
        block = A[kept].take(kept, axis=1)
        _, solution, info = posv(block.T, B[m, kept], lower=1, overwrite_a=True)
        if info:
            raise np.linalg.LinAlgError(
                f"H: found a block that is not positive definite in row {m}, expected more damping"
            )
        out[m, kept] = solution


def variants():
    """What the kernels here compile for some patterns."""
    for c in (2, 3, 4, 8, 12, 16):
        for dtype in ("float32", "float64"):
            yield "masked_solve.cu", {"REAL": cuda.real(dtype), "PLACES": c}
