"""Prune linears that share their inputs, by the sums of their group."""

import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from cuobs import arrays, footprint
from cuobs.layer import check_layer, given_hessian, given_of, solve_layer
from cuobs.loss import energies, energies_together, energy_units, share_lost
from cuobs.models.pruning.targets import pulls, target_weights
from cuobs.models.structure import oriented
from cuobs.sharing import row_counts, stackable

# Where the Hessian of a layer is not positive definite, λ grows tenfold up to this share.
MAX_DAMP = 10.0


class Call(NamedTuple):
    """Linears that are pruned at once, one set below the other.

    Attributes
    ----------
    members : slice
        Of the group's linears.
    counts : tuple of int, or None
        How many of their rows each process prunes; None where each prunes all.
    rows : list of slice
        This process's rows of each.
    """

    members: slice
    counts: tuple | None
    rows: list


def prune_rows(recipe, settings, moments, dense_share, members, ranks, dtypes=None):
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
    dtypes : list of torch.dtype, optional
        To which each new weight is rounded; by default its own.

    Returns
    -------
    dict of tensor of bool
        By name, the mask in the form of the weight, True = kept.
    """
    began = time.perf_counter()
    modules, rows, shares = zip(*members.values(), strict=True)
    dtypes = dtypes or [m.weight.dtype for m in modules]
    weights = [oriented(m).contiguous().to(d) for m, d in zip(modules, dtypes, strict=True)]
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
    damp, H, calls = recipe.damp, moments.hessian, _calls(recipe, weights, ranks)
    rows = [own for call in calls for own in call.rows]
    goals = [None] * len(weights)

    def pull(call):
        """On a GPU the method's own factor, in its own dtype, gives the targets of what pulls."""
        own = shares[call.members]
        if not H.is_cuda or not (dense_share or any(own)):
            return None
        parts = weights[call.members], moments, dense_share, own, getattr(torch, settings.dtype)
        return lambda: arrays.receive(_stacked(pulls(*parts, call.rows)))
    while True:
        try:
            if not H.is_cuda:
                goals = target_weights(weights, moments, damp, dense_share, shares, rows)
            own, found = replace(recipe, damp=damp), []
            for call in calls:
                parts = (some[call.members] for some in (weights, goals))
                found += _prune_together(own, settings, call, *parts, pull(call), H, ranks)
            return found, damp
        except np.linalg.LinAlgError as error:
            damp = max(10 * damp, 1e-4)
            if damp > MAX_DAMP:
                raise ValueError(
                    f"model: found that the Hessian of {name} stays singular up to damp="
                    f"{damp / 10:g} ({error}), expected activations that differ"
                ) from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _calls(recipe, weights, ranks):
    """How linears that share their inputs are pruned: at once where scopes stay the same."""
    counts, K = [len(W) for W in weights], weights[0].shape[1]
    if stackable(recipe.pattern, tuple(counts), K):
        return [_call(recipe, slice(0, len(counts)), counts, K, ranks)]
    return [_call(recipe, slice(i, i + 1), counts[i : i + 1], K, ranks) for i in range(len(counts))]


def _call(recipe, members, counts, K, ranks):
    shares = row_counts(recipe, sum(counts), K, ranks.size)
    if shares is None:
        return Call(members, None, [slice(0, count) for count in counts])
    begin = sum(shares[: ranks.rank])
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    bounds = [
        np.clip((begin - start, begin + shares[ranks.rank] - start), 0, count).tolist()
        for start, count in zip(starts, counts, strict=True)
    ]
    return Call(members, shares, [slice(*pair) for pair in bounds])


def _prune_together(recipe, settings, call, weights, goals, pull, H, ranks):
    """(weight, mask, loss) of each linear of a call."""
    own = [W[rows] for W, rows in zip(weights, call.rows, strict=True)]
    W, goal = (_stacked(parts) for parts in (own, goals))
    with arrays.stream_of(W):
        layer = check_layer(W, goal, settings.dtype)
        H, _ = given_hessian(layer, H, settings, settings.namespace(W))
        if call.counts is not None:
            settings = replace(settings, others=ranks)
        given = given_of(layer, None, H, settings, arrays.namespace(H))
        footprint.check([recipe], settings, layer.weight.shape, arrays.namespace(H), given)
        new, mask, *_ = solve_layer(recipe, settings, layer, H, pull)
        new, mask = (arrays.hand_back(array, W) for array in (new, mask))
        coming = []  # while losses are added up
        if call.counts is not None:
            coming = [ranks.begin_gather(part, call.counts) for part in (new, mask)]
        losses = _losses(weights, own, _split(new, own), H, call, ranks, settings.precision)
        new, mask = (finish() for finish in coming) if coming else (new, mask)
    masks = mask.split([len(W) for W in weights])
    return list(zip(_split(new, weights), masks, losses, strict=True))


def _split(stacked, like):
    """Weights that were stacked, each in its own dtype."""
    parts = stacked.split([len(W) for W in like])
    return [part.to(W.dtype) for part, W in zip(parts, like, strict=True)]


def _losses(weights, own, new, H, call, ranks, precision):
    """The relative loss of each linear, of which this process may have some rows alone."""
    xp = arrays.namespace(H)

    def widened(A):
        return arrays.asarray(arrays.receive(A), xp, H.dtype)

    units = energy_units((widened(W) for W in weights), H)  # one at a time
    parts = (
        (widened(rows), widened(pruned), unit)
        for rows, pruned, unit in zip(own, new, units, strict=True)
    )
    if call.counts is None:
        found = [energies(rows, pruned, H, unit) for rows, pruned, unit in parts]
    else:
        found = ranks.total(energies_together(list(parts), H, precision))
    return [share_lost(*pair) for pair in found]


def _stacked(parts):
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)
