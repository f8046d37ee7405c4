"""Cholesky factors and triangular inverses."""

import numpy as np
import scipy.linalg

from cuobs.arrays import namespace

def cholesky(A):
    """Lower Cholesky factor of one matrix or of a batch.

    Raises
    ------
    numpy.linalg.LinAlgError
        A matrix is not positive definite.
    """
    xp = namespace(A)
    if xp is np:
        return np.linalg.cholesky(A)
    import cupyx

    # CuPy looks at cuSOLVER's devInfo only when it is told to.
    with cupyx.errstate(linalg="raise"):
        return xp.linalg.cholesky(A)


def reversed_cholesky(H):
    """Upper triangular R with H = R Rᵀ.

    It is the Cholesky factor of H with rows and columns reversed, so that R[a:, a:] belongs to
    the columns from a on after those before a have been eliminated from H⁻¹.

    Parameters
    ----------
    H : array, shape (K, K)

    Returns
    -------
    array, shape (K, K)

    Raises
    ------
    numpy.linalg.LinAlgError
        H is not positive definite.
    """
    try:
        return cholesky(H[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise np.linalg.LinAlgError(
            "hessian: found a matrix that is not positive definite with this damping, expected "
            "a larger damp (0.01 is usual), more calibration tokens than columns, or "
            "dtype='float64'"
        ) from None


def upper_inverse(R):
    """Inverse of an upper triangular matrix, shape (K, K)."""
    if namespace(R) is np:
        inverse, _ = scipy.linalg.get_lapack_funcs("trtri", (R,))(R)
        return inverse
    import cupyx.scipy.linalg

    xp = namespace(R)
    return cupyx.scipy.linalg.solve_triangular(R, xp.eye(len(R), dtype=R.dtype))


def inverse(A):
    """Inverse of one symmetric positive definite matrix, shape (K, K)."""
    U = upper_inverse(reversed_cholesky(A))
    return U.T @ U
