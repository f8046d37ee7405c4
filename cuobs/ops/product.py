"""Products that add to a matrix in place."""

import numpy as np

from cuobs.arrays import namespace


def add_product(A, B, out, alpha=1):
    """out += alpha A B.

    Each matrix may be a slice of a larger one, or the transpose of one; none is copied on a GPU.

    Parameters
    ----------
    A : array, shape (m, k)
    B : array, shape (k, n)
        Of the same dtype; float16 is allowed on a GPU, multiplied on tensor cores and summed in
        float32.
    out : array, shape (m, n)
        float32 or float64, its rows contiguous. Overwritten.
    alpha : float
    """
    if namespace(out) is np:
        product = A @ B
        if alpha != 1:
            product *= alpha
        out += product
        return
    if A.shape[1] and out.size:
        _gemm(A, B, out, alpha)


def _gemm(A, B, out, alpha):
    from cupy.cuda import runtime
    from cupy.cuda.device import get_cublas_handle
    from cupy_backends.cuda.libs import cublas

    types = {
        "float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F,
    }
    (m, k), n = A.shape, B.shape[1]
    double = out.dtype == np.float64
    alpha, beta = (np.array(v, np.float64 if double else np.float32) for v in (alpha, 1))
    # cuBLAS counts columns first: row-major arrays are transposes there, and outᵀ += Bᵀ Aᵀ.
    op_A, ld_A = _operand(A)
    op_B, ld_B = _operand(B)
    _, ld_out = _operand(out)
    cublas.setPointerMode(get_cublas_handle(), cublas.CUBLAS_POINTER_MODE_HOST)
    cublas.gemmEx(
        get_cublas_handle(), op_B, op_A, n, m, k, alpha.ctypes.data,
        B.data.ptr, types[B.dtype.name], ld_B, A.data.ptr, types[A.dtype.name], ld_A,
        beta.ctypes.data, out.data.ptr, types[out.dtype.name], ld_out,
        _compute_type(A.dtype, cublas), cublas.CUBLAS_GEMM_DEFAULT,
    )


def _operand(array):
    """cuBLAS's operation on a matrix, and its leading dimension."""
    from cupy_backends.cuda.libs import cublas

    (rows, columns), size = array.shape, array.itemsize
    along_row, along_column = array.strides[1] // size, array.strides[0] // size
    if along_row == 1 or columns == 1:
        return cublas.CUBLAS_OP_N, max(along_column, columns)
    if along_column == 1 or rows == 1:
        return cublas.CUBLAS_OP_T, max(along_row, rows)
    raise ValueError(f"array: found strides {array.strides}, expected rows or columns in a piece")


def _compute_type(dtype, cublas):
    if dtype == np.float64:
        return cublas.CUBLAS_COMPUTE_64F
    if dtype == np.float32 and _allows_tf32():
        return cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    return cublas.CUBLAS_COMPUTE_32F


def _allows_tf32():
    # What `arrays.tensor_cores` has set, for CuPy's own products too.
    from cupy._core import _routines_linalg as linalg

    return linalg.get_compute_type(np.dtype("float32")) == linalg.COMPUTE_TYPE_TF32
