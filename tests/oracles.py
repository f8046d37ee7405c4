"""Independent float64 references: every method of cuobs in its textbook form.

Nothing here is shared with the package. A pattern is the brute enumeration of its strided view,
an inverse is an explicit inverse, and columns are eliminated from it by Schur complements. W is
(M, K), Hl the damped Hessian; masks are True where kept. Ties prune the lowest index.
"""

import itertools
import math
import re
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

NAMED = {
    "2:4": "view=(M,K):(K,1) block=(1,1) scope=(1,4) keep=2",
    "4:8": "view=(M,K):(K,1) block=(1,2) scope=(1,4) keep=2",
    "coupled-2:4": "view=(M,K/16,8,2):(K,16,1,8) block=(1,1,1,2) scope=(1,1,4,1) keep=2",
    "block16-row8": "view=(M/16,8,2,K):(16K,K,8K,1) block=(1,1,1,16) scope=(1,1,2,1) keep=1",
}


# "Few masks" are at most this many; scopes with more are pruned by the separable costs of blocks.
FEW = 128


# Patterns


def numbers(text, M, K):
    """The integers of a parenthesised list such as "(M,K/16,8,2)"."""
    terms = text.strip().strip("()").split(",")
    return tuple(
        int(eval(re.sub(r"(?<=\d)(?=[MK])", "*", t).replace("/", "//"), {"M": M, "K": K}))
        for t in terms
        if t.strip()
    )


def text_form(name):
    """Named pattern, n:m or n:mxb, written out as view, block, scope and keep."""
    if name in NAMED:
        return NAMED[name]
    short = re.fullmatch(r"(\d+):(\d+)(?:x(\d+))?", name)
    if short:
        n, m, b = (int(g or 1) for g in short.groups())
        return f"view=(M,K):(K,1) block=(1,{b}) scope=(1,{m}) keep={n}"
    return name


@dataclass
class Scopes:
    """element -> (scope, block) of an (M, K) weight, and the rectangles that the scopes are."""

    scope: np.ndarray  # (M, K) ints
    block: np.ndarray  # (M, K) ints, block within the scope
    keep: int
    rows: np.ndarray  # (m, r)
    columns: np.ndarray  # (n, c)
    blocks: np.ndarray  # (r, c)

    @cached_property
    def count(self):
        return int(self.blocks.max()) + 1

    @cached_property
    def choices(self):
        """The sets of blocks a scope may lose, in the order in which ties are decided."""
        return list(itertools.combinations(range(self.count), self.count - self.keep))

    @cached_property
    def chosen(self):
        """(blocks, choices) 1 where a choice has a block, else 0."""
        return np.array([[float(b in c) for c in self.choices] for b in range(self.count)])

    @cached_property
    def lost(self):
        """(choices, r, c) True where a choice prunes."""
        return self.among(np.array(self.choices)[:, None, None])

    def among(self, lost):
        """(..., r, c) True where the block of an element is one of the last axis of `lost`."""
        return (self.blocks[..., None] == lost).any(-1)


