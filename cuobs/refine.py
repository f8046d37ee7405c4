"""The exact re-solve: the best weights for a mask."""

import numpy as np

from cuobs.batches import run_batches
from cuobs.ops.conjugate_gradient import masked_cg
from cuobs.ops.masked_solve import masked_factor_solve

# Relative residuals to stop at.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
# Share of the damped loss that an iteration must still gain: about ten times as much is left then.
SETTLED = {"float32": 5e-4, "float64": 0.0}
# Iterations that the conjugate gradients take to get there on layers of language models.
ITERATIONS = {"float32": 40, "float64": 500}


def resolve(problem, mask, start=None):
    """The weights that minimise the damped loss for a mask: Wp_S Hλ_SS = (W* Hλ)_S in each row.

    Parameters
    ----------
    problem : Problem
    mask : array of bool, shape (M, K)
        True = kept, the set S of each row.
    start : array, shape (M, K), optional
        Weights to start from, the target by default.

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
    expected = ITERATIONS[dtype]
    energy = float((problem.W * G).sum(dtype="float64"))
    return masked_cg(
        problem.H,
        G,
        mask,
        problem.W if start is None else start,
        tolerance=TOLERANCE[dtype],
        max_iterations=10 * K,
        settled=SETTLED[dtype],
        energy=energy,
        progress=lambda done: problem.settings.report(min(done, expected), expected),
    )


def _factor_rows(problem, G, mask):
    out = np.zeros_like(problem.W)

    def solve(begin, end):
        masked_factor_solve(problem.H, G[begin:end], mask[begin:end], out=out[begin:end])

    run_batches(solve, len(mask), problem, bytes_per_row=problem.H.nbytes)
    return out
