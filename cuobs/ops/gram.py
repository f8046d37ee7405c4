"""Sums of products over tokens: Gram matrices of activations, and those of two sets of them."""

from typing import Any

import numpy as np

from cuobs.arrays import dtype_of
from cuobs.ops.checks import precise, real, rows_in_a_piece, shaped, square
from cuobs.ops.dispatch import twinned


def _check_add_gram(X, out, precision="tensor"):
    _check_activations("X", X)
    square("out", out)
    shaped("out", out, (X.shape[1],) * 2)
    rows_in_a_piece("out", out)
    real("out", out)
    precise(precision)


@twinned(_check_add_gram)
def add_gram(X: Any, out: Any, precision: str = "tensor") -> None:
    """out += XᵀX.

    Parameters
    ----------
    X : array, shape (N, K)
        float16, bfloat16 (see `cuobs.ops.tensor_view`), float32 or float64.
    out : array, shape (K, K)
        float32 or float64, symmetric. Overwritten.
    precision : {"tensor", "fp32"}
        "tensor" lets a GPU multiply half precision as it is, on tensor cores, and sum in float32:
        the products are exact. Otherwise, and for sums in float64, X is widened first; float32 is
        then multiplied in tf32 where it says "tensor".
    """
    X = X.astype(out.dtype, copy=False)
    # NumPy sees one array on both sides and calls a symmetric rank update.
    out += X.T @ X


def _check_add_cross_gram(X, Y, out, precision="tensor"):
    _check_activations("X", X)
    _check_activations("Y", Y)
    shaped("out", out, (X.shape[1], Y.shape[1]))
    rows_in_a_piece("out", out)
    if len(X) != len(Y):
        raise ValueError(f"Y: found {len(Y)} rows, expected {len(X)}, those of X")
    real("out", out)
    precise(precision)


@twinned(_check_add_cross_gram)
def add_cross_gram(X: Any, Y: Any, out: Any, precision: str = "tensor") -> None:
    """out += XᵀY: what two sets of activations of the same tokens have in common.

    Parameters
    ----------
    X : array, shape (N, K)
    Y : array, shape (N, L)
        Both as X in `add_gram`. Where they are of one half precision, a GPU multiplies it as it is.
    out : array, shape (K, L)
        float32 or float64. Overwritten.
    precision : {"tensor", "fp32"}
        As in `add_gram`.
    """
    out += X.astype(out.dtype, copy=False).T @ Y.astype(out.dtype, copy=False)


def _check_mirror_upper(A):
    square("A", A)
    rows_in_a_piece("A", A)
    real("A", A)


@twinned(_check_mirror_upper)
def mirror_upper(A: Any) -> None:
    """Overwrite what lies below the diagonal of a matrix by what lies above it.

    Parameters
    ----------
    A : array, shape (K, K)
        float32 or float64. Overwritten.
    """
    below = np.tril_indices(len(A), -1)
    A[below] = A.T[below]


def _check_activations(name, X):
    if X.ndim != 2:
        raise ValueError(f"{name}: found {X.ndim} dimensions, expected 2 (tokens, features)")
    if dtype_of(X) not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"{name}: found dtype {X.dtype}, expected a floating-point one")
