"""Prune a causal language model in memory, block by block and group by group."""

import copy
import operator
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import torch

import cuobs
from cuobs import validation
from cuobs.models import memory
from cuobs.models import ranks as processes
from cuobs.models.blocks import capture, evaluating, plain_torch
from cuobs.models.checkpoints import checkpoint
from cuobs.models.checkpoints.source import BLOCKS
from cuobs.models.distilling.distillation import split_windows
from cuobs.models.parked import parked
from cuobs.models.pruning.checks import check_alone, check_by_window
from cuobs.models.pruning.groups import probe
from cuobs.models.pruning.layers import check_limit, choose_layers
from cuobs.models.pruning.prediction import check_host, settle, work_from_shapes, work_of
from cuobs.models.pruning.resident import Resident
from cuobs.models.pruning.rows import prune_rows, zeros
from cuobs.models.pruning.scratch import at_home, states_at
from cuobs.models.pruning.streams import Passage, Streams
from cuobs.models.pruning.targets import Moments
from cuobs.models.pruning.tuning import tune_block
from cuobs.models.pruning.warming import Warming
from cuobs.models.ranks import Ranks
from cuobs.models.recipe import read_arguments
from cuobs.models.recovery import check_room, recover
from cuobs.models.report import BlockReport, LayerReport, ModelReport
from cuobs.models.rotating.folding import examine
from cuobs.models.rotating.rotation import rotate
from cuobs.models.rotating.rotation_prediction import rotation_work, settle_rotation
from cuobs.models.structure import check_plain, find_blocks, linears, oriented
from cuobs.models.tokens.windows import check_windows

# What an unfinished run keeps its rotation in, beside its blocks.
ROTATION = "rotation.safetensors"
# Tokens that run through a block at once.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}


