"""OBS with compensation inside each scope only."""

from cuobs.footprint import Memory
from cuobs.ops.pieces import piece_bytes
from cuobs.ops.selection import mask_bytes, select_mask
from cuobs.ops.systems import scope_compensation, solve_bytes
from cuobs.problem import Pruned
from cuobs.recipe import Method


def obs_local(problem):
    """Take each scope's cheapest mask and compensate its loss by the rest of the scope.

    Costs and compensation are those of the frozen inverse Hessian C: removing P costs
    w_P (C_PP)⁻¹ w_Pᵀ, and w −= w_P (C_PP)⁻¹ C_P,: in the scope.

    References
    ----------
    .. [1] Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
       NeurIPS 1992.
    """
    W, C, layout = problem.W, problem.scope_blocks, problem.layout
    mask = problem.xp.empty(W.shape, bool)
    select_mask(problem.by_scope(W), C, layout, mask)
    return Pruned(mask, scope_compensation(W, C, mask))


def memory(size):
    """R, R⁻¹ and the scopes' blocks; mask, weight and a piece of either pass."""
    M, K = size.layout.shape
    c = size.layout.columns
    kept = 2 * size.matrix + c * K * size.itemsize
    solved = piece_bytes(M, K // c * solve_bytes(c, size.itemsize), size.device)
    return Memory(kept + size.mask + max(mask_bytes(size), size.weight + solved), kept)


METHOD = Method(
    "obs-local",
    "exact scope costs, compensation inside each scope",
    obs_local,
    memory=memory,
    by_row=True,
    operations=(1, 1),
)
