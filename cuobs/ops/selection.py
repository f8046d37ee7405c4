"""Which blocks of each scope to prune.

Arrays are place-major: w has shape (c, R, r, G) for R row groups of r rows and G column groups of
c columns; what is known of a scope's n blocks has shape (n, R, G).
"""

from functools import lru_cache

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops import cuda

# Scopes with more candidate masks are left to array operations; a kernel is unrolled over them.
MAX_UNROLLED = 128
# Slices of rows that are summed apart.
SLICES = 16
# Up to this many blocks, ranks come from all comparisons; above, from a sort.
COMPARED = 16


def block_sums(scores, layout):
    """Sum scores over each block of each scope.

    Parameters
    ----------
    scores : array, shape (c, R, r, G)
    layout : Layout

    Returns
    -------
    array, shape (n, R, G)
    """
    xp = namespace(scores)
    c, R, r, G = scores.shape
    if layout.elementwise:
        return scores[:, :, 0]
    sums = xp.zeros((layout.n_blocks, R, G), scores.dtype)
    for row in range(r):
        for place in range(c):
            sums[layout.blocks[row, place]] += scores[place, :, row]
    return sums


def prune_lowest(scores, n_pruned):
    """Mark the blocks with the lowest scores, the lowest index first where scores tie.

    Parameters
    ----------
    scores : array, shape (n, R, G)
    n_pruned : int

    Returns
    -------
    array of bool, shape (n, R, G)
    """
    xp = namespace(scores)
    n = len(scores)
    if n > COMPARED:
        order = xp.argsort(scores, axis=0, kind="stable")
        rank = xp.argsort(order, axis=0, kind="stable")
        return rank < n_pruned
    # A block ranks after those before it, but for each of them that scores more.
    rank = xp.empty(scores.shape, np.int8)
    for i in range(n):
        rank[i] = i
        for j in range(i):
            later = (scores[i] < scores[j]).view(np.int8)
            rank[j] += later
            rank[i] -= later
    return rank < n_pruned


def expand(blocks, layout):
    """Blocks of scopes to elements: (n, R, G) to (R, r, G, c)."""
    xp = namespace(blocks)
    _, R, G = blocks.shape
    r, c = layout.blocks.shape
    if layout.elementwise:
        return blocks.transpose(1, 2, 0)[:, None]
    out = xp.empty((R, r, G, c), blocks.dtype)
    for row in range(r):
        for place in range(c):
            out[:, row, :, place] = blocks[layout.blocks[row, place]]
    return out


def scope_blocks(C, c):
    """The c x c diagonal blocks of a (K, K) matrix, place-major: shape (c, c, G)."""
    G = len(C) // c
    return C.reshape(G, c, G, c).diagonal(0, 0, 2)


