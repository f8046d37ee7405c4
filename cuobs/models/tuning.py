"""Tune a pruned block: its kept weights learn together, masks fixed, what the dense block gives."""

import contextlib
import copy
import math
import warnings

import torch

from cuobs.models import memory
from cuobs.models.blocks import as_dtype, run, windows_of
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
    kept : list of tensor or None
        Indices of the tokens that count.
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
    for parameter in block.parameters():
        parameter.requires_grad_(parameter in weights)
    batches = [
        (h[a : a + STEP_WINDOWS], goal[a : a + STEP_WINDOWS], part, w[a : a + STEP_WINDOWS])
        for h, goal, call, indices in zip(hidden, goals, calls, kept, strict=True)
        for w in [_counting(h, indices)]
        for a in range(0, len(h), STEP_WINDOWS)
        for part in [windows_of(call, a, a + STEP_WINDOWS, len(h))]
    ]
    optimizer = torch.optim.Adam(list(weights), lr=rate)
    steps = passes * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    before, step_windows = _error(block, batches), STEP_WINDOWS
    order = torch.Generator().manual_seed(0)
    with _repeatable(hidden[0]), torch.enable_grad():
        for _ in range(passes):
            for i in torch.randperm(len(batches), generator=order).tolist():
                step_windows = _gradient(block, batches[i], optimizer, step_windows)
                for weight, mask in weights.items():
                    weight.grad.mul_(mask)
                optimizer.step()
                schedule.step()
    after = _error(block, batches)
    better = after < before
    for name, module in linears(home).items():
        module.weight.requires_grad_(False)
        if name in masks:
            module.weight.data.copy_(modules[name].weight.data if better else first[name])
    return before, after if better else before


def _counting(hidden, indices):
    """1 for each token that counts, 0 for the others: shape (B, T, 1)."""
    weight = torch.full(hidden.shape[:2], float(indices is None), device=hidden.device)
    if indices is not None:
        weight.view(-1)[indices] = 1.0
    return weight[..., None]


def _lost(block, hidden, goal, call, counts):
    out = run(block, hidden.float(), as_dtype(call, torch.float32))
    return ((out - goal.float()).square() * counts).sum()


def _whole(goal, counts):
    return (goal.float().square() * counts).sum()


def _gradient(block, batch, optimizer, windows):
    """Leave the gradient of a batch's relative error in the weights.

    Returns how many windows at once the device's memory allows, beginning with ``windows``.
    """
    hidden, goal, call, counts = batch
    whole, lost = _whole(goal, counts), None
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            for a in range(0, len(hidden), windows):
                b = a + windows
                part = windows_of(call, a, b, len(hidden))
                lost = _lost(block, hidden[a:b], goal[a:b], part, counts[a:b])
                (lost / whole).backward()
            return windows
        except torch.cuda.OutOfMemoryError:
            if windows == 1:
                raise MemoryError(
                    f"memory: tuning on a window of {hidden.shape[1]} tokens needs more than the "
                    "device has free, expected shorter windows or no tuning"
                ) from None
        lost = None
        memory.make_room(hidden.device)
        windows //= 2


@torch.no_grad()
def _error(block, batches):
    lost = sum(_lost(block, *batch) for batch in batches)
    whole = sum(_whole(goal, counts) for _, goal, _, counts in batches)
    return float((lost / whole).sqrt())


@contextlib.contextmanager
def _repeatable(like):
    """Sums in one order, so that a run gives the same bits again; tf32 on the device."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if like.is_cuda:
        torch.set_float32_matmul_precision("high")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warned)
        torch.set_float32_matmul_precision(before[1])
