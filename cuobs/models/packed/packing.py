"""Packed models: in memory, in checkpoints, and as transformers opens them.

A packed checkpoint is one of transformers in which each packed linear holds its values under the
name of its weight and its index beside them; ``quantization_config`` of its ``config.json`` says
which these are, and by what pattern.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch

import cuobs
from cuobs import arrays, ops, validation
from cuobs.models.blocks import plain_torch
from cuobs.models.checkpoints.card import CARD, stored_otherwise
from cuobs.models.checkpoints.checkpoint import aside, begin, set_aside
from cuobs.models.checkpoints.destination import finish
from cuobs.models.checkpoints.loading import empty_model
from cuobs.models.checkpoints.marker import abandon, check_destination
from cuobs.models.checkpoints.names import TensorReader, index_name
from cuobs.models.checkpoints.source import METHOD, REPORT, Stored, find_source
from cuobs.models.parked import at_hand
from cuobs.models.pruning.layers import choose_layers
from cuobs.models.report import read_report
from cuobs.models.structure import find_blocks, is_transposed, linears, oriented, shared_weights
from cuobs.ops.packed import VERSION
from cuobs.packed import check_obeys
from cuobs.pattern import parse, verify
from cuobs.torch.packed import PackedLinear, pack_tensor, pattern_text, unpack_tensor


@dataclass
class Packing:
    """What was packed.

    Attributes
    ----------
    modules : dict of str to str
        The pattern of each packed linear, by its name in the model.
    left : dict of str to str
        Why others in the blocks were not.
    before, after : int
        Bytes of the weights of the packed linears, dense and packed.
    zeros : int
        Pruned elements that were -0.0 and come back as 0.0.
    """

    modules: dict
    left: dict
    before: int = 0
    after: int = 0
    zeros: int = 0

    def add(self, other: "Packing") -> None:
        """Count what was packed elsewhere too."""
        self.modules |= other.modules
        self.left |= other.left
        self.before, self.after = self.before + other.before, self.after + other.after
        self.zeros += other.zeros

    def lines(self) -> Iterator[str]:
        """A summary in lines of text."""
        share = f"{self.after / self.before:.4f}" if self.before else "-"
        yield f"packed       {len(self.modules)} linears by {self.config()['pattern']}"
        yield (
            f"weights      {self.before / 2**20:.1f} MiB dense, {self.after / 2**20:.1f} MiB "
            f"packed ({share})"
        )
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            yield f"left dense   {len(names)} linears, {names[0]} first: {reason}"
        if self.zeros:
            yield f"signs        {self.zeros} pruned weights were -0.0 and come back as 0.0"

    def config(self) -> dict:
        """What ``config.json`` says of it."""
        return packed_config(self.modules)


def packed_config(modules):
    """What ``config.json`` says of packed linears, from the pattern of each by its name."""
    return {
        "quant_method": METHOD, "version": VERSION,
        "pattern": ", ".join(dict.fromkeys(modules.values())), "modules": modules,
    }  # fmt: skip


@plain_torch()
def pack_model(model: Any, pattern: Any = "2:4") -> Packing:
    """Pack the linears in the blocks of a pruned model, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On any device; its packed linears become `cuobs.torch.PackedLinear`, which have no
        gradients.
    pattern : str, Pattern or dict
        The one that they obey, or that of each by name. A linear that breaks it stays dense.

    Returns
    -------
    Packing

    Raises
    ------
    ValueError
        None obeys it.
    """
    prefix, blocks = find_blocks(model)
    found = Packing({}, {})
    shared = _shared(model, prefix, blocks)
    for name, module in _named_linears(prefix, blocks).items():
        own = _pattern_of(pattern, name)
        weight = oriented(module)
        if reason := shared.get(name) or _broken(weight, own):
            found.left[name] = reason
            continue
        packed = PackedLinear.from_weight(weight, own, module.bias)
        _note(found, name, weight, packed.weight, packed.index, packed.pattern)
        _put(model, name, packed.train(module.training))
    _check_any(found, pattern, prefix, blocks)
    return found


@plain_torch()
def pack_folder(
    src: str | PathLike,
    dst: str | PathLike,
    pattern: Any = None,
    *,
    shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    device: str = "auto",
    resume: bool = False,
    progress: Callable | None = None,
) -> Packing:
    """Pack the pruned model of a folder into another folder.

    Block by block; each is on disk as soon as it is packed.

    Parameters
    ----------
    src : path
        A checkpoint of transformers, as `prune_folder` writes it. Never written.
    dst : path
        A new or empty folder, or with ``resume`` that of an unfinished run. It opens with
        ``AutoModelForCausalLM.from_pretrained`` after ``import cuobs.models``.
    pattern : str or Pattern, optional
        By default what ``cuobs_report.json`` says of each linear, or 2:4 without one.
    shard_size : int or str
        The largest file of weights: bytes, or a size like "5GB".
    trust_remote_code : bool
        Run the code that SRC holds, where its model needs it.
    device : {"auto", "cpu", "cuda"}
        Where weights are packed, one at a time.
    resume : bool
        Go on with an unfinished run: blocks that it has packed are taken as they are.
    progress : callable, optional
        Called with (done, total) after each linear.

    Returns
    -------
    Packing

    Raises
    ------
    ValueError
        No linear obeys the pattern, SRC is no checkpoint of plain weights, or the unfinished run
        began with another one.
    """
    source = find_source(src)
    if source.gguf is not None:
        raise ValueError(f"{source.name}: found a GGUF, expected the folder of a pruned model")
    check_destination(source, dst, resume)
    shard_bytes = arrays.parse_size(shard_size)
    patterns = _patterns_of(source) if pattern is None else parse(pattern)
    place = arrays.device_name(arrays.choose(device))
    stored = source.stored
    model = empty_model(source.folder, trust_remote_code)
    prefix, blocks = find_blocks(model)
    pack_block = partial(
        _pack_block, stored, TensorReader(source, stored), _shared(model, prefix, blocks), patterns,
        place,
    )  # fmt: skip
    found, changed, existed = Packing({}, {}), {}, os.path.isdir(dst)
    total = len(linears(blocks))
    begin(dst, _identity(source, stored, pattern), resume)
    try:
        for index, block in enumerate(blocks):
            modules = {f"{prefix}.{index}.{name}": m for name, m in linears(block).items()}
            title = f"packed-{index:05}"
            if held := aside(dst, title):
                tensors, part = held[0], Packing(**json.loads(held[1]["packing"]))
            else:
                tensors, part = pack_block(modules)
                if tensors:
                    tensors = set_aside(dst, title, tensors, {"packing": json.dumps(asdict(part))})
            found.add(part)
            changed |= tensors
            if progress:
                progress(len(found.modules) + len(found.left), total)
        if not found.modules:
            _refuse(source.name, found)
    except (ValueError, OSError):
        abandon(dst, existed)
        raise
    finish(
        source, dst, changed, config={**source.config, "quantization_config": found.config()},
        extra=_said_of(source, packed=True), shard_size=shard_bytes,
    )  # fmt: skip
    return found


def _identity(source, stored, pattern):
    """What decides the result, to be told again: the files of a model by their sizes and times."""
    names = {tensor.file for tensor in stored.values()} | {"config.json", REPORT}
    states = [(name, *_state(source.path(name))) for name in sorted(names)]
    return {
        "command": "pack-model", "pattern": None if pattern is None else pattern_text(pattern),
        "model": hashlib.sha256(json.dumps(states).encode()).hexdigest(),
    }  # fmt: skip


def _state(path):
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ()
    return found.st_size, found.st_mtime_ns


def _pack_block(stored, read, shared, patterns, place, modules):
    """The packed tensors of linears, by their names in the files, and what was done."""
    part, packed = Packing({}, {}), {}
    for name, module in modules.items():
        file_name, own = _file_name(f"{name}.weight", stored), _pattern_of(patterns, name)
        reason = shared.get(name)
        if file_name is None:
            reason = "it is put together from several tensors when it is loaded"
        if not reason:
            weight = oriented(module, read(file_name)).to(place)
            reason = _broken(weight, own)
        if reason:
            part.left[name] = reason
            continue
        packed |= _packed(part, name, weight, own, file_name)
    return packed, part


def _packed(found, name, weight, pattern, file_name):
    """A linear's packed tensors by their names in the files; it is counted as packed."""
    values, index = (tensor.cpu() for tensor in pack_tensor(weight, pattern, name))
    _note(found, name, weight, values, index, pattern_text(pattern))
    return {file_name: values, index_name(file_name): index}


