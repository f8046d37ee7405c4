"""Write the folder of a changed model: all that its source holds, and what was changed.

The tensors that are written are those that the source stores, by the names and in the dtypes that
they have there, however the loaded class calls them and whether it knows them or not; those that
were changed come from the model. So nothing is lost that a class ignores, and what was not touched
is the same to the last bit.
"""

import contextlib
import json
import os
import shutil

import torch

from cuobs import files
from cuobs.containers import write_tensors
from cuobs.models.checkpoints.loading import load_tokenizer
from cuobs.models.checkpoints.marker import settle, sync
from cuobs.models.checkpoints.names import (
    TORCH,
    TensorReader,
    bytes_of,
    cast,
    described,
    entry_of,
    equal,
)
from cuobs.models.checkpoints.shards import METADATA, WEIGHTS, fill, lay_out, places_in
from cuobs.models.checkpoints.source import (
    FLOATS,
    LEFTOVER,
    STAGING,
    find_source,
    torch_name,
)


def changed_tensors(model, source, names):
    """The tensors of a model that are no longer those of its files, by their names there.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    source : Source
    names : dict of str to str
        See `cuobs.models.checkpoints.names.match`, of the model as it was loaded.

    Returns
    -------
    dict of str to tensor
        On their devices; views where they are. A tensor that the files do not hold, because it
        was one with another and no longer is, comes by the model's own name.
    """
    stored = source.stored
    read, own = TensorReader(source, stored), model.state_dict(keep_vars=True)
    held = {id(own[name]) for name in names if name in own}
    changed = {}
    for name, tensor in own.items():
        tensor, other = tensor.detach(), names.get(name)
        if other is not None:
            if not equal(tensor, read(other)):
                changed[other] = tensor
        elif id(own[name]) not in held and name not in stored and _is_new(name, model):
            changed[name] = tensor
    return changed


def _is_new(name, model):
    """Whether a tensor was tied to another when the model was read, and is its own now."""
    tied = getattr(model, "_tied_weights_keys", None) or ()
    return name in tied


