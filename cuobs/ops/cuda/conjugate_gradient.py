"""A step of conjugate gradients on a GPU, a block of threads a row."""

from pathlib import Path

import numpy as np

from cuobs.ops.cuda import loader

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 512


def cg_step(Q, mask, X, residual, P, rr, limit, gained):
    M, K = Q.shape
    kernel = loader.kernel_for(SOURCE, "cg_step", _defines, K, Q.dtype, P.dtype)
    kernel((M,), (THREADS,), (Q, mask, X, residual, P, rr, limit, gained, np.int32(K)))


def row_squares(A):
    # A product might run on tensor cores, and round.
    return (A * A).sum(1)


def _defines(K, dtype, operand):
    width = 1 if K % 4 else 4
    return {
        "REAL": loader.real(dtype), "OPERAND": loader.real(operand), "WIDTH": width,
        "ITEMS": -(-K // (THREADS * width)), "THREADS": THREADS,
    }


def variants():
    """The macros that the kernels may be compiled with, for some widths."""
    for K in (100, 511, 1536, 9728, 20000):
        for dtype in ("float32", "float64"):
            for operand in {dtype, "float16" if dtype == "float32" else dtype}:
                yield _defines(K, dtype, operand)
