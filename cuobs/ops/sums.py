"""Sums over whole arrays: inner products in float64, and how many elements are not zero.

CuPy's own, but for those that it brings compiled, are programs that take a compiler a second or two
each when they are called first.
"""

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops.checks import boolean, contiguous, real, same_dtype, shaped
from cuobs.ops.dispatch import twinned
from cuobs.ops.pieces import pieces


def _check_inner(A, B, out):
    _check_pair(A, B)
    _check_total(out, ())


def _check_row_inner(A, B, out):
    _check_pair(A, B)
    _check_total(out, A.shape[:1])


def _check_pair(A, B):
    real("A", A)
    same_dtype("A", A, "B", B)
    if A.ndim != 2:
        raise ValueError(f"A: found {A.ndim} dimensions, expected 2")
    shaped("B", B, A.shape)


def _check_total(out, shape):
    if out.dtype != "float64":
        raise TypeError(f"out: found dtype {out.dtype}, expected float64")
    shaped("out", out, shape)
    contiguous("out", out)


@twinned(_check_inner)
def add_inner(A, B, out):
    """out += Σ A_ij B_ij; a GPU is not waited for.

    Parameters
    ----------
    A, B : array, shape (M, K)
        float32 or float64, of any strides; a GPU copies one whose rows are no runs of memory.
        Products of float32 are rounded to it.
    out : array of float64, shape ()
        What is added to.
    """
    out += (A * B).sum(dtype="float64")


@twinned(_check_row_inner)
def add_row_inner(A, B, out):
    """out_i += Σ_j A_ij B_ij.

    Parameters
    ----------
    A, B : array, shape (M, K)
        As in `add_inner`.
    out : array of float64, shape (M,)
        What is added to.
    """
    for rows in pieces(namespace(A), len(A), A.shape[1] * A.itemsize):
        out[rows] += (A[rows] * B[rows]).sum(1, dtype="float64")


def inner(A, B):
    """`add_inner` to nothing, as a float."""
    out = namespace(A).zeros((), "float64")
    add_inner(A, B, out)
    return float(out)


@twinned(lambda mask: boolean("mask", mask))
def count_true(mask):
    """How many elements of an array of bool are true."""
    return int(np.count_nonzero(mask))
