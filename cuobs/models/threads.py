"""Work in other threads."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from cuobs.cores import cores

# Tensors that are read side by side: to have each in memory of its own takes longer than reading.
READERS = 8


def side_by_side(function, items):
    """What a function that reads makes of each item, in order, some at once where cores allow."""
    workers = min(cores(), READERS)
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(function, items)


def callers_stream(device):
    """What makes a context that gives another thread the caller's device and stream.

    Each thread has its own, and what one stream still reads another may overwrite. A thread wants a
    context of its own, too.
    """
    if device.type != "cuda":
        return contextlib.nullcontext
    return partial(torch.cuda.stream, torch.cuda.current_stream(device))
