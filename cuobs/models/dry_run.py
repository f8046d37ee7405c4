"""What pruning a model's folder will do and take, told without its weights."""

import time
from itertools import groupby

import torch

from cuobs.arrays import size_text
from cuobs.models.pruning.prediction import (
    check_host,
    predict_host,
    seconds_a_block,
    settle,
    states_of,
    work_from_shapes,
)
from cuobs.models.pruning.prune import choose, count_tokens, report_of, rotation_of
from cuobs.models.rotating.rotation_prediction import predict_rotation_host, settle_rotation
from cuobs.models.structure import linears, oriented
from cuobs.models.summary import time_text

# Order of the matrices whose product shows how fast a device is, and how often it is taken.
ORDER, TIMES = {"cpu": 1024, "cuda": 8192}, 3


def plan(model, windows, recipe, device, batch, protocol, say, in_files, host_memory=None):
    """Say what would be done to a model; a `ModelReport` that holds no blocks.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the meta device, in the dtype of its weights.
    windows : Windows
    recipe : ModelRecipe
    device : torch.device
    batch : int
        Windows that run at once.
    protocol : dict
    say : callable
        Called with lines of text.
    in_files : bool
        Whether the blocks will stay in their files until they are wanted.
    host_memory : int, optional
        Bytes of the host's memory that may be used.
    """
    blocks, layers = choose(model, recipe, device, host_memory, empty=True)
    for line in describe(layers, blocks):
        say(line)
    report = report_of(recipe, layers, windows, batch, device, protocol)
    report.protocol |= count_tokens(windows, layers, blocks)
    work = work_from_shapes(
        model, blocks, windows, batch, recipe, device, layers, in_files
    )
    check_host(work, device, host_memory)
    rotation = rotation_of(model, windows, layers, recipe, device)
    taken = settle_rotation(rotation, device, host_memory) if rotation else 0
    place, held, predicted = settle(work, device, host_memory)
    report.memory_predicted = max(taken, predicted)
    if rotation:
        say(f"rotating     {size_text(taken)} on {device.type}; pruning {size_text(predicted)}")
    if device.type != "cpu":
        host = predict_host(work, device, place == "host")
        host = max(host, predict_rotation_host(rotation, device)) if rotation else host
        say(f"memory       about {host / 2**30:.2f} GiB of the host")
    if place != "device":
        where = "in a scratch file" if place == "scratch" else "in the host's memory"
        say(f"states       {states_of(work) / 2**30:.2f} GiB of hidden states, {where}")
    each = seconds_a_block(work, held, _rate(device, next(model.parameters()).dtype))
    every = time_text(each * len(blocks))
    say(f"time         {time_text(each)} a block, {every} for {len(blocks)}, by estimate")
    return report


def describe(layers, blocks):
    """Lines of text: the linears, block by block, where blocks that are alike share lines."""
    rows = [
        (index, tuple(_rows(layers, index, block))) for index, block in enumerate(blocks)
    ]
    for alike, some in groupby(rows, key=lambda row: row[1]):
        indices = [index for index, _ in some]
        last = f" to {indices[-1]}" if len(indices) > 1 else ""
        yield f"{layers.prefix}.{indices[0]}{last}"
        width = max(len(name) for name, *_ in alike)
        for name, (outputs, inputs), what in alike:
            yield f"  {name:<{width}}  {outputs} x {inputs}  {what}"
    for name in layers.outside:
        yield f"{name}  left as it is: outside the blocks"


def _rows(layers, index, block):
    for inner, module in linears(block).items():
        own = layers.recipes.get((index, inner))
        what = f"left as it is: {layers.left[index, inner]}" if own is None else own.pattern.label
        yield inner, tuple(oriented(module).shape), what


def _rate(device, dtype):
    """Floating-point operations a second of a large product."""
    n = ORDER[device.type]
    A = torch.ones(n, n, dtype=dtype, device=device)
    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        A @ A
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(2 * n**3 / (time.perf_counter() - began))
    return max(found)
