"""SparseGPT column by column in plain NumPy, as it is written down: the baseline."""

import numpy as np


def sparsegpt_columns(W, H, keep=2, of=4, damp=0.01):
    """Keep `keep` of every `of` columns in a row.

    The upper Cholesky factor U of the inverse damped Hessian gives, at column j, the score
    w²/U_jj² and the compensation w_right −= (w_j − q_j) / U_jj · U_j,right. A scope's mask is
    chosen at its first column. Every column updates all columns to its right at once.

    Parameters
    ----------
    W : ndarray, shape (M, K)
    H : ndarray, shape (K, K)
        XᵀX, undamped.

    Returns
    -------
    weight : ndarray, shape (M, K)
    mask : ndarray of bool, shape (M, K)
        True = kept.

    References
    ----------
    .. [1] Frantar, Alistarh, "SparseGPT: massive language models can be accurately pruned in
       one-shot", ICML 2023, algorithm 1 with a block of one column.
    """
    W = W.copy()
    M, K = W.shape
    damped = H + damp * H.diagonal().mean() * np.eye(K, dtype=H.dtype)
    U = np.linalg.cholesky(np.linalg.inv(damped)).T
    mask = np.ones((M, K), bool)
    for j in range(K):
        if j % of == 0:
            scores = (W[:, j : j + of] / U.diagonal()[j : j + of]) ** 2
            lowest = np.argsort(scores, axis=1, kind="stable")[:, : of - keep]
            np.put_along_axis(mask[:, j : j + of], lowest, False, axis=1)
        kept = np.where(mask[:, j], W[:, j], 0)
        error = (W[:, j] - kept) / U[j, j]
        W[:, j + 1 :] -= np.outer(error, U[j, j + 1 :])
        W[:, j] = kept
    return W, mask
