"""Distil a pruned model: all kept weights learn together what the dense model says, masks fixed.

It knows nothing of how the masks came about: a model, the dense one beside it, masks by name and
windows of tokens are all it takes.
"""

import contextlib
import math
import time
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

from cuobs import arrays, validation
from cuobs.models import memory
from cuobs.models.blocks import evaluating, learning_alone, plain_torch
from cuobs.models.digests import digest
from cuobs.models.distilling import fitting
from cuobs.models.distilling.divergence import divergence, divergence_gradient
from cuobs.models.distilling.logits import Cut
from cuobs.models.distilling.sharding import sharded
from cuobs.models.distilling.state import State, put
from cuobs.models.ranks import current
from cuobs.models.repeatable import repeatable
from cuobs.models.report import DistillationReport
from cuobs.models.tokens.calibration import check_tokens, to_array
from cuobs.torch.keep_zeros import masked_weights

# Windows of a step, and steps over which the rate grows to its full size.
STEP_WINDOWS = 8
WARM_UP = 20
BETAS = 0.9, 0.95
LARGEST_GRADIENT = 1.0
# One window in so many is kept aside.
ASIDE = 32
SAVE_SECONDS = 180.0
# Where products are taken in bfloat16.
IN_HALF = ("cuda",)
# All of PyTorch's attentions but that of cuDNN, whose sums have no fixed order.
ATTENTIONS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@plain_torch()
def distill(
    model: Any,
    dense: Any,
    masks: dict,
    tokens: Any,
    *,
    attention_mask: Any = None,
    times: Any = None,
    passes: int = 2,
    rate: float = 3e-4,
    step_windows: int = STEP_WINDOWS,
    seed: int = 0,
    device: Any = None,
    checkpointing: bool | None = None,
    state: str | PathLike | None = None,
    resume: bool = False,
    save_seconds: float | None = None,
    starting: Callable | None = None,
    progress: Callable | None = None,
    on_pass: Callable | None = None,
) -> DistillationReport:
    """Lower KL(dense ‖ pruned) of the next-token distributions by AdamW on all kept weights.

    Windows of 8 a step, the rate growing over 20 steps and falling to 0 by a half cosine, gradients
    masked and clipped at 1. The weights that learn are held in float32; products are taken in
    bfloat16 on a GPU and logits made a few tokens at a time. One window in 32, at least one, is
    kept aside, and the model ends with the weights of the pass that did best there, or with those
    it had.

    Processes that torchrun started share the windows of each step and add up their gradients. Each
    holds all weights, or, where its device has no room for that, a slice of each that learns.

    Parameters
    ----------
    model : torch.nn.Module
        Pruned; changed in place, on its own device. Its forward gives logits: those of
        transformers, or any that takes tokens alone.
    dense : torch.nn.Module
        The same vocabulary. Both lie on ``device`` meanwhile.
    masks : dict of tensor of bool
        By the name of a linear, in the form of its weight, True = kept, where the model is zero
        otherwise. Only these weights learn.
    tokens : array of int, shape (windows, length)
        None at all change nothing.
    attention_mask : array of bool or int, shape (windows, length), optional
        0 where a token is padding; those tokens enter no sum.
    times : array of int, shape (windows,), optional
        How often a pass sees each window; once by default.
    passes : int
        0 changes nothing.
    rate : float
    step_windows : int
        Windows of a step; fewer make more steps of few windows.
    seed : int
        Of the order in which windows are seen.
    device : torch.device or str, optional
        The model's own by default.
    checkpointing : bool, optional
        Whether a block's forward is done again for its gradient instead of being kept; by default
        where a window would not fit otherwise.
    state : path, optional
        A file that is written every few minutes, to go on from. The caller removes it.
    resume : bool
        Go on from ``state`` if it is there: the same bits as without the break.
    save_seconds : float, optional
        Between two states; 180 by default.
    starting : callable, optional
        Called with a `DistillationReport` when all is checked and the memory is predicted.
    progress : callable, optional
        Called with (done, total) steps.
    on_pass : callable, optional
        Called with the report before the first pass and after each.

    Returns
    -------
    DistillationReport

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, or the state is that of another run.
    FileExistsError, FileNotFoundError
        There is a state and ``resume`` is not given, or no folder for one.
    """
    check_arguments(passes, rate, step_windows, seed)
    _check_models(model, dense)
    # By name, so that a run that goes on finds the same order.
    weights, masks = masked_weights(model, masks)
    _check_pruned(weights, masks)
    settings = {"passes": passes, "rate": rate, "seed": seed, "step_windows": step_windows}
    report = DistillationReport(settings)
    if not passes or not len(tokens) or not weights:
        return report
    tokens, mask, times = _check_tokens(model, tokens, attention_mask, times)
    learned, aside = split_windows(len(tokens))
    steps = [_order(learned, times, step_windows, [seed, number]) for number in range(passes)]
    report.windows, report.aside = len(learned), len(aside)
    report.steps = sum(map(len, steps))
    device = torch.device(next(model.parameters()).device if device is None else device)
    apart = check_fits(model, sum(weight.numel() for weight in weights.values()), device)
    apart = current().total(float(apart)) > 0  # by all, where devices differ
    saved = State(state, SAVE_SECONDS if save_seconds is None else save_seconds, current())
    if state is not None:
        given = {
            "tokens": digest(tokens, mask, torch.from_numpy(times)),
            "masks": digest(*masks.values()),
            "model": digest(*weights.values()),
        }
        saved.begin({**settings, **given}, resume)
    stored = [weight.dtype for weight in weights.values()]
    began = time.perf_counter()
    memory.reset(device)
    with contextlib.ExitStack() as held:
        split, blocks = None, fitting.blocks_of(model)
        if apart:
            weights, masks, split = _shared_out(model, dense, weights, masks, device, held)
        for part in (model, dense):
            held.enter_context(evaluating(part))
            held.enter_context(_in_float32(part, device))
        held.enter_context(learning_alone(model, weights.values()))
        held.enter_context(repeatable(device))
        held.enter_context(sdpa_kernel(ATTENTIONS))
        pair = _Pair(model, dense, weights, masks, stored, tokens, mask, device, split, blocks)
        room, again, report.memory_predicted = fitting.plan(pair, step_windows, checkpointing)
        held.enter_context(fitting.forward_again(blocks if again else []))
        if starting:
            starting(report)
        _learn(pair, room, steps, aside, report, saved, progress, on_pass)
    report.seconds = time.perf_counter() - began
    report.memory_peak = memory.peak(device)
    return report


