"""OBS span by span: compensation to the right, each finished span eliminated from C."""

from cuobs.methods.obs_local import select
from cuobs.ops.cholesky import upper_inverse
from cuobs.ops.selection import scope_blocks
from cuobs.ops.sweep import scope_solutions
from cuobs.problem import Pruned


def obs_split(problem, splits=64):
    """All masks from the first C, then `obs-full`'s update span by span.

    Parameters
    ----------
    problem : Problem
    splits : int
        Spans, of as many scopes each as divide the columns evenly; the last may be shorter.
    """
    mask = select(problem.by_scope(problem.W), problem.scope_blocks, problem.layout)
    return sweep_spans(problem, splits, lambda a, b, values, C: mask[:, a:b])


def obs_interleaved(problem, splits=64):
    """`obs-split` with the masks of each span chosen from its current weights and C.

    Parameters
    ----------
    problem : Problem
    splits : int
        Spans, of as many scopes each as divide the columns evenly; the last may be shorter.
    """
    layout = problem.layout
    (R, r), (_, c) = layout.rows.shape, layout.columns.shape

    def choose_mask(a, b, values, C):
        n = (b - a) // c
        w = values.reshape(R, r, n, c).transpose(3, 0, 1, 2)
        return select(w, scope_blocks(C, c), layout)

    return sweep_spans(problem, splits, choose_mask)


def sweep_spans(problem, splits, mask_of):
    """Prune span by span, from the reversed factor R of H.

    The columns from a on have the inverse Hessian of R[a:, a:] once those before are eliminated,
    so a span g needs only its own block, C_gg = R_gg⁻ᵀ R_gg⁻¹, and T = Σ e R[left, :], the sum
    over the deviations e so far: its compensated weights are W_g + T_g R_gg⁻¹.

    Parameters
    ----------
    problem : Problem
    splits : int
    mask_of : callable
        ``mask_of(a, b, values, C)`` gives the mask of columns a to b from their compensated
        weights and their inverse Hessian.
    """
    xp, W, R = problem.xp, problem.W, problem.R
    G, c = problem.layout.columns.shape
    width = -(-G // splits) * c
    T = xp.zeros_like(W)
    weight = xp.empty_like(W)
    mask = xp.empty(W.shape, bool)
    for a in range(0, W.shape[1], width):
        b = min(a + width, W.shape[1])
        U = upper_inverse(R[a:b, a:b])
        C = U.T @ U
        values = W[:, a:b] + T[:, a:b] @ U
        mask[:, a:b] = mask_of(a, b, values, C)
        multipliers = scope_solutions(values, C, mask[:, a:b], problem.layout)
        # What is passed on is the deviation before the pruned entries are set to 0.
        updated = values - multipliers @ C
        T[:, b:] += (W[:, a:b] - updated) @ R[a:b, b:]
        weight[:, a:b] = updated * mask[:, a:b]
        problem.settings.report(b, W.shape[1])
    return Pruned(mask, weight)
