"""Conjugate gradients on the kept columns of all rows at once."""

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops import kernels

# Iterations between looks at how far it is; on a GPU each look waits for it.
CHECK_EVERY = 2
THREADS = 512


def masked_cg(
    A, B, mask, X=None, *, tolerance, max_iterations, settled=0.0, energy=0.0, progress=None
):
    """Solve X_S A_SS = B_S for every row, with its own set S of columns and X = 0 elsewhere.

    Preconditioned by diag(A). One product (M, K) x (K, K) an iteration serves all rows; rows that
    have converged stop changing.

    Parameters
    ----------
    A : array, shape (K, K)
        Symmetric positive definite.
    B : array, shape (M, K)
        Right-hand sides.
    mask : array of bool, shape (M, K)
        True = in S.
    X : array, shape (M, K), optional
        Where to start; zeros by default. Not changed.
    tolerance : float
        Stop when each row's preconditioned residual norm is below this share of that of B.
    max_iterations : int
    settled : float
        Stop, too, when an iteration lowers the energy by no more than this share of what is left.
    energy : float
        The energy tr(T A Tᵀ) of the targets T whose products T A are B: what is left is
        tr((X − T) A (X − T)ᵀ).
    progress : callable, optional
        Called with the number of iterations done.

    Returns
    -------
    array, shape (M, K)

    References
    ----------
    .. [1] Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    xp = namespace(A)
    B, mask = xp.ascontiguousarray(B), xp.ascontiguousarray(mask)
    inverse_diagonal = 1 / A.diagonal()
    X = xp.zeros_like(B) if X is None else xp.where(mask, X, 0)
    limit = tolerance**2 * _dot(B * mask * inverse_diagonal, B)
    residual = B - X @ A
    left = energy - float(_dot(X, B + residual).sum(dtype="float64"))
    residual *= mask
    P = residual * inverse_diagonal
    rz = _dot(residual, P)
    gained = xp.zeros_like(rz)
    Q = xp.empty_like(B)
    for iteration in range(max_iterations):
        if iteration % CHECK_EVERY == 0:
            # Since the last look: beside the whole gain, the last ones would be lost in rounding.
            gain = float(gained.sum(dtype="float64"))
            gained.fill(0)
            left -= gain
            if iteration and gain <= CHECK_EVERY * settled * left:
                break
            if progress:
                progress(iteration)
        xp.matmul(P, A, out=Q)
        cg_step(Q, inverse_diagonal, mask, X, residual, P, rz, limit, gained)
    return X


def cg_step(Q, inverse_diagonal, mask, X, residual, P, rz, limit, gained):
    """The rest of an iteration, after the product Q = P A.

    Parameters
    ----------
    Q : array, shape (M, K)
        May be overwritten.
    inverse_diagonal : array, shape (K,)
    mask : array of bool, shape (M, K)
    X, residual, P : array, shape (M, K)
        Overwritten. P and the residual are 0 outside the mask.
    rz : array, shape (M,)
        The squared preconditioned norm of each row's residual. Overwritten.
    limit : array, shape (M,)
        Rows at or below it stay as they are.
    gained : array, shape (M,)
        Raised by what the step takes off each row's energy.
    """
    xp = namespace(Q)
    M, K = Q.shape
    if xp is not np:
        kernel = kernels.kernel_for("conjugate_gradient.cu", "cg_step", _defines, K, Q.dtype)
        kernel((M,), (THREADS,), (Q, inverse_diagonal, mask, X, residual, P, rz, limit,
                                  gained, np.int32(K)))
        return
    Q *= mask
    active = rz > limit
    curvature = _dot(P, Q)
    step = np.where(active, rz / np.where(curvature > 0, curvature, 1), 0)
    gained += step * rz
    X += step[:, None] * P
    residual -= step[:, None] * Q
    Z = np.multiply(residual, inverse_diagonal, out=Q)
    rz_new = _dot(residual, Z)
    P *= np.where(active, rz_new / np.where(rz > 0, rz, 1), 0)[:, None]
    P += Z
    rz[:] = rz_new


def _dot(A, B):
    """Row-wise inner products."""
    if namespace(A) is np:
        return np.einsum("mk,mk->m", A, B)
    # A product would run on tensor cores, and round.
    return (A * B).sum(1)


def _defines(K, dtype):
    return {"REAL": kernels.real(dtype), "ITEMS": -(-K // THREADS)}


def variants():
    """What the kernels here compile for some widths."""
    for K in (100, 1024, 1536, 9728, 20000):
        for dtype in ("float32", "float64"):
            yield "conjugate_gradient.cu", _defines(K, dtype)
