"""OBS in an order of cost, with one inverse Hessian for all rows."""

import numpy as np

from cuobs.arrays import to_numpy
from cuobs.footprint import Memory
from cuobs.ops.conjugate_gradient import cg_bytes, masked_cg
from cuobs.ops.products import gemm, matmul
from cuobs.ops.schur import eliminate
from cuobs.ops.selection import expand, mask_bytes, scope_blocks, select
from cuobs.problem import Pruned
from cuobs.recipe import Method, Option

# The joint solves are systems of a group's size; the tolerance is that of the dtype.
TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
ORDERS = ("largest", "left", "smallest")


def obs_ordered(problem, group=None, order="largest"):
    """Prune the scopes group by group, dearest first, and eliminate each group from C.

    For every group, masks and costs are found again from the current W and C; the `group` scopes
    whose cost, summed over all rows, is largest (or smallest, or leftmost) are pruned by a joint
    solve over each row's pruned set, and their columns are eliminated from C.

    Parameters
    ----------
    problem : Problem
    group : int, optional
        Scopes in a Schur update; a tenth of all by default.
    order : {"largest", "left", "smallest"}
    """
    xp, layout = problem.xp, problem.layout
    m, r, c = layout.row_groups, layout.rows, layout.columns
    scopes, M = layout.column_groups, m * r
    group, tolerance = group or default_group(scopes), TOLERANCE[problem.dtype.name]
    # Of the scopes that are left; what shrinks is taken into another array before it is written.
    W, C = problem.W, problem.C
    left = np.arange(scopes)
    weight = xp.empty_like(W)
    mask = xp.empty(W.shape, bool)
    cost, converged = xp.zeros(M, "float64"), True
    while len(left):
        n = len(left)
        w = W.reshape(m, r, n, c).transpose(3, 0, 1, 2)
        pruned, best, _ = select(w, scope_blocks(C, c), layout)
        chosen = _first(best, group, order)
        rest = np.setdiff1d(np.arange(n), chosen)
        columns, others = (xp.asarray(_columns(part, c)) for part in (chosen, rest))
        kept = ~expand(pruned[:, :, xp.asarray(chosen)], layout).reshape(M, -1)

        w = W[:, columns]
        rows = C[columns]
        C_group, cross = rows[:, columns], rows[:, others]
        # tf32 and float16 are too short for this tolerance.
        limit = tolerance**2 * (w * w / C_group.diagonal() * ~kept).sum(1)
        multipliers, solved = masked_cg(
            C_group, w, ~kept, limit=limit, max_iterations=20 * len(columns), precision="fp32"
        )
        converged = converged and solved
        deviation = matmul(multipliers, C_group, "fp32")
        cost += xp.einsum("mk,mk->m", multipliers, w)
        final = xp.asarray(_columns(left[chosen], c))
        weight[:, final] = (w - deviation) * kept
        mask[:, final] = kept
        W = W[:, others]
        gemm(multipliers, cross, W, alpha=-1, beta=1, precision=problem.precision)
        C = C[others]
        C = C[:, others]
        eliminate(C, C_group, cross, problem.precision)
        left = left[rest]
        problem.settings.report(scopes - len(left), scopes)
    return Pruned(mask, weight, cost, converged)


def default_group(scopes):
    """A tenth of the scopes, at least one."""
    return max(1, scopes // 10)


def _first(costs, group, order):
    """Positions, ascending, of the scopes to prune next, by what row groups lose in them."""
    n = costs.shape[1]
    if order == "left" or n <= group:
        return np.arange(min(group, n))
    key = to_numpy(costs.sum(0, dtype="float64"))
    key = -key if order == "largest" else key
    return np.sort(np.argsort(key, kind="stable")[:group])


def _columns(scopes, c):
    """Columns of scopes, in layout order."""
    return (scopes[:, None] * c + np.arange(c)).ravel()


def memory(size, group, order):
    """R, R⁻¹ and C, then R and C; weight and mask, and the first two groups' work."""
    K, c = size.layout.shape[1], size.layout.columns
    p = min(group or default_group(size.layout.column_groups), size.layout.column_groups) * c
    first = _group_bytes(size, K, p, owned=False)
    second = _group_bytes(size, max(K - p, 0), p, owned=True)
    work = size.weight + size.mask + max(first, second)
    return Memory(max(3 * size.matrix, 2 * size.matrix + work), 2 * size.matrix)


def _group_bytes(size, columns, p, owned):
    """Of a group of p columns among those that are left, whose C and W are the loop's own or the
    problem's."""
    M, (m, s) = size.layout.shape[0], (size.layout.row_groups, size.itemsize)
    left = max(columns - p, 0)
    scopes = m * columns // size.layout.columns
    C, W = owned * columns**2 * s, owned * M * columns * s
    selected = scopes * (size.layout.n_blocks + 2 * s)
    # Rows of C and what lies between group and others; multipliers, deviations and weights.
    group = p * (columns + p + left) * s + M * p * (3 * s + 1)
    rest = M * left * s
    return max(
        C + W + selected + mask_bytes(size),
        C + W + selected + group + cg_bytes(M, p, s),
        C + selected + group + rest + max(W, size.product and rest),
        C + selected + group + rest + left * columns * s,
        selected + group + rest + left * (left + max(columns, left + p)) * s,
    )


GROUP = Option(
    "group", int, help="Scopes between two Schur updates.", computed="a tenth of them"
)
METHOD = Method(
    "obs-ordered",
    "groups of scopes, dearest first, one C for all rows",
    obs_ordered,
    (GROUP, Option("order", str, ORDERS, "largest", "Which scopes go first.")),
    memory=memory,
)
