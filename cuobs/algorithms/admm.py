"""ADMM: mask and weights together, by alternating directions."""

import math
from typing import NamedTuple

from cuobs.algorithms.admm_ops import project_update, ridge_right_side
from cuobs.arrays import largest
from cuobs.footprint import Memory
from cuobs.ops.products import gemm, matmul, tensor_operand
from cuobs.ops.projection import project_mask, projection_bytes
from cuobs.problem import Pruned
from cuobs.recipe import Method, Option


class Schedule(NamedTuple):
    """How the penalty ρ grows.

    Attributes
    ----------
    start : float
        ρ of the first step.
    growth : tuple of float
        Factors for a step in which more than 10%, more than 0.5% and less of the mask changed.
    """

    start: float
    growth: tuple


SCHEDULES = {
    "default": Schedule(0.1, (1.06, 1.04, 1.03)),
    "slow": Schedule(0.1, (1.04, 1.02, 1.02)),
}
# An inverse is made for a ρ this much ahead and used up to one this much beyond it. A correction
# converges while ρ is below twice that of its inverse; beyond once it over-relaxes, which helps.
AHEAD = 1.2
LIMIT = 1.7
MIN_STEPS = 30
MAX_STEPS = 300
# Stop when less than this share of the pruned elements changed in a step.
SETTLED = 3e-4
# A step after one in which more than so many times this changed is not the last.
NEAR = 1.5


def admm(problem, schedule="default"):
    """Split the problem into a ridge solve and a projection that pull each other together.

    With columns scaled to a unit diagonal of H and G = W H, each step solves
    B (H + ρI) = G − V + ρD, projects D = project(B + V/ρ), and updates V ← V + ρ(B − D). The
    inverse need not follow ρ: that of another ρ corrects the last B by one residual.

    Parameters
    ----------
    problem : Problem
    schedule : {"default", "slow"}
        "slow" takes more steps, half as many again to twice, for a loss 0.3 to 1.6% lower.

    References
    ----------
    .. [1] Meng, Behdin, Wang, Mazumder, "ALPS: improved optimization for highly sparse one-shot
       pruning for large language models", NeurIPS 2024.
    """
    xp, layout, precision = problem.xp, problem.layout, problem.precision
    H, scale = _scaled(problem)
    W = problem.W * scale
    unit = _unit(W)
    W /= unit
    scale /= unit
    G = matmul(W, H, precision)
    H_operand = tensor_operand(H, precision)
    mask = xp.zeros(W.shape, bool)
    n_kept = project_mask(W, mask, layout)
    B, D, V, product = W, W * mask, xp.zeros_like(W), xp.empty_like(W)
    # Operands as tensor cores take them, where they do.
    B_operand = tensor_operand(B, precision)
    right, operand = (product, None) if B_operand is B else (xp.empty_like(B_operand), B_operand)
    multiply = gemm.prepared(B_operand, H_operand, product, precision=precision)
    turn = ridge_right_side.prepared(D, V, G, B, product, right)
    update = project_update.prepared(B, V, D, mask, operand, layout)
    settings = problem.settings
    n_pruned = settings.over_all_rows(mask.size - n_kept)
    rho, growth = SCHEDULES[schedule]
    correct, inverted, share = None, 0.0, 1.0
    multiply()
    for step in range(MAX_STEPS):
        if rho > LIMIT * inverted:
            # The last inverse goes before the next comes.
            correct, inverted = None, AHEAD * rho
            A = tensor_operand(_shifted_inverse(problem, H, inverted), precision)
            correct = gemm.prepared(right, A, B, beta=1, precision=precision)
            del A
        turn(rho)
        correct()
        changed = update(rho)
        # The next step's product is under way while this one's count is waited for.
        goes_on = step + 1 < MIN_STEPS or share > NEAR * SETTLED
        if goes_on:
            multiply()
        share = settings.over_all_rows(int(changed)) / n_pruned
        settings.report(min(step + 1, MIN_STEPS), MIN_STEPS + 1)
        if step + 1 >= MIN_STEPS and share < SETTLED:
            break
        if not goes_on:
            multiply()
        rho *= growth[0] if share > 0.1 else growth[1] if share > 0.005 else growth[2]
    project_mask(B, mask, layout)
    B /= scale
    return Pruned(mask, B)


def _scaled(problem):
    """H with a unit diagonal, and the root of its diagonal."""
    scale = problem.xp.sqrt(problem.H.diagonal())
    H = problem.H / scale
    H /= scale[:, None]
    return H, scale


def inverts(problem, schedule):
    """What the first step inverts."""
    H, _ = _scaled(problem)
    H.ravel()[:: len(H) + 1] += AHEAD * SCHEDULES[schedule].start
    return H


def _unit(W):
    """The power of two in whose terms W suits float16: far from its largest and smallest number.

    Rows whose weights are below 1e-8 of the largest keep fewer digits there.
    """
    size = largest(W)
    return 2.0 ** max(math.frexp(size)[1] - 10, -60) if size else 1.0


def _shifted_inverse(problem, H, rho):
    """(H + ρI)⁻¹; the diagonal of H is changed meanwhile."""
    diagonal = H.ravel()[:: len(H) + 1]
    own = diagonal.copy()
    diagonal += rho
    try:
        return problem.inverse(H)
    finally:
        diagonal[:] = own


def memory(size, schedule):
    """H with a unit diagonal and, of H + ρI, the inverse or what it comes from; six weights."""
    operands = size.operand(size.matrix + 2 * size.weight)
    inverted = 3 * size.matrix + size.operand(size.matrix)
    applied = 2 * size.matrix + max(size.product, size.mask + projection_bytes(size))
    return Memory(5 * size.weight + size.mask + operands + max(inverted, applied))


METHOD = Method(
    "admm",
    "alternating directions towards mask and weights together",
    admm,
    (Option("schedule", str, tuple(SCHEDULES), "default",
            "How the penalty grows; slow is better and takes longer."),),
    resolves=True,
    memory=memory,
    by_row=True,
    operations=(6, 180),
    held=(8, 10),
    inverts=inverts,
)  # fmt: skip