def check_arguments(passes, rate, step_windows, seed):
    """Refuse arguments of `distill` that are wrong whatever the model is."""
    validation.integer("passes", passes, low=0)
    validation.integer("step_windows", step_windows)
    validation.integer("seed", seed, low=0)
    validation.positive("rate", rate)


def _check_models(model, dense):
    """Refuse what is no model, and one that is to be its own goal."""
    for name, module in (("model", model), ("dense", dense)):
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{name}: found {type(module).__name__}, expected a torch.nn.Module")
    if model is dense:
        raise ValueError("dense: found the model itself, expected a copy from before it was pruned")


def _check_pruned(weights, masks):
    """Refuse weights that are not zero where a mask says so: what learns is what is kept."""
    for name, weight in weights.items():
        pruned = weight.detach().masked_fill(masks[name].to(weight.device), 0)
        if bool(pruned.any()):
            raise ValueError(
                f"model: found {int((pruned != 0).sum())} elements of {name} that are not zero "
                "where its mask prunes them, expected the pruned model"
            )


def size_of_both(model, learning):
    """Bytes of a model and the dense one, in float32, and of gradients and two moments."""
    return 12 * learning + 8 * sum(parameter.numel() for parameter in model.parameters())


def check_fits(model, learning, device, limit=None):
    """Refuse a model that distillation has no room for, however few windows run at once.

    Parameters
    ----------
    model : torch.nn.Module
    learning : int
        Weights that learn.
    device : torch.device
    limit : int, optional
        Bytes of the host's memory that may be used, where that is the device.

    Returns
    -------
    bool
        Whether processes have to share the weights that learn out among them.

    Raises
    ------
    ValueError
        The model and the dense one, in float32, gradients and two moments take more than there is.
    """
    size, room, whose = current().size, memory.whole(device), "a device"
    if limit is not None and device.type == "cpu":
        size, room, whose = 1, limit, "host_memory"  # nothing is shared out for that
    needed = size_of_both(model, learning)
    if needed <= room:
        return False
    least = needed - 20 * learning + 20 * learning // size
    if size == 1 or least > room:
        each = f", in each of {size} processes" if size > 1 else ""
        raise ValueError(
            f"distill: found a model that takes {arrays.size_text(least)} with the dense one, its "
            f"gradients and moments{each}, expected one for the {arrays.size_text(room)} of "
            f"{whose}; processes on devices of their own share out what learns"
        )
    return True