class Form(NamedTuple):
    """How a weight will lie packed.

    Attributes
    ----------
    pattern : str
    shape : tuple of int
        (outputs, inputs).
    transposed : bool
        Whether the model holds it as (inputs, outputs).
    """

    pattern: str
    shape: tuple
    transposed: bool

    def described(self, name, dtype):
        """Its values and its index, by names in the files: `Stored` that are in none yet."""
        form = ops.tiling(parse(self.pattern).compile(*self.shape))
        return {name: Stored("", dtype, form.values_shape),
                index_name(name): Stored("", "I32", form.index_shape)}  # fmt: skip


def packed_forms(model, recipe):
    """The `Form` of each linear that is pruned, by its name; its weights are not looked at.

    Raises
    ------
    ValueError
        A pattern has more masks than an index can number.
    """
    prefix, blocks = find_blocks(model)
    forms = {}
    for (index, inner), own in choose_layers(model, prefix, blocks, recipe).recipes.items():
        name, module = f"{prefix}.{index}.{inner}", linears(blocks[index])[inner]
        shape = tuple(oriented(module).shape)
        with validation.naming(name):
            ops.tiling(own.pattern.compile(*shape))
        forms[name] = Form(pattern_text(own.pattern), shape, is_transposed(module))
    return forms


def pack_changed(model, changed, names, pattern_of, keep):
    """Pack the linears of a pruned model among the tensors that are to be written.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    changed : dict of str to tensor
        See `cuobs.models.checkpoints.destination.changed_tensors`. Packed weights take their
        places in it.
    names : dict of str to str
        The names in the files by those in the model.
    pattern_of : callable
        The `Pattern` of a linear by its name, None where it was not pruned.
    keep : callable
        Called with the number of a block and its packed tensors by name; gives what is written.

    Returns
    -------
    Packing
    """
    prefix, blocks = find_blocks(model)
    found, shared = Packing({}, {}), _shared(model, prefix, blocks)
    for index, block in enumerate(blocks):
        packed = {}
        with at_hand(block):
            for inner, module in linears(block).items():
                name = f"{prefix}.{index}.{inner}"
                file_name, own = names.get(f"{name}.weight", f"{name}.weight"), pattern_of(name)
                weight, reason = oriented(module), shared.get(name)
                if not reason:
                    reason = "it was not pruned" if own is None else _broken(weight, own)
                if reason:
                    found.left[name] = reason
                    continue
                packed |= _packed(found, name, weight, own, file_name)
        changed |= keep(index, packed) if packed else {}
    if not found.modules:
        _refuse("model", found)
    return found


