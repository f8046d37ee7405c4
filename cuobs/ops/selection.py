"""Which blocks of each scope to prune.

Arrays are place-major: w has shape (c, m, r, n) for m row groups of r rows and n column groups of
c columns; what is known of the blocks of a scope has shape (blocks, m, n).
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops.checks import boolean, real, rows_in_a_piece, same_dtype, square
from cuobs.ops.dispatch import twinned
from cuobs.ops.pieces import PIECE, piece_bytes, pieces

# Up to this many blocks, ranks come from all comparisons; above, from a sort.
COMPARED = 16


def block_sums(scores: Any, layout: Any) -> Any:
    """Sum scores over each block of each scope.

    Parameters
    ----------
    scores : array, shape (c, m, r, n)
    layout : Layout

    Returns
    -------
    array, shape (blocks, m, n)
    """
    _check_places("scores", scores, layout)
    xp = namespace(scores)
    c, m, r, n = scores.shape
    if layout.elementwise:
        return scores[:, :, 0]
    sums = xp.zeros((layout.n_blocks, m, n), scores.dtype)
    for row in range(r):
        for place in range(c):
            sums[layout.blocks[row, place]] += scores[place, :, row]
    return sums


def prune_lowest(scores: Any, n_pruned: int) -> Any:
    """Mark the blocks with the lowest scores, the lowest index first where scores tie.

    Parameters
    ----------
    scores : array, shape (blocks, ...)
    n_pruned : int

    Returns
    -------
    array of bool, shape (blocks, ...)
        `n_pruned` in each scope; NaN counts as infinite.
    """
    xp = namespace(scores)
    # Whatever is compared with NaN is false, and ranks would not be a permutation.
    scores = xp.fmin(scores, xp.inf)
    blocks = len(scores)
    if blocks > COMPARED:
        order = xp.argsort(scores, axis=0, kind="stable")
        rank = xp.argsort(order, axis=0, kind="stable")
        return rank < n_pruned
    # A block ranks after those before it, but for each of them that scores more.
    rank = xp.empty(scores.shape, np.int8)
    for i in range(blocks):
        rank[i] = i
        for j in range(i):
            later = (scores[i] < scores[j]).view(np.int8)
            rank[j] += later
            rank[i] -= later
    return rank < n_pruned


def expand(blocks: Any, layout: Any) -> Any:
    """Blocks of scopes to elements.

    Parameters
    ----------
    blocks : array, shape (blocks, m, n)
    layout : Layout

    Returns
    -------
    array, shape (m, r, n, c)

    Raises
    ------
    ValueError
        They are not as many as the layout has.
    """
    if blocks.ndim != 3 or len(blocks) != layout.n_blocks:
        raise ValueError(
            f"blocks: found shape {blocks.shape}, expected ({layout.n_blocks}, row groups, "
            "column groups)"
        )
    xp = namespace(blocks)
    _, m, n = blocks.shape
    r, c = layout.blocks.shape
    if layout.elementwise:
        return blocks.transpose(1, 2, 0)[:, None]
    out = xp.empty((m, r, n, c), blocks.dtype)
    for row in range(r):
        for place in range(c):
            out[:, row, :, place] = blocks[layout.blocks[row, place]]
    return out


def keep_highest(scores, layout):
    """The mask of the blocks whose scores have the highest sums: bool like the scores, True = kept.

    Parameters
    ----------
    scores : array, shape (rows, K)
        Of whole row groups, in layout order.
    layout : Layout
    """
    r, c = layout.blocks.shape
    by_place = scores.reshape(-1, r, scores.shape[1] // c, c).transpose(3, 0, 1, 2)
    pruned = prune_lowest(block_sums(by_place, layout), layout.n_blocks - layout.keep)
    kept = expand(pruned, layout)
    return ~kept.reshape(scores.shape)


def score_bytes(layout, K, itemsize):
    """Bytes that `keep_highest` makes on the way for a row group, its scores among them."""
    # Sums, and the same without NaN.
    sums = itemsize * (1 if layout.elementwise else 2)
    scopes = layout.column_groups * (layout.n_blocks * sums + _rank_bytes(layout))
    return layout.rows * K * (itemsize + 3) + scopes


def _rank_bytes(layout):
    """Of the blocks of a scope: ranks of a byte with what is compared, or two sorts."""
    return layout.n_blocks * (3 if layout.n_blocks <= COMPARED else 24)


def scope_blocks(C: Any, c: int) -> Any:
    """The c x c diagonal blocks of a matrix, place-major.

    Parameters
    ----------
    C : array, shape (K, K)
    c : int
        Columns of a scope, of which K = n c.

    Returns
    -------
    array, shape (c, c, n)
        A view.

    Raises
    ------
    ValueError
        C is not square, or c does not divide K.
    """
    _check_scopes(C, c)
    n = len(C) // c
    return C.reshape(n, c, n, c).diagonal(0, 0, 2)


def _check_scopes(U, c):
    square("U", U)
    if len(U) % c:
        raise ValueError(f"c: found {c}, expected a divisor of {len(U)}, the matrix's order")


@twinned(_check_scopes)
def factor_scope_blocks(U: Any, c: int) -> Any:
    """The c x c diagonal blocks of UᵀU, place-major.

    Parameters
    ----------
    U : array, shape (K, K)
        Upper triangular.
    c : int

    Returns
    -------
    array, shape (c, c, n)
    """
    scoped = U.reshape(len(U), len(U) // c, c)
    return namespace(U).einsum("kgi,kgj->ijg", scoped, scoped)


def candidate_costs(w, C, layout):
    """Cost w_P (C_PP)⁻¹ w_Pᵀ of each candidate mask of each scope, summed over the scope's rows.

    Given as to `select`; an array of shape (candidates, m, n).

    Notes
    -----
    Gaussian elimination: where place p is pruned at the cost w_p² / C_pp, w_i − w_p C_ip / C_pp and
    C_ij − C_ip C_jp / C_pp are left to those after it. What is left by the beginning of a set
    serves every set that goes on from it.
    """
    _check_select(w, C, layout)
    xp = namespace(w)
    _, m, r, n = w.shape
    costs = xp.zeros((len(layout.candidates), m, n), w.dtype)
    for row, sets in enumerate(_sets_of_rows(layout)):
        _add_costs(costs, sets, w[:, :, row], C[:, :, None] if C.ndim == 3 else C[:, :, :, row])
    return costs


@lru_cache(maxsize=64)
def _sets_of_rows(layout):
    """What `_by_first` makes of the places that candidate masks prune in each row of a scope."""
    rows = [
        [(tuple(np.flatnonzero(mask).tolist()), k) for k, mask in enumerate(masks)]
        for masks in layout.candidates.transpose(1, 0, 2)
    ]
    return [_by_first([one for one in row if one[0]]) for row in rows]


def _by_first(sets):
    """Sets (places, candidate) by their first place.

    Returns
    -------
    dict
        For each place the candidates whose set ends there, the slice of the places that may follow,
        and, counted from the start of that slice, the sets of what follows by their first place.
    """
    found = {}
    for first in sorted({places[0] for places, _ in sets}):
        rest = [(places[1:], k) for places, k in sets if places[0] == first]
        ended = [k for places, k in rest if not places]
        rest = [one for one in rest if one[0]]
        start = min((places[0] for places, _ in rest), default=0)
        stop = max((places[-1] for places, _ in rest), default=-1) + 1
        rest = [(tuple(place - start for place in places), k) for places, k in rest]
        found[first] = ended, slice(start, stop), _by_first(rest)
    return found


def _add_costs(costs, sets, w, C, before=0):
    """Add what sets by their first place cost, given what is left of w and C, to a cost before.

    Shapes (places, m, n) and (places, places, m or 1, n).
    """
    while sets:
        last = max(sets)
        for place, (ended, places, following) in sets.items():
            pivot, value = C[place, place], w[place]
            cost = before + value * value / pivot
            for candidate in ended:
                costs[candidate] += cost
            if following:
                column = C[places, place]
                ratio = column / pivot
                left = column[:, None] * ratio
                namespace(C).subtract(C[places, places], left, out=left)
                state = w[places] - ratio * value, left, cost
                del left, ratio
                if place != last:
                    _add_costs(costs, following, *state)
                    del state  # before the next is made
        sets = following
        if following:
            w, C, before = state


def choose(costs, layout):
    """Take the cheapest mask of each scope.

    Parameters
    ----------
    costs : array, shape (candidates, m, n)
    layout : Layout

    Returns
    -------
    blocks : array of bool, shape (blocks, m, n)
        The blocks to prune.
    best : array, shape (m, n)
        The cost of that mask.
    gap : array, shape (m, n)
        How much more the second-best mask costs.
    """
    xp = namespace(costs)
    n_pruned = layout.n_blocks - layout.keep
    if not layout.enumerated:
        blocks = prune_lowest(costs, n_pruned)
        best = xp.where(blocks, costs, 0).sum(0)
        kept = xp.where(blocks, xp.inf, costs).min(0)
        return blocks, best, kept - xp.where(blocks, costs, -xp.inf).max(0)
    winner = costs.argmin(0)
    best = xp.take_along_axis(costs, winner[None], 0)[0]
    others = costs.copy()
    xp.put_along_axis(others, winner[None], xp.inf, 0)
    table = xp.asarray(layout.candidate_blocks)
    return table[:, winner], best, others.min(0) - best


def _check_places(name, array, layout):
    r, c = layout.blocks.shape
    if array.ndim != 4 or array.shape[0] != c or array.shape[2] != r:
        raise ValueError(
            f"{name}: found shape {array.shape}, expected ({c}, row groups, {r}, column groups)"
        )


def _check_select(w, C, layout):
    _check_places("w", w, layout)
    real("w", w)
    same_dtype("w", w, "C", C)
    c, m, r, n = w.shape
    if C.shape not in ((c, c, n), (c, c, m, r, n)):
        raise ValueError(
            f"C: found shape {C.shape}, expected {(c, c, n)} or {(c, c, m, r, n)}"
        )


@twinned(_check_select)
def select(w: Any, C: Any, layout: Any) -> tuple:
    """The cheapest mask of each scope: `choose` on `candidate_costs`.

    Parameters
    ----------
    w : array, shape (c, m, r, n)
    C : array, shape (c, c, n) or (c, c, m, r, n)
        The diagonal blocks of the inverse Hessian, shared or one for each row.
    layout : Layout

    Returns
    -------
    blocks : array of bool, shape (blocks, m, n)
        The blocks to prune.
    best, gap : array, shape (m, n)
        The cost of that mask, and how much more the second-best costs.
    """
    xp = namespace(w)
    _, m, _, n = w.shape
    blocks = xp.empty((layout.n_blocks, m, n), bool)
    best, gap = xp.empty((m, n), w.dtype), xp.empty((m, n), w.dtype)
    for part, *found in _chosen(w, C, layout):
        blocks[:, part], best[part], gap[part] = found
        del found  # before the next piece is made
    return blocks, best, gap


def _chosen(w, C, layout):
    """Pieces of row groups, each with what `choose` finds there."""
    xp, own = namespace(w), C.ndim > 3
    each = select_bytes(layout, w.dtype.itemsize, own)
    if xp is np:  # a GPU's pieces are few as they are
        each = _bytes_of_scopes(each, w.shape[3], layout)
    for part in pieces(xp, w.shape[1], each):
        yield part, *choose(
            candidate_costs(w[:, part], C[:, :, part] if own else C, layout), layout
        )  # fmt: skip


def _bytes_of_scopes(each, scopes, layout):
    """Of the bytes that all scopes of a row group take, those of some."""
    return -(-each * scopes // layout.column_groups)


@lru_cache(maxsize=64)
def select_bytes(layout, itemsize, own=False):
    """Bytes that `select` makes on the way for a row group, whose C is its own or shared."""
    # All row groups share what is left of a shared C.
    share = 1 if own else 1 / layout.row_groups
    left = max(math.ceil(_numbers_left(sets, share)) for sets in _sets_of_rows(layout))
    costs = len(layout.candidates)
    numbers = max(left + costs + 8, 2 * costs + layout.n_blocks + 8)
    return layout.column_groups * (numbers * itemsize + _rank_bytes(layout))


def _numbers_left(sets, share):
    """Numbers of a scope that `_add_costs` holds at the most, with a share of those left of C."""
    most = held = 0
    while sets:
        last = max(sets)
        for place, (_, places, following) in sets.items():
            count = places.stop - places.start
            left = held + 1 + count * (1 + share * count)
            most = max(most, left + count * (1 + share))
            if place != last:
                most = max(most, left + _numbers_left(following, share))
        held, sets = left - held, following
    return most


def mask_bytes(size, scopes=None):
    """Bytes that `select_mask` makes on the way, of a shared C, for so many scopes or fewer."""
    layout, each = size.layout, select_bytes(size.layout, size.itemsize)
    scopes = scopes or layout.column_groups
    if size.device == "cpu":
        each = _bytes_of_scopes(each, scopes, layout)
        return min(layout.row_groups * each, max(each, PIECE["cpu"]))
    return _bytes_of_scopes(piece_bytes(layout.row_groups, each, size.device), scopes, layout)


def _check_select_mask(w, C, layout, out):
    _check_select(w, C, layout)
    boolean("out", out)
    c, m, r, n = w.shape
    if out.shape != (m * r, n * c):
        raise ValueError(f"out: found shape {out.shape}, expected {(m * r, n * c)}")
    rows_in_a_piece("out", out)


@twinned(_check_select_mask)
def select_mask(w: Any, C: Any, layout: Any, out: Any) -> None:
    """The cheapest mask of each scope, element by element.

    Parameters
    ----------
    w : array, shape (c, m, r, n)
    C : array, shape (c, c, n) or (c, c, m, r, n)
    layout : Layout
    out : array of bool, shape (m r, n c)
        True = kept; rows may be those of a wider array. Overwritten.
    """
    r = w.shape[2]
    for part, pruned, *rest in _chosen(w, C, layout):
        rows = out[part.start * r : part.stop * r]
        rows[...] = ~expand(pruned, layout).reshape(rows.shape)
        del pruned, rest
