"""Prune linears that share their inputs, by the sums of their group."""

import time
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial

import numpy as np
import torch

from cuobs import arrays
from cuobs.layer import check_layer, hessian_of, solve_layer
from cuobs.loss import loss
from cuobs.models.pruning.targets import pulls, target_weights
from cuobs.models.structure import oriented
from cuobs.recipe import Settings

# Where the Hessian of a layer is not positive definite, λ grows tenfold up to this share.
MAX_DAMP = 10.0
# Methods that prune a row without a look at others, or add up over all of them where they do look.
BY_ROW = (
    "magnitude", "wanda", "obs-local", "obs-full", "obs-split", "obs-interleaved", "sparsegpt",
    "true-obs", "admm",
)  # fmt: skip
# What the rows of a process may be a multiple of.
UNITS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class SharedRows(Settings):
    """Settings of a process that has some rows of a weight, and can ask for sums over all.

    Attributes
    ----------
    total : callable
        The sum of a number over all processes.
    """

    total: object = field(default=None, compare=False, repr=False)

    def over_all_rows(self, number):
        """The sum over all rows of a number that is one over those at hand."""
        return self.total(number)


def prune_rows(recipe, settings, moments, dense_share, members, ranks):
    """Prune linears that share their inputs, in place, and complete their reports.

    Parameters
    ----------
    recipe : Recipe
    settings : Settings
    moments : Moments
    dense_share : float
    members : dict
        By name, a linear, its `LayerReport` and its residual share.
    ranks : Ranks
        The processes that share the rows.

    Returns
    -------
    dict of tensor of bool
        By name, the mask in the form of the weight, True = kept.
    """
    began = time.perf_counter()
    modules, rows, shares = zip(*members.values(), strict=True)
    weights = [oriented(m).contiguous() for m in modules]
    results, damp = _prune_damped(
        recipe, settings, moments, dense_share, shares, weights, rows[0].name, ranks
    )
    masks = {}
    for name, module, row, share, (new, mask, lost) in zip(
        members, modules, rows, shares, results, strict=True
    ):
        row.loss, row.sparsity, row.damp = lost, zeros(new), damp
        row.dense_share, row.residual_share = float(dense_share), float(share)
        if damp != recipe.damp:
            row.note = f"damped by {damp:g}: its Hessian is not positive definite with less"
        oriented(module).copy_(new)
        masks[name] = oriented(module, mask)
    seconds, whole = time.perf_counter() - began, sum(len(W) for W in weights)
    for row, W in zip(rows, weights, strict=True):
        row.seconds = seconds * len(W) / whole
    return masks


def zeros(weight):
    """The share of a weight that is exactly zero."""
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


def _prune_damped(recipe, settings, moments, dense_share, shares, weights, name, ranks):
    """New weights, masks and losses, and the damping under which the Hessian was definite."""
    damp, H = recipe.damp, moments.hessian
    goals = right = [None] * len(weights)
    if H.is_cuda:  # the method's own factor, in float32, gives the targets
        dtype = getattr(torch, settings.dtype)
        right = pulls(weights, moments, dense_share, shares, dtype) or right
    while True:
        try:
            if not H.is_cuda:
                goals = target_weights(weights, moments, damp, dense_share, shares)
            own = replace(recipe, damp=damp)
            return _prune_together(own, settings, weights, H, goals, right, ranks), damp
        except np.linalg.LinAlgError as error:
            damp = max(10 * damp, 1e-4)
            if damp > MAX_DAMP:
                raise ValueError(
                    f"model: found that the Hessian of {name} stays singular up to damp="
                    f"{damp / 10:g} ({error}), expected activations that differ"
                ) from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _prune_together(recipe, settings, weights, H, goals, right, ranks):
    """(weight, mask, loss) of each linear: one call for all where scopes stay the same."""
    counts = tuple(len(W) for W in weights)
    if len(weights) > 1 and not stackable(recipe.pattern, counts, H.shape[0]):
        return [
            part
            for one in zip(weights, goals, right, strict=True)
            for part in _prune_together(recipe, settings, one[:1], H, one[1:2], one[2:], ranks)
        ]
    W, goal, pull = (_stacked(parts) for parts in (weights, goals, right))
    with arrays.stream_of(W):
        H, _ = hessian_of(W.shape, None, H, settings, settings.namespace(W))
        new, mask = _solve_shared(recipe, settings, W, goal, pull, H, ranks)
        xp = arrays.namespace(H)
        pairs = zip(W.split(counts), new.split(counts), strict=True)
        losses = [
            loss(*(arrays.asarray(arrays.receive(A), xp, settings.dtype) for A in pair), H)
            for pair in pairs
        ]
    return list(zip(new.split(counts), mask.split(counts), losses, strict=True))


def _solve_shared(recipe, settings, W, goal, pull, H, ranks):
    """New weight and mask, shape (M, K); where processes share the rows, each solves its own."""
    counts, own = None, slice(None)
    if ranks.size > 1 and recipe.method in BY_ROW and recipe.options.get("order") != "shared":
        counts = _row_counts(recipe.pattern, *W.shape, ranks.size)
    if counts is not None:
        start = sum(counts[: ranks.rank])
        own = slice(start, start + counts[ranks.rank])
        same = {f.name: getattr(settings, f.name) for f in fields(Settings)}
        settings = SharedRows(**same, total=partial(ranks.total, device=W.device))
    layer = check_layer(W[own], None if goal is None else goal[own], settings.dtype)
    right = None if pull is None else arrays.receive(pull[own])
    new, mask, *_ = solve_layer(recipe, settings, layer, H, right)
    new, mask = (arrays.hand_back(array, W) for array in (new, mask))
    if counts is None:
        return new, mask
    whole, masks = torch.empty_like(W), torch.empty(W.shape, dtype=torch.bool, device=W.device)
    for all_rows, mine in (whole, new), (masks, mask):
        all_rows[own] = mine
        ranks.collect(all_rows, counts)
    return whole, masks


def _row_counts(pattern, rows, K, size):
    """So many rows for each process that no scope is torn apart; None where that can't be."""
    for unit in UNITS:
        whole, rest = divmod(rows, unit)
        edges = [whole * rank // size * unit for rank in range(size)] + [rows]
        counts = tuple(stop - start for start, stop in zip(edges, edges[1:], strict=False))
        if not rest and 0 not in counts and stackable(pattern, counts, K):
            return counts
    return None


def _stacked(parts):
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


@lru_cache(maxsize=256)
def stackable(pattern, counts, K):
    """Whether weights set one below the other have the scopes that each has alone."""
    try:
        stacked = pattern.compile(sum(counts), K)
        alone = [pattern.compile(count, K) for count in counts]
    except ValueError:
        return False
    starts = np.cumsum([0, *counts[:-1]])
    rows = [layout.row_order + start for layout, start in zip(alone, starts, strict=True)]
    if any(layout.rows != stacked.rows for layout in alone):
        return False
    found = {tuple(group) for group in np.concatenate(rows).tolist()}
    same = all(
        np.array_equal(layout.column_order, stacked.column_order)
        and np.array_equal(layout.blocks, stacked.blocks)
        for layout in alone
    )
    return same and found == {tuple(group) for group in stacked.row_order.tolist()}