@plain_torch()
def prune_model(
    model: Any,
    tokens: Any,
    *,
    attention_mask: Any = None,
    batch_tokens: int | None = None,
    host_memory: int | str | None = None,
    checkpoint_folder: str | PathLike | None = None,
    resume: bool = False,
    protocol: dict | None = None,
    keep_masks: bool = False,
    dtypes: dict | None = None,
    places: dict | None = None,
    warming: Any = None,
    starting: Callable | None = None,
    rotating: Callable | None = None,
    on_block: Callable | None = None,
    **options: Any,
) -> ModelReport:
    """Prune the linears in the blocks of a causal language model, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense blocks of ``nn.Linear`` or ``Conv1D``; changed in place, on its own device. Only one
        block at a time moves to ``device``.
    tokens : array of int, shape (windows, length)
        Calibration windows.
    attention_mask : array of bool or int, shape (windows, length), optional
        0 where a token is padding; those tokens enter no sum.
    batch_tokens : int, optional
        Tokens that run through a block at once. It can change results in their last bits.
    host_memory : int or str, optional
        Bytes of the host's memory that may be used, or a size like "6GiB". Hidden states that do
        not fit, on the device nor there, are kept in mapped files, in ``checkpoint_folder`` or,
        without one, where temporary files are.
    checkpoint_folder : path, optional
        Where each finished block is written before the next begins.
    resume : bool
        Go on from the blocks in that folder.
    protocol : dict, optional
        Where the tokens come from, for the report.
    keep_masks : bool
        Whether the report is to hold the masks.
    dtypes : dict of str to torch.dtype, optional
        To what new weights are rounded, by their names in the model: what they will be written in,
        where that is narrower than what they are held in.
    places : dict of str to (Stored or StoredPacked), optional
        Where finished weights are written, by their names in the model, see
        `cuobs.models.checkpoints.checkpoint.save_block`; the files are there once ``starting`` was
        called.
    warming : Warming, optional
        Of this recipe, begun before.
    starting : callable, optional
        Called when all is checked, with a `ModelReport` that holds no blocks yet: what will be
        done, and the memory that it is predicted to take.
    rotating : callable, optional
        Called with (done, total) steps while a rotation is learned.
    on_block : callable, optional
        Called with (report, blocks) after each block, the number of all blocks and the
        `ModelReport` so far. From a GPU the block may still be on its way back. As the other two
        it is called in the state that pruning itself needs: without gradients, autocast and
        inference mode, with the CPU and float32 as default device and dtype.
    pattern : str or Pattern
        See `cuobs.patterns`. A layer that it does not divide stays as it is, and the report says
        so.
    method : str
        See `cuobs.methods`; its options are arguments as well.
    refine : {None, "exact"}
        As in `cuobs.prune`.
    damp : float
        λ as a share of the mean of a Hessian's diagonal. A layer whose Hessian is not positive
        definite gets ten times as much, and more, until it is; the report says so.
    layers : dict, optional
        What is different for some linears, by a glob of their names:
        ``{"*.down_proj": {"pattern": "4:8"}}``. Later ones have the last word.
    skip : str or list of str, optional
        Globs; linears whose whole name fits one of them, as ``"*.k_proj"``, stay as they are.
    target : {"mixed", "pruned", "dense"}
        What a layer is to give: "pruned" its dense weights' outputs for the inputs that the pruned
        model feeds it, as is usual; "dense" the outputs that it has in the dense model; "mixed"
        something between, see the shares.
    dense_share : float or (float, float), optional
        Of a mixed target, 0.5 by default: 0 is "pruned", 1 is "dense". A pair goes evenly from the
        first block to the last.
    residual_share : float or (float, float), optional
        Of a mixed target, 0.5 by default: the share of what the residual stream has lost that
        layers which write into it are to make up for.
    drop_first_token : bool
        Leave the first token of each window out of the sums; its activations are huge and unlike
        all others.
    tune : int
        Passes of gradient descent over the calibration tokens in which a block's kept weights
        learn together, masks fixed, to give the hidden states of the dense model; 0 for none.
    tune_rate : float
        The learning rate of those passes at their start.
    distill : int
        Passes over the calibration tokens in which all kept weights learn together what the dense
        model says, masks fixed, after the last block; see `cuobs.models.distill`. A copy of the
        dense model is kept for that.
    distill_rate : float
        The learning rate of those.
    rotate : bool
        Give the model another basis first in which the patterns prune less of what counts, see
        `cuobs.models.rotate`; a head that is tied to the embedding is untied.
    rotate_steps, rotate_score, rotate_permute
        ``steps``, ``score`` and ``permute`` of that.
    device : {"auto", "cpu", "cuda"}
        Where blocks run and are pruned; "auto" takes the GPU where PyTorch and CuPy both find one.
    dtype, precision, memory_limit, workers, batch_rows
        As in `cuobs.prune`.

    Returns
    -------
    ModelReport

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, the model has no blocks of plain linears, is a mixture of experts or
        passes more between its blocks than hidden states, or its activations are not finite.
    """
    recipe, device = check_arguments(batch_tokens=batch_tokens, **options)
    if host_memory is not None:
        host_memory = cuobs.arrays.parse_size(host_memory, "host_memory")
    if resume and checkpoint_folder is None:
        raise ValueError("resume: found no checkpoint_folder, expected that of the unfinished run")
    ranks = processes.current()
    windows = check_windows(model, tokens, attention_mask, recipe.drop_first_token)
    if recipe.distill:
        split_windows(len(windows.tokens))
    mine = share_windows(windows, ranks)
    blocks, layers = choose(model, recipe, device, host_memory)
    dense = copy.deepcopy(model) if recipe.distill else None
    batch = batch_of(batch_tokens, windows, device)
    report = report_of(recipe, layers, windows, batch, device, protocol)
    report.protocol |= count_tokens(windows, layers, blocks)
    identity = _identity(report, windows, blocks)
    if resume and ranks.leads:
        checkpoint.check(checkpoint_folder, identity)
    in_files = parked(blocks[0]) is not None
    check_host(
        work_from_shapes(model, blocks, mine, batch, recipe, device, layers, in_files),
        device, host_memory,
    )
    rotation = rotation_of(model, windows, layers, recipe, device)
    taken = settle_rotation(rotation, device, host_memory) if rotation else 0
    begun = warming or _warm(recipe, blocks, device)
    with evaluating(model), memory.one_pool(device):
        check_alone(model, blocks, windows.tokens, windows.mask)
        stream = examine(model, windows.tokens, device) if recipe.rotate else None
        if checkpoint_folder is not None and ranks.leads:
            identity["model"] = checkpoint.fingerprint(model, blocks)
            checkpoint.begin(checkpoint_folder, identity, resume)
        ranks.agree(None)  # the folder is there
        begun.finish()
        if warming is not None:  # by the shapes in files, which may lie there transposed
            _warm(recipe, blocks, device).finish()
        work = work_of(model, blocks, mine, batch, recipe, device, layers)
        place, held, predicted = settle(work, device, host_memory)
        report.memory_predicted = max(taken, predicted)
        if starting:
            starting(report)
        if stream is not None:
            report.rotation = _rotate(
                model, stream, windows, layers, recipe, device, checkpoint_folder, rotating
            )
        memory.reset(device)
        hidden = states_at(place, device, checkpoint_folder or tempfile.gettempdir())
        streams = _enter(model, blocks, mine, batch, recipe.follows, held, device, hidden)
        masked = keep_masks or recipe.distill > 0
        with Resident(blocks, device) as source:
            job = Job(
                recipe, layers, source, report, device, checkpoint_folder, masked, ranks,
                dtypes or {}, places or {},
            )  # fmt: skip
            _prune_blocks(job, streams, on_block)
    if recipe.distill:
        report.distillation = recover(
            model, dense, report.masks, windows.tokens, windows.mask, passes=recipe.distill,
            rate=recipe.distill_rate, device=device, folder=checkpoint_folder,
        )  # fmt: skip
        report.masks = report.masks if keep_masks else {}
    return report


