"""OBS span by span: compensation to the right, each finished span eliminated from C."""

from cuobs.footprint import Memory
from cuobs.ops.products import gemm
from cuobs.ops.selection import mask_bytes, scope_blocks, select_mask
from cuobs.ops.sweep import scope_solutions, solutions_bytes, span_inverses
from cuobs.problem import Pruned
from cuobs.recipe import Method, Option


def obs_split(problem, splits=64):
    """All masks from the first C, then `obs-full`'s update span by span.

    Parameters
    ----------
    problem : Problem
    splits : int
        Spans, of as many scopes each as divide the columns evenly; the last may be shorter.
    """
    mask = problem.xp.empty(problem.W.shape, bool)
    select_mask(problem.by_scope(problem.W), problem.scope_blocks, problem.layout, mask)
    return sweep_spans(problem, splits, mask)


def obs_interleaved(problem, splits=64):
    """`obs-split` with the masks of each span chosen from its current weights and C.

    Parameters
    ----------
    problem : Problem
    splits : int
        Spans, of as many scopes each as divide the columns evenly; the last may be shorter.
    """
    layout = problem.layout
    m, r, c = layout.row_groups, layout.rows, layout.columns

    def choose_mask(values, C, out):
        w = values.reshape(m, r, -1, c).transpose(3, 0, 1, 2)
        select_mask(w, scope_blocks(C, c), layout, out)

    return sweep_spans(problem, splits, problem.xp.empty(problem.W.shape, bool), choose_mask)


def sweep_spans(problem, splits, mask, choose_mask=None):
    """Prune span by span, from the reversed factor R of H.

    The columns from a on have the inverse Hessian of R[a:, a:] once those before are eliminated,
    so a span g needs only its own block, C_gg = R_gg⁻ᵀ R_gg⁻¹, and T = Σ e R[left, :], the sum
    over the deviations e so far: its compensated weights are W_g + T_g R_gg⁻¹.

    Parameters
    ----------
    problem : Problem
    splits : int
    mask : array of bool, shape (M, K)
        True = kept.
    choose_mask : callable, optional
        ``choose_mask(values, C, out)`` writes a span's mask from its compensated weights and their
        inverse Hessian before the span is pruned.
    """
    xp, W = problem.xp, problem.W
    R = xp.ascontiguousarray(problem.R)
    precision = problem.precision
    width = span_width(problem.layout, splits)
    T = xp.zeros_like(W)
    weight = xp.empty_like(W)
    starts = range(0, W.shape[1], width)
    for a, (U, C) in zip(starts, span_inverses(R, width, precision), strict=True):
        span, right = slice(a, a + width), slice(a + width, None)
        values = W[:, span].copy()
        gemm(T[:, span], U, values, beta=1, precision=precision)
        if choose_mask:
            choose_mask(values, C, mask[:, span])
        multipliers = scope_solutions(values, C, mask[:, span], problem.layout, precision)
        gemm(multipliers, C, values, alpha=-1, beta=1, precision=precision)
        # What is passed on is the deviation before the pruned entries are set to 0.
        gemm(W[:, span] - values, R[span, right], T[:, right], beta=1, precision=precision)
        weight[:, span] = values
        problem.settings.report(min(a + width, W.shape[1]), W.shape[1])
    weight *= mask
    return Pruned(mask, weight)


def span_width(layout, splits):
    """Columns of a span."""
    return -(-layout.column_groups // splits) * layout.columns


def split_memory(size, splits):
    """`memory`, and R⁻¹ with its scopes' blocks, of which all masks are chosen first."""
    more = size.matrix + size.layout.columns * size.layout.shape[1] * size.itemsize
    most, kept = memory(size, splits)
    choosing = kept + size.mask + mask_bytes(size)
    return Memory(more + max(most, choosing), more + kept)


def memory(size, splits):
    """R twice, the inverses of all spans, T, mask, weight and what is added to T or a span."""
    M, K = size.layout.shape
    width = min(span_width(size.layout, splits), K)
    # Each span has two arrays, which are objects of Python.
    spans = 2 * K * width * size.itemsize + 1024 * (K // width)
    span = M * width * size.itemsize
    chosen = mask_bytes(size, width // size.layout.columns)
    rest = size.product * (K - width) // K
    work = span + max(chosen, solutions_bytes(size, width), span + max(span, rest))
    return Memory(
        2 * size.matrix + spans + 2 * size.weight + size.mask + work, size.matrix
    )


SPLITS = Option("splits", int, default=64, help="Spans of columns.")
SPLIT = Method("obs-split", "obs-full span by span, C updated between", obs_split, (SPLITS,),
               memory=split_memory, by_row=True, operations=(2, 4))
METHOD = Method(
    "obs-interleaved", "obs-split, masks chosen span by span", obs_interleaved, (SPLITS,),
    memory=memory, by_row=True, operations=(2, 4),
)
