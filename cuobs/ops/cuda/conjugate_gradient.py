"""Conjugate gradients on a GPU: what they begin with, and a step; a block of threads a row."""

from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.conjugate_gradient import smallest_square
from cuobs.ops.cuda import loader

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 512


def cg_start(residual, mask, X, scale, limit, operand):
    M, K = residual.shape
    dtype = residual.dtype
    given = (cupy.ascontiguousarray(residual), mask,
             loader.NULL if X is None else cupy.ascontiguousarray(X), scale,
             cupy.ascontiguousarray(limit, dtype))
    residual, X = (cupy.empty((M, K), dtype) for _ in range(2))  # X outlives the other
    P = cupy.empty((M, K), operand)
    rr, limit = cupy.empty((2, M), dtype)
    least = dtype.type(smallest_square(K, dtype))
    _launch("cg_start", dtype, P.dtype, M, K, (*given, least, residual, X, P, rr, limit))
    return residual, X, P, rr, limit


def cg_step(Q, mask, X, residual, P, rr, limit, gained):
    _launch("cg_step", Q.dtype, P.dtype, *Q.shape, (Q, mask, X, residual, P, rr, limit, gained))


def _launch(name, dtype, operand, M, K, args):
    kernel = loader.kernel_for(SOURCE, name, _defines, K, dtype, operand)
    kernel((M,), (THREADS,), (*args, np.int32(K)))


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
