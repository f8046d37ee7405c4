"""Sums on a GPU: a block of threads a row, then one for the rows."""

from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.cuda import loader

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 256
# The most blocks that count.
MAX_BLOCKS = 2048


def add_inner(A, B, out):
    parts = cupy.zeros(len(A), np.float64)
    add_row_inner(A, B, parts)
    _kernel("add_up", A.dtype)((1,), (THREADS,), (parts, np.int32(len(A)), out))


def add_row_inner(A, B, out):
    M, K = A.shape
    A, B = _by_rows(A), _by_rows(B)
    args = A, loader.strides(A)[0], B, loader.strides(B)[0], out, np.int32(K)
    _kernel("row_inner", A.dtype)((M,), (THREADS,), args)


def _by_rows(A):
    return A if A.strides[1] == A.itemsize else cupy.ascontiguousarray(A)


def count_true(mask):
    mask, count = cupy.ascontiguousarray(mask), cupy.zeros((), np.uint64)
    blocks = min(-(-mask.size // THREADS), MAX_BLOCKS)
    # The program of float32: most that is pruned has made it already.
    _kernel("count_true", np.dtype(np.float32))(
        (blocks,), (THREADS,), (mask, np.int64(mask.size), count)
    )
    return int(count)


def _kernel(name, dtype):
    return loader.kernel_for(SOURCE, name, _defines, dtype.name)


def _defines(dtype):
    return {"REAL": loader.real(dtype), "THREADS": THREADS}


def variants():
    """The macros that the kernels may be compiled with."""
    for dtype in ("float32", "float64"):
        yield _defines(dtype)
