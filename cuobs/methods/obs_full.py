"""OBS with compensation everywhere, the inverse Hessian frozen."""

from cuobs.methods.obs_local import select
from cuobs.ops.sweep import scope_solutions
from cuobs.problem import Pruned


def obs_full(problem):
    """Take all masks from the first C, then remove scopes one after the other, left to right.

    Each removal, λ = w_P (C_PP)⁻¹ with w as it then is, changes every column not pruned yet by
    −λ C_P,:. One sweep finds all λ, one product applies them.
    """
    mask = select(problem.by_scope(problem.W), problem.scope_blocks, problem.layout)
    multipliers = scope_solutions(problem.W, problem.C, mask, problem.layout)
    return Pruned(mask, (problem.W - multipliers @ problem.C) * mask)
