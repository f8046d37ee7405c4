"""Whether a model's blocks, run one by one, are the model: looked at before any work."""

import numpy as np
import torch

from cuobs.models.blocks import (
    capture,
    not_by_window,
    run,
    running_alone,
    taking_windows,
    windows_of,
)
from cuobs.models.memory import Room
from cuobs.models.parked import at_hand, home_of

# What a block adds to a window's hidden states differs by less, however many windows run with it.
WINDOWS_DIFFER = 0.1
# Tokens that show whether blocks depend on each other, and the share by which hidden states may
# differ after the last: they are computed twice in the same way.
ALONE_TOKENS = 16
ALONE_DIFFERS = 1e-3


@torch.no_grad()
def check_alone(model, blocks, tokens, mask):
    """Refuse a model whose blocks share more than hidden states and what it passes to each.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : torch.nn.ModuleList
    tokens : tensor of int, shape (windows, length)
    mask : tensor, shape (windows, length), or None
        0 where a token is padding.

    Raises
    ------
    ValueError
        One window gives another hidden state where blocks run one by one.
    """
    window = _short_window(tokens, mask)
    expected = Room(1).each(1, lambda *_: _own(model, blocks, *window))[0]
    (hidden,), calls = capture(model, blocks, [window], expected.device)
    for block, (call,) in zip(blocks, calls, strict=True):
        with at_hand(block), running_alone():
            entering = hidden.to(home_of(block))
            hidden = run(block, entering, call)
            # What a block keeps for those after it is then that of another window, as it will be.
            run(block, entering.flip(1), call)
    away = float((hidden.to(expected.device).float() - expected.float()).norm())
    differs = away / max(float(expected.float().norm()), 1e-30)
    if not differs <= ALONE_DIFFERS and bool(torch.isfinite(expected).all()):
        raise ValueError(
            f"model: found that its blocks, run one by one, give hidden states that differ by "
            f"{differs:.1%} from its own, expected blocks that pass nothing else to each other "
            "(keys and values, say)"
        )


def check_by_window(block, hidden, call, room):
    """Refuse a block for which `windows_of` does not give a window's own arguments."""
    if len(hidden) == 1:
        return

    def part(start, stop):
        with torch.no_grad():
            return run(block, hidden[start:stop], windows_of(call, start, stop, len(hidden)))

    whole = torch.cat(room.each(len(hidden), part))[:1].float()
    with running_alone(hidden.shape[1]):
        alone = Room(1).each(1, part)[0]
    differs, adds = (whole - alone).norm(), (whole - hidden[:1]).norm()
    if differs > WINDOWS_DIFFER * adds:
        reason = f"{float(differs / adds):.0%} of what it adds to the first differs"
        raise not_by_window(reason, hidden.shape[1])


def _own(model, blocks, tokens, mask):
    """The hidden states that leave the last block in the model's own forward."""
    home = home_of(model)
    found = []
    handle = blocks[-1].register_forward_hook(lambda *args: found.append(args[-1]))
    try:
        arguments = {} if mask is None else {"attention_mask": mask.to(home)}
        body = getattr(model, "base_model", model)
        with taking_windows():
            body(input_ids=tokens.to(home), use_cache=False, **arguments)
    finally:
        handle.remove()
    if len(found) != 1:
        raise ValueError(
            f"model: found that its last block runs {len(found)} times a forward, expected once"
        )
    return found[0] if torch.is_tensor(found[0]) else found[0][0]


def _short_window(tokens, mask):
    """Some tokens of the first window, and their mask; padding at its start is left out."""
    first = 0 if mask is None else int(np.argmax(mask[0].numpy() != 0))
    chosen = slice(first, first + ALONE_TOKENS)
    return tokens[:1, chosen], None if mask is None else mask[:1, chosen]
