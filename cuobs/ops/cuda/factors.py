"""Cholesky factors and triangular inverses on a GPU: tiles in registers, the rest by products."""

from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.gram import mirror_upper
from cuobs.ops.pieces import strips
from cuobs.ops.products import gemm

SOURCE = Path(__file__).with_suffix(".cu")
# Order of the matrices that a kernel holds in registers, and its SIDE x SIDE threads.
TILE = {"float32": 128, "float64": 64}
SIDE = 16
# Order of the tiles that a kernel transposes, and the rows of one that it moves at once.
TRANSPOSED, TRANSPOSED_ROWS = 32, 8
# Block rows of the Gram matrix of a triangle.
BLOCK_ROWS = 8


def _lower_factor(A, info):
    return cupy.tril(_potrf(A, info).T)


def _reversed_factor(H, info):
    # cuBLAS takes no rows that run backwards.
    reverse, R = _potrf(H[::-1, ::-1], info), cupy.empty(H.shape, H.dtype)
    tiles = -(-len(H) // TRANSPOSED)
    _kernel("reverse_transpose", _transposing, H.dtype)(
        (tiles, tiles), (TRANSPOSED, TRANSPOSED_ROWS), (reverse, R, np.int32(len(H)))
    )
    return R


def _potrf(A, info):
    """Lᵀ of a matrix A = L Lᵀ, with anything below the diagonal."""
    from cupy.cuda.device import get_cusolver_handle
    from cupy_backends.cuda.libs import cublas, cusolver

    A = cupy.array(A, order="C")
    letter = {"float32": "s", "float64": "d"}[A.dtype.name]
    # To cuSOLVER, which counts columns first, it is the lower triangle; with that it is much faster
    # than with the upper one.
    shape = get_cusolver_handle(), cublas.CUBLAS_FILL_MODE_LOWER, len(A), A.data.ptr, len(A)
    size = getattr(cusolver, f"{letter}potrf_bufferSize")(*shape)
    work = cupy.empty(size, A.dtype)
    getattr(cusolver, f"{letter}potrf")(*shape, work.data.ptr, size, info.data.ptr)
    return A


def _transposed(A):
    from cupy import cublas

    out = cupy.empty(A.shape[::-1], A.dtype)
    return cublas.geam("T", "T", 1.0, A, 0.0, A, out=out)


def factor_solve(R, B):
    from cupy.cuda.device import get_cublas_handle
    from cupy_backends.cuda.libs import cublas

    X, R = cupy.array(B, order="C"), cupy.ascontiguousarray(R)
    trsm = getattr(cublas, {"float32": "strsm", "float64": "dtrsm"}[X.dtype.name])
    handle, one = get_cublas_handle(), np.ones(1, X.dtype)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    # To cuBLAS, which counts columns first, R is the lower triangle Rᵀ and the rows are columns.
    for transposed in cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N:
        trsm(
            handle, cublas.CUBLAS_SIDE_LEFT, cublas.CUBLAS_FILL_MODE_LOWER, transposed,
            cublas.CUBLAS_DIAG_NON_UNIT, len(R), len(X), one.ctypes.data,
            R.data.ptr, len(R), X.data.ptr, len(R),
        )  # fmt: skip
    return X


def upper_solve(U, B):
    from cupyx.scipy.linalg import solve_triangular

    # The transpose of U counts columns first, as cuBLAS does: it is not copied.
    return solve_triangular(U.T, B, trans=1, lower=True, check_finite=False)


def upper_inverse(U, precision="fp32"):
    U = cupy.array(U, order="C")
    K, tile = len(U), TILE[U.dtype.name]
    for a, size, count in _diagonal_blocks(K, tile):
        _launch_triangular(U[a:, a:], size, count)
    while tile < K:
        # Of [[P, Q], [0, S]] the inverse is [[P⁻¹, −P⁻¹ Q S⁻¹], [0, S⁻¹]].
        for a, size, count in _diagonal_blocks(K, 2 * tile):
            if size > tile:
                blocks = _stack(U, a, 2 * tile, size, count)
                corner = blocks[:, :tile, tile:]
                product = cupy.empty(corner.shape, U.dtype)
                exactly = dict(precision=precision, exact=True)
                gemm(blocks[:, :tile, :tile], corner, product, **exactly)
                gemm(product, blocks[:, tile:, tile:], corner, alpha=-1, **exactly)
        tile *= 2
    return U


def upper_gram(U, precision="fp32"):
    out = cupy.empty_like(U)
    for a, b in strips(len(U), BLOCK_ROWS):
        gemm(U[:b, a:b].T, U[:b, a:], out[a:b, a:], precision=precision)
    mirror_upper(out)
    return out


def _factor_inverse(A, info, precision, first=0):
    """L⁻¹ into a batch A, shape (B, n, n), of columns that begin at `first` of the whole."""
    B, n, _ = A.shape
    tile = TILE[A.dtype.name]
    if n <= tile:
        _kernel("factor_inverse", _tiling, A.dtype, True)(
            (B,), (SIDE * SIDE,), (A, *loader.strides(A), np.int32(n), np.int32(first), info)
        )
        return
    # [[P, .], [Q, S]]: with P⁻¹ and L₂₁ = Q P⁻ᵀ, S − L₂₁ L₂₁ᵀ is left; then −S⁻¹ L₂₁ P⁻¹. P is
    # of an order that does not change with a unit matrix appended to A.
    m = tile << ((n - 1) // tile).bit_length() - 1
    left, below, right = A[:, :m, :m], A[:, m:, :m], A[:, m:, m:]
    _factor_inverse(left, info, precision, first)
    L21, product = cupy.empty((2, B, n - m, m), A.dtype)
    gemm(below, left.transpose(0, 2, 1), L21, precision=precision)
    gemm(L21, L21.transpose(0, 2, 1), right, alpha=-1, beta=1, precision=precision)
    _factor_inverse(right, info, precision, first + m)
    gemm(L21, left, product, precision=precision)
    gemm(right, product, below, alpha=-1, precision=precision)
    A[:, :m, m:] = 0


def _diagonal_blocks(K, size):
    """(first column, size, number) of the blocks that cover a diagonal: whole ones, the rest."""
    count, rest = divmod(K, size)
    return [(0, size, count)] * (count > 0) + [(count * size, rest, 1)] * (rest > 0)


def _stack(U, first, step, size, count):
    """A view (count, size, size) of the blocks of a matrix at every step-th diagonal element."""
    row, column = U.strides
    return cupy.lib.stride_tricks.as_strided(
        U[first:, first:], (count, size, size), (step * (row + column), row, column)
    )


def _launch_triangular(U, size, count):
    # The kernel takes a lower triangle, so rows and columns change places.
    row, column = loader.strides(U)
    _kernel("triangular_inverse", _tiling, U.dtype, False)(
        (count,), (SIDE * SIDE,), (U, np.int64(size * (row + column)), column, row, np.int32(size))
    )


def _kernel(name, define, dtype, *args):
    return loader.kernel_for(SOURCE, name, define, dtype.name, *args)


def _tiling(dtype, factor):
    return {"REAL": loader.real(dtype), "TILE": TILE[dtype], "SIDE": SIDE, "FACTOR": factor}


def _transposing(dtype):
    return {"REAL": loader.real(dtype), "TRANSPOSED": TRANSPOSED}


def variants():
    """The macros that the kernels may be compiled with."""
    for dtype in ("float32", "float64"):
        yield _transposing(dtype)
        for factor in (True, False):
            yield _tiling(dtype, factor)
