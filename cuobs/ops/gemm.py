"""Products of matrices and of batches of matrices, into place."""

from functools import cache
from types import SimpleNamespace

import numpy as np

from cuobs.arrays import namespace

# Matrices of a batch that one call of cuBLAS multiplies. It may choose its kernel by their number,
# and with it the last bits; a fixed one gives a matrix the same bits in whatever batch it comes.
CHUNK = 32
FLOAT32 = np.dtype("float32")
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
        Rows contiguous. On a GPU float16 and float32 may come from float16, which is summed in
        float32. Overwritten.
    alpha, beta : float
    exact : bool
        Whether a float32 product has to keep the digits of float32 even where tensor cores are
        allowed. They then multiply the upper and the lower halves of the digits one by one.
    """
    xp = namespace(out)
    if xp is np:
        if alpha == 1 and not beta:
            np.matmul(A, B, out=out)
            return
        product = A @ B
        if alpha != 1:
            product *= alpha
        if beta:
            product += out if beta == 1 else beta * out
        out[...] = product
        return
    if not out.size or not A.shape[-1]:
        out *= beta
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
    library = _library()
    return library.get_compute_type(FLOAT32) == library.TF32


def tensor_operand(array):
    """An operand for tensor cores: in float16 where they may multiply float32, or as it is.

    float16 keeps as many digits as tf32 and is multiplied twice as fast, but holds no more than
    65504 and fewer digits below 6e-5.
    """
    if namespace(array) is np or array.dtype != np.float32 or not tensor_cores_allowed():
        return array
    return array.astype("float16")


def _multiply(A, B, out, alpha, beta, tf32):
    library = _library()
    size = out.dtype.itemsize
    compute = library.compute_64 if size == 8 else library.tf32 if tf32 else library.compute_32
    alpha, beta = library.scalar(alpha, size == 8), library.scalar(beta, size == 8)
    batch, m, k = A.shape
    n = B.shape[2]
    # cuBLAS counts columns first: row-major arrays are transposes there, and outᵀ = Bᵀ Aᵀ.
    op_A, ld_A, step_A, bytes_A, type_A = _operand(A, library)
    op_B, ld_B, step_B, bytes_B, type_B = _operand(B, library)
    op_out, ld_out, step_out, bytes_out, type_out = _operand(out, library)
    if op_out != library.plain:
        raise ValueError(f"out: found strides {out.strides}, expected contiguous rows")
    handle = library.handle()
    library.set_pointer_mode(handle, library.host)
    for first in range(0, batch, CHUNK):
        library.gemm(
            handle, op_B, op_A, n, m, k, alpha,
            B.data.ptr + first * bytes_B, type_B, ld_B, step_B,
            A.data.ptr + first * bytes_A, type_A, ld_A, step_A, beta,
            out.data.ptr + first * bytes_out, type_out, ld_out, step_out,
            min(CHUNK, batch - first), compute, library.default,
        )  # fmt: skip


def _operand(array, library):
    """cuBLAS's operation on the matrices of a batch, leading dimension, step, step in bytes, type.
    """
    _, rows, columns = array.shape
    size = array.dtype.itemsize
    step, row, column = array.strides
    kind = library.types[size]
    if column == size or columns == 1:
        return library.plain, max(row // size, columns), step // size, step, kind
    if row == size or rows == 1:
        return library.transposed, max(column // size, rows), step // size, step, kind
    raise ValueError(f"array: found strides {array.strides}, expected rows or columns in a piece")


@cache
def _library():
    """What a product needs of CuPy, looked up once: the look-ups take longer than a launch."""
    from cupy._core import _routines_linalg as linalg
    from cupy.cuda import runtime
    from cupy.cuda.device import get_cublas_handle
    from cupy_backends.cuda.libs import cublas

    @cache
    def scalar(value, double):
        held.append(np.array(value, np.float64 if double else np.float32))
        return held[-1].ctypes.data

    held = []
    return SimpleNamespace(
        gemm=cublas.gemmStridedBatchedEx,
        handle=get_cublas_handle,
        set_pointer_mode=cublas.setPointerMode,
        host=cublas.CUBLAS_POINTER_MODE_HOST,
        plain=cublas.CUBLAS_OP_N,
        transposed=cublas.CUBLAS_OP_T,
        default=cublas.CUBLAS_GEMM_DEFAULT,
        compute_32=cublas.CUBLAS_COMPUTE_32F,
        compute_64=cublas.CUBLAS_COMPUTE_64F,
        tf32=cublas.CUBLAS_COMPUTE_32F_FAST_TF32,
        types={2: runtime.CUDA_R_16F, 4: runtime.CUDA_R_32F, 8: runtime.CUDA_R_64F},
        scalar=scalar,
        get_compute_type=linalg.get_compute_type,
        TF32=linalg.COMPUTE_TYPE_TF32,
    )


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
