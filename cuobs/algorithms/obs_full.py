"""OBS with compensation everywhere, the inverse Hessian frozen."""

from cuobs.footprint import Memory
from cuobs.ops.products import gemm
from cuobs.ops.selection import mask_bytes, select_mask
from cuobs.ops.sweep import scope_solutions, solutions_bytes
from cuobs.problem import Pruned
from cuobs.recipe import Method


def obs_full(problem):
    """Take all masks from the first C, then remove scopes one after the other, left to right.

    Each removal, λ = w_P (C_PP)⁻¹ with w as it then is, changes every column not pruned yet by
    −λ C_P,:. One sweep finds all λ, one product applies them.
    """
    W, blocks, layout = problem.W, problem.scope_blocks, problem.layout
    C, mask = problem.C, problem.xp.empty(W.shape, bool)
    select_mask(problem.by_scope(W), blocks, layout, mask)
    multipliers = scope_solutions(W, C, mask, layout, problem.precision)
    weight = W.copy()
    gemm(multipliers, C, weight, alpha=-1, beta=1, precision=problem.precision)
    weight *= mask
    return Pruned(mask, weight)


def memory(size):
    """R, R⁻¹ and C, then R and C alone; mask, multipliers, weight and what is added to it."""
    M, K = size.layout.shape
    blocks = size.layout.columns * K * size.itemsize
    kept = 2 * size.matrix + blocks
    work = max(mask_bytes(size), solutions_bytes(size, K), 2 * size.weight + size.product)
    return Memory(max(3 * size.matrix + blocks, kept + size.mask + work), kept)


METHOD = Method(
    "obs-full",
    "obs-local's masks, compensation everywhere, C frozen",
    obs_full,
    memory=memory,
    by_row=True,
    operations=(2, 4),
)
