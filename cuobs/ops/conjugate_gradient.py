"""Conjugate gradients on the kept columns of all rows at once."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuobs.arrays import namespace, to_numpy
from cuobs.ops.checks import boolean, precise, real, same_dtype, shaped, square
from cuobs.ops.dispatch import twinned
from cuobs.ops.products import gemm, tensor_operand

# Iterations between looks at how far it is; on a GPU each look waits for it.
CHECK_EVERY = 2


def masked_cg(
    A: Any,
    residual: Any,
    mask: Any,
    X: Any = None,
    *,
    limit: Any,
    max_iterations: int,
    settled: float = 0.0,
    energy: float = 0.0,
    precision: str = "fp32",
    progress: Callable | None = None,
) -> tuple:
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
    precision : {"tensor", "fp32"}
        "tensor" lets a GPU multiply float32 in float16.
    progress : callable, optional
        Called with the number of iterations done.

    Returns
    -------
    X : array, shape (M, K)
    converged : bool
        Whether it stopped by `limit` or `settled`, and not for want of iterations or of numbers.

    References
    ----------
    .. [1] Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    _check_system(A, residual, mask, X, limit, precision)
    xp = namespace(A)
    # A copy: a kernel reads several at once, from places that a caller's view need not start at.
    mask = mask.copy(order="C")
    scale = xp.sqrt(A.diagonal())
    operand = A / scale
    operand /= scale[:, None]
    operand = tensor_operand(operand, precision)
    residual, X, P, rr, limit = cg_start(residual, mask, X, scale, limit, operand.dtype)
    gained = xp.zeros_like(rr)
    Q = xp.empty_like(residual)
    multiply = gemm.prepared(P, operand, Q, precision=precision)
    for iteration in range(max_iterations):
        if iteration % CHECK_EVERY == 0:
            if iteration:
                # Since the last look: beside the whole gain, these would be lost in rounding.
                gain = float(to_numpy(gained).sum(dtype="float64"))
                gained.fill(0)
                energy -= gain
                if not gain > CHECK_EVERY * settled * energy:
                    converged = math.isfinite(gain)
                    break
            if progress:
                progress(iteration)
        multiply()
        cg_step(Q, mask, X, residual, P, rr, limit, gained)
    else:
        converged = bool((to_numpy(rr) <= to_numpy(limit)).all())
    X /= scale
    return X, converged


def cg_bytes(M, K, itemsize):
    """Bytes that `masked_cg` takes beside its arguments.

    X, residual, direction, product and what a step makes of one of them; a mask; the matrix with a
    unit diagonal.
    """
    return M * K * (5 * itemsize + 1) + K * K * itemsize


def _check_system(A, residual, mask, X, limit, precision):
    square("A", A)
    real("A", A)
    shaped("residual", residual, (len(residual), len(A)))
    same_dtype("A", A, "residual", residual)
    shaped("mask", mask, residual.shape)
    boolean("mask", mask)
    shaped("limit", limit, residual.shape[:1])
    precise(precision)
    if X is not None:
        shaped("X", X, residual.shape)
        same_dtype("A", A, "X", X)


@twinned()
def cg_start(residual, mask, X, scale, limit, operand):
    """What the iterations begin with, in terms of columns with a unit diagonal of A.

    Parameters
    ----------
    residual : array, shape (M, K)
    mask : array of bool, shape (M, K)
        Row after row.
    X : array, shape (M, K), or None
        Where to start; None is zeros.
    scale : array, shape (K,)
        The root of the diagonal of A, element after element.
    limit : array, shape (M,)
    operand : dtype
        Of P.

    Returns
    -------
    residual, X, P : array, shape (M, K)
        New ones, 0 outside the mask.
    rr, limit : array, shape (M,)
        Likewise. All as in `cg_step`.
    """
    xp, K = namespace(residual), residual.shape[1]
    residual = xp.where(mask, residual, 0)
    residual /= scale
    X = xp.zeros_like(residual) if X is None else xp.where(mask, X, 0)
    X *= scale
    rr = _row_squares(residual)
    limit = xp.maximum(limit, smallest_square(K, rr.dtype))
    P = residual * xp.sqrt(K / xp.where(rr > limit, rr, 1))[:, None]
    return residual, X, P.astype(operand, copy=False), rr, limit


def smallest_square(K, dtype):
    """A row's residual below this counts as none: the unit of its direction would overflow."""
    return 4 * K / float(np.finfo(dtype).max)


@twinned()
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
    xp, K = namespace(Q), Q.shape[1]
    Q *= mask
    curvature = xp.einsum("mk,mk->m", P, Q)
    runs = rr > limit
    active = runs & (curvature > 0)
    root = xp.sqrt(K * rr)
    step = xp.where(active, root / xp.where(active, curvature, 1), 0)
    gained += step * root
    X += step[:, None] * P
    residual -= step[:, None] * Q
    # Where the curvature is not positive, a row has come as far as the digits go, and ends.
    after = xp.where(active, _row_squares(residual), 0)
    goes_on = after > limit
    P *= xp.sqrt(xp.where(goes_on, after / xp.where(active, rr, 1), 0))[:, None]
    P += residual * xp.sqrt(xp.where(goes_on, K / xp.where(goes_on, after, 1), 0))[:, None]
    rr[:] = xp.where(runs, after, rr)


def _row_squares(A):
    """The squared norm of each row of a matrix (M, K)."""
    return namespace(A).einsum("mk,mk->m", A, A)
