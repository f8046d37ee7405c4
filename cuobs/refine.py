"""The exact re-solve: the best weights for a mask."""

import numpy as np

from cuobs.batches import run_batches
from cuobs.ops.conjugate_gradient import masked_cg
from cuobs.ops.products import matmul
from cuobs.ops.systems import masked_factor_solve

# Residuals to stop at, by the norm of the target; both with columns scaled to a unit diagonal of H.
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
    xp, target, H = problem.xp, problem.W, problem.H
    M, K = mask.shape
    kept = int(mask.sum()) / M
    # A row's own factor costs kept³/3, an iteration of all rows K² each; both twice that in FLOP.
    if xp is np and kept**3 / 3 < ITERATIONS[dtype] * K**2:
        return _factor_rows(problem, mask)
    expected = ITERATIONS[dtype]
    X = xp.where(mask, target if start is None else start, 0)
    away = target - X
    residual = matmul(away, H, problem.precision)
    return masked_cg(
        H,
        residual,
        mask,
        X,
        limit=TOLERANCE[dtype] ** 2 * (target**2 * H.diagonal()).sum(1),
        max_iterations=10 * K,
        settled=SETTLED[dtype],
        energy=float((away * residual).sum(dtype="float64")),
        precision=problem.precision,
        progress=lambda done: problem.settings.report(min(done, expected), expected),
    )


def _factor_rows(problem, mask):
    G = problem.W @ problem.H
    out = np.zeros_like(problem.W)

    def solve(begin, end):
        masked_factor_solve(problem.H, G[begin:end], mask[begin:end], out=out[begin:end])

    run_batches(solve, len(mask), problem, bytes_per_row=problem.H.nbytes)
    return out