def factor_scope_blocks(U, c):
    """The c x c diagonal blocks of UᵀU, place-major.

    Parameters
    ----------
    U : array, shape (K, K)
        Upper triangular.
    c : int

    Returns
    -------
    array, shape (c, c, G)
    """
    xp = namespace(U)
    K = len(U)
    if xp is not np and c <= cuda.MAX_PLACES:
        U = xp.ascontiguousarray(U)
        parts = xp.empty((min(SLICES, K), c, c, K // c), U.dtype)
        kernel = cuda.kernel("scope_blocks.cu", "factor_scope_blocks",
                                REAL=cuda.real(U.dtype), PLACES=c)
        kernel((-(-K // c // 32), len(parts)), (32, 8), (U, np.int64(K), np.int32(K), parts))
        return parts.sum(0)
    scoped = U.reshape(K, K // c, c)
    return xp.einsum("kgi,kgj->ijg", scoped, scoped)


def candidate_costs(w, C, layout):
    """Cost w_P (C_PP)⁻¹ w_Pᵀ of each candidate mask of each scope, summed over the scope's rows.

    Parameters
    ----------
    w : array, shape (c, R, r, G)
    C : array, shape (c, c, G) or (c, c, R, r, G)
        The diagonal blocks of the inverse Hessian, shared or one for each row.
    layout : Layout

    Returns
    -------
    array, shape (candidates, R, G)

    Notes
    -----
    Forward substitution with an L D Lᵀ factor, unrolled over the places of a set. The factor of a
    set's beginning serves every set that goes on from it.
    """
    xp = namespace(w)
    c, R, r, G = w.shape
    costs = xp.zeros((len(layout.candidates), R, G), w.dtype)
    for row in range(r):
        chain = _Chain(w[:, :, row], C if C.ndim == 3 else C[:, :, :, row])
        for candidate, pruned in enumerate(layout.candidates):
            places = tuple(np.flatnonzero(pruned[row]).tolist())
            if places:
                costs[candidate] += chain.cost(places)
    return costs


class _Chain:
    """Costs of sets of places, each set's factor grown from that of its beginning."""

    def __init__(self, w, C):
        self.w, self.C = w, C
        self.known = {}

    def cost(self, places):
        return self._factor(places)[3]

    def _factor(self, places):
        """(row of L times D, pivot, forward-substituted weight, cost) of the last place."""
        if places in self.known:
            return self.known[places]
        i = places[-1]
        scaled, value, pivot, cost = [], self.w[i], self.C[i, i], 0
        for n, j in enumerate(places[:-1]):
            row, before, solved, cost = self._factor(places[: n + 1])
            entry = self.C[i, j]
            for k in range(n):
                entry = entry - scaled[k] * row[k]
            scaled.append(entry)
            ratio = entry / before
            pivot = pivot - entry * ratio
            value = value - ratio * solved
        # The next place needs this row as unit L.
        unit = [
            entry / self._factor(places[: n + 1])[1] for n, entry in enumerate(scaled)
        ]
        result = unit, pivot, value, cost + value * value / pivot
        self.known[places] = result
        return result


def choose(costs, layout):
    """Take the cheapest mask of each scope.

    Parameters
    ----------
    costs : array, shape (candidates, R, G)
    layout : Layout

    Returns
    -------
    blocks : array of bool, shape (n, R, G)
        The blocks to prune.
    best : array, shape (R, G)
        The cost of that mask.
    gap : array, shape (R, G)
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


def select(w, C, layout):
    """The cheapest mask of each scope: `choose` on `candidate_costs`.

    Parameters
    ----------
    w : array, shape (c, R, r, G)
    C : array, shape (c, c, G) or (c, c, R, r, G)
        The diagonal blocks of the inverse Hessian, shared or one for each row.
    layout : Layout

    Returns
    -------
    blocks : array of bool, shape (n, R, G)
        The blocks to prune.
    best, gap : array, shape (R, G)
        The cost of that mask, and how much more the second-best costs.
    """
    xp = namespace(w)
    kernel = None if xp is np else _kernel(layout, w.dtype)
    if kernel is None:
        return choose(candidate_costs(w, C, layout), layout)
    _, R, _, G = w.shape
    blocks = xp.empty((layout.n_blocks, R, G), bool)
    best, gap = xp.empty((2, R, G), w.dtype)
    _launch(kernel, w, C, blocks, cuda.NULL, np.int64(0), best, gap)
    return blocks, best, gap


def select_mask(w, C, layout, out):
    """The cheapest mask of each scope, element by element.

    Parameters
    ----------
    w : array, shape (c, R, r, G)
    C : array, shape (c, c, G) or (c, c, R, r, G)
    layout : Layout
    out : array of bool, shape (R r, G c)
        True = kept; rows may be those of a wider array. Overwritten.
    """
    kernel = None if namespace(w) is np else _kernel(layout, w.dtype)
    if kernel is None:
        pruned, _, _ = choose(candidate_costs(w, C, layout), layout)
        out[...] = ~expand(pruned, layout).reshape(out.shape)
        return
    _launch(kernel, w, C, cuda.NULL, out, cuda.strides(out)[0], cuda.NULL, cuda.NULL)


@lru_cache(maxsize=64)
def _kernel(layout, dtype):
    """The kernel for a layout, or None where a scope is too large for one."""
    if _unrolls(layout):
        return cuda.kernel("select.cu", "select", **_defines(layout, dtype))


def _unrolls(layout):
    return cuda.unrolls(layout) and len(layout.candidates) <= MAX_UNROLLED


def _launch(kernel, w, C, blocks, mask, mask_row, best, gap):
    _, R, _, G = w.shape
    if C.ndim == 3:
        C = C[:, :, None, None]
    C = namespace(w).broadcast_to(C, (len(w), *w.shape))
    grid = -(-G // 32), min(-(-R // 16), 65535)
    kernel(grid, (32, 4), (w, *cuda.strides(w), C, *cuda.strides(C), np.int32(R),
                           np.int32(G), blocks, mask, mask_row, best, gap))


def _defines(layout, dtype):
    bits = 1 << np.arange(32)
    return cuda.scope_defines(layout, dtype) | {
        "N_CANDIDATES": len(layout.candidates),
        "PRUNED": (layout.candidates * bits[: layout.blocks.shape[1]]).sum(2).ravel(),
        "CHOICE": layout.candidate_blocks.T @ bits[: layout.n_blocks],
        "ENUMERATED": layout.enumerated,
    }


def variants():
    """What the kernels here compile for some patterns."""
    for layout, dtype in cuda.samples():
        if _unrolls(layout):
            yield "select.cu", _defines(layout, dtype)
            c = layout.blocks.shape[1]
            yield "scope_blocks.cu", {"REAL": cuda.real(dtype), "PLACES": c}
