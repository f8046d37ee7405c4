"""True OBS: every row has its own inverse Hessian and its own order of scopes."""

import math
from dataclasses import dataclass, replace

import numpy as np

from cuobs import arrays
from cuobs.algorithms import true_obs_ops as ops
from cuobs.algorithms.obs_ordered import GROUP, default_group
from cuobs.batches import Workspace, run_batches
from cuobs.footprint import Memory
from cuobs.ops.factors import cholesky_inverse
from cuobs.ops.pieces import piece_bytes
from cuobs.ops.products import CHUNK, tensor_operand
from cuobs.ops.selection import scope_blocks, select, select_bytes
from cuobs.problem import Pruned
from cuobs.recipe import Method, Option

# Z is made wide enough for this share of all columns times all that a row may lose. It outgrows
# that two or three times, as columns get fewer and Z wider.
SHARE = 0.4
ORDERS = ("gap", "left", "shared", "largest", "smallest")
# Rows of a batch at most: a grid of blocks has no more along its second axis.
MAX_ROWS = 65535


def true_obs(problem, group=None, order="gap"):
    """Prune each row's scopes group by group, in that row's own order.

    The weights are the exact solution for the mask, so a scope that has been decided is
    forgotten, its kept columns too, and the weights are found once at the end by the exact
    re-solve. With Z the factor of all columns pruned so far, a group with pruned columns P needs
    A = C_PP − Z_P Z_Pᵀ = L Lᵀ and, on the columns still open, Zn = L⁻¹ (C_P: − Z_P Zᵀ). With
    y = L⁻¹ w_P, the row's cost grows by ‖y‖², w −= y Zn, the scopes' diagonal blocks of the
    inverse Hessian lose those of Znᵀ Zn, and Zn is appended to Z.

    Parameters
    ----------
    problem : Problem
    group : int, optional
        Scopes in a Schur update; a tenth of all by default.
    order : {"gap", "left", "shared", "largest", "smallest"}
        Which scopes come first: those whose second-best mask costs most more than the best
        ("gap"); from left to right; one order for all rows by the first summed costs, largest
        first ("shared"); largest or smallest best cost of the row, found again for every group.

    References
    ----------
    .. [1] Frantar, Alistarh, "Optimal Brain Compression", NeurIPS 2022.
    """
    xp, layout = problem.xp, problem.layout
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    # Scaled to a unit diagonal, every entry of C and Z lies in [-1, 1].
    scale = 1 / xp.sqrt(problem.C.diagonal())
    C = problem.C * scale
    C *= scale[:, None]
    # The weights are found by H alone.
    del problem.C
    W = (problem.W * scale).reshape(m, r, n, c)
    rank = _shared_rank(W, C, layout) if order == "shared" else xp.arange(n)
    run = _Run(
        C, tensor_operand(C, problem.precision), problem.precision, layout,
        min(group or default_group(n), n), order, rank.astype(C.dtype), Workspace(),
    )
    mask = xp.empty((m, r, n, c), bool)
    cost = xp.zeros((m, r), C.dtype)

    def prune(start, stop):
        rows = slice(start, stop)
        try:
            failed = _prune_rows(run, W[rows], mask[rows], cost[rows])
            # Where float16 is too short for a row, float32 is asked.
            for first in (start + failed).tolist():
                rows = slice(first, first + 1)
                if run.C_factor is run.C or _prune_exactly(run, W[rows], mask[rows], cost[rows]):
                    raise np.linalg.LinAlgError
        except MemoryError:
            run.space.clear()
            raise
        except np.linalg.LinAlgError:
            raise np.linalg.LinAlgError(
                "hessian: found that what the pruned columns leave of it is not positive definite "
                f"in {C.dtype}, expected a larger damp (0.01 is usual) or dtype='float64'"
            ) from None

    held = {id(a): a.nbytes for a in (C, run.C_factor, W, mask)}
    shape = layout, run.group, C.dtype.itemsize
    each = _bytes_per_row(*shape, run.C_factor.dtype.itemsize, arrays.device_name(xp))
    run_batches(
        prune, m, problem, r * each, _bytes_per_worker(*shape), sum(held.values()),
        unit=CHUNK // math.gcd(CHUNK, r), most=max(1, MAX_ROWS // r),
    )  # fmt: skip
    return Pruned(mask.reshape(m * r, n * c), cost=cost.ravel())


@dataclass(frozen=True)
class _Run:
    """What all batches share: C with a unit diagonal, and the same in the dtype of the factor."""

    C: object
    C_factor: object
    precision: str
    layout: object
    group: int
    order: str
    rank: object
    space: Workspace


