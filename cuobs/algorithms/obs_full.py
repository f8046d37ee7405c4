"""OBS with compensation everywhere, the inverse Hessian frozen."""

from cuobs.ops.products import gemm
from cuobs.ops.selection import select_mask
from cuobs.ops.sweep import scope_solutions
from cuobs.problem import Pruned
from cuobs.recipe import Method


def obs_full(problem):
    """Take all masks from the first C, then remove scopes one after the other, left to right.

    Each removal, λ = w_P (C_PP)⁻¹ with w as it then is, changes every column not pruned yet by
    −λ C_P,:. One sweep finds all λ, one product applies them.
    """
    W, C, layout = problem.W, problem.C, problem.layout
    mask = problem.xp.empty(W.shape, bool)
    select_mask(problem.by_scope(W), problem.scope_blocks, layout, mask)
    multipliers = scope_solutions(W, C, mask, layout, problem.precision)
    weight = W.copy()
    gemm(multipliers, C, weight, alpha=-1, beta=1, precision=problem.precision)
    weight *= mask
    return Pruned(mask, weight)


METHOD = Method("obs-full", "obs-local's masks, compensation everywhere, C frozen", obs_full)
