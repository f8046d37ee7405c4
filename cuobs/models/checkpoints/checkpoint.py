"""An unfinished run: what it began with, its finished blocks kept safe, the masks.

While a model is being pruned its folder holds ``cuobs_incomplete.json`` and, in ``cuobs_blocks``,
a file for each finished block. What a block's pruned weights are lies in that, or in the files of
weights that the run writes. The marker goes last, when everything else is in its place.
"""

import hashlib
import json
import os
from dataclasses import asdict
from os import PathLike

import numpy as np
import torch
from safetensors.torch import safe_open

import cuobs
from cuobs import files
from cuobs.containers import write_tensors
from cuobs.models import digests
from cuobs.models.checkpoints.marker import check_began_with, sync
from cuobs.models.checkpoints.names import (
    TORCH,
    TensorReader,
    bytes_of,
    cast,
    entry_of,
    index_name,
)
from cuobs.models.checkpoints.shards import fill
from cuobs.models.checkpoints.source import (
    BLOCKS,
    MARKER,
    MASKS,
    Source,
    Stored,
    StoredPacked,
    safetensors_header,
    unfinished,
)
from cuobs.models.parked import around, parked, state_of
from cuobs.models.report import BlockReport
from cuobs.models.structure import linears
from cuobs.models.threads import side_by_side
from cuobs.torch.packed import pack_tensor

# What a config says that changes no result: how it was written, and in what the weights lie.
NO_MATTER = (
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache",
)  # fmt: skip


def check(folder, identity):
    """Refuse to go on with a run that began with something else, as far as that is known.

    Parameters
    ----------
    folder : path
        Of an unfinished run, or a new one.
    identity : dict
        Some of what decides the result.

    Raises
    ------
    ValueError
    """
    if unfinished(folder):
        check_began_with(folder, {"cuobs": cuobs.__version__, **identity}, whole=False)


def begin(folder, identity, resume):
    """Mark a folder as incomplete, or check that the run in it is the one that goes on.

    Parameters
    ----------
    folder : path
    identity : dict
        Everything that decides the result.
    resume : bool

    Raises
    ------
    ValueError
        The run in the folder was started with something else.
    FileExistsError
        There is a run and ``resume`` is not given.
    """
    identity = {"cuobs": cuobs.__version__, **identity}
    os.makedirs(folder, exist_ok=True)
    marker = os.path.join(folder, MARKER)
    if os.path.exists(marker):
        if not resume:
            raise FileExistsError(f"{folder}: found an unfinished run, expected resume")
        check_began_with(folder, identity)
    else:
        files.write_text(marker, json.dumps(identity, indent=2) + "\n")
    os.makedirs(os.path.join(folder, BLOCKS), exist_ok=True)


def digest(block):
    """A fingerprint of all weights of a block, as they are now; a parked one keeps it."""
    result = hashlib.sha256()
    for name, tensor in state_of(block):
        digests.add(result, tensor, f"{name} ")
        del tensor  # before the next is read
    if (own := parked(block)) is not None:
        own.digest = result.hexdigest()
    return result.hexdigest()


def fingerprint(model, blocks):
    """A fingerprint of all that a model is: its config and its tensors.

    Those that are not stored too; some blocks are read side by side, each tensor by tensor. A
    rotation and windows of the model's own depend on all blocks, also before any of them is pruned.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : torch.nn.ModuleList
    """
    config = getattr(model, "config", None)
    content = {} if config is None else config.to_dict()
    content = {key: value for key, value in content.items() if key not in NO_MATTER}
    result = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for name, tensor in around(model, blocks):
        digests.add(result, tensor, f"{name} ")
        del tensor
    for found in side_by_side(digest, blocks):
        result.update(found.encode())
    return result.hexdigest()


def save_block(folder, index, prefix, block, masks, report, before, places):
    """Write a finished block, whole or not at all.

    Parameters
    ----------
    folder : path
    index : int
    prefix : str
        The block's name.
    block : torch.nn.Module
    masks : dict of str to tensor of bool
        Of its pruned linears.
    report : BlockReport
    before : str
        Its `digest` before.
    places : dict of str to (Stored or StoredPacked)
        Where weights are written, by their names in the model: in files inside ``folder``.
        Others are kept with the masks; so are those that they can't be read back from to the last
        bit, since they are of fewer digits there.
    """
    modules = linears(block)
    tensors = {f"{prefix}.{name}.mask": pack(mask) for name, mask in masks.items()}
    weights = {f"{prefix}.{name}.weight": modules[name].weight.detach() for name in masks}
    mine = {name: places[name] for name in weights if name in places}
    rounded = _write_in_place(weights, mine)
    tensors |= {
        name: weight for name, weight in weights.items() if name not in mine or name in rounded
    }
    path = _block_path(os.path.abspath(folder), index)
    elsewhere = {name: _relative(place, os.path.dirname(path)) for name, place in mine.items()}
    _write(path, tensors, {
        "before": before, "report": json.dumps(asdict(report)), "elsewhere": json.dumps(elsewhere),
    })  # fmt: skip
    sync(os.path.dirname(path))


def _write_in_place(weights, places):
    """Write weights where they lie in the end; the names of those that were rounded for that."""
    rounded, indices = set(), {}
    packed = {name: place for name, place in places.items() if isinstance(place, StoredPacked)}

    def take(name):
        weight, place = weights[name], places[name]
        found = cast(name, weight, TORCH[place.dtype])
        if not torch.equal(found.to(weight.dtype), weight):
            rounded.add(name)
        if name in packed:
            found = found.T.contiguous() if place.transposed else found
            found, indices[index_name(name)] = pack_tensor(found, place.pattern, name)
        return found

    fill(places | {name: place.values for name, place in packed.items()}, take)
    fill({index_name(name): place.index for name, place in packed.items()}, indices.pop)
    return rounded


