"""Prune linears that share their inputs, by the sums of their group."""

import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from cuobs import arrays
from cuobs.layer import check_layer, hessian_of, solve_layer
from cuobs.loss import loss
from cuobs.models.structure import oriented
from cuobs.models.targets import pulls, target_weights

# Where the Hessian of a layer is not positive definite, λ grows tenfold up to this share.
MAX_DAMP = 10.0


def prune_rows(recipe, settings, moments, dense_share, members):
    """Prune linears that share their inputs, in place, and complete their reports.

    Parameters
    ----------
    recipe : Recipe
    settings : Settings
    moments : Moments
    dense_share : float
    members : dict
        By name, a linear, its `LayerReport` and its residual share.

    Returns
    -------
    dict of tensor of bool
        By name, the mask in the form of the weight, True = kept.
    """
    began = time.perf_counter()
    modules, rows, shares = zip(*members.values(), strict=True)
    weights = [oriented(m).contiguous() for m in modules]
    results, damp = _prune_damped(recipe, settings, moments, dense_share, shares, weights, rows[0])
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


def _prune_damped(recipe, settings, moments, dense_share, shares, weights, row):
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
            return _prune_together(own, settings, weights, H, goals, right), damp
        except np.linalg.LinAlgError as error:
            damp = max(10 * damp, 1e-4)
            if damp > MAX_DAMP:
                raise ValueError(
                    f"model: found that the Hessian of {row.name} stays singular up to damp="
                    f"{damp / 10:g} ({error}), expected activations that differ"
                ) from None
        except ValueError as error:
            raise ValueError(f"{row.name}: {error}") from error


def _prune_together(recipe, settings, weights, H, goals, right):
    """(weight, mask, loss) of each linear: one call for all where scopes stay the same."""
    counts = tuple(len(W) for W in weights)
    if len(weights) > 1 and not stackable(recipe.pattern, counts, H.shape[0]):
        return [
            part
            for one in zip(weights, goals, right, strict=True)
            for part in _prune_together(recipe, settings, one[:1], H, one[1:2], one[2:])
        ]
    W, goal, pull = (_stacked(parts) for parts in (weights, goals, right))
    with arrays.stream_of(W):
        layer = check_layer(W, goal, settings.dtype)
        H, _ = hessian_of(W.shape, None, H, settings, settings.namespace(W))
        pull = None if pull is None else arrays.receive(pull)
        new, mask, *_ = solve_layer(recipe, settings, layer, H, pull)
        losses, stop = [], 0
        for count in counts:
            start, stop = stop, stop + count
            base = arrays.asarray(layer.weight[start:stop], arrays.namespace(H), settings.dtype)
            losses.append(loss(base, new[start:stop].astype(base.dtype, copy=False), H))
        parts = [arrays.hand_back(a, W).split(counts) for a in (new, mask)]
    return list(zip(*parts, losses, strict=True))


def _stacked(parts):
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


@lru_cache(maxsize=256)
def stackable(pattern, counts, K):
    """Whether weights set one below the other have the scopes that each has alone."""
    try:
        stacked = pattern.compile(sum(counts), K)
    except ValueError:
        return False
    alone = [pattern.compile(count, K) for count in counts]
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
