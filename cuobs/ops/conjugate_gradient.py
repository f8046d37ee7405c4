"""Conjugate gradients on the kept columns of all rows at once."""

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops import cuda
from cuobs.ops.gemm import gemm, tensor_operand

# Iterations between looks at how far it is; on a GPU each look waits for it.
CHECK_EVERY = 2
THREADS = 512


def masked_cg(
    A, residual, mask, X=None, *, limit, max_iterations, settled=0.0, energy=0.0, progress=None
):
    """Solve X_S A_SS = B_S for every row, with its own set S of columns and X = 0 elsewhere.

    With columns scaled to a unit diagonal of A. One product (M, K) x (K, K) an iteration serves
    all rows; rows that have converged stop changing.

    Parameters
    ----------
    A : array, shape (K, K)
        Symmetric positive definite.
    residual : array, shape (M, K)
        B − X A, the right-hand sides less what X makes of them. Not changed, like all of these.
    mask : array of bool, shape (M, K)
        True = in S.
    X : array, shape (M, K), optional
        Where to start; zeros by default.
    limit : array, shape (M,)
        Stop when each row's Σ residual² / diag(A) over S is at or below it.
    max_iterations : int
    settled : float
        Stop, too, when an iteration lowers the energy by no more than this share of what is left.
    energy : float
        What it is at the start: tr((X − T) A (X − T)ᵀ) where B = T A.
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
    # A copy: a kernel reads several at once, from places that a caller's view need not start at.
    mask = xp.array(mask, order="C")
    scale = xp.sqrt(A.diagonal())
    operand = A / scale
    operand /= scale[:, None]
    operand = tensor_operand(operand)
    residual = xp.where(mask, residual / scale, 0)
    X = xp.zeros_like(residual) if X is None else xp.where(mask, X * scale, 0)
    rr = _squares(residual)
    # A residual below this counts as none: the unit of its direction would overflow.
    limit = xp.maximum(limit, 4 * len(A) / float(xp.finfo(rr.dtype).max))
    P = residual * xp.sqrt(len(A) / xp.where(rr > limit, rr, 1))[:, None]
    P = P.astype(operand.dtype, copy=False)
    gained = xp.zeros_like(rr)
    Q = xp.empty_like(residual)
    for iteration in range(max_iterations):
        if iteration % CHECK_EVERY == 0:
            if iteration:
                # Since the last look: beside the whole gain, these would be lost in rounding.
                gain = float(gained.sum(dtype="float64"))
                gained.fill(0)
                energy -= gain
                if not gain > CHECK_EVERY * settled * energy:
                    break
            if progress:
                progress(iteration)
        gemm(P, operand, Q)
        cg_step(Q, mask, X, residual, P, rr, limit, gained)
    X /= scale
    return X


def cg_step(Q, mask, X, residual, P, rr, limit, gained):
    """The rest of an iteration, after the product Q = P A with a unit diagonal of A.

    Parameters
    ----------
    Q : array, shape (M, K)
        May be overwritten.
    mask : array of bool, shape (M, K)
    X, residual, P : array, shape (M, K)
        Overwritten. The residual and P are 0 outside the mask; P, the direction in terms of the
        residual's root mean square, may be of float16.
    rr : array, shape (M,)
        The squared norm of each row's residual. Overwritten.
    limit : array, shape (M,)
        Rows at or below it stay as they are.
    gained : array, shape (M,)
        Raised by what the step takes off each row's energy.
    """
    xp = namespace(Q)
    M, K = Q.shape
    if xp is not np:
        kernel = cuda.kernel_for(
            "conjugate_gradient.cu", "cg_step", _defines, K, Q.dtype, P.dtype
        )
        kernel((M,), (THREADS,), (Q, mask, X, residual, P, rr, limit, gained, np.int32(K)))
        return
    Q *= mask
    curvature = np.einsum("mk,mk->m", P, Q)
    runs = rr > limit
    active = runs & (curvature > 0)
    root = np.sqrt(K * rr)
    step = np.where(active, root / np.where(active, curvature, 1), 0)
    gained += step * root
    X += step[:, None] * P
    residual -= step[:, None] * Q
    # Where the curvature is not positive, a row has come as far as the digits go, and ends.
    after = np.where(active, _squares(residual), 0)
    goes_on = after > limit
    P *= np.sqrt(np.where(goes_on, after / np.where(active, rr, 1), 0))[:, None]
    P += residual * np.sqrt(np.where(goes_on, K / np.where(goes_on, after, 1), 0))[:, None]
    rr[:] = np.where(runs, after, rr)


def _squares(A):
    """Squared norms of rows."""
    if namespace(A) is np:
        return np.einsum("mk,mk->m", A, A)
    # A product would run on tensor cores, and round.
    return (A * A).sum(1)


def _defines(K, dtype, operand):
    width = 1 if K % 4 else 4
    return {
        "REAL": cuda.real(dtype), "OPERAND": cuda.real(operand), "WIDTH": width,
        "ITEMS": -(-K // (THREADS * width)),
    }


def variants():
    """What the kernels here compile for some widths."""
    for K in (100, 511, 1536, 9728, 20000):
        for dtype in ("float32", "float64"):
            for operand in {dtype, "float16" if dtype == "float32" else dtype}:
                yield "conjugate_gradient.cu", _defines(K, dtype, operand)
