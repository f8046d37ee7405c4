"""Work in other threads on a GPU."""

import contextlib
from functools import partial

import torch


def callers_stream(device):
    """What makes a context that gives another thread the caller's device and stream.

    Each thread has its own, and what one stream still reads another may overwrite. A thread wants a
    context of its own, too.
    """
    if device.type != "cuda":
        return contextlib.nullcontext
    return partial(torch.cuda.stream, torch.cuda.current_stream(device))