def _shared_out(model, dense, weights, masks, device, held):
    """Slices of weights and masks by the weights' names, and their `Split`, while a stack holds."""
    names, ranks = list(weights), current()
    slices, split = held.enter_context(sharded(model, names, ranks, device))
    there = dict(dense.named_parameters())
    there = [name for name in names if name in there]
    held.enter_context(sharded(dense, there, ranks, device, learns=False))
    masks = {name: split.own(mask) for name, mask in masks.items()}
    return dict(zip(names, slices, strict=True)), masks, split


def split_windows(windows):
    """Which windows are learned from, and which are kept aside, evenly among them.

    Returns
    -------
    learned, aside : ndarray of int
    """
    if windows < 2:
        raise ValueError(f"tokens: found {windows} window, expected 2 at least: one is kept aside")
    count = max(1, windows // ASIDE)
    aside = ((np.arange(count) + 0.5) * windows / count).astype(int)
    return np.setdiff1d(np.arange(windows), aside), aside


class _Pair:
    """The pruned model and the dense one on a device, and windows for both."""

    def __init__(
        self, model, dense, weights, masks, stored, tokens, mask, device, split=None, blocks=()
    ):  # fmt: skip
        self.weights, self.stored, self.split = list(weights.values()), stored, split
        self.kept = [masks[name].to(device) for name in weights]
        self.tokens = tokens.to(device)
        self.mask = None if mask is None else mask.to(device)
        self.device, self.ranks = device, current()
        self.model, self.blocks = model, blocks
        with self._products():
            self.pruned, self.dense = Cut(model, self.tokens), Cut(dense, self.tokens)

    def hidden(self, cut, tokens, mask=None):
        """What a model's head reads, shape (tokens, D)."""
        with self._products():
            return cut.hidden(tokens, mask).flatten(0, 1)

    def given(self, windows, number=None):
        """Tokens of some windows, their mask, and 1 for each token that counts: of so many windows,
        by default of all."""
        tokens = self.tokens[windows]
        if self.mask is None:
            mask, counts = None, torch.ones(tokens.shape, device=self.device)
        else:
            mask = self.mask[windows]
            counts = mask.float()
        if number is not None:
            counts[max(number, 0) :] = 0
        return tokens, mask, counts.flatten()

    @torch.no_grad()
    def divergence(self, windows, room):
        """The mean over the tokens of some windows."""

        def part(start, stop):
            tokens, mask, counts = self.given(own[start:stop], number - start)
            both = (self.hidden(cut, tokens, mask) for cut in (self.pruned, self.dense))
            return divergence(self.pruned, self.dense, *both, counts)

        counts, (own, number) = self.given(windows)[2].sum(), self._own(windows)
        lost = sum(room.each(len(own), part))
        return self.ranks.total(float(lost)) / float(counts)

    def gradient(self, windows, room):
        """Set the gradients of the mean over some windows, 0 where a weight is pruned."""
        whole, (own, number) = self.given(windows)[2].sum(), self._own(windows)

        def add(start, stop):
            tokens, mask, counts = self.given(own[start:stop], number - start)
            # All or none: memory may run out on the way.
            for weight, found in zip(
                self.weights, self._gradient(tokens, mask, counts / whole), strict=True
            ):
                if found is not None and weight.grad is not None:
                    weight.grad.add_(found)
                elif found is not None:
                    weight.grad = found

        for weight in self.weights:
            weight.grad = None
        room.each(len(own), add)
        if self.split is None:
            self.ranks.add_up_gradients(self.weights)

    def clip(self):
        """Have the norm of all gradients be no more than `LARGEST_GRADIENT`."""
        if self.split is None:
            clip_grad_norm_(self.weights, LARGEST_GRADIENT)
            return
        squares = clip_grad_norm_(self.weights, math.inf).square()  # which clips nothing
        self.ranks.add_up(squares)
        share = (LARGEST_GRADIENT / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad.mul_(share)

    def _own(self, windows):
        """This process's of some windows, and how many they are. Where weights are gathered, all
        have as many, and the first is seen again for nothing."""
        own = windows[self.ranks.share]
        filled = -(-len(windows) // self.ranks.size) - len(own) if self.split is not None else 0
        return np.append(own, windows[:1].repeat(filled)), len(own)

    def _gradient(self, tokens, mask, counts):
        with torch.no_grad():
            goals = self.hidden(self.dense, tokens, mask)
        hidden = self.hidden(self.pruned, tokens, mask)
        pull, at_head = divergence_gradient(
            self.pruned, self.dense, hidden, goals, counts, self.weights
        )
        before = torch.autograd.grad(hidden, self.weights, pull, allow_unused=True)
        both = zip(before, at_head, self.kept, strict=True)
        found = [(a if b is None else b if a is None else a.add_(b), kept) for a, b, kept in both]
        return [None if gradient is None else gradient.mul_(kept) for gradient, kept in found]

    def _products(self):
        """On a GPU products are taken in bfloat16, before the head."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type in IN_HALF)


def _learn(pair, room, steps, aside, report, saved, progress, on_pass):
    """Take all steps; the pair's model ends with the weights of the best pass."""
    weights, rate = pair.weights, report.settings["rate"]
    optimizer = torch.optim.AdamW(
        weights, lr=rate, betas=BETAS, weight_decay=0.0, fused=pair.device.type == "cuda"
    )
    best = first = _copies(pair)
    done, found = saved.load(weights, optimizer, report, pair.split)
    best = found or best
    if not report.divergence:
        report.divergence.append(pair.divergence(aside, room))
    if on_pass:
        on_pass(report)
    warm_up, seen = min(WARM_UP, report.steps // 4), 0
    for number, batches in enumerate(steps, 1):
        for windows in batches:
            seen += 1
            if seen <= done:
                continue
            pair.gradient(windows, room)
            pair.clip()
            for group in optimizer.param_groups:
                group["lr"] = rate * _share_of_rate(seen - 1, warm_up, report.steps)
            optimizer.step()
            saved.due(seen, weights, optimizer, best, report, pair.split)
            if progress:
                progress(seen, report.steps)
        if len(report.divergence) <= number:
            copies = _copies(pair)
            with _holding(pair, copies):
                report.divergence.append(pair.divergence(aside, room))
            if _best(report.divergence) == number:
                best = copies
            if on_pass:
                on_pass(report)
    optimizer.state.clear()  # optimizers hold themselves, until they are collected
    report.kept = _best(report.divergence)
    put(weights, best if report.kept else first)


def _share_of_rate(step, warm_up, steps):
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def _best(divergence):
    """The pass of the lowest divergence, the first of equals; no number is lowest of all."""
    return min(
        range(len(divergence)), key=lambda i: (not math.isfinite(divergence[i]), divergence[i])
    )


def _copies(pair):
    """The weights on the host, in the dtype in which the model will hold them."""
    pairs = zip(pair.weights, pair.stored, strict=True)
    return [weight.detach().to("cpu", dtype, copy=True) for weight, dtype in pairs]


@contextlib.contextmanager
def _holding(pair, values):
    """Other values in the weights meanwhile: those that they will have when they are stored."""
    if all(dtype == weight.dtype for weight, dtype in zip(pair.weights, pair.stored, strict=True)):
        yield
        return
    own = [weight.detach().clone() for weight in pair.weights]
    put(pair.weights, values)
    try:
        yield
    finally:
        put(pair.weights, own)


@contextlib.contextmanager
def _in_float32(model, device):
    """On a device, all floats of half precision widened; afterwards as and where it was."""
    home = next(model.parameters()).device
    model.to(device)
    narrow = [
        (tensor, tensor.dtype)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)
        model.to(home)


def _order(learned, times, size, seed):
    """The windows of each step of a pass."""
    windows = np.repeat(learned, times[learned])
    windows = np.random.default_rng(seed).permutation(windows)
    return [windows[a : a + size] for a in range(0, len(windows), size)]


def _check_tokens(model, tokens, attention_mask, times):
    """Tokens and their attention mask, or None, as tensors, and times as an array; no window of
    padding alone."""
    if hasattr(model, "get_input_embeddings"):
        tokens = check_tokens(model, tokens)
    else:
        tokens = to_array(tokens).astype(np.int64)
    times = np.ones(len(tokens), int) if times is None else to_array(times)
    if times.shape != (len(tokens),) or times.dtype.kind not in "iu" or times.min() < 0:
        raise ValueError(
            f"times: found {times.dtype} of shape {times.shape}, expected counts, one a window: "
            f"{len(tokens)}"
        )
    if attention_mask is None:
        return torch.from_numpy(tokens), None, times
    mask = to_array(attention_mask)
    if mask.shape != tokens.shape or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"attention_mask: found shape {mask.shape}, expected {tokens.shape} as the tokens, "
            "0 and 1 alone"
        )
    some = mask.any(axis=1)
    mask = torch.from_numpy(mask[some].astype(np.int64))
    return torch.from_numpy(tokens[some]), mask, times[some]
