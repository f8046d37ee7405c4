"""Products of matrices and of batches of matrices, into place."""

from functools import cache

import numpy as np

from cuobs.arrays import namespace

# Matrices of a batch that one call of cuBLAS multiplies. It may choose its kernel by their number,
# and with it the last bits; a fixed one gives a matrix the same bits in whatever batch it comes.
CHUNK = 32
# Multiply-adds from which an exact product is worth being split into three on tensor cores.
SPLIT_FROM = 2**28


def gemm(A, B, out, alpha=1.0, beta=0.0, exact=False):
    """out ← alpha A B + beta out.

    Parameters
    ----------
    A : array, shape (m, k) or (batch, m, k)
        A slice of a larger array or the transpose of one; it is not copied on a GPU.
    B : array, shape (k, n) or (batch, k, n)
        Likewise, of the same dtype.
    out : array, shape (m, n) or (batch, m, n)
        Rows contiguous. float16 and float32 may come from float16, which is summed in float32.
        Overwritten.
    alpha, beta : float
    exact : bool
        Whether a float32 product has to keep the digits of float32 even where tensor cores are
        allowed. They then multiply the upper and the lower halves of the digits one by one.
    """
    xp = namespace(out)
    if xp is np:
        product = A @ B
        if alpha != 1:
            product *= alpha
        if beta:
            product += out if beta == 1 else beta * out
        out[...] = product
        return
    if not out.size:
        return
    if out.ndim == 2:
        A, B, out = A[None], B[None], out[None]
    tf32 = out.dtype == A.dtype == np.float32 and tensor_cores_allowed()
    if tf32 and exact:
        tf32 = out.size * A.shape[2] >= SPLIT_FROM
        if tf32:
            (A, A_low), (B, B_low) = _split(A), _split(B)
            _multiply(A, B_low, out, alpha, beta, tf32)
            _multiply(A_low, B, out, alpha, 1.0, tf32)
            beta = 1.0
    _multiply(A, B, out, alpha, beta, tf32)


def tensor_cores_allowed():
    """Whether `arrays.tensor_cores` allows them for float32."""
    from cupy._core import _routines_linalg as linalg

    return linalg.get_compute_type(np.dtype("float32")) == linalg.COMPUTE_TYPE_TF32


def _multiply(A, B, out, alpha, beta, tf32):
    from cupy.cuda import runtime
    from cupy.cuda.device import get_cublas_handle
    from cupy_backends.cuda.libs import cublas

    types = {
        "float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F,
    }
    scalars = np.float64 if out.dtype == np.float64 else np.float32
    compute = (
        cublas.CUBLAS_COMPUTE_64F if scalars is np.float64
        else cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if tf32
        else cublas.CUBLAS_COMPUTE_32F
    )
    batch, m, k = A.shape
    n = B.shape[2]
    alpha, beta = np.array(alpha, scalars), np.array(beta, scalars)
    # cuBLAS counts columns first: row-major arrays are transposes there, and outᵀ = Bᵀ Aᵀ.
    op_A, ld_A = _operand(A)
    op_B, ld_B = _operand(B)
    _, ld_out = _operand(out)
    step_A, step_B, step_out = (a.strides[0] // a.itemsize for a in (A, B, out))
    handle = get_cublas_handle()
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    for first in range(0, batch, CHUNK):
        cublas.gemmStridedBatchedEx(
            handle, op_B, op_A, n, m, k, alpha.ctypes.data,
            B.data.ptr + first * B.strides[0], types[B.dtype.name], ld_B, step_B,
            A.data.ptr + first * A.strides[0], types[A.dtype.name], ld_A, step_A,
            beta.ctypes.data,
            out.data.ptr + first * out.strides[0], types[out.dtype.name], ld_out, step_out,
            min(CHUNK, batch - first), compute, cublas.CUBLAS_GEMM_DEFAULT,
        )


def _operand(array):
    """cuBLAS's operation on the matrices of a batch, and their leading dimension."""
    from cupy_backends.cuda.libs import cublas

    _, rows, columns = array.shape
    _, row, column = (s // array.itemsize for s in array.strides)
    if column == 1 or columns == 1:
        return cublas.CUBLAS_OP_N, max(row, columns)
    if row == 1 or rows == 1:
        return cublas.CUBLAS_OP_T, max(column, rows)
    raise ValueError(f"array: found strides {array.strides}, expected rows or columns in a piece")


def _split(array):
    """The part of a float32 array that tf32 holds, and the rest."""
    if array.strides[2] != array.itemsize and array.strides[1] == array.itemsize:
        return tuple(part.transpose(0, 2, 1) for part in _split(array.transpose(0, 2, 1)))
    return _split_kernel()(array)


@cache
def _split_kernel():
    import cupy

    return cupy.ElementwiseKernel(
        "float32 x", "float32 high, float32 low",
        "high = __uint_as_float(__float_as_uint(x) & 0xffffe000u); low = x - high;",
        "cuobs_split",
    )