def choose(model, recipe, device, host_memory=None, empty=False):
    """The blocks of a model and its `Layers`, where all that it takes to prune them is there.

    Parameters
    ----------
    model : torch.nn.Module
    recipe : ModelRecipe
    device : torch.device
    host_memory : int, optional
        Bytes of the host's memory that may be used.
    empty : bool
        Whether the model has no weights yet.
    """
    prefix, blocks = find_blocks(model)
    layers = choose_layers(model, prefix, blocks, recipe)
    check_limit(layers, blocks, recipe.config.settings, device)
    if recipe.distill:
        check_room(model, recipe, device, host_memory)
    for index, inner in layers.recipes:
        block = blocks[index]
        there = not empty and parked(block) is None
        check_plain(f"{prefix}.{index}.{inner}", linears(block)[inner], there)
    return blocks, layers


def _warm(recipe, blocks, device):
    """Begin to compile what pruning the blocks will need; a `Warming`."""
    weights = [oriented(module) for module in linears(blocks[0]).values()]
    shapes, config = [tuple(W.shape) for W in weights], recipe.config
    return Warming(config.recipe, config.settings, shapes, weights[0].dtype, device)


def _rotate(model, stream, windows, layers, recipe, device, folder, progress):
    """Rotate the model for the patterns of its linears, or as an unfinished run has done it."""
    return rotate(
        model, windows.tokens, layers.patterns, attention_mask=windows.mask,
        drop_first_token=recipe.drop_first_token, **asdict(recipe.rotation), device=device,
        stream=stream, stored=folder and os.path.join(folder, BLOCKS, ROTATION),
        progress=progress,
    )  # fmt: skip


def rotation_of(model, windows, layers, recipe, device):
    """What rotating a model first will take, a `RotationWork`; None where it is not rotated."""
    if not recipe.rotate:
        return None
    return rotation_work(model, windows.tokens.shape, layers.patterns, recipe.rotation, device)


def share_windows(windows, ranks):
    """This process's windows."""
    if ranks.size == 1:
        return windows
    if len(windows.tokens) < ranks.size:
        raise ValueError(
            f"tokens: found {len(windows.tokens)} windows for {ranks.size} processes, expected at "
            "least one for each"
        )
    return windows.part(ranks.share)


