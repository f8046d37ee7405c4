"""Gram matrices of activations."""

import numpy as np

from cuobs.arrays import namespace


def add_gram(X, out):
    """out += XᵀX.

    Parameters
    ----------
    X : array, shape (N, K)
        Half precision is widened to the dtype of `out`.
    out : array, shape (K, K)
        Overwritten.
    """
    if namespace(out) is not np:
        raise NotImplementedError
    X = X.astype(out.dtype, copy=False)
    # NumPy sees one array on both sides and calls a symmetric rank update.
    out += X.T @ X
