"""The exact re-solve: the best weights for a mask."""

import numpy as np

from cuobs import validation
from cuobs.arrays import device_name
from cuobs.batches import run_batches
from cuobs.ops.conjugate_gradient import cg_bytes, masked_cg
from cuobs.ops.factors import upper_solve
from cuobs.ops.products import matmul
from cuobs.ops.sums import inner
from cuobs.ops.systems import factor_solve_bytes, masked_factor_solve

# Residuals to stop at, by the norm of the target; both with columns scaled to a unit diagonal of H.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
# Share of the damped loss that an iteration must still gain: about ten times as much is left then.
SETTLED = {"float32": 5e-4, "float64": 0.0}
# Iterations that the conjugate gradients take to get there on layers of language models.
ITERATIONS = {"float32": 40, "float64": 500}
# Of rows spread over the weight, the share of their loss by which they may be away from the best
# weights as far as `excess` can tell; it overestimates, by 2 to 10 times on layers of models.
SAMPLE, CERTAIN = 32, 0.04
# Further descents go on until an iteration gains this much less.
FURTHER = 1e-2


def resolve(problem, mask, start=None):
    """The weights that minimise the damped loss for a mask: Wp_S Hλ_SS = (W* Hλ)_S in each row.

    Where rows are few or short, a factor of each; else conjugate gradients on all rows at once. In
    float32 these end where `excess` says that no more than `CERTAIN` of the loss is left above the
    least, and descend again from the true residual while it is more: once as they are, then with
    all digits of float32, which on a GPU begin anew where tensor cores had a part. Layers of models
    are content with the first descent; each further one takes as long again or longer.

    Parameters
    ----------
    problem : Problem
    mask : array of bool, shape (M, K)
        True = kept, the set S of each row.
    start : array, shape (M, K), optional
        Weights to start from, the target by default.

    Returns
    -------
    weight : array, shape (M, K)
    converged : bool
        Whether the loss is the least for the mask, to within a few percent of it in float32.

    References
    ----------
    .. [1] Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    dtype = problem.dtype.name
    xp, target = problem.xp, problem.W
    M, K = mask.shape
    on_gpu = device_name(xp) == "cuda"
    # Not asked on a GPU: it would be waited for.
    if not on_gpu and _by_factors(int(mask.sum()) / M, K, dtype):
        return _factor_rows(problem, mask, start), True

    def begin():
        return xp.where(mask, target if start is None else start, 0)

    X, converged = _descend(problem, mask, begin(), problem.precision)
    if dtype == "float64" or excess(problem, mask, X) <= CERTAIN:
        return X, converged
    # Again from the true residual, in which no rounding has added up.
    X, converged = _descend(problem, mask, X, problem.precision, further=True)
    left = excess(problem, mask, X)
    if left > CERTAIN:
        if on_gpu and problem.precision == "tensor":
            # What tensor cores leave can be far off: with all digits from the beginning.
            X, _ = _descend(problem, mask, begin(), "fp32")
        X, converged = _descend(problem, mask, X, "fp32", further=True)
        left = excess(problem, mask, X)
    return X, converged and left <= CERTAIN


def _by_factors(kept, K, dtype):
    """Whether the CPU solves rows that keep so many of K columns by a factor each."""
    # That costs kept³/3, an iteration of all rows K² each; both twice that in FLOP.
    return kept**3 / 3 < ITERATIONS[dtype] * K**2


def resolve_bytes(size):
    """Bytes that `resolve` takes beside the problem, the factor R, mask and start."""
    layout, K = size.layout, size.layout.shape[1]
    share, dtype = layout.keep / layout.n_blocks, f"float{8 * size.itemsize}"
    if size.device == "cpu" and _by_factors(K * share, K, dtype):
        kept = layout.column_groups * (layout.columns - layout.pruned_columns[0])
        return 2 * size.weight + factor_solve_bytes(kept, K, size.itemsize)
    # X and the residual to start from.
    return 2 * size.weight + cg_bytes(*layout.shape, size.itemsize)


def warn_unconverged(dtype, name="hessian"):
    """Say that weights may lose more than they need to, by a Hessian of a name."""
    validation.warn(
        f"{name}: found one on which conjugate gradients did not converge to the best weights in "
        f"{dtype}, expected a larger damp (0.01 is usual) or dtype='float64'"
    )


def _descend(problem, mask, X, precision, further=False):
    """Conjugate gradients from X on; weights, and whether they converged."""
    target, H, dtype = problem.W, problem.H, problem.dtype.name
    expected = ITERATIONS[dtype]
    away = target - X
    # What is left where it has settled is less than what tensor cores round.
    residual = matmul(away, H, "fp32" if further else precision)
    energy = inner(away, residual)
    squares = problem.xp.multiply(target, target, out=away)
    squares *= H.diagonal()
    limit = TOLERANCE[dtype] ** 2 * squares.sum(1)
    del away, squares
    return masked_cg(
        H,
        residual,
        mask,
        X,
        limit=limit,
        max_iterations=10 * len(H),
        settled=SETTLED[dtype] * (FURTHER if further else 1),
        energy=energy,
        precision=precision,
        progress=lambda done: problem.settings.report(min(done, expected), expected),
    )


def excess(problem, mask, X):
    """At most this share of the damped loss is more than the least for the mask, in some rows.

    With r the residual (W* − X) H on the kept columns S, a row loses r (H_SS)⁻¹ rᵀ more than the
    best weights do, and that is r H⁻¹ rᵀ = ‖R⁻¹ rᵀ‖² at most, as H⁻¹ is (H_SS)⁻¹ there and
    something positive semidefinite.
    """
    rows = slice(None, None, -(-len(X) // SAMPLE))
    # Copies: whole arrays are taken by kernels that are there already.
    target, X, mask = problem.W[rows].copy(), X[rows].copy(), mask[rows].copy()
    away = target - X
    residual = matmul(away, problem.H)
    lost = inner(away, residual)
    above = upper_solve(problem.R, (residual * mask).T)
    above = inner(above, above)
    # No residual is smaller than its rounding.
    diagonal = problem.xp.broadcast_to(problem.H.diagonal(), target.shape)
    rounding = TOLERANCE["float32"] ** 2 * inner(target * target, diagonal)
    return above / lost if above > rounding and lost > 0 else 0.0


def _factor_rows(problem, mask, start):
    G = problem.W @ problem.H
    out = np.zeros_like(problem.W)
    held = G.nbytes + out.nbytes + mask.nbytes + (0 if start is None else start.nbytes)
    each = factor_solve_bytes(int(mask.sum(1).max()), len(problem.H), out.itemsize)

    def solve(begin, end):
        masked_factor_solve(problem.H, G[begin:end], mask[begin:end], out=out[begin:end])

    run_batches(solve, len(mask), problem, bytes_per_worker=each, held=held)
    return out
