"""True OBS: every row has its own inverse Hessian and its own order of scopes."""

from dataclasses import dataclass

import numpy as np

from cuobs.arrays import namespace
from cuobs.batches import run_batches
from cuobs.methods.obs_ordered import default_group
from cuobs.ops import schur
from cuobs.ops.selection import candidate_costs, choose, expand, scope_blocks
from cuobs.problem import Pruned

# Columns of finished scopes are carried along until the live ones are fewer than this share.
COMPACT_BELOW = 0.75


def true_obs(problem, group=None, order="gap"):
    """Prune each row's scopes group by group, in that row's own order.

    The weights are the exact solution for the mask, so a scope that has been decided is
    forgotten, its kept columns too, and the weights are found once at the end by the exact
    re-solve. With Z the factor rows of all pruned columns so far, a group with pruned columns P
    needs A = C[P,P] − Z_PᵀZ_P = L Lᵀ and Y = C[P,:] − Z_PᵀZ on the columns still open; then
    Zn = L⁻¹Y, y = L⁻¹w_P, w −= yᵀZn, the scopes' diagonal blocks of C lose those of ZnᵀZn, Zn is
    appended to Z, and the row's cost grows by ‖y‖².

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
    group = min(group or default_group(G), G)
    # Scaled to a unit diagonal, every entry of C and Z lies in [-1, 1].
    scale = 1 / xp.sqrt(problem.C.diagonal())
    C = problem.C * scale * scale[:, None]
    W = (problem.W * scale).reshape(R, r, G * c)
    rank = _shared_rank(W, C, layout) if order == "shared" else xp.arange(G)
    mask = xp.empty((R, r, G, c), bool)
    cost = xp.empty((R, r), W.dtype)

    def prune(start, stop):
        rows = slice(start, stop)
        mask[rows], cost[rows] = _prune_rows(W[rows], C, layout, group, order, rank)

    K = G * c
    run_batches(prune, R, problem, bytes_per_row=r * K * K // 4 * 2 * W.dtype.itemsize)
    return Pruned(mask.reshape(R * r, K), cost=cost.ravel())


@dataclass
class _Rows:
    """A batch of R row groups of r rows, B = R r, with n scopes still carried for each.

    scopes (R, n) and live (R, n) say which scopes they are and which are undecided. w (c, R, r, n)
    and D (c, c, R, r, n) are weights and diagonal blocks of the inverse Hessian, place-major.
    Z (B, c n, room) holds the factor rows as columns, so that dropping a scope copies whole rows;
    the first `used` of each are filled.
    """

    scopes: object
    live: object
    w: object
    D: object
    Z: object
    used: int = 0


def _prune_rows(W, C, layout, group, order, rank):
    """Masks (True = kept), shape (R, r, G, c), and costs, shape (R, r), of a batch of rows."""
    xp = namespace(W)
    R, r, K = W.shape
    c = layout.columns.shape[1]
    G = K // c
    w = xp.array(W.reshape(R, r, G, c).transpose(3, 0, 1, 2), order="C")
    own = scope_blocks(C, c)
    rows = _Rows(
        scopes=xp.tile(xp.arange(G), (R, 1)),
        live=xp.ones((R, G), bool),
        w=w,
        D=xp.array(xp.broadcast_to(own[:, :, None, None], (c, *w.shape)), order="C"),
        Z=xp.empty((R * r, K, _room(G, group, layout)), W.dtype),
    )
    mask = xp.empty((R, r, G, c), bool)
    cost = xp.zeros((R, r), W.dtype)
    every = xp.arange(R)[:, None]
    for done in range(0, G, group):
        size = min(group, G - done)
        # Of finished scopes nothing is left in D, and their costs are not used.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            blocks, best, gap = choose(candidate_costs(rows.w, rows.D, layout), layout)
        key = {"largest": -best, "smallest": best, "gap": -gap}.get(order, rank[rows.scopes])
        key = xp.where(rows.live, key, xp.inf)
        chosen = xp.argsort(key, axis=1, kind="stable")[:, :size]
        pruned = expand(xp.take_along_axis(blocks, chosen[None], axis=2), layout)
        mask[every, :, rows.scopes[every, chosen]] = ~pruned.transpose(0, 2, 1, 3)
        rows.live[every, chosen] = False
        P, valid = _positions(pruned, chosen, rows.scopes.shape[1])
        cost += _eliminate(rows, C, P, valid, last=done + size == G).reshape(R, r)
        left = G - done - size
        if left and (
            left < COMPACT_BELOW * rows.live.shape[1]
            or rows.used + P.shape[1] > rows.Z.shape[2]
        ):
            _compact(rows, left, _room(left, group, layout))
    return mask, cost


def _positions(pruned, chosen, n):
    """Places of the pruned columns among the c n that are carried, and which of them are real.

    Rows of one group may lose different numbers of columns; the shorter lists are filled up.
    """
    xp = namespace(pruned)
    R, r, size, c = pruned.shape
    flags = pruned.reshape(R * r, size * c)
    places = xp.arange(c) * n + chosen[:, :, None]
    places = xp.repeat(places.reshape(R, size * c), r, axis=0)
    longest = int(flags.sum(1).max())
    order = xp.argsort(~flags, axis=1, kind="stable")[:, :longest]
    return xp.take_along_axis(places, order, 1), xp.take_along_axis(flags, order, 1)


def _eliminate(rows, C, P, valid, last):
    """Eliminate the pruned columns P, shape (B, p), of each row; returns the costs, shape (B,)."""
    xp = namespace(C)
    c, R, r, n = rows.w.shape
    B, p = P.shape
    columns = (xp.arange(c)[:, None] + rows.scopes[:, None] * c).reshape(R, c * n)
    columns = xp.repeat(columns, r, axis=0)
    targets = xp.take_along_axis(columns, P, 1)
    Z = rows.Z[:, :, : rows.used]
    Y = schur.gather_blocks(C, targets, targets if last else columns)
    if rows.used:
        Z_P = schur.gather_rows(Z, P)
        Y -= xp.matmul(Z_P, (Z_P if last else Z).transpose(0, 2, 1))
    Y *= valid[:, :, None]
    A = Y if last else xp.take_along_axis(Y, P[:, None, :], 2)
    A = A * valid[:, None, :]
    A[:, xp.arange(p), xp.arange(p)] += ~valid
    inverse = schur.cholesky_inverse(A)
    flat = rows.w.reshape(c, B, n).transpose(1, 0, 2).reshape(B, c * n)
    w = xp.take_along_axis(flat, P, 1) * valid
    y = xp.matmul(inverse, w[:, :, None])[:, :, 0]
    if not last:
        Zn = xp.matmul(inverse, Y)
        schur.update_scopes(
            rows.w.reshape(c, B, n), rows.D.reshape(c, c, B, n), Zn.reshape(B, p, c, n), y
        )
        rows.Z[:, :, rows.used : rows.used + p] = Zn.transpose(0, 2, 1)
        rows.used += p
    return (y * y).sum(1)


def _compact(rows, left, room):
    """Drop finished scopes, keeping the `left` live ones, and make room in Z."""
    xp = namespace(rows.w)
    c, R, r, n = rows.w.shape
    keep = xp.argsort(~rows.live, axis=1, kind="stable")[:, :left]
    rows.scopes = xp.take_along_axis(rows.scopes, keep, 1)
    rows.live = xp.ones((R, left), bool)
    rows.w = xp.take_along_axis(rows.w, keep[None, :, None], 3)
    rows.D = xp.take_along_axis(rows.D, keep[None, None, :, None], 4)
    places = (xp.arange(c)[:, None] * n + keep[:, None]).reshape(R, c * left)
    Z = xp.empty((R * r, c * left, rows.used + room), rows.Z.dtype)
    Z[:, :, : rows.used] = schur.gather_rows(
        rows.Z[:, :, : rows.used], xp.repeat(places, r, axis=0)
    )
    rows.Z = Z


def _room(scopes, group, layout):
    """Factor rows that come before the scopes carried have shrunk enough to be compacted."""
    groups = -(-int((1 - COMPACT_BELOW) * scopes) // group) + 1
    return groups * group * int(layout.candidates.sum(2).max()) * (
        1 if layout.enumerated else layout.n_blocks - layout.keep
    )


def _shared_rank(W, C, layout):
    """Place of each scope in the published order: largest summed cost under the first C first."""
    xp = namespace(W)
    R, r, K = W.shape
    c = layout.columns.shape[1]
    w = W.reshape(R, r, K // c, c).transpose(3, 0, 1, 2)
    _, best, _ = choose(candidate_costs(w, scope_blocks(C, c), layout), layout)
    order = xp.argsort(-best.sum(0, dtype="float64"), kind="stable")
    return xp.argsort(order)
