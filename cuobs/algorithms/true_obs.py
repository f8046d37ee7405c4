"""True OBS: every row has its own inverse Hessian and its own order of scopes."""

import math
from dataclasses import dataclass, replace

import numpy as np

from cuobs import arrays
from cuobs.algorithms.obs_ordered import GROUP, default_group
from cuobs.batches import Workspace, run_batches
from cuobs.ops import schur
from cuobs.ops.cholesky import cholesky_inverse
from cuobs.ops.gemm import CHUNK
from cuobs.ops.selection import scope_blocks, select
from cuobs.problem import Pruned
from cuobs.recipe import Method, Option

# Z is made wide enough for this share of all columns times all that a row may lose. It outgrows
# that two or three times, as columns get fewer and Z wider.
SHARE = 0.4
ORDERS = ("gap", "left", "shared", "largest", "smallest")


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
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
    # Scaled to a unit diagonal, every entry of C and Z lies in [-1, 1].
    scale = 1 / xp.sqrt(problem.C.diagonal())
    C = problem.C * scale
    C *= scale[:, None]
    W = (problem.W * scale).reshape(R, r, G, c)
    rank = _shared_rank(W, C, layout) if order == "shared" else xp.arange(G)
    run = _Run(
        C, C.astype(schur.factor_dtype(xp, C.dtype), copy=False), layout,
        min(group or default_group(G), G), order, rank.astype(C.dtype), Workspace(),
    )
    mask = xp.empty((R, r, G, c), bool)
    cost = xp.zeros((R, r), C.dtype)

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

    run_batches(prune, R, problem, r * _bytes_per_row(run), unit=CHUNK // math.gcd(CHUNK, r))
    return Pruned(mask.reshape(R * r, G * c), cost=cost.ravel())


@dataclass(frozen=True)
class _Run:
    """What all batches share: C with a unit diagonal, and the same in the dtype of the factor."""

    C: object
    C_factor: object
    layout: object
    group: int
    order: str
    rank: object
    space: Workspace


def _prune_rows(run, W, mask, cost):
    """Masks (True = kept), shape (R, r, G, c), and costs, shape (R, r), of a batch of row groups.

    Returns the row groups in which a factorisation failed.
    """
    xp, layout, space = arrays.namespace(W), run.layout, run.space
    R, r, G, c = W.shape
    sizes, area = _plan(layout, run.group)
    dtype = run.C_factor.dtype
    for name, size in sizes.items():
        space.array(name, (R * r, size), dtype, xp)
    # Of the open scopes: which they are, weights and diagonal blocks of the inverse Hessian,
    # place-major, and the factor of all columns pruned so far.
    scopes = xp.tile(xp.arange(G, dtype=np.int32), (R, 1))
    w = xp.array(W.transpose(3, 0, 1, 2), order="C")
    own = scope_blocks(run.C, c)[:, :, None, None]
    D = xp.array(xp.broadcast_to(own, (c, *w.shape)), order="C")
    alike = schur.pruned_columns(layout)[1]
    factor = schur.Factor(
        xp.empty((R * r, G * c, 0), dtype), starts=None if alike else xp.zeros(R * r, np.int32)
    )
    cost[...] = 0
    cost = cost.reshape(R * r)
    # A GPU is not asked before the end, since each question waits for it; only where rows lose
    # different numbers of columns, each group asks for the most.
    info = None if xp is np else xp.zeros(R * r, np.int32)
    for left in range(G - run.group, -run.group, -run.group):
        size = run.group + min(left, 0)
        blocks, best, gap = select(w, D, layout)
        key = {"largest": -best, "smallest": best, "gap": -gap}.get(run.order)
        chosen = schur.first_scopes(run.rank[scopes] if key is None else key, scopes, size)
        places, columns, weights, counts = schur.take_pruned(
            blocks, chosen, scopes, w, layout, mask
        )
        p = columns.shape[1]
        Z_P = space.array("Z_P", (R * r, p, factor.used), dtype, xp)
        schur.gather_factor(factor.Z, places, factor.used, out=Z_P)
        inverse = cholesky_inverse(schur.group_blocks(run.C, columns, Z_P), info)
        y, inverse = schur.solve_group(inverse, weights, cost, dtype)
        if left <= 0:
            break
        scopes, w, D = schur.drop_scopes(chosen, scopes, w, D, factor)
        schur.make_room(factor, p, area, space)
        Zn = schur.append_factor(
            run.C_factor, scopes, columns, Z_P, inverse, counts, factor, space
        )
        schur.update_scopes(w, D, Zn, y)
    return np.flatnonzero([] if info is None else arrays.to_numpy(info).reshape(R, r).any(1))


def _prune_exactly(run, W, mask, cost):
    """`_prune_rows` without tensor cores and float16."""
    with arrays.tensor_cores(arrays.namespace(W), False):
        return _prune_rows(replace(run, C_factor=run.C), W, mask, cost).size


def _plan(layout, group):
    """Elements that a row needs in each buffer, and the area that its Z spans."""
    K, (G, c) = layout.columns.size, layout.columns.shape
    most, alike = schur.pruned_columns(layout)
    # A group takes `aligned` columns of Z, few as they may be.
    area = int(SHARE * K * G * schur.aligned(group * most) / group)
    Z = Y = Z_P = used = room = 0
    for left in range(G - group, -group, -group):
        p = schur.aligned((group + min(left, 0)) * most)
        n = max(left, 0) * c
        Z_P = max(Z_P, p * used)
        Y = max(Y, p * n)
        if left > 0 and used + p > room:
            room = schur.room_for(used + p, n, area)
            Z = max(Z, n * (room + schur.ALIGN))
        used += p
    return {"Z0": Z, "Z1": Z, "Y": Y, "Z_P": Z_P} | ({} if alike else {"Zn": Y}), area


def _bytes_per_row(run):
    """Memory that a row of a batch takes at most."""
    layout, size = run.layout, run.C.dtype.itemsize
    G, c = layout.columns.shape
    short = run.C_factor.dtype.itemsize
    p = schur.aligned(run.group * schur.pruned_columns(layout)[0])
    buffers = sum(_plan(layout, run.group)[0].values()) * short
    # A = LLᵀ, halves of it while it is factored, L⁻¹ again in the factor's dtype.
    factors = p * p * (2 * size + short)
    # Weights twice, blocks, and what a selection looks at and returns.
    scopes = G * ((c * c + 2 * c + len(layout.candidates) + 8) * size + layout.n_blocks + 8)
    return buffers + factors + scopes + p * (size + 16)


def _shared_rank(W, C, layout):
    """Place of each scope in the published order: largest summed cost under the first C first."""
    xp = arrays.namespace(W)
    w = W.transpose(3, 0, 1, 2)
    _, best, _ = select(w, scope_blocks(C, len(w)), layout)
    order = xp.argsort(-best.sum(0, dtype="float64"), kind="stable")
    return xp.argsort(order)


METHOD = Method(
    "true-obs",
    "every row has its own C and its own order",
    true_obs,
    (GROUP, Option("order", str, ORDERS, "gap", "Which scopes go first.")),
    resolves=True,
)
