"""Tune a pruned block: its kept weights learn together, masks fixed, what the dense block gives."""

import copy
import math
from functools import partial

import torch

from cuobs.models.blocks import as_dtype, run, windows_of
from cuobs.models.memory import Room
from cuobs.models.repeatable import repeatable
from cuobs.models.structure import linears

# Windows of a gradient step.
STEP_WINDOWS = 8


def tune_block(block, masks, hidden, goals, calls, kept, *, passes, rate):
    """Lower the squared error of a block's output by Adam on its kept weights, in place.

    Parameters
    ----------
    block : torch.nn.Module
        Pruned.
    masks : dict of tensor
        By the name of a linear, in the form of its weight, True = kept. Only these weights learn.
    hidden, goals : list of tensor, shape (B, T, D)
        What enters the block, in the pruned model, and what is to leave it, in the dense one.
    calls : list of tuple
        The block's other arguments, batch by batch.
    kept : list of tensor of bool, shape (B, T), or None
        Which tokens count; None if all do.
    passes : int
        Times that all tokens are seen.
    rate : float
        Learning rate at the start; it falls to 0 by a half cosine.

    Returns
    -------
    before, after : float
        ‖output − goal‖ / ‖goal‖ over the tokens that count. Where the last step has not lowered
        it, the block stays as it was.
    """
    home, first = block, {n: m.weight.data.clone() for n, m in linears(block).items() if n in masks}
    if next(block.parameters()).dtype != torch.float32:
        block = copy.deepcopy(block).float()
    modules = linears(block)
    weights = {modules[name].weight: mask for name, mask in masks.items()}
    learning = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    for parameter in block.parameters():
        parameter.requires_grad_(parameter in weights)
    batches = [
        (h[a : a + STEP_WINDOWS], goal[a : a + STEP_WINDOWS], part, w[a : a + STEP_WINDOWS])
        for h, goal, call, counts in zip(hidden, goals, calls, kept, strict=True)
        for w in [_counting(h, counts)]
        for a in range(0, len(h), STEP_WINDOWS)
        if bool(w[a : a + STEP_WINDOWS].any())
        for part in [windows_of(call, a, a + STEP_WINDOWS, len(h))]
    ]
    optimizer = torch.optim.Adam(list(weights), lr=rate)
    steps = passes * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    room = Room(STEP_WINDOWS)
    before = _error(block, batches, room)
    order = torch.Generator().manual_seed(0)
    with repeatable(hidden[0].device), torch.enable_grad():
        for _ in range(passes):
            for i in torch.randperm(len(batches), generator=order).tolist():
                _gradient(block, weights, batches[i], room)
                optimizer.step()
                schedule.step()
    after = _error(block, batches, room)
    better = after < before
    for name, weight in first.items():
        linears(home)[name].weight.data.copy_(modules[name].weight.data if better else weight)
    for parameter, learned in learning:
        parameter.grad = None
        parameter.requires_grad_(learned)
    return before, after if better else before


def _counting(hidden, counts):
    """1 for each token that counts, 0 for the others: shape (B, T, 1)."""
    if counts is None:
        return torch.ones(*hidden.shape[:2], 1, device=hidden.device)
    return counts[..., None].float()


def _gradient(block, weights, batch, room):
    """Set the gradient of a batch's relative error, 0 where a weight is pruned."""
    whole = _whole(batch)

    def add(start, stop):
        lost = _lost(block, batch, start, stop)
        # All or none: memory may run out on the way.
        found = torch.autograd.grad(lost / whole, list(weights))
        for (weight, mask), gradient in zip(weights.items(), found, strict=True):
            gradient.mul_(mask)
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    for weight in weights:
        weight.grad = None
    room.each(len(batch[0]), add)


def _lost(block, batch, start, stop):
    hidden, goal, call, counts = batch
    call = as_dtype(windows_of(call, start, stop, len(hidden)), torch.float32)
    out = run(block, hidden[start:stop].float(), call)
    return ((out - goal[start:stop].float()).square() * counts[start:stop]).sum()


def _whole(batch):
    _, goal, _, counts = batch
    return (goal.float().square() * counts).sum()


@torch.no_grad()
def _error(block, batches, room):
    lost = sum(
        part for batch in batches for part in room.each(len(batch[0]), partial(_lost, block, batch))
    )
    return float((lost / sum(map(_whole, batches))).sqrt())
