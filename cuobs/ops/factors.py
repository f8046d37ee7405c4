"""Cholesky factors and triangular inverses."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import scipy

from cuobs import blas
from cuobs.arrays import namespace, to_numpy
from cuobs.ops.checks import precise, real, same_dtype, shaped, square
from cuobs.ops.dispatch import twinned
from cuobs.ops.gram import mirror_upper
from cuobs.ops.pieces import strips
from cuobs.ops.products import gemm

# Order up to which a matrix is factored in one piece, where others are by rows: one of several side
# by side, whose pieces are shared out, and one alone, whose pieces everyone makes.
LEAF, LEAF_OF_ONE = 8192, 4096
# Strips that products with a triangle are made in at most, each without the zeros beside it, and of
# what order a GPU is busy with one for longer than it takes to launch it.
STRIPS, STRIP = 4, 2048
# Orders between which the CPU factors a matrix by one thread.
ONE_THREAD = (256, 4096)


def _check_matrix(name, A):
    square(name, A)
    real(name, A)


def _check_upper(U, precision="fp32"):
    _check_matrix("U", U)
    precise(precision)


def _check_batch(A, info=None, precision="fp32"):
    if A.ndim != 3 or A.shape[1] != A.shape[2]:
        raise ValueError(f"A: found shape {A.shape}, expected a batch of square matrices")
    real("A", A)
    precise(precision)
    if info is not None and (info.shape != A.shape[:1] or info.dtype != np.int32):
        raise ValueError(
            f"info: found {info.dtype} of shape {info.shape}, expected int32 of shape {A.shape[:1]}"
        )


def cholesky(A: Any, info: Any = None) -> Any:
    """Lower Cholesky factor of a matrix.

    Parameters
    ----------
    A : array, shape (K, K)
        Symmetric; of float32 or float64, as in all that follow.
    info : array of int32, shape (1,), optional
        Instead of raising, note here a pivot that is not positive, for `check_factored`. A GPU is
        then not waited for.

    Returns
    -------
    array, shape (K, K)

    Raises
    ------
    numpy.linalg.LinAlgError
        A is not positive definite.
    """
    return _factored("A", A, info, _lower_factor)


def _factored(name, A, info, factor):
    """What `factor` makes of a checked matrix, which raises where nobody asked to be told later."""
    _check_matrix(name, A)
    noted = namespace(A).zeros(1, np.int32) if info is None else info
    made = factor(A, noted)
    if info is None:
        check_factored(noted)
    return made


@twinned()
def _lower_factor(A, info):
    # LAPACK counts columns first, and so sees the transpose.
    A = np.array(A, order="C")
    potrf = scipy.linalg.get_lapack_funcs("potrf", (A,))
    with _threads_for(A):
        L, info[0] = potrf(A.T, lower=False, overwrite_a=True)
    return L.T


def _threads_for(A):
    """One thread of BLAS for a matrix that is done before two pools have settled their fight."""
    return blas.one_thread() if ONE_THREAD[0] <= len(A) <= ONE_THREAD[1] else nullcontext()


def check_factored(info: Any) -> None:
    """Raise unless each matrix of a batch was factored.

    Parameters
    ----------
    info : array of int, shape (B,)
        0, or 1 + the first column whose pivot is not positive.

    Raises
    ------
    numpy.linalg.LinAlgError
        Which names the matrices.
    """
    failed = np.flatnonzero(to_numpy(info))
    if not len(failed):
        return
    named = ", ".join(str(b) for b in failed[:8].tolist()) + (", ..." if len(failed) > 8 else "")
    raise np.linalg.LinAlgError(
        f"A: found {len(failed)} of {len(info)} matrices that are not positive definite (numbers "
        f"{named}), expected none"
        if len(info) > 1
        else f"A: found a matrix whose pivot {int(info[0]) - 1} is not positive, expected a "
        "positive definite one"
    )


def reversed_cholesky(H: Any, info: Any = None) -> Any:
    """Upper triangular R with H = R Rᵀ.

    It is the Cholesky factor of H with rows and columns reversed, so that R[a:, a:] belongs to
    the columns from a on after those before a have been eliminated from H⁻¹.

    Parameters
    ----------
    H : array, shape (K, K)
    info : array of int32, shape (1,), optional
        As in `cholesky`, with pivots counted from the last one.

    Returns
    -------
    array, shape (K, K)

    Raises
    ------
    numpy.linalg.LinAlgError
        As `cholesky`.
    """
    return _factored("H", H, info, _reversed_factor)


@twinned()
def _reversed_factor(H, info):
    return _lower_factor(H[::-1, ::-1], info)[::-1, ::-1]


@twinned(_check_upper)
def upper_inverse(U: Any, precision: str = "fp32") -> Any:
    """Inverse of an upper triangular matrix.

    On a GPU its larger blocks come by products, which keep the digits of float32 in either
    precision.

    Parameters
    ----------
    U : array, shape (K, K)
        Zeros below the diagonal.
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (K, K)
        Zeros below the diagonal.
    """
    trtri = scipy.linalg.get_lapack_funcs("trtri", (U,))
    with _threads_for(U):
        return trtri(U)[0]


def _check_upper_solve(U, B):
    _check_matrix("U", U)
    same_dtype("U", U, "B", B)
    shaped("B", B, (len(U), *B.shape[1:]))


@twinned(_check_upper_solve)
def upper_solve(U: Any, B: Any) -> Any:
    """X with U X = B, by substitution.

    Parameters
    ----------
    U : array, shape (K, K)
        Upper triangular.
    B : array, shape (K,) or (K, n)
        Of the same dtype.

    Returns
    -------
    array, shape (K,) or (K, n)
    """
    return scipy.linalg.solve_triangular(U, B, check_finite=False)


@twinned(_check_upper)
def upper_gram(U: Any, precision: str = "fp32") -> Any:
    """UᵀU of an upper triangular matrix: the inverse of R Rᵀ where U is R⁻¹.

    Parameters
    ----------
    U : array, shape (K, K)
        Zeros below the diagonal.
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (K, K)
    """
    return U.T @ U


def _check_factor_solve(R, B):
    _check_matrix("R", R)
    same_dtype("R", R, "B", B)
    if B.ndim != 2 or B.shape[1] != len(R):
        raise ValueError(f"B: found shape {B.shape}, expected rows of {len(R)}")


@twinned(_check_factor_solve)
def factor_solve(R: Any, B: Any) -> Any:
    """X with X R Rᵀ = B, by two substitutions.

    Parameters
    ----------
    R : array, shape (K, K)
        Of `reversed_cholesky`.
    B : array, shape (M, K)
        Of the same dtype.

    Returns
    -------
    array, shape (M, K)
    """
    half = scipy.linalg.solve_triangular(R, B.T, check_finite=False)
    return scipy.linalg.solve_triangular(R, half, trans=1, check_finite=False).T


def inverse_factor_solve(U, B, precision="fp32"):
    """`factor_solve` by the inverse U of the factor: B UᵀU.

    Its products keep the digits of float32 on tensor cores too, and take less time there than
    substitutions.

    Parameters
    ----------
    U : array, shape (K, K)
        Zeros below the diagonal.
    B : array, shape (M, K)
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (M, K)
    """
    half, lower = _times_lower(B, U, precision), _transposed(U)
    out = namespace(B).empty_like(half)
    for a, b in strips(len(U), STRIPS, STRIP):
        gemm(half[:, :b], lower[a:b, :b].T, out[:, a:b], precision=precision, exact=True)
    return out


def inverse(A: Any, precision: str = "fp32") -> Any:
    """Inverse of a symmetric positive definite matrix, by its reversed factor.

    Parameters
    ----------
    A : array, shape (K, K)
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (K, K)

    Raises
    ------
    numpy.linalg.LinAlgError
        A is not positive definite.
    """
    xp = namespace(A)
    # A GPU is not waited for before all is launched.
    info = None if xp is np else xp.zeros(1, np.int32)
    found = upper_gram(upper_inverse(reversed_cholesky(A, info), precision), precision)
    if info is not None:
        check_factored(info)
    return found


def inverse_by_rows(A, by_rows, precision="fp32"):
    """`inverse` of a matrix, the most of it by products whose rows are made one by one.

    Parameters
    ----------
    A, precision
        As in `inverse`, whose errors it has.
    by_rows : callable
        Called with a function that gives the rows of a slice, and their number: all of them, by
        whomever they are made.

    Returns
    -------
    array, shape (K, K)
    """
    noted = []
    with _no_warnings():
        [(_, U)] = _factors_by_rows([(A, False, True)], by_rows, precision, noted)
        found = gram_by_rows(U, by_rows, precision)
    _check_all(noted)
    return found


def gram_by_rows(U, by_rows, precision="fp32"):
    """`upper_gram` of a triangular matrix, its rows made one by one as in `inverse_by_rows`."""
    # Tensor cores are quickest where both operands are summed over along rows.
    lower = _transposed(U)
    del U

    def gram(rows):
        out = namespace(lower).zeros((rows.stop - rows.start, len(lower)), lower.dtype)
        for a, b in _strips(rows):
            into = out[a - rows.start : b - rows.start, a:]
            gemm(lower[a:b, :b], lower[a:, :b].T, into, precision=precision)
        return out

    out = by_rows(gram, len(lower))
    mirror_upper(out)
    return out


def factor_by_rows(A, by_rows, precision="fp32", factor=True, inverted=False):
    """The reversed factor R of a matrix, and R⁻¹, each where it is wanted.

    Of [[P, Q], [Qᵀ, S]] with S = R₂₂R₂₂ᵀ it is [[R₁₁, R₁₂], [0, R₂₂]], where R₁₂ = Q R₂₂⁻ᵀ and
    R₁₁R₁₁ᵀ = P − R₁₂R₁₂ᵀ.

    Parameters
    ----------
    A, by_rows, precision
        As in `inverse_by_rows`.
    factor, inverted : bool

    Returns
    -------
    R : array, shape (K, K), or None
    U : array, shape (K, K), or None
    """
    return factors_by_rows([(A, factor, inverted)], by_rows, precision)[0]


def factors_by_rows(wanted, by_rows, precision="fp32"):
    """`factor_by_rows` of several matrices of one order, step by step side by side.

    Whoever makes rows of a product makes whole pieces of one of the matrices.

    Parameters
    ----------
    wanted : list of (array, bool, bool)
        A, factor and inverted of each.
    by_rows, precision
        As in `inverse_by_rows`.

    Returns
    -------
    list of (array or None, array or None)
        R and U of each.
    """
    noted = []
    with _no_warnings():
        made = _factors_by_rows(wanted, by_rows, precision, noted)
    _check_all(noted)
    return made


def _no_warnings():
    """NumPy says nothing of products of what is no factor, as `_check_all` will."""
    return np.errstate(over="ignore", invalid="ignore")


def _check_all(noted):
    """`check_factored` when all is launched: a GPU is waited for once."""
    check_factored(namespace(noted[0]).concatenate(noted).max(keepdims=True))


def _factors_by_rows(wanted, by_rows, precision, noted):
    K = len(wanted[0][0])
    if K <= (LEAF_OF_ONE if len(wanted) == 1 else LEAF):
        return _leaves(wanted, by_rows, precision, noted)
    m = K // 2
    below = [(A[m:, m:], factor, True) for A, factor, _ in wanted]
    below = _factors_by_rows(below, by_rows, precision, noted)
    beside = [
        _beside(A, U22, by_rows, precision)
        for (A, _, _), (_, U22) in zip(wanted, below, strict=True)
    ]
    above = [
        (_left_of(A, R12, by_rows, precision), *which)
        for (A, *which), R12 in zip(wanted, beside, strict=True)
    ]
    above = _factors_by_rows(above, by_rows, precision, noted)
    return [
        _together(*pieces, by_rows, precision, *which)
        for (_, *which), *pieces in zip(wanted, above, beside, below, strict=True)
    ]


def _leaves(wanted, by_rows, precision, noted):
    """R and R⁻¹ of matrices in one piece; of several, each is made by one and sent to all."""
    xp = namespace(wanted[0][0])
    if len(wanted) == 1:
        ((A, factor, inverted),) = wanted
        noted.append(xp.zeros(1, np.int32))
        R = reversed_cholesky(A, noted[-1])
        return [(R if factor else None, upper_inverse(R, precision) if inverted else None)]

    def make(own):
        made = xp.zeros((own.stop - own.start, 2, *wanted[0][0].shape), wanted[0][0].dtype)
        for both, (A, _, inverted) in zip(made, wanted[own], strict=True):
            info = xp.zeros(1, np.int32)
            both[0] = reversed_cholesky(A, info)
            if inverted:
                both[1] = upper_inverse(both[0], precision)
            both[0, :1, 0] += xp.where(info, np.nan, 0).astype(made.dtype)  # others are told so
        return made

    made = by_rows(make, len(wanted))
    noted.append(xp.isnan(made[:, 0, 0, 0]).astype(np.int32))
    return [
        (both[0].copy() if factor else None, both[1].copy() if inverted else None)
        for both, (_, factor, inverted) in zip(made, wanted, strict=True)
    ]


def _beside(A, U22, by_rows, precision):
    """R₁₂ of `factor_by_rows`."""
    m = len(A) - len(U22)
    return by_rows(lambda rows: _times_lower(A[rows, m:], U22, precision), m)


def _left_of(A, R12, by_rows, precision):
    """P − R₁₂R₁₂ᵀ."""
    m = len(R12)
    return by_rows(lambda rows: A[rows, :m] - _exact(R12[rows], R12.T, precision), m)


def _together(above, R12, below, by_rows, precision, factor, inverted):
    """R and R⁻¹ of their pieces, each where it is wanted."""
    (R11, U11), (R22, U22) = above, below
    R = _upper(R11, R12, R22) if factor else None
    if not inverted:
        return R, None
    lower = _transposed(U22)

    def corner(rows):
        return _times_lower(_lower_times(lower, R12.T, rows, precision), U11, precision)

    U12 = -by_rows(corner, len(U22)).T
    return R, _upper(U11, U12, U22)


def _times_lower(A, U, precision):
    """A Uᵀ of an upper triangular U, without most of its zeros."""
    out = namespace(A).empty((len(A), len(U)), A.dtype)
    for a, b in strips(len(U), STRIPS, STRIP):
        gemm(A[:, a:], U[a:b, a:].T, out[:, a:b], precision=precision, exact=True)
    return out


def _lower_times(L, B, rows, precision):
    """Rows of L B of a lower triangular L, likewise."""
    out = namespace(B).empty((rows.stop - rows.start, B.shape[1]), B.dtype)
    for a, b in _strips(rows):
        into = out[a - rows.start : b - rows.start]
        gemm(L[a:b, :b], B[:b], into, precision=precision, exact=True)
    return out


def _strips(rows):
    count = rows.stop - rows.start
    return [(rows.start + a, rows.start + b) for a, b in strips(count, STRIPS, STRIP)]


@twinned()
def _transposed(A):
    """The transpose of a matrix, row after row."""
    return np.ascontiguousarray(A.T)


def _exact(A, B, precision):
    out = namespace(A).empty((len(A), B.shape[1]), A.dtype)
    gemm(A, B, out, precision=precision, exact=True)
    return out


def _upper(P, Q, S):
    """[[P, Q], [0, S]]"""
    m, K = len(P), len(P) + len(S)
    out = namespace(P).zeros((K, K), P.dtype)
    out[:m, :m], out[:m, m:], out[m:, m:] = P, Q, S
    return out


def cholesky_inverse(A: Any, info: Any = None, precision: str = "fp32") -> Any:
    """L⁻¹ of A = L Lᵀ, for a batch.

    Parameters
    ----------
    A : array, shape (B, p, p)
        Its lower triangle is read. Overwritten.
    info : array of int32, shape (B,), optional
        Instead of raising, note here the pivots that are not positive, for `check_factored`.
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (B, p, p)
        Lower triangular, in the memory of A.

    Raises
    ------
    numpy.linalg.LinAlgError
        Which names the matrices that are not positive definite.
    """
    _check_batch(A, info, precision)
    noted = namespace(A).zeros(len(A), np.int32) if info is None else info
    _factor_inverse(A, noted, precision)
    if info is None:
        check_factored(noted)
    return A


@twinned()
def _factor_inverse(A, info, precision):
    potrf, trtri = scipy.linalg.get_lapack_funcs(("potrf", "trtri"), (A,))
    for b in range(len(A)):
        # LAPACK counts columns first, and so sees the transpose.
        upper, wrong = potrf(A[b].T, lower=False)
        A[b] = trtri(upper, lower=False, overwrite_c=True)[0].T
        info[b] = info[b] or wrong