@plain_torch()
def unpack_folder(
    src: str | PathLike,
    dst: str | PathLike,
    *,
    shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    progress: Callable | None = None,
) -> list:
    """Undo `pack_folder`: the tensors that were packed, bit for bit, in a plain checkpoint.

    Parameters
    ----------
    src, dst : path
    shard_size, trust_remote_code, progress
        See `pack_folder`.

    Returns
    -------
    list of str
        The names of the linears.

    Raises
    ------
    ValueError
        SRC was not packed by cuobs, or by a later release.
    """
    source = find_source(src, packed=True)
    check_destination(source, dst)
    shard_bytes = arrays.parse_size(shard_size)
    config = dict(source.config)
    modules = check_config(source.name, config.pop("quantization_config"))
    stored = source.stored
    read = TensorReader(source, stored)
    model = empty_model(source.folder, trust_remote_code)
    changed, dropped = {}, set()
    for done, (name, pattern) in enumerate(modules.items(), 1):
        module = model.get_submodule(name)
        file_name = _file_name(f"{name}.weight", stored)
        beside = file_name and index_name(file_name)
        if beside not in stored:
            raise ValueError(f"{source.name}: found no {name}.index, expected all packed weights")
        weight = unpack_tensor(
            read(file_name), read(beside), pattern, *oriented(module).shape
        )
        changed[file_name] = (weight.T if is_transposed(module) else weight).contiguous()
        dropped.add(beside)
        if progress:
            progress(done, len(modules))
    finish(
        source, dst, changed, dropped=dropped, config=config,
        extra=_said_of(source, packed=False), shard_size=shard_bytes,
    )  # fmt: skip
    return list(modules)