def _prune_rows(run, W, mask, cost):
    """Masks (True = kept), shape (m, r, n, c), and costs, shape (m, r), of a batch of row groups.

    Returns the row groups in which a factorisation failed.
    """
    xp, layout, space = arrays.namespace(W), run.layout, run.space
    m, r, n, c = W.shape
    sizes, area = _plan(layout, run.group)
    dtype = run.C_factor.dtype
    for name, size in sizes.items():
        rows = ops.rows_at_once(W, m * r) if name == "Y" else m * r
        space.array(name, (rows, size), dtype, xp)
    # Of the open scopes: which they are, weights and diagonal blocks of the inverse Hessian,
    # place-major, and the factor of all columns pruned so far.
    scopes = xp.tile(xp.arange(n, dtype=np.int32), (m, 1))
    w = xp.array(W.transpose(3, 0, 1, 2), order="C")
    own = scope_blocks(run.C, c)[:, :, None, None]
    D = xp.array(xp.broadcast_to(own, (c, *w.shape)), order="C")
    starts = None if ops.alike(layout) else xp.zeros(m * r, np.int32)
    factor = ops.Factor(xp.empty((m * r, n * c, 0), dtype), starts=starts)
    cost[...] = 0
    cost = cost.reshape(m * r)
    # Only where rows lose different numbers of columns, each group asks a GPU for the most.
    info = ops.notes(W, m * r)
    for left in range(n - run.group, -run.group, -run.group):
        size = run.group + min(left, 0)
        blocks, best, gap = select(w, D, layout)
        key = {"largest": -best, "smallest": best, "gap": -gap}.get(run.order)
        chosen = ops.first_scopes(run.rank[scopes] if key is None else key, scopes, size)
        places, columns, weights, counts = ops.take_pruned(
            blocks, chosen, scopes, w, layout, mask
        )
        p = columns.shape[1]
        Z_P = space.array("Z_P", (m * r, p, factor.used), dtype, xp)
        ops.gather_factor(factor.Z, places, factor.used, out=Z_P)
        A = ops.group_blocks(run.C, columns, Z_P, run.precision)
        inverse = cholesky_inverse(A, info, run.precision)
        y, inverse = ops.solve_group(inverse, weights, cost, dtype)
        if left <= 0:
            break
        scopes, w, D = ops.drop_scopes(chosen, scopes, w, D, factor)
        ops.make_room(factor, p, area, space)
        Zn = ops.append_factor(
            run.C_factor, scopes, columns, Z_P, inverse, counts, factor, space, run.precision
        )
        ops.update_scopes(w, D, Zn, y)
    return np.flatnonzero([] if info is None else arrays.to_numpy(info).reshape(m, r).any(1))


def _prune_exactly(run, W, mask, cost):
    """`_prune_rows` without tensor cores and float16."""
    exact = replace(run, C_factor=run.C, precision="fp32")
    return _prune_rows(exact, W, mask, cost).size


def _plan(layout, group):
    """Elements that a row needs in each buffer, and the area that its Z spans."""
    n, c = layout.column_groups, layout.columns
    K = n * c
    most = layout.pruned_columns[1]
    # A group takes `aligned` columns of Z, few as they may be.
    area = int(SHARE * K * n * ops.aligned(group * most) / group)
    Z = Y = Z_P = used = room = 0
    for left in range(n - group, -group, -group):
        p = ops.aligned((group + min(left, 0)) * most)
        rows = max(left, 0) * c
        Z_P = max(Z_P, p * used)
        Y = max(Y, p * rows)
        if left > 0 and used + p > room:
            room = ops.room_for(used + p, rows, area)
            Z = max(Z, rows * (room + ops.ALIGN))
        used += p
    return {"Z0": Z, "Z1": Z, "Y": Y, "Z_P": Z_P} | ({} if ops.alike(layout) else {"Zn": Y}), area


def _bytes_per_row(layout, group, itemsize, short, device):
    """Bytes that a row of a batch takes at most; `short` are those of a number in the factor."""
    n, c = layout.column_groups, layout.columns
    p = ops.aligned(group * layout.pruned_columns[1])
    sizes, _ = _plan(layout, group)
    on_cpu = device == "cpu"
    buffers = (sum(sizes.values()) - on_cpu * sizes["Y"]) * short
    # A = LLᵀ, halves of it while it is factored, L⁻¹ again in the factor's dtype.
    factors = p * p * (2 * itemsize + short)
    # Weights twice, blocks, and what a selection returns; a kernel makes nothing else on the way.
    scopes = n * ((c * c + 2 * c + 8) * itemsize + layout.n_blocks + 24)
    on_the_way = select_bytes(layout, itemsize, own=True) if on_cpu else (
        n * len(layout.candidates) * itemsize
    )
    return buffers + factors + scopes + on_the_way + p * (itemsize + 16 + 40 * on_cpu)


def _bytes_per_worker(layout, group, itemsize):
    """What a thread on the CPU takes for the one row that it is at."""
    K = layout.column_groups * layout.columns
    p = ops.aligned(group * layout.pruned_columns[1])
    # Rows of C, Y and what it loses; the places of A and what that loses.
    return 3 * p * K * itemsize + p * p * (16 + itemsize)


def memory(size, group, order):
    """R, R⁻¹ and C, then R and a scaled C; the scaled weight, mask, and a row."""
    layout, s = size.layout, size.itemsize
    n, groups = layout.column_groups, layout.row_groups
    group = min(group or default_group(n), n)
    short = s - size.operand(s)
    row = layout.rows * _bytes_per_row(layout, group, s, short, size.device)
    row += (size.device == "cpu") * _bytes_per_worker(layout, group, s)
    if order == "shared":
        each = select_bytes(layout, s)
        ranking = groups * n * (layout.n_blocks + 2 * s) + piece_bytes(groups, each, size.device)
        row = max(row, ranking)
    work = size.operand(size.matrix) + size.weight + size.mask + row
    return Memory(max(3 * size.matrix, 2 * size.matrix + work), size.matrix)


def _shared_rank(W, C, layout):
    """Place of each scope in the published order: largest summed cost under the first C first."""
    xp = arrays.namespace(W)
    w = W.transpose(3, 0, 1, 2)
    _, best, _ = select(w, scope_blocks(C, len(w)), layout)
    order = xp.argsort(-best.sum(0, dtype="float64"), kind="stable")
    return xp.argsort(order)


def by_row(order, **_):
    """Whether each row has an order of its own."""
    return order != "shared"


METHOD = Method(
    "true-obs",
    "every row has its own C and its own order",
    true_obs,
    (GROUP, Option("order", str, ORDERS, "gap", "Which scopes go first.")),
    resolves=True,
    memory=memory,
    by_row=by_row,
)
