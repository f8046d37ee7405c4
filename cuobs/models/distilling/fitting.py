"""How many windows a distillation runs at once, and forwards done again where that saves room."""

import contextlib
import math
from functools import partial

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from cuobs import arrays
from cuobs.models import memory
from cuobs.models.distilling.logits import CHUNK
from cuobs.models.structure import find_blocks

# Tokens that run through a model at once while gradients are wanted.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


def plan(pair, step_windows, checkpointing):
    """How many windows run at once, whether forwards are done again, and the bytes it takes."""
    if pair.split is not None:
        return _plan_of_slices(pair)
    learning = sum(weight.numel() for weight in pair.weights)
    length = pair.tokens.shape[1]
    chunk = 24 * min(CHUNK[pair.device.type], step_windows * length * _vocabulary(pair))
    if pair.device.type == "cuda":
        memory.give_back()
        free = torch.cuda.mem_get_info(pair.device)[0]
    else:
        free = arrays.free_memory(np)
    # A gradient and two moments, in float32, are still to come.
    free = 0.8 * free - 12 * learning - chunk
    window = _bytes_of_a_window(pair)
    again = window > free if checkpointing is None else checkpointing
    if again:
        blocks = max(1, len(pair.blocks))
        window = window // blocks + 4 * blocks * length * pair.width
    windows = min(step_windows, BATCH_TOKENS[pair.device.type] // length, int(free // window))
    windows = max(1, windows)
    total = 12 * learning + chunk + windows * window
    if pair.device.type == "cuda":
        total += torch.cuda.memory_allocated(pair.device)
    else:
        total += memory.resident() + 2 * 4 * learning
    return memory.Room(windows), again, int(total)


def _plan_of_slices(pair):
    """The same where blocks are gathered one by one, by all processes side by side."""
    with forward_again(pair.blocks[1:]):
        window = _bytes_of_a_window(pair)  # of one block, and what enters the others
    sizes = [shape.numel() for shape in pair.split.shapes]
    # Of a block the weights and their gradient, each in products' dtype and in float32.
    gathered = 12 * sum(sizes) // max(1, len(pair.blocks))
    total = 12 * sum(map(len, pair.weights)) + 24 * CHUNK[pair.device.type] + window + gathered
    if pair.device.type == "cuda":
        total += torch.cuda.memory_allocated(pair.device)
    else:
        total += memory.resident()
    return memory.Room(1), True, int(total)


@torch.no_grad()
def _vocabulary(pair):
    """Logits of a token."""
    hidden = pair.hidden(pair.pruned, pair.tokens[:1, :1])
    return pair.pruned.logits(hidden).shape[1]


def _bytes_of_a_window(pair):
    """What backpropagation keeps of a window, counted in a forward of it."""
    own = {weight.untyped_storage().data_ptr() for weight in pair.model.parameters()}

    def kept(length):
        seen = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            mask = None if pair.mask is None else pair.mask[:1, :length]
            hidden = pair.hidden(pair.pruned, pair.tokens[:1, :length], mask)
        pair.width = hidden.shape[-1]
        return sum(seen.values())

    try:
        # Copies of the weights in bfloat16 are kept however many tokens there are.
        return max(1, kept(None) - kept(1))
    except torch.cuda.OutOfMemoryError:
        memory.give_back()
        return math.inf


def blocks_of(model):
    """The blocks of a model, none of one that has no list of them."""
    try:
        return list(find_blocks(model)[1])
    except ValueError:
        return []


@contextlib.contextmanager
def forward_again(blocks):
    """Let each block keep its input alone, and run a second time for its gradient."""
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
