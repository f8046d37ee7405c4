"""Gram matrices of activations."""

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops import cuda
from cuobs.ops.gemm import gemm

# The upper triangle is made of block rows, each by one product with all columns to its right: as
# many as this at most, their height a multiple of that of the tiles a product is made of.
BLOCK_ROWS = 16
BLOCK_TILE = 256
# Order of the tiles that a kernel mirrors.
TILE = 32


def add_gram(X, out, half=True):
    """out += XᵀX.

    Parameters
    ----------
    X : array, shape (N, K)
    out : array, shape (K, K)
        Symmetric. Overwritten.
    half : bool
        Whether a GPU may multiply float16 as it is, on tensor cores, and sum in float32. The
        products are exact. Otherwise, and for sums in float64, X is widened first.
    """
    if namespace(out) is np:
        X = X.astype(out.dtype, copy=False)
        # NumPy sees one array on both sides and calls a symmetric rank update.
        out += X.T @ X
        return
    if not (half and X.dtype == np.float16 and out.dtype == np.float32):
        X = X.astype(out.dtype, copy=False)
    K = len(out)
    width = -(-K // (BLOCK_ROWS * BLOCK_TILE)) * BLOCK_TILE
    for a in range(0, K, width):
        b = min(a + width, K)
        gemm(X[:, a:b].T, X[:, a:], out[a:b, a:], beta=1)
    mirror_upper(out)


def mirror_upper(A):
    """Overwrite what lies below the diagonal of a (K, K) matrix by what lies above it."""
    if namespace(A) is np:
        below = np.tril_indices(len(A), -1)
        A[below] = A.T[below]
        return
    kernel = cuda.kernel("mirror.cu", "mirror_upper", REAL=cuda.real(A.dtype))
    tiles = -(-len(A) // TILE)
    kernel((tiles, tiles), (TILE, 8), (A, np.int64(cuda.strides(A)[0]), np.int32(len(A))))


def variants():
    """What the kernels here compile."""
    for dtype in ("float32", "float64"):
        yield "mirror.cu", {"REAL": cuda.real(dtype)}
