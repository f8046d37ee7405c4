"""Conjugate gradients on the kept columns of all rows at once."""

import numpy as np

from cuobs.arrays import namespace


def masked_cg(A, B, mask, X=None, *, tolerance, max_iterations, matmul=None, callback=None):
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
    matmul : callable, optional
        The product to use, ``matmul(P, A)``.
    callback : callable, optional
        Called with (iteration, share of rows that have converged).

    Returns
    -------
    array, shape (M, K)

    References
    ----------
    .. [1] Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    xp = namespace(A)
    multiply = matmul or xp.matmul
    inverse_diagonal = 1 / A.diagonal()
    X = xp.zeros_like(B) if X is None else xp.where(mask, X, 0)
    scale = _dot(B * mask * inverse_diagonal, B)
    residual = (B - multiply(X, A)) * mask
    Z = residual * inverse_diagonal
    P = Z.copy()
    rz = _dot(residual, Z)
    limit = tolerance**2 * scale
    for iteration in range(max_iterations):
        active = rz > limit
        remaining = int(active.sum())
        if callback:
            callback(iteration, 1 - remaining / len(B))
        if not remaining:
            break
        Q = multiply(P, A)
        Q *= mask
        curvature = _dot(P, Q)
        step = xp.where(active, rz / xp.where(curvature > 0, curvature, 1), 0)[:, None]
        X += step * P
        residual -= step * Q
        xp.multiply(residual, inverse_diagonal, out=Z)
        rz_new = _dot(residual, Z)
        beta = xp.where(active, rz_new / xp.where(rz > 0, rz, 1), 0)[:, None]
        P *= beta
        P += Z
        rz = rz_new
    return X


def _dot(A, B):
    """Row-wise inner products."""
    return namespace(A).einsum("mk,mk->m", A, B)