def check_config(name, config):
    """The packed linears of a config, by name, with their patterns; refuse what is not known."""
    config = config if isinstance(config, dict) else config.to_dict()
    if config.get("quant_method") != METHOD or not isinstance(config.get("modules"), dict):
        raise ValueError(
            f"{name}: found the quantization {config.get('quant_method')!r}, expected a model "
            "packed by cuobs"
        )
    if config.get("version") != VERSION:
        raise ValueError(
            f"{name}: found packed weights of version {config.get('version')}, expected {VERSION}"
        )
    return config["modules"]


def put_packed(model, modules):
    """Put empty `PackedLinear` in the places of linears, on their devices.

    Parameters
    ----------
    model : torch.nn.Module
    modules : dict of str to str
        Patterns by the names of linears.
    """
    for name, pattern in modules.items():
        module = model.get_submodule(name)
        M, K = oriented(module).shape
        _put(model, name, PackedLinear(
            K, M, pattern, module.bias is not None, module.weight.device, module.weight.dtype,
        ).train(module.training))  # fmt: skip


def _put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _named_linears(prefix, blocks):
    return {f"{prefix}.{name}": module for name, module in linears(blocks).items()}


def _shared(model, prefix, blocks):
    found = shared_weights(model, prefix, blocks)
    return {f"{prefix}.{i}.{n}": f"it shares its weight with {other}"
            for (i, n), other in found.items()}  # fmt: skip


def _broken(weight, pattern):
    """Why a weight can't be packed, or an empty text."""
    try:
        found = verify(weight, pattern)
    except ValueError as error:
        return str(error)
    if found:
        return ""
    return f"it breaks {pattern.label}"


def _pattern_of(patterns, name):
    if isinstance(patterns, dict):
        return parse(patterns[name])
    return patterns(name) if callable(patterns) else parse(patterns)


def _note(found, name, weight, values, index, pattern):
    found.modules[name] = pattern
    found.before += weight.numel() * weight.element_size()
    found.after += values.nbytes + index.nbytes
    negative = torch.signbit(weight).sum() - torch.signbit(values).sum()
    found.zeros += int(negative)


def _check_any(found, pattern, prefix, blocks):
    if found.modules:
        return
    name, module = next(iter(_named_linears(prefix, blocks).items()))
    check_obeys(oriented(module), _pattern_of(pattern, name), name)
    _refuse("model", found)


def _refuse(name, found):
    first, reason = next(iter(found.left.items()))
    raise ValueError(
        f"{name}: found no linear that can be packed ({first}: {reason}), expected a model that "
        "cuobs prune-model has written, or another --pattern"
    )


def _file_name(name, stored):
    """The name of a tensor in the files: its own, or with or without the prefix of a class."""
    if name in stored:
        return name
    found = [n for n in stored if n.endswith("." + name) or name.endswith("." + n)]
    return found[0] if len(found) == 1 else None


def _report_of(source):
    """The report of the run that pruned a model, which goes with it."""
    path = source.path(REPORT)
    if not os.path.isfile(path):
        return {}
    with open(path, "rb") as file:
        return {REPORT: file.read()}


def _said_of(source, packed):
    """The report that goes with a model, and its card, which says how the weights are stored."""
    files = _report_of(source)
    if files and CARD in source.carried:
        with open(source.path(CARD), "rb") as file:
            card = file.read().decode(errors="surrogateescape")
        # Another release's report may hold something else.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            card = stored_otherwise(read_report(source.folder), card, packed)
            files[CARD] = card.encode(errors="surrogateescape")
    return files


def _patterns_of(source):
    """What a folder's report says of the pattern of a linear by name; 2:4 without one."""
    try:
        settings = json.loads(_report_of(source)[REPORT])["settings"]
        first = parse(settings["pattern_view"])
        label = settings["pattern"]
        first = parse(label) if label in cuobs.patterns() else first
        layers = settings.get("layers") or {}
    except (KeyError, ValueError, TypeError):
        return parse("2:4")

    def of(name):
        own = first
        for glob, changes in layers.items():
            if "pattern" in changes and fnmatch.fnmatchcase(name, glob):
                own = parse(changes["pattern"])
        return own

    return of
