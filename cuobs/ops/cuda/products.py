"""Products on a GPU, by cuBLAS."""

from functools import cache, partial
from types import SimpleNamespace

import cupy
import numpy as np

from cuobs.ops.products import CHUNK

# Multiply-adds from which an exact product is worth being split into three on tensor cores.
SPLIT_FROM = 2**28
# What each dtype of operands may be summed to.
TOTALS = {
    "float16": ("float16", "float32"), "bfloat16": ("float32",),
    "float32": ("float32",), "float64": ("float64",),
}


def gemm(A, B, out, alpha=1.0, beta=0.0, precision="fp32", exact=False):
    if not out.size or not A.shape[-1]:
        out *= beta
        return
    if out.ndim == 2:
        A, B, out = A[None], B[None], out[None]
    tf32 = _in_tf32(A, out, precision)
    if tf32 and exact:
        tf32 = out.size * A.shape[2] >= SPLIT_FROM
        if tf32:
            (A, A_low), (B, B_low) = _split(A), _split(B)
            _multiply(A, B_low, out, alpha, beta, tf32)
            _multiply(A_low, B, out, alpha, 1.0, tf32)
            beta = 1.0
    _multiply(A, B, out, alpha, beta, tf32)


def prepare_gemm(A, B, out, alpha=1.0, beta=0.0, precision="fp32", exact=False):
    plain = out.ndim == 2 and out.size and A.shape[-1] and not exact
    batches = (A[None], B[None]) if plain else ()
    # Of what is copied first, each call makes a copy of its own.
    if not plain or any(_operand(batch, _library())[0] is not batch for batch in batches):
        return partial(gemm, A, B, out, alpha, beta, precision, exact)
    return _prepare(*batches, out[None], alpha, beta, _in_tf32(A, out, precision))


def _in_tf32(A, out, precision):
    return precision == "tensor" and out.dtype == A.dtype == np.float32


def tensor_operand(array, precision):
    if precision != "tensor" or array.dtype != np.float32:
        return array
    return array.astype("float16")


def _multiply(A, B, out, alpha, beta, tf32):
    _prepare(A, B, out, alpha, beta, tf32)()


def _prepare(A, B, out, alpha, beta, tf32):
    """A function that multiplies batches of matrices."""
    library = _library()
    double = out.dtype.itemsize == 8
    compute = library.compute_64 if double else library.tf32 if tf32 else library.compute_32
    alpha, beta = library.scalar(alpha, double), library.scalar(beta, double)
    (type_A, type_out), type_B = _types(A.dtype, out.dtype), _types(B.dtype, out.dtype)[0]
    batch, m, k = A.shape
    n = B.shape[2]
    # cuBLAS counts columns first: row-major arrays are transposes there, and outᵀ = Bᵀ Aᵀ.
    A, op_A, ld_A = _operand(A, library)
    B, op_B, ld_B = _operand(B, library)
    ld_out = _leading(out)
    if ld_out is None or (batch > 1 and out.strides[0] < n * out.itemsize):
        raise ValueError(
            f"out: found strides {out.strides}, expected rows that are runs of memory, each its own"
        )
    handle = library.handle()
    calls = [
        (handle, op_B, op_A, n, m, k, alpha,
         B.data.ptr + first * B.strides[0], type_B, ld_B, B.strides[0] // B.itemsize,
         A.data.ptr + first * A.strides[0], type_A, ld_A, A.strides[0] // A.itemsize, beta,
         out.data.ptr + first * out.strides[0], type_out, ld_out,
         out.strides[0] // out.itemsize, min(CHUNK, batch - first), compute, library.default)
        for first in range(0, batch, CHUNK)
    ]  # fmt: skip

    def multiply(operands=(A, B, out)):  # which are held
        library.set_pointer_mode(handle, library.host)
        for call in calls:
            library.gemm(*call)

    return multiply


def _operand(array, library):
    """The matrices of a batch as cuBLAS takes them, copied where it can't, with its operation and
    leading dimension."""
    if array.strides[0] >= 0:
        if (leading := _leading(array)) is not None:
            return array, library.plain, leading
        if (leading := _leading(array.transpose(0, 2, 1))) is not None:
            return array, library.transposed, leading
    array = cupy.ascontiguousarray(array)
    return array, library.plain, array.shape[2]


def _leading(array):
    """Elements from row to row where rows are runs of memory that lie apart, else None."""
    _, rows, columns = array.shape
    size = array.itemsize
    _, row, column = array.strides
    if columns > 1 and column != size:
        return None
    if rows == 1:
        return columns
    return row // size if row >= columns * size else None


@cache
def _types(dtype, total):
    """cuBLAS's types of an operand and of what its products are summed to."""
    if total.name not in TOTALS.get(dtype.name, ()):
        raise TypeError(
            f"out: found dtype {total} for products of {dtype}, expected "
            f"{' or '.join(TOTALS.get(dtype.name, ('floating-point operands',)))}"
        )
    types = _library().types
    return types[dtype.name], types[total.name]


@cache
def _library():
    """What a product needs of CuPy, looked up once: the look-ups take longer than a launch."""
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
        types={
            "float16": runtime.CUDA_R_16F, "bfloat16": runtime.CUDA_R_16BF,
            "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F,
        },
        scalar=scalar,
    )


def _split(array):
    """The part of a float32 array that tf32 holds, and the rest."""
    if array.strides[2] != array.itemsize and array.strides[1] == array.itemsize:
        return tuple(part.transpose(0, 2, 1) for part in _split(array.transpose(0, 2, 1)))
    return _split_kernel()(array)


@cache
def _split_kernel():
    return cupy.ElementwiseKernel(
        "float32 x", "float32 high, float32 low",
        "high = __uint_as_float(__float_as_uint(x) & 0xffffe000u); low = x - high;",
        "cuobs_split",
    )