@cache
def enumerate_view(name, M, K):
    """Where each element of the view lies; return (scope, block), each (M, K), and keep."""
    view, block, scope, keep = re.fullmatch(
        r"view=(\S+) block=(\S+) scope=(\S+) keep=(\d+)", text_form(name)
    ).groups()
    shape, stride = (numbers(t, M, K) for t in view.split(":"))
    block, scope = numbers(block, M, K), numbers(scope, M, K)
    blocks_along = [n // b for n, b in zip(shape, block, strict=True)]
    scopes_along = [n // s for n, s in zip(blocks_along, scope, strict=True)]
    assert all(n == s * t * b for n, s, t, b in zip(shape, scope, scopes_along, block, strict=True))
    index = np.indices(shape).reshape(len(shape), -1)
    offset = np.array(stride) @ index
    assert len(np.unique(offset)) == len(offset), "the view overlaps"
    assert len(offset) == M * K, "the view leaves elements out"
    at, within = np.divmod(index // np.array(block)[:, None], np.array(scope)[:, None])
    scope_of, block_of = np.empty(M * K, int), np.empty(M * K, int)
    scope_of[offset] = np.ravel_multi_index(at, scopes_along)
    block_of[offset] = np.ravel_multi_index(within, scope)
    scope_of, block_of = scope_of.reshape(M, K), block_of.reshape(M, K)
    scope_of.flags.writeable = block_of.flags.writeable = False
    return scope_of, block_of, int(keep)


@cache
def scopes(name, M, K):
    """Enumerate the view and find the groups of rows and of columns that its scopes are."""
    scope, block, keep = enumerate_view(name, M, K)
    rectangles = {}
    for (i, j), s in np.ndenumerate(scope):
        rectangles.setdefault(s, (set(), set()))
        rectangles[s][0].add(i)
        rectangles[s][1].add(j)
    rows = np.array(sorted({tuple(sorted(r)) for r, _ in rectangles.values()}))
    columns = np.array(sorted({tuple(sorted(c)) for _, c in rectangles.values()}))
    assert sorted(rows.ravel()) == list(range(M)) and sorted(columns.ravel()) == list(range(K))
    blocks = block[np.ix_(rows[0], columns[0])]
    for r, c in itertools.product(rows, columns):
        assert len(np.unique(scope[np.ix_(r, c)])) == 1
        assert np.array_equal(block[np.ix_(r, c)], blocks)
    return Scopes(scope, block, keep, rows, columns, blocks)


def obeys(mask, name):
    """True where every scope of the (M, K) mask keeps exactly `keep` whole blocks."""
    scope, block, keep = enumerate_view(name, *mask.shape)
    n = block.max() + 1
    kept, size = np.zeros((scope.max() + 1, n), int), np.zeros((scope.max() + 1, n), int)
    np.add.at(kept, (scope, block), mask)
    np.add.at(size, (scope, block), 1)
    whole = (kept == 0) | (kept == size)
    return bool(whole.all() and ((kept > 0).sum(1) == keep).all())


# The problem


def damped(W, H, damp=0.01, target=None):
    """W* with dead columns zeroed, and H + lambda I with 1 on the diagonal of dead columns."""
    target = np.array(W if target is None else target, dtype=float)
    H = np.array(H, dtype=float)
    diagonal = np.diag(H).copy()
    lam = damp * diagonal.mean()
    dead = diagonal == 0
    H[dead, dead] = 1
    target[:, dead] = 0
    return target, H + lam * np.eye(len(H))


def relative_loss(W, pruned, H):
    D = np.asarray(pruned, float) - np.asarray(W, float)
    W = np.asarray(W, float)
    return math.sqrt(np.einsum("ij,jk,ik", D, H, D, optimize=True)
                     / np.einsum("ij,jk,ik", W, H, W, optimize=True))


def damped_costs(target, pruned, Hl):
    """D Hl D^T of every row."""
    D = pruned - target
    return np.einsum("ij,ij->i", D @ Hl, D)


def exact(target, Hl, mask):
    """The best weights for a mask, one dense solve a row."""
    out = np.zeros_like(target)
    G = target @ Hl
    for i in range(len(target)):
        S = np.flatnonzero(mask[i])
        out[i, S] = np.linalg.solve(Hl[np.ix_(S, S)], G[i, S])
    return out


# Choosing


def separable(score, s, groups=None):
    """Mask that prunes, in every scope, the blocks whose summed (M, K) score is smallest."""
    mask = np.ones(score.shape, bool)
    for columns in s.columns if groups is None else s.columns[groups]:
        inside = score[s.rows][:, :, columns]
        total = np.stack([inside[:, s.blocks == b].sum(-1) for b in range(s.count)], -1)
        lost = np.argsort(total, axis=-1, kind="stable")[:, : s.count - s.keep]
        mask[s.rows[:, :, None], columns] = ~s.among(lost[:, None, None])
    return mask


def choice_costs(w, C, s):
    """Cost of losing each choice of blocks in one scope.

    w is (..., r, c), C (..., r, c, c); the result is (..., choices). The cost of rows adds. Where
    there are too many choices to try, the cost of a choice is the sum of its blocks' own.
    """
    if len(s.choices) > FEW:
        alone = removal_costs(w, C, s, [(b,) for b in range(s.count)])
        return alone @ s.chosen
    return removal_costs(w, C, s, s.choices)


def removal_costs(w, C, s, choices):
    """w_P (C_PP)^-1 w_P^T of each choice of blocks, summed over the rows of the scope."""
    gone = s.among(np.array(choices)[:, None, None])
    cost = np.zeros((*w.shape[:-2], len(choices)))
    for i in range(len(s.blocks)):
        lost = gone[:, i].sum(1)
        for n in np.unique(lost):
            which = np.flatnonzero(lost == n)
            P = np.nonzero(gone[which, i])[1].reshape(len(which), n)
            wp = w[..., i, P]
            C_PP = C[..., i, P[:, :, None], P[:, None, :]]
            cost[..., which] += (wp * np.linalg.solve(C_PP, wp[..., None])[..., 0]).sum(-1)
    return cost


def shared_costs(W, C, s, groups):
    """(row groups, len(groups), choices) costs under one C for all rows."""
    at = s.columns[groups]
    blocks = C[at[:, :, None], at[:, None, :]][:, None]
    blocks = np.broadcast_to(blocks, (len(groups), s.rows.shape[1], *blocks.shape[2:]))
    return choice_costs(W[s.rows][:, :, at].transpose(0, 2, 1, 3), blocks, s)


def pruned_of(s, costs, groups, M, K):
    """(M, K) True where the cheapest choices of these column groups prune."""
    gone = np.zeros((M, K), bool)
    best = costs.argmin(-1)
    for i, rows in enumerate(s.rows):
        for k, g in enumerate(groups):
            gone[rows[:, None], s.columns[g]] = s.lost[best[i, k]]
    return gone


def eliminate(C, P):
    """Schur complement: C with the columns P removed, their rows and columns left zero."""
    C = C - C[:, P] @ np.linalg.solve(C[np.ix_(P, P)], C[P])
    C[P] = 0
    C[:, P] = 0
    return C


# Methods. Each returns (weights, mask) or (weights, mask, cost), for W* and damped Hl.


def magnitude(target, s):
    mask = separable(target**2, s)
    return target * mask, mask


def wanda(target, diagonal, s):
    mask = separable(target**2 * diagonal, s)
    return target * mask, mask


def obs_local(target, Hl, s):
    C = np.linalg.inv(Hl)
    W, groups = target.copy(), range(len(s.columns))
    gone = pruned_of(s, shared_costs(target, C, s, groups), groups, *target.shape)
    for columns in s.columns:
        for i in range(len(W)):
            P = columns[gone[i, columns]]
            W[i, columns] -= np.linalg.solve(C[np.ix_(P, P)], W[i, P]) @ C[np.ix_(P, columns)]
    W[gone] = 0
    return W, ~gone


def sequential(W, C, gone, s, groups, right):
    """obs-full's update of the scopes `groups`, in place, on the columns `right`."""
    for g in groups:
        columns, passed = s.columns[g], s.columns[groups[0]:g + 1].ravel()
        for i in range(len(W)):
            P = columns[gone[i, columns]]
            multiplier = np.linalg.solve(C[np.ix_(P, P)], W[i, P])
            W[i, right] -= multiplier @ C[np.ix_(P, right)]
            W[i, passed[gone[i, passed]]] = 0


def spans(s, splits):
    size = math.ceil(len(s.columns) / splits)
    return [range(a, min(a + size, len(s.columns))) for a in range(0, len(s.columns), size)]


def obs_full(target, Hl, s):
    return obs_split(target, Hl, s, 1)


def obs_split(target, Hl, s, splits, interleaved=False):
    C = np.linalg.inv(Hl)
    W = target.copy()
    every = range(len(s.columns))
    gone = np.zeros(W.shape, bool)
    if not interleaved:
        gone = pruned_of(s, shared_costs(W, C, s, every), every, *W.shape)
    for span in spans(s, splits):
        if interleaved:
            gone |= pruned_of(s, shared_costs(W, C, s, span), span, *W.shape)
        sequential(W, C, gone, s, span, s.columns[span[0]:].ravel())
        C = eliminate(C, s.columns[list(span)].ravel())
    return W, ~gone


def sparsegpt(target, Hl, s):
    """Column by column; C loses each column as it is passed, so U_jj^2 is its current C_jj."""
    C = np.linalg.inv(Hl)
    W = target.copy()
    mask = np.ones(W.shape, bool)
    for g, columns in enumerate(s.columns):
        pivots, ahead = [], C[np.ix_(columns, columns)]
        for j in range(len(columns)):
            pivots.append(ahead[j, j])
            ahead = eliminate(ahead, [j])
        score = np.zeros(W.shape)
        score[:, columns] = W[:, columns] ** 2 / np.array(pivots)
        mask[:, columns] = separable(score, s, [g])[:, columns]
        for j in columns:
            error = np.where(mask[:, j], 0, W[:, j]) / C[j, j]
            W -= np.outer(error, C[j])
            W[~mask[:, j], j] = 0
            C = eliminate(C, [j])
    return W, mask


def obs_ordered(target, Hl, s, group, order="largest"):
    C = np.linalg.inv(Hl)
    W = target.copy()
    gone = np.zeros(W.shape, bool)
    left = list(range(len(s.columns)))
    cost = np.zeros(len(W))
    while left:
        costs = shared_costs(W, C, s, left)
        total = costs.min(-1).sum(0)
        sign = {"left": 0, "largest": -1, "smallest": 1}[order]
        now = sorted(np.argsort(sign * total, kind="stable")[:group])
        chosen = [left[k] for k in now]
        gone |= pruned_of(s, costs[:, now], chosen, *W.shape)
        columns = s.columns[chosen].ravel()
        for i in range(len(W)):
            P = columns[gone[i, columns]]
            multiplier = np.linalg.solve(C[np.ix_(P, P)], W[i, P])
            cost[i] += multiplier @ W[i, P]
            W[i] -= multiplier @ C[P]
            W[i, P] = 0
        C = eliminate(C, columns)
        left = [g for g in left if g not in chosen]
    return W, ~gone, cost


def true_obs(target, Hl, s, group, order="gap"):
    C0 = np.linalg.inv(Hl)
    every = range(len(s.columns))
    shared = np.argsort(-shared_costs(target, C0, s, every).min(-1).sum(0), kind="stable")
    W = target.copy()
    gone = np.zeros(W.shape, bool)
    cost = np.zeros(len(W))
    for rows in s.rows:
        C = [C0.copy() for _ in rows]
        left = list(every) if order != "shared" else list(shared)
        while left:
            at = s.columns[left]
            costs = choice_costs(
                np.stack([W[i][at] for i in rows], 1),
                np.stack([c[at[:, :, None], at[:, None, :]] for c in C], 1), s
            )
            ranked = np.sort(costs, -1)
            key = np.zeros(len(left))
            if order == "gap":
                key = ranked[:, 0] - ranked[:, 1]
            elif order in ("largest", "smallest"):
                key = ranked[:, 0] * (-1 if order == "largest" else 1)
            now = np.argsort(key, kind="stable")[:group]
            for k in now:
                gone[rows[:, None], s.columns[left[k]]] = s.lost[costs[k].argmin()]
            columns = s.columns[[left[k] for k in now]].ravel()
            for k, i in enumerate(rows):
                P = columns[gone[i, columns]]
                multiplier = np.linalg.solve(C[k][np.ix_(P, P)], W[i, P])
                cost[i] += multiplier @ W[i, P]
                W[i] -= multiplier @ C[k][P]
                W[i, gone[i]] = 0
                C[k] = eliminate(C[k], P)
            left = [g for k, g in enumerate(left) if k not in now]
    return W, ~gone, cost


def admm_mask(target, Hl, s, rho=0.1, growth=(1.3, 1.2, 1.1), every=3, most=300, kept=None):
    """ADMM; returns the mask and the number of steps.

    With `kept` (a, b), there is no new inverse for every rho: one is made for a rho a times as
    large and kept until rho is b times as large as that; it corrects the last B by one residual.
    """
    scale = np.sqrt(np.diag(Hl))
    Ws = target * scale
    Hs = Hl / np.outer(scale, scale)
    eye = np.eye(len(Hs))
    G = Ws @ Hs
    V = np.zeros_like(Ws)
    mask = last = separable(Ws**2, s)
    B, D = Ws, Ws * mask
    inverse_rho = 0
    for step in range(1, most + 1):
        right = G - V + rho * D
        if kept is None:
            B = right @ np.linalg.inv(Hs + rho * eye)
        else:
            if rho > kept[1] * inverse_rho:
                inverse_rho = kept[0] * rho
                inverse = np.linalg.inv(Hs + inverse_rho * eye)
            B = B + (right - B @ (Hs + rho * eye)) @ inverse
        mask = separable((B + V / rho) ** 2, s)
        D = (B + V / rho) * mask
        V = V + rho * (B - D)
        if step % every == 0:
            changed = (mask != last).sum() / (~mask).sum()
            last = mask
            if step >= 30 and changed < 0.0003:
                break
            rho *= growth[0] if changed > 0.1 else growth[1] if changed > 0.005 else growth[2]
    return separable(B**2, s), step


def mask_costs(target, Hl, masks):
    """Least damped cost of one row of weights, (K,), for each of the masks, (n, K)."""
    G = target @ Hl
    out, kept = np.empty(len(masks)), masks.sum(1)
    for n in np.unique(kept):
        which = np.flatnonzero(kept == n)
        S = np.nonzero(masks[which])[1].reshape(len(which), n)
        w = np.linalg.solve(Hl[S[:, :, None], S[:, None, :]], G[S][..., None])[..., 0]
        out[which] = target @ G - (G[S] * w).sum(1)
    return out


def optimum(target, Hl, s):
    """Brute force over all masks: the least damped cost of each group of rows."""
    every = np.array(list(itertools.product(range(len(s.choices)), repeat=len(s.columns))))
    masks = np.ones((len(every), s.rows.shape[1], len(Hl)), bool)
    for columns, choice in zip(s.columns, every.T, strict=True):
        masks[:, :, columns] = ~s.lost[choice]
    return np.array([
        sum(mask_costs(target[i], Hl, masks[:, k]) for k, i in enumerate(rows)).min()
        for rows in s.rows
    ])
