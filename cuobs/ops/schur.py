"""Schur complements of the inverse Hessian: of one for all rows, and of one for each row."""

import numpy as np
import scipy.linalg

from cuobs.arrays import namespace
from cuobs.ops.cholesky import cholesky


def eliminate(C, columns, others):
    """Eliminate `columns` from the inverse Hessian: C_oo − C_oc (C_cc)⁻¹ C_co.

    Parameters
    ----------
    C : array, shape (K, K)
    columns, others : array of int

    Returns
    -------
    array, shape (len(others), len(others))
    """
    cross = C[columns][:, others]
    Y = cholesky_inverse(C[columns][:, columns][None])[0] @ cross
    return C[others][:, others] - Y.T @ Y


def cholesky_inverse(A):
    """L⁻¹ of A = L Lᵀ, for a batch.

    Parameters
    ----------
    A : array, shape (B, p, p)

    Returns
    -------
    array, shape (B, p, p)
        Lower triangular.
    """
    L = cholesky(A)
    xp = namespace(A)
    if xp is np:
        trtri = scipy.linalg.get_lapack_funcs("trtri", (L,))
        for b in range(len(L)):
            L[b] = trtri(L[b].T, lower=0)[0].T
        return L
    return xp.linalg.inv(L)


def gather_blocks(C, rows, columns):
    """C[rows[b], columns[b]] for each b of a batch.

    Parameters
    ----------
    C : array, shape (K, K)
    rows : array of int, shape (B, p)
    columns : array of int, shape (B, n)

    Returns
    -------
    array, shape (B, p, n)
    """
    xp = namespace(C)
    if xp is not np:
        return C[rows[:, :, None], columns[:, None, :]]
    out = np.empty((*rows.shape, columns.shape[1]), C.dtype)
    for b in range(len(rows)):
        # Whole rows first: two takes read memory in order, one double index would not.
        C[rows[b]].take(columns[b], axis=1, out=out[b])
    return out


def gather_rows(Z, rows):
    """Z[b, rows[b], :] for each b of a batch: (B, n, m), (B, p) to (B, p, m)."""
    return Z[namespace(Z).arange(len(Z))[:, None], rows]


def update_scopes(w, D, Zn, y):
    """Take a group's elimination out of the weights and diagonal blocks of the other scopes.

    w −= yᵀ Zn, and D −= the diagonal blocks of Znᵀ Zn.

    Parameters
    ----------
    w : array, shape (c, B, n)
        Overwritten.
    D : array, shape (c, c, B, n)
        Overwritten.
    Zn : array, shape (B, p, c, n)
    y : array, shape (B, p)
    """
    xp = namespace(w)
    c, B, n = w.shape
    change = xp.matmul(y[:, None, :], Zn.reshape(B, -1, c * n)).reshape(B, c, n)
    w -= change.transpose(1, 0, 2)
    for i in range(c):
        for j in range(i + 1):
            block = xp.einsum("bkn,bkn->bn", Zn[:, :, i], Zn[:, :, j])
            D[i, j] -= block
            if i != j:
                D[j, i] -= block