def _relative(place, folder):
    """A place whose files are named from a folder."""
    if isinstance(place, StoredPacked):
        return place._replace(
            values=_relative(place.values, folder), index=_relative(place.index, folder)
        )
    return place._replace(file=os.path.relpath(place.file, folder))


def _absolute(fields, folder):
    """The inverse of `_relative`, of what became of a place in JSON."""
    if isinstance(fields[0], str):
        file, dtype, shape, start = fields
        return Stored(os.path.join(folder, file), dtype, tuple(shape), start)
    values, index, pattern, shape, transposed = fields
    parts = (_absolute(part, folder) for part in (values, index))
    return StoredPacked(*parts, pattern, tuple(shape), transposed)


def set_aside(folder, title, tensors, metadata=None):
    """Keep tensors in a file beside the finished blocks; a dict of `Stored`."""
    path = _path_aside(folder, title)
    _write(path, tensors, metadata)
    return safetensors_header("", path)[0]


def aside(folder, title):
    """What was `set_aside`, and the metadata of its file; None where nothing was."""
    path = _path_aside(folder, title)
    return safetensors_header("", path) if os.path.exists(path) else None


def _path_aside(folder, title):
    return os.path.join(os.path.abspath(folder), BLOCKS, f"{title}.safetensors")


def _write(path, tensors, metadata=None):
    with files.replacing(path, force=True) as file:
        write_tensors(
            file, {name: entry_of(tensor) for name, tensor in tensors.items()},
            lambda name: [bytes_of(tensors[name])], metadata,
        )  # fmt: skip


def finished(folder, index):
    """The tensors that a run goes on with of a finished block, by their names in the model.

    Returns
    -------
    dict of str to (Stored or StoredPacked)
    """
    return _record(_block_path(os.path.abspath(folder), index))[0]


def in_place(folder, index):
    """Where the weights of a finished block lie that are written as they will be in the end."""
    path = _block_path(os.path.abspath(folder), index)
    return _elsewhere(path, safetensors_header("", path)[1])


def _record(path):
    """Where the tensors of a finished block lie, and what its file says of it."""
    stored, metadata = safetensors_header("", path)
    return _elsewhere(path, metadata) | stored, metadata


def _elsewhere(path, metadata):
    """Where its weights lie that are not in the file at a path, as its metadata says."""
    found, folder = json.loads(metadata.get("elsewhere", "{}")), os.path.dirname(path)
    places = {name: _absolute(fields, folder) for name, fields in found.items()}
    for place in places.values():
        for part in place[:2] if isinstance(place, StoredPacked) else (place,):
            if os.path.getsize(part.file) < part.start + part.nbytes:
                raise ValueError(f"{part.file} is truncated")
    return places


def load_block(folder, index, prefix, block, before):
    """Put a finished block's weights in place; its report and masks, or None if there is none.

    Raises
    ------
    ValueError
        The file belongs to another model.
    """
    path = _block_path(os.path.abspath(folder), index)
    if not os.path.exists(path):
        return None
    try:
        stored, metadata = _record(path)
        report = BlockReport.from_dict(json.loads(metadata["report"]))
        same = metadata["before"] == before
    except (ValueError, KeyError, AttributeError, FileNotFoundError):
        raise ValueError(
            f"resume: found that {path} is damaged, expected a whole file; without it the block is "
            "pruned again"
        ) from None
    if not same:
        raise ValueError(f"resume: found that {path} was made from another model's weights")
    report.resumed = True
    return report, _put_back(prefix, block, stored)


def _put_back(prefix, block, stored):
    """Put weights that are stored into a block; its masks."""
    modules, masks, read = linears(block), {}, TensorReader(Source("", ""), stored)
    for key in stored:
        name, _, kind = key.removeprefix(prefix + ".").rpartition(".")
        weight = modules[name].weight
        if kind == "mask":
            masks[name] = unpack(read(key), weight.shape[1]).to(weight.device)
        else:
            weight.data.copy_(read(key, device=weight.device))
    return masks


def pack(mask):
    """Eight elements of a mask in a byte, row by row, the first in the highest bit."""
    packed = np.packbits(mask.cpu().numpy(), axis=1)
    return torch.from_numpy(np.ascontiguousarray(packed))


def unpack(packed, columns):
    """The inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns).astype(bool))


def write_masks(file, source, masks, columns):
    """Write masks that finished blocks hold into one file.

    Parameters
    ----------
    file : file
        Open for writing bytes.
    source : Source
    masks : dict of str to Stored
        By the name of the linear.
    columns : dict of str to int
        Likewise.
    """
    stored = {f"{name}.mask": mask for name, mask in masks.items()}
    columns = json.dumps({f"{name}.mask": columns[name] for name in masks}, sort_keys=True)
    read = TensorReader(source, stored)
    write_tensors(
        file, {name: entry_of(mask) for name, mask in stored.items()},
        lambda name: [bytes_of(read(name))], {"columns": columns},
    )  # fmt: skip


def load_masks(path: str | PathLike) -> dict:
    """The masks of a pruned model, in the form of its weights, True = kept.

    Parameters
    ----------
    path : path
        ``cuobs_masks.safetensors`` or the folder that holds it.

    Returns
    -------
    dict of tensor of bool
        By the name of the linear.
    """
    path = os.path.join(path, MASKS) if os.path.isdir(path) else path
    with safe_open(path, "pt") as stored:
        columns = json.loads(stored.metadata()["columns"])
        return {
            key.removesuffix(".mask"): unpack(stored.get_tensor(key), columns[key])
            for key in stored.keys()
        }


def _block_path(folder, index):
    return os.path.join(folder, BLOCKS, f"{index:05}.safetensors")
