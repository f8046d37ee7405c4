"""The exact re-solve: the best weights for a mask."""

import numpy as np

from cuobs.batches import run_batches
from cuobs.ops.masked_solve import masked_factor_solve
from cuobs.ops.conjugate_gradient import masked_cg

# Relative residuals to stop at. In float32 the loss no longer moves in its fourth digit.
TOLERANCE = {"float32": 1e-3, "float64": 1e-12}
# Iterations that the conjugate gradients take to get there on layers of language models.
ITERATIONS = {"float32": 30, "float64": 500}


def resolve(problem, mask, start=None):
    """The weights that minimise the damped loss for a mask: Wp_S Hλ_SS = (W* Hλ)_S in each row.

    Parameters
    ----------
    problem : Problem
    mask : array of bool, shape (M, K)
        True = kept, the set S of each row.
    start : array, shape (M, K), optional
        Weights to start from.

    Returns
    -------
    array, shape (M, K)
    """
    dtype = problem.dtype.name
    M, K = mask.shape
    G = problem.W @ problem.H
    kept = int(mask.sum()) / M
    # A row's own factor costs kept³/3, an iteration of all rows K² each; both twice that in FLOP.
    if problem.xp is np and kept**3 / 3 < ITERATIONS[dtype] * K**2:
        return _factor_rows(problem, G, mask)
    return masked_cg(
        problem.H, G, mask, start, tolerance=TOLERANCE[dtype], max_iterations=10 * K
    )


def _factor_rows(problem, G, mask):
    out = np.zeros_like(problem.W)

    def solve(begin, end):
        masked_factor_solve(problem.H, G[begin:end], mask[begin:end], out=out[begin:end])

    run_batches(solve, len(mask), problem, bytes_per_row=problem.H.nbytes)
    return out
