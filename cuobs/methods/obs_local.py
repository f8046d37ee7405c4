"""OBS with compensation inside each scope only."""

from cuobs.ops.masked_solve import masked_solve
from cuobs.ops.selection import candidate_costs, choose, expand
from cuobs.problem import Pruned


def obs_local(problem):
    """Take each scope's cheapest mask and compensate its loss by the rest of the scope.

    Costs and compensation are those of the frozen inverse Hessian C: removing P costs
    w_P (C_PP)⁻¹ w_Pᵀ, and w −= w_P (C_PP)⁻¹ C_P,: in the scope.

    References
    ----------
    .. [1] Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
       NeurIPS 1992.
    """
    layout = problem.layout
    w, C = problem.by_scope(problem.W), problem.scope_blocks
    mask = select(w, C, layout)
    pruned = ~problem.by_scope(mask)
    shared = C[:, :, None, None]
    multipliers = masked_solve(shared, w, pruned)
    weight = problem.W.copy()
    scoped = problem.by_scope(weight)
    for i in range(len(w)):
        for j in range(len(w)):
            scoped[i] -= multipliers[j] * shared[j, i]
    return Pruned(mask, weight * mask)


def select(w, C, layout):
    """The mask (True = kept), shape (M, n), of the cheapest candidates under C.

    Parameters
    ----------
    w : array, shape (c, R, r, G)
    C : array, shape (c, c, G)
    layout : Layout
    """
    c, R, r, G = w.shape
    pruned, _, _ = choose(candidate_costs(w, C, layout), layout)
    return ~expand(pruned, layout).reshape(R * r, G * c)