def finish(
    src, dst, changed, *, dropped=(), config=None, extra=None, without=(), save_dtype=None,
    shard_size=5 * 10**9, reserved=None,
):  # fmt: skip
    """Write all that belongs to a changed model, then take the marker away.

    Everything is made in a folder inside ``dst`` first and moved when it is whole, ``config.json``
    last: without it nothing opens the folder as a model.

    Parameters
    ----------
    src : path or Source
        All its tensors, but those in ``changed`` and ``dropped``, and all its files are carried
        over, whatever they are. Of a GGUF nothing is: ``changed`` holds all.
    dst : path
        See `cuobs.models.checkpoints.marker.check_destination`.
    changed : mapping of str to (tensor, Stored or StoredPacked)
        By the names of the files, see `changed_tensors`; one that is stored in another file, named
        by its whole path, is read when it is written, and unpacked where it lies packed. Names that
        the source lacks are added.
        A tensor in floating point that takes the place of another is written in its dtype.
    dropped : collection of str
        Names of the source's tensors that are not written.
    config : dict, optional
        What ``config.json`` is to say; as in the source by default. Of a GGUF it is needed.
    extra : mapping of str to (str, bytes or callable), optional
        Further files by name, which take the place of the source's own; a callable writes its own
        into the open file that it is given.
    without : collection of str
        Names of the source's files that are not carried over, because they no longer hold.
    save_dtype : torch.dtype or str, optional
        Of all tensors in floating point, and of the config; those of the source by default.
    shard_size : int
        Bytes of the largest file of weights, where no single tensor is larger.
    reserved : path, optional
        A folder of the same disk that holds the files of weights already, see
        `cuobs.models.checkpoints.shards`. Tensors in ``changed`` that are stored there, in their
        places, are left as they are.

    Raises
    ------
    OSError
        A file can't be written; what was there stays, and the marker too.
    ValueError
        A weight that is finite is not in ``save_dtype``.
    """
    source = find_source(src)
    save_dtype = getattr(torch, save_dtype) if isinstance(save_dtype, str) else save_dtype
    staging = os.path.join(dst, STAGING)
    os.makedirs(dst, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    os.mkdir(staging)
    with _named(dst):
        _copy_others(source, staging, without)
        written = write_weights(
            source, staging, changed, dropped, save_dtype, shard_size, reserved
        )
        if clash := written & set(source.carried):
            raise ValueError(
                f"{source.name}: found {min(clash)} beside the weights, which is what one of their "
                "own files is to be called, expected another name or --shard-size"
            )
        config = _with_dtype(source.config if config is None else config, save_dtype)
        if config != source.config:
            files.write_text(
                os.path.join(staging, "config.json"), json.dumps(config, indent=2) + "\n", True
            )
        for name, content in (extra or {}).items():
            with files.replacing(os.path.join(staging, name), force=True) as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
    if reserved is not None:
        for title in written - set(os.listdir(staging)):
            os.replace(os.path.join(reserved, title), os.path.join(staging, title))
    _move(staging, dst)


def write_weights(
    source, folder, changed, dropped=(), save_dtype=None, shard_size=5 * 10**9, reserved=None
):  # fmt: skip
    """Write safetensors, and their index where there are several.

    See `finish`; ``folder`` is a new one. One tensor at a time is in memory.

    Returns
    -------
    set of str
        The names of the files.
    """
    stored = source.stored
    held = {name: described(tensor) for name, tensor in changed.items()}
    elsewhere = {name: at for name, at in changed.items() if not torch.is_tensor(at)}
    read = TensorReader(source, stored | elsewhere)
    entries = entries_of(stored, held, dropped, save_dtype)

    def take(name):
        tensor = changed.get(name)
        tensor = tensor.detach().cpu() if torch.is_tensor(tensor) else read(name)
        return cast(name, tensor, TORCH[entries[name].dtype])

    parts = lay_out(entries, shard_size)
    if reserved is not None:
        places = places_in(reserved, parts)
        fill({name: at for name, at in places.items() if changed.get(name) != at}, take)
    for title, part in parts.items() if reserved is None else ():
        with files.replacing(os.path.join(folder, title)) as file:
            write_tensors(file, part, lambda name: [bytes_of(take(name))], METADATA)
    if len(parts) == 1:
        return set(parts)
    total = sum(entry.size for entry in entries.values())
    weight_map = {name: title for title, part in parts.items() for name in part}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    title = WEIGHTS + ".index.json"
    files.write_text(os.path.join(folder, title), json.dumps(index, indent=2) + "\n")
    return {*parts, title}


def entries_of(stored, changed, dropped=(), save_dtype=None):
    """What the headers of the files that are written say of their tensors, in their order.

    Parameters
    ----------
    stored : dict of str to Stored
        The tensors of the source; those that it lacks come behind them.
    changed : dict of str to Stored
    dropped, save_dtype
        See `finish`.

    Returns
    -------
    dict of str to Entry
    """
    entries = {}
    for name in (*stored, *sorted(changed.keys() - stored.keys())):
        if name in dropped:
            continue
        tensor = changed.get(name) or stored[name]
        dtype, like = tensor.dtype, stored.get(name, tensor).dtype
        if like in FLOATS:
            dtype = like if save_dtype is None else torch_name(save_dtype)
        entries[name] = entry_of(tensor._replace(dtype=dtype))
    return entries


@contextlib.contextmanager
def _named(dst):
    """Say of a file that can't be written where it was to be in the end."""
    try:
        yield
    except OSError as error:
        text = str(error) if not error.strerror else (
            f"{error.filename2 or error.filename or dst}: found that it can't be written "
            f"({error.strerror})"
        )  # fmt: skip
        raise type(error)(text.replace(os.path.join(dst, STAGING), os.fspath(dst))) from None


def _with_dtype(config, dtype):
    """A config that names the dtype of the weights as it is now."""
    if dtype is None:
        return config
    name, result = str(dtype).removeprefix("torch."), dict(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    result.update(dict.fromkeys(keys, name))
    for key, part in config.items():
        if isinstance(part, dict) and {"dtype", "torch_dtype"} & part.keys():
            result[key] = _with_dtype(part, dtype)
    return result


def _copy_others(source, staging, without):
    """All files of a source besides its weights, as they are; a tokenizer, out of a GGUF."""
    if source.gguf is not None:
        with contextlib.suppress(ValueError):
            load_tokenizer(source).save_pretrained(staging)
        return
    for name in source.carried:
        if name in without:
            continue
        target = os.path.join(staging, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(source.path(name), target)


def _move(staging, dst):
    """Put all files in place, whole and on disk, and let go of what the run needed."""
    for place, _, names in os.walk(staging):
        for name in names:
            path = os.path.join(place, name)
            sync(path)
        sync(place)
    for name in os.listdir(dst):  # an earlier try may have left others, of another size
        written = name.startswith("model") and name.endswith((".safetensors", ".index.json"))
        if written or name.startswith(LEFTOVER):
            os.unlink(os.path.join(dst, name))
    for name in sorted(os.listdir(staging), key=lambda n: n == "config.json"):
        path = os.path.join(dst, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        os.replace(os.path.join(staging, name), path)
    os.rmdir(staging)
    sync(dst)
    settle(dst)
