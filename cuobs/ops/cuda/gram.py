"""Gram matrices on a GPU: block rows of the upper triangle, mirrored."""

from pathlib import Path

import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.pieces import strips
from cuobs.ops.products import gemm

SOURCE = Path(__file__).with_suffix(".cu")
# The upper triangle is made of block rows, each by one product with all columns to its right: as
# many as this at most, their height a multiple of that of the tiles a product is made of.
BLOCK_ROWS = 16
BLOCK_TILE = 256
# Order of the tiles that are mirrored, and the rows of one that a block of threads moves at once.
TILE, TILE_ROWS = 32, 8


def add_gram(X, out, precision="tensor"):
    (X,) = _operands(out, precision, X)
    for a, b in strips(len(out), BLOCK_ROWS, BLOCK_TILE):
        gemm(X[:, a:b].T, X[:, a:], out[a:b, a:], beta=1, precision=precision)
    mirror_upper(out)


def add_cross_gram(X, Y, out, precision="tensor"):
    X, Y = _operands(out, precision, X, Y)
    gemm(X.T, Y, out, beta=1, precision=precision)


def mirror_upper(A):
    kernel = loader.kernel(SOURCE, "mirror_upper", **_defines(A.dtype))
    tiles = -(-len(A) // TILE)
    kernel((tiles, tiles), (TILE, TILE_ROWS),
           (A, np.int64(loader.strides(A)[0]), np.int32(len(A))))


def _operands(out, precision, *operands):
    """As they are where tensor cores may multiply them in half precision, else in out's dtype."""
    kind = operands[0].dtype
    as_is = (
        precision == "tensor"
        and out.dtype == np.float32
        and kind.name in ("float16", "bfloat16")
        and all(X.dtype == kind for X in operands)
    )
    return operands if as_is else [X.astype(out.dtype, copy=False) for X in operands]


def _defines(dtype):
    return {"REAL": loader.real(dtype), "TILE": TILE}


def variants():
    """The macros that the kernels may be compiled with."""
    for dtype in ("float32", "float64"):
        yield _defines(dtype)
