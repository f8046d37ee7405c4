"""Perplexity on windows of tokens, and how far two models agree on them."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cuobs.models.blocks import plain_torch
from cuobs.models.by_block import Runner
from cuobs.models.distilling.divergence import comparison
from cuobs.models.distilling.logits import Cut
from cuobs.models.parked import home_of
from cuobs.models.report import Agreement
from cuobs.models.tokens.calibration import check_tokens

# Tokens whose logits are held at once: each is a row of the vocabulary in float32.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


@plain_torch()
def perplexity(
    model: Any,
    tokens: Any,
    device: Any = None,
    progress: Callable | None = None,
) -> float:
    """Perplexity as the SparseGPT and Wanda papers measure it.

    Every window stands alone; all but its first token are predicted from those before them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Moved to ``device`` meanwhile.
    tokens : array of int, shape (windows, length)
    device : torch.device or str, optional
        The model's own by default.
    progress : callable, optional
        Called with (done, total) windows.

    Returns
    -------
    float
        Not a number where the model's outputs are none.
    """
    tokens = torch.from_numpy(check_tokens(model, tokens))
    if tokens.shape[1] < 2:
        raise ValueError("tokens: found windows of 1, expected at least 2")
    device = torch.device(home_of(model) if device is None else device)
    with _whole_on_device(), Runner(model, device) as runner:
        total = sum(
            runner.each(tokens, _batch(tokens, device), partial(_surprise, model), progress)
        )
    mean = total / (len(tokens) * (tokens.shape[1] - 1))
    return math.inf if mean > 700 else math.exp(mean)


@plain_torch()
def agreement(
    model: Any,
    dense: Any,
    tokens: Any,
    device: Any = None,
    progress: Callable | None = None,
) -> Agreement:
    """Compare a model with the dense one on windows of tokens, at all their places.

    One model at a time lies on the device, then only what follows the hidden states of both.

    Parameters
    ----------
    model, dense : transformers.PreTrainedModel
        Of one vocabulary; moved to ``device`` meanwhile.
    tokens : array of int, shape (windows, length)
    device : torch.device or str, optional
        The model's own by default.
    progress : callable, optional
        Called with (done, total) windows of both models.

    Returns
    -------
    Agreement
    """
    tokens = torch.from_numpy(check_tokens(model, tokens))
    homes = [home_of(part) for part in (model, dense)]
    device = torch.device(homes[0] if device is None else device)
    with _whole_on_device(), contextlib.ExitStack() as stack:
        hidden = [
            _hidden(part, tokens, device, progress, place * len(tokens))
            for place, part in enumerate((model, dense))
        ]
        cuts, states = zip(*hidden, strict=True)
        for cut, home in zip(cuts, homes, strict=True):
            stack.enter_context(Runner(cut.model, device).without_blocks())
            if cut.head is not None:
                stack.callback(cut.head.to, home)
                cut.head.to(device)
        lost = same = 0.0
        for h, g in zip(*states, strict=True):
            found = comparison(*cuts, h.to(device), g.to(device))
            lost, same = lost + found[0], same + found[1]
    return Agreement(float(lost) / tokens.numel(), float(same) / tokens.numel())


@torch.no_grad()
def _hidden(model, tokens, device, progress, done):
    """A model cut before its head, and what its head reads of each window, on the CPU."""
    with Runner(model, device) as runner:
        with runner.without_blocks():
            cut = Cut(model, tokens.to(device))
        tell = progress and (lambda count, total: progress(done + count, 2 * total))
        parts = runner.each(
            tokens, _batch(tokens, device), lambda some: cut.hidden(some).cpu(), tell
        )
    return cut, [window for states in parts for window in states]


def _batch(tokens, device):
    """Windows whose logits are held at once."""
    return max(1, BATCH_TOKENS.get(device.type, 1024) // tokens.shape[1])


@contextlib.contextmanager
def _whole_on_device():
    """Say in a sentence where a device has no room for a model as a whole."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise MemoryError(
            "memory: found that the model takes more than the device has free, expected a smaller "
            "one or device='cpu'"
        ) from None


def _surprise(model, tokens):
    """The negative log likelihood of all tokens but the first of each window, summed."""
    logits = model(input_ids=tokens, use_cache=False).logits
    # Window by window: a float32 copy of all logits would double the peak.
    return sum(
        float(torch.nn.functional.cross_entropy(row[:-1].float(), expected[1:], reduction="sum"))
        for row, expected in zip(logits, tokens, strict=True)
    )