def batch_of(batch_tokens, windows, device):
    """Windows that run through a block at once."""
    return max(1, (batch_tokens or BATCH_TOKENS[device.type]) // windows.tokens.shape[1])


def count_tokens(windows, layers, blocks):
    """Tokens that count, for a protocol; warn of fewer than a linear that is pruned has columns."""
    found = int(windows.keep.sum())
    columns, name = max(
        ((oriented(linears(blocks[index])[inner]).shape[1], f"{layers.prefix}.{index}.{inner}")
         for index, inner in layers.recipes),
        key=operator.itemgetter(0),
    )  # fmt: skip
    if found < columns:
        validation.warn(
            f"tokens: found {found} for {columns} columns of {name}, expected several for each: "
            "the loss on other tokens will be higher by far"
        )
    return {"tokens": found, "tokens_a_column": round(found / columns, 1)}


def report_of(recipe, layers, windows, batch, device, protocol):
    """A `ModelReport` of what will be done, without blocks."""
    return ModelReport(
        settings={**recipe.described(), "device": device.type, "batch_windows": batch},
        protocol={"windows": len(windows.tokens), "length": windows.tokens.shape[1],
                  **(protocol or {})},
        left=layers.outside,
    )  # fmt: skip


def check_arguments(*, device="auto", batch_tokens=None, **options):
    """Refuse arguments of `prune_model` that are wrong whatever the model is.

    Returns
    -------
    recipe : ModelRecipe
    device : torch.device
    """
    if batch_tokens is not None:
        validation.integer("batch_tokens", batch_tokens)
    device = choose_device(device)
    return read_arguments({**options, "device": device.type}), device


def choose_device(name):
    """The device of a name; "auto" takes the GPU where PyTorch and CuPy both find one."""
    if name == "cpu":
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(f"device: found {name!r}, expected 'auto', 'cpu' or 'cuda'")
    if torch.cuda.is_available() and cuobs.arrays.find_cupy() is not None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        fault = cuobs.arrays.cupy_fault() or f"PyTorch {torch.__version__} finds no CUDA device"
        raise ValueError(f"device: found 'cuda', but {fault}")
    return torch.device("cpu")


@dataclass
class Job:
    """What stays the same from block to block.

    Attributes
    ----------
    recipe : ModelRecipe
    layers : Layers
    source : Resident
        Whose `load` and `store` are the only way to a block.
    report : ModelReport
    device : torch.device
    folder : path or None
        Where finished blocks are kept.
    keep_masks : bool
    ranks : Ranks
        The processes that share windows and rows.
    dtypes : dict of str to torch.dtype
        To which new weights are rounded, by their names; others keep the model's.
    places : dict of str to Stored
        Where they are written, by their names; others are kept in the folder too.
    """

    recipe: object
    layers: object
    source: object
    report: ModelReport
    device: torch.device
    folder: object = None
    keep_masks: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    dtypes: dict = field(default_factory=dict)
    places: dict = field(default_factory=dict)

    def dtype(self, linear, weight):
        """That in which a linear's weight is written in the end."""
        return self.dtypes.get(f"{linear}.weight", weight.dtype)

    def name(self, index, inner=""):
        """The name of a block, or of a linear in it."""
        return ".".join(filter(None, (self.layers.prefix, str(index), inner)))

    def depth(self, index):
        """0 for the first block, 1 for the last."""
        return index / max(1, len(self.source) - 1)


def _identity(report, windows, blocks):
    """Everything that decides the result: where it runs and how much at once is not of it."""
    settings = {k: v for k, v in report.settings.items() if k not in ("batch_windows", "device")}
    return {**settings, "tokens": windows.digest(), "blocks": len(blocks)}


def _enter(model, blocks, windows, batch, follows, held, device, hidden):
    """The `Streams` that enter the first block, in a list of hidden states or what acts as one."""
    entry = capture(model, blocks, windows.batches(batch), device, hidden=hidden)
    return Streams.begin(
        entry.hidden, entry.calls, windows.counts(batch, device), follows, memory.Room(batch), held
    )


def _prune_blocks(job, streams, on_block):
    """Prune block after block, and complete the report as it goes."""
    report, began = job.report, time.perf_counter()
    for index in range(len(job.source)):
        report.blocks.append(_prune_block(job, streams, index))
        report.seconds = time.perf_counter() - began
        before = 0 if report.rotation is None else report.rotation.memory_peak
        report.memory_peak = max(before, memory.peak(job.device))
        if on_block:
            on_block(report, len(job.source))


@torch.no_grad()
def _prune_block(job, streams, index):
    """Take a block and both streams one block further; its report."""
    began = time.perf_counter()
    block = job.source.load(index)
    dense = copy.deepcopy(block) if job.recipe.follows else None
    stored = before = None
    if job.folder is not None:
        before = job.source.digest() or checkpoint.digest(block)
        stored = checkpoint.load_block(job.folder, index, job.name(index), block, before)
    if index == 0:
        check_by_window(block, streams.pruned[0], streams.calls[0][0], streams.room)
    plan = None if stored else job.ranks.agree(probe(block, *streams.first_window(index)))
    residual = job.recipe.shares(job.depth(index))[1] > 0
    with Passage(streams, index, block, dense, plan, residual) as passage:
        found, masks = stored or _prune_groups(job, index, block, passage)
        if dense is not None:
            passage.leave("dense")
        if job.recipe.tune and not stored:
            found.tuned = tune_block(
                block, masks, at_home(streams.pruned), at_home(streams.dense),
                streams.calls[index], streams.counts,
                passes=job.recipe.tune, rate=job.recipe.tune_rate,
                batch=job.report.settings["batch_windows"], ranks=job.ranks,
            )  # fmt: skip
        _round(job, index, block, masks)
        if job.recipe.tune and not stored:
            _measure_sparsity(block, found)
        measured = dense is None or found.drift is not None
        if index + 1 < len(job.source) or not measured:
            passage.leave("pruned", anew=found.tuned is not None)
    streams.calls[index] = None
    if not measured:
        found.drift = _share(job, streams.drift())
    if not stored:
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        found.seconds = time.perf_counter() - began
        if job.folder is not None:
            if job.ranks.leads:
                name = job.name(index)
                checkpoint.save_block(
                    job.folder, index, name, block, masks, found, before, job.places
                )
            job.ranks.agree(None)  # the file is there
    if job.folder is not None:
        job.source.kept(checkpoint.finished(job.folder, index))
    if job.keep_masks:
        job.report.masks.update({job.name(index, n): m.cpu() for n, m in masks.items()})
    job.source.store()
    memory.trim(job.device)
    return found


def _prune_groups(job, index, block, passage):
    """Prune a block group by group; its report and the masks by name."""
    modules, rows, masks = linears(block), {}, {}
    for inner, module in modules.items():
        reason = job.layers.left.get((index, inner))
        if inner in passage.plan.idle:
            reason = "the block does not run it"
        rows[inner] = LayerReport(job.name(index, inner), tuple(oriented(module).shape))
        if reason:
            rows[inner].note = f"left as it is: {reason}"
            rows[inner].sparsity = zeros(module.weight)
    dense_share, residual_share = job.recipe.shares(job.depth(index))
    shares = {n: residual_share if n in passage.plan.writers else 0.0 for n in modules}
    for place, group in enumerate(passage.plan.groups):
        names = [n for n in group.names if not rows[n].note]
        if not names:
            continue
        moments = Moments()
        writes = any(shares[n] for n in names)
        passage.inputs(place, bool(dense_share), writes, moments.update)
        moments.add_up(job.ranks)
        job.source.settle()  # memory is short from here on
        moments.check_finite(job.name(index, group.names[0]))
        memory.make_room(job.device)
        for recipe, members in _by_recipe(job, index, names).items():
            masks |= prune_rows(
                recipe, job.recipe.config.settings, moments, dense_share,
                {n: (modules[n], rows[n], shares[n]) for n in members}, job.ranks,
                [job.dtype(job.name(index, n), modules[n].weight) for n in members],
            )  # fmt: skip
        memory.make_room(job.device)
    return BlockReport(index, list(rows.values())), masks


def _round(job, index, block, masks):
    """Give pruned weights the values that they are written with: what is measured is written."""
    modules = linears(block)
    for name in masks:
        weight = modules[name].weight
        dtype = job.dtype(job.name(index, name), weight)
        if dtype != weight.dtype:
            weight.copy_(weight.to(dtype))


def _by_recipe(job, index, names):
    """Linears of a group that are pruned by the same recipe, and so together."""
    found = {}
    for name in names:
        found.setdefault(job.layers.recipes[index, name], []).append(name)
    return found


def _share(job, sums):
    """The root of a share whose two sums are over this process's windows."""
    job.ranks.add_up(sums)
    return float((sums[0] / sums[1]).sqrt())


def _measure_sparsity(block, found):
    modules = linears(block)
    for row in found.layers:
        inner = next(n for n in modules if row.name.endswith(f".{found.index}.{n}"))
        row.sparsity = zeros(modules[inner].weight)
