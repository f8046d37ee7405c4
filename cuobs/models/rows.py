"""Prune linears that share their inputs, by the sums of their group."""

import time
from dataclasses import replace

import numpy as np
import torch

import cuobs
from cuobs.models.structure import oriented
from cuobs.models.targets import target_weights

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
    for name, module, W, row, share, (new, mask, loss) in zip(
        members, modules, weights, rows, shares, results, strict=True
    ):
        row.loss = cuobs.relative_loss(W, new, moments.hessian) if loss is None else loss
        row.sparsity, row.damp = zeros(new), damp
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
    damp = recipe.damp
    while True:
        try:
            goals = target_weights(weights, moments, damp, dense_share, shares)
            own = replace(recipe, damp=damp)
            return _prune_together(own, settings, weights, moments.hessian, goals), damp
        except np.linalg.LinAlgError as error:
            damp = max(10 * damp, 1e-4)
            if damp > MAX_DAMP:
                raise ValueError(
                    f"model: found that the Hessian of {row.name} stays singular up to damp="
                    f"{damp / 10:g} ({error}), expected activations that differ"
                ) from None
        except ValueError as error:
            raise ValueError(f"{row.name}: {error}") from error


def _prune_together(recipe, settings, weights, H, goals):
    """(weight, mask, loss or None) of each linear: one call for all where scopes stay the same."""
    counts = [len(W) for W in weights]
    if len(weights) > 1 and not stackable(recipe.pattern, counts, H.shape[0]):
        return [
            part
            for W, goal in zip(weights, goals, strict=True)
            for part in _prune_together(recipe, settings, [W], H, [goal])
        ]
    one = len(weights) == 1
    W, goal = (parts[0] if one else torch.cat(parts) for parts in (weights, goals))
    result = recipe.run(W, H, settings, target=goal)
    losses = [result.loss] if one else [None] * len(weights)
    return list(zip(result.weight.split(counts), result.mask.split(counts), losses, strict=True))


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
