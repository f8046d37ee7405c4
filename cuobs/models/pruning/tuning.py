"""Tune a pruned block: its kept weights learn together, masks fixed, what the dense block gives."""

import copy
import math
from functools import partial
from typing import NamedTuple

import torch

from cuobs.models.blocks import as_dtype, learning_alone, run, windows_of
from cuobs.models.memory import Room
from cuobs.models.pruning.scratch import leave
from cuobs.models.ranks import Ranks
from cuobs.models.repeatable import repeatable
from cuobs.models.structure import linears

# Windows of a gradient step.
STEP_WINDOWS = 8


def tune_block(
    block, masks, hidden, goals, calls, kept, *, passes, rate, batch=None, ranks=None
):  # fmt: skip
    """Lower the squared error of a block's output by Adam on its kept weights, in place.

    Processes that share the windows take the steps that one takes, each with its own windows.

    Parameters
    ----------
    block : torch.nn.Module
        Pruned.
    masks : dict of tensor
        By the name of a linear, in the form of its weight, True = kept. Only these weights learn.
    hidden, goals : list of tensor, shape (B, T, D)
        What enters the block, in the pruned model, and what is to leave it, in the dense one; on
        the block's device or on the CPU.
    calls : list of tuple
        The block's other arguments, batch by batch.
    kept : list of tensor of bool, shape (B, T), or None
        Which tokens count; None if all do.
    passes : int
        Times that all tokens are seen.
    rate : float
        Learning rate at the start; it falls to 0 by a half cosine.
    batch : int, optional
        Windows in a batch of a single process, no step goes beyond one; by default those in the
        first.
    ranks : Ranks, optional
        The processes that share the windows: one of them has every so-many-th.

    Returns
    -------
    before, after : float
        ‖output − goal‖ / ‖goal‖ over the tokens that count. Where the last step has not lowered
        it, the block stays as it was.
    """
    ranks = ranks or Ranks()
    home, first = block, {n: m.weight.data.clone() for n, m in linears(block).items() if n in masks}
    if next(block.parameters()).dtype != torch.float32:
        block = copy.deepcopy(block).float()
    modules = linears(block)
    weights = {modules[name].weight: mask for name, mask in masks.items()}
    device = next(block.parameters()).device
    kept = [_counting(h, counts, device) for h, counts in zip(hidden, kept, strict=True)]
    steps = _steps(hidden, goals, calls, kept, batch or len(hidden[0]), ranks)
    optimizer = torch.optim.Adam(list(weights), lr=rate)
    count = passes * len(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / count))
    )
    room = Room(STEP_WINDOWS)
    before = _error(block, steps, room, ranks)
    order = torch.Generator().manual_seed(0)
    with repeatable(device), learning_alone(block, weights):
        for _ in range(passes):
            for i in torch.randperm(len(steps), generator=order).tolist():
                _gradient(block, weights, steps[i], room)
                ranks.add_up_gradients(weights)
                optimizer.step()
                schedule.step()
    after = _error(block, steps, room, ranks)
    better = after < before
    for name, weight in first.items():
        linears(home)[name].weight.data.copy_(modules[name].weight.data if better else weight)
    return before, after if better else before


class Step(NamedTuple):
    """The windows of a gradient step.

    Attributes
    ----------
    parts : list of tuple
        Hidden states, goals, the block's other arguments and 1 for each token that counts, of the
        windows that this process has of it, batch by batch.
    whole : tensor, shape ()
        The squared norm of all of its goals.
    """

    parts: list
    whole: torch.Tensor


def _steps(hidden, goals, calls, kept, batch, ranks):
    """The `Step`s of a pass, in order; those in which no token counts are left out."""
    windows = int(ranks.total(sum(map(len, hidden))))
    ends = [
        (a, min(a + STEP_WINDOWS, start + batch, windows))
        for start in range(0, windows, batch)
        for a in range(start, min(start + batch, windows), STEP_WINDOWS)
    ]
    found = [_parts(hidden, goals, calls, kept, *map(ranks.before, pair)) for pair in ends]
    zeros = torch.zeros(2, device=kept[0].device)
    sums = torch.stack([sum(map(_sums, parts), zeros) for parts in found])
    ranks.add_up(sums)
    return [
        Step(parts, whole) for parts, (whole, counted) in zip(found, sums, strict=True) if counted
    ]


def _parts(hidden, goals, calls, kept, start, stop):
    """What there is of a process's windows from one number to another."""
    found, first = [], 0
    for h, goal, call, counts in zip(hidden, goals, calls, kept, strict=True):
        a, b = max(start - first, 0), min(stop - first, len(h))
        if a < b:
            call = windows_of(call, a, b, len(h))
            found.append((h[a:b], goal[a:b], call, counts[a:b]))
        first += len(h)
    return found


def _counting(hidden, counts, device):
    """1 for each token that counts, 0 for the others: shape (B, T, 1)."""
    if counts is None:
        return torch.ones(*hidden.shape[:2], 1, device=device)
    return counts[..., None].float()


def _sums(part):
    """The squared norm of a part's goals, and how many tokens count."""
    _, goal, _, counts = part
    squares = goal.to(counts.device).float().square()
    found = torch.stack([(squares * counts).sum(), counts.sum()])
    leave(goal)
    return found


def _gradient(block, weights, step, room):
    """Set the gradient of a step's relative error, 0 where a weight is pruned."""

    def add(part, start, stop):
        lost = _lost(block, part, start, stop)
        # All or none: memory may run out on the way.
        found = torch.autograd.grad(lost / step.whole, list(weights))
        for (weight, mask), gradient in zip(weights.items(), found, strict=True):
            gradient.mul_(mask)
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    for weight in weights:
        weight.grad = None
    for part in step.parts:
        room.each(len(part[0]), partial(add, part))


def _lost(block, part, start, stop):
    hidden, goal, call, counts = part
    call = as_dtype(windows_of(call, start, stop, len(hidden)), torch.float32)
    entering, wanted = (x[start:stop].to(counts.device).float() for x in (hidden, goal))
    out = run(block, entering, call)
    found = ((out - wanted).square() * counts[start:stop]).sum()
    leave(hidden, goal)
    return found


@torch.no_grad()
def _error(block, steps, room, ranks):
    parts = (part for step in steps for part in step.parts)
    lost = sum(
        (s for part in parts for s in room.each(len(part[0]), partial(_lost, block, part))),
        torch.zeros((), device=steps[0].whole.device),
    )
    ranks.add_up(lost)
    return float((lost / sum(step.whole for step in steps)).sqrt())
