"""Cholesky factors and triangular inverses."""

from contextlib import nullcontext

import numpy as np
import scipy.linalg

from cuobs.arrays import namespace, one_blas_thread
from cuobs.ops import cuda
from cuobs.ops.gemm import gemm
from cuobs.ops.gram import mirror_upper

# Orders between which the CPU factors a matrix by one thread.
ONE_THREAD = (256, 4096)
# Order of the matrices that a kernel holds in registers.
TILE = {"float32": 128, "float64": 64}
# Order of the tiles that a kernel transposes.
TRANSPOSED = 32
# Block rows of the Gram matrix of a triangle.
BLOCK_ROWS = 8


def cholesky(A, info=None):
    """Lower Cholesky factor of a matrix.

    Parameters
    ----------
    A : array, shape (K, K)
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
    xp = namespace(A)
    noted = xp.zeros(1, np.int32) if info is None else info
    if xp is np:
        # LAPACK counts columns first, and so sees the transpose.
        A = np.array(A, order="C")
        potrf = scipy.linalg.get_lapack_funcs("potrf", (A,))
        with _threads_for(A):
            L, noted[0] = potrf(A.T, lower=False, overwrite_a=True)
        L = L.T
    else:
        L = xp.tril(_potrf(A, noted).T)
    if info is None:
        check_factored(noted)
    return L


def _potrf(A, info):
    """Lᵀ of a matrix A = L Lᵀ on a GPU, with anything below the diagonal."""
    from cupy.cuda.device import get_cusolver_handle
    from cupy_backends.cuda.libs import cublas, cusolver

    xp = namespace(A)
    A = xp.array(A, order="C")
    letter = {"float32": "s", "float64": "d"}[A.dtype.name]
    # To cuSOLVER, which counts columns first, it is the lower triangle; with that it is much faster
    # than with the upper one.
    shape = get_cusolver_handle(), cublas.CUBLAS_FILL_MODE_LOWER, len(A), A.data.ptr, len(A)
    size = getattr(cusolver, f"{letter}potrf_bufferSize")(*shape)
    work = xp.empty(size, A.dtype)
    getattr(cusolver, f"{letter}potrf")(*shape, work.data.ptr, size, info.data.ptr)
    return A


def _threads_for(A):
    """One thread of BLAS for a matrix that is done before two pools have settled their fight."""
    return one_blas_thread() if ONE_THREAD[0] <= len(A) <= ONE_THREAD[1] else nullcontext()


def check_factored(info):
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
    failed = namespace(info).flatnonzero(info)
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


def check_hessian(info):
    """`check_factored` of a damped Hessian, with what to do about it."""
    if int(info[0]):
        raise np.linalg.LinAlgError(
            "hessian: found a matrix that is not positive definite with this damping, expected "
            "a larger damp (0.01 is usual), more calibration tokens than columns, or "
            "dtype='float64'"
        )


def reversed_cholesky(H, info=None):
    """Upper triangular R with H = R Rᵀ.

    It is the Cholesky factor of H with rows and columns reversed, so that R[a:, a:] belongs to
    the columns from a on after those before a have been eliminated from H⁻¹.

    Parameters
    ----------
    H : array, shape (K, K)
    info : array of int32, shape (1,), optional
        As in `cholesky`, for `check_hessian`.

    Returns
    -------
    array, shape (K, K)

    Raises
    ------
    numpy.linalg.LinAlgError
        H is not positive definite.
    """
    xp = namespace(H)
    noted = xp.zeros(1, np.int32) if info is None else info
    if xp is np:
        R = cholesky(H[::-1, ::-1], noted)[::-1, ::-1]
    else:
        # cuBLAS takes no rows that run backwards.
        reverse, R = _potrf(H[::-1, ::-1], noted), xp.empty(H.shape, H.dtype)
        tiles = -(-len(H) // TRANSPOSED)
        _kernel("reverse_transpose", H.dtype)(
            (tiles, tiles), (TRANSPOSED, 8), (reverse, R, np.int32(len(H)))
        )
    if info is None:
        check_hessian(noted)
    return R


def upper_inverse(R):
    """Inverse of an upper triangular matrix, shape (K, K), with zeros below."""
    xp = namespace(R)
    if xp is np:
        trtri = scipy.linalg.get_lapack_funcs("trtri", (R,))
        with _threads_for(R):
            return trtri(R)[0]
    U = xp.array(R, order="C")
    K, tile = len(U), TILE[U.dtype.name]
    for a, size, count in _diagonal_blocks(K, tile):
        _launch_triangular(U[a:, a:], size, count)
    while tile < K:
        # Of [[P, Q], [0, S]] the inverse is [[P⁻¹, −P⁻¹ Q S⁻¹], [0, S⁻¹]].
        for a, size, count in _diagonal_blocks(K, 2 * tile):
            if size > tile:
                blocks = _stack(U, a, 2 * tile, size, count)
                corner = blocks[:, :tile, tile:]
                product = xp.empty(corner.shape, U.dtype)
                gemm(blocks[:, :tile, :tile], corner, product, exact=True)
                gemm(product, blocks[:, tile:, tile:], corner, alpha=-1, exact=True)
        tile *= 2
    return U


def upper_gram(U):
    """UᵀU of an upper triangular U, shape (K, K)."""
    xp = namespace(U)
    if xp is np:
        return U.T @ U
    K = len(U)
    out = xp.empty_like(U)
    width = -(-K // BLOCK_ROWS)
    for a in range(0, K, width):
        b = min(a + width, K)
        gemm(U[:b, a:b].T, U[:b, a:], out[a:b, a:])
    mirror_upper(out)
    return out


def inverse(A):
    """Inverse of one symmetric positive definite matrix, shape (K, K)."""
    return upper_gram(upper_inverse(reversed_cholesky(A)))


def cholesky_inverse(A, info=None):
    """L⁻¹ of A = L Lᵀ, for a batch.

    Parameters
    ----------
    A : array, shape (B, p, p)
        Its lower triangle is read. Overwritten.
    info : array of int32, shape (B,), optional
        Instead of raising, note here the pivots that are not positive, for `check_factored`.

    Returns
    -------
    array, shape (B, p, p)
        Lower triangular, in the memory of A.

    Raises
    ------
    numpy.linalg.LinAlgError
        Which names the matrices that are not positive definite.
    """
    xp = namespace(A)
    noted = xp.zeros(len(A), np.int32) if info is None else info
    if xp is not np:
        _factor(A, noted, 0)
    else:
        potrf, trtri = scipy.linalg.get_lapack_funcs(("potrf", "trtri"), (A,))
        for b in range(len(A)):
            # LAPACK counts columns first, and so sees the transpose.
            upper, wrong = potrf(A[b].T, lower=False)
            A[b] = trtri(upper, lower=False, overwrite_c=True)[0].T
            noted[b] = noted[b] or wrong
    if info is None:
        check_factored(noted)
    return A


def _factor(A, info, first):
    """L⁻¹ into a batch A, shape (B, n, n)."""
    xp = namespace(A)
    B, n, _ = A.shape
    tile = TILE[A.dtype.name]
    if n <= tile:
        _kernel("factor_inverse", A.dtype)(
            (B,), (256,), (A, *cuda.strides(A), np.int32(n), np.int32(first), info)
        )
        return
    # [[P, .], [Q, S]]: with P⁻¹ and L₂₁ = Q P⁻ᵀ, S − L₂₁ L₂₁ᵀ is left; then −S⁻¹ L₂₁ P⁻¹. P is
    # of an order that does not change with a unit matrix appended to A.
    m = tile << ((n - 1) // tile).bit_length() - 1
    left, below, right = A[:, :m, :m], A[:, m:, :m], A[:, m:, m:]
    _factor(left, info, first)
    L21, product = xp.empty((2, B, n - m, m), A.dtype)
    gemm(below, left.transpose(0, 2, 1), L21)
    gemm(L21, L21.transpose(0, 2, 1), right, alpha=-1, beta=1)
    _factor(right, info, first + m)
    gemm(L21, left, product)
    gemm(right, product, below, alpha=-1)
    A[:, :m, m:] = 0


def _diagonal_blocks(K, size):
    """(first column, size, number) of the blocks that cover a diagonal: whole ones, the rest."""
    count, rest = divmod(K, size)
    return [(0, size, count)] * (count > 0) + [(count * size, rest, 1)] * (rest > 0)


def _stack(U, first, step, size, count):
    """A view (count, size, size) of the blocks of a matrix at every step-th diagonal element."""
    row, column = U.strides
    return namespace(U).lib.stride_tricks.as_strided(
        U[first:, first:], (count, size, size), (step * (row + column), row, column)
    )


def _launch_triangular(U, size, count):
    # The kernel takes a lower triangle, so rows and columns change places.
    row, column = cuda.strides(U)
    _kernel("triangular_inverse", U.dtype)(
        (count,), (256,), (U, np.int64(size * (row + column)), column, row, np.int32(size))
    )


def _kernel(name, dtype):
    return cuda.kernel("cholesky.cu", name, **_defines(dtype))


def _defines(dtype):
    return {"REAL": cuda.real(dtype), "TILE": TILE[str(dtype)]}


def variants():
    """What the kernels here compile."""
    for dtype in ("float32", "float64"):
        yield "cholesky.cu", _defines(dtype)
