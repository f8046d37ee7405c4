"""Checkpoints: read a model, keep finished blocks safe, write the pruned model.

While a model is being pruned its folder holds ``cuobs_incomplete.json`` and, in ``cuobs_blocks``,
a file for each finished block. The marker goes last, when everything else is in its place.
"""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from functools import reduce

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save

import cuobs
from cuobs import files
from cuobs.models.report import BlockReport
from cuobs.models.structure import linears

MARKER = "cuobs_incomplete.json"
BLOCKS = "cuobs_blocks"
STAGING = "cuobs_staging"
REPORT = "cuobs_report.json"
MASKS = "cuobs_masks.safetensors"
# What a killed run may leave of a file that was being written.
LEFTOVER = ".cuobs_"

# What a checkpoint's folder holds besides weights is copied, these aside.
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx",
    ".onnx_data", ".tflite", ".index.json",
)  # fmt: skip
# What a config says of weights that are not plain floats.
COMPRESSED = ("quantization_config", "compression_config", "sparsity_config")
# How the names of a tokenizer's files begin.
TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
# Dtypes of safetensors that a model may be held in.
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def find_source(src):
    """The folder of a checkpoint and, if it is one, the name of its GGUF file.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such folder, or it holds no checkpoint.
    """
    src = os.fspath(src)
    if os.path.isfile(src) and src.endswith(".gguf"):
        return os.path.dirname(src) or ".", os.path.basename(src)
    if not os.path.isdir(src):
        raise FileNotFoundError(f"{src}: found no such folder, expected a checkpoint or a .gguf")
    config = os.path.join(src, "config.json")
    if os.path.isfile(config):
        if unfinished(src):
            raise ValueError(f"{src}: found a model that is not complete, expected a whole one")
        with open(config) as file:
            try:
                content = json.load(file)
            except ValueError as error:
                raise ValueError(f"{config}: found no JSON ({error})") from None
        for key in COMPRESSED:
            if key in content:
                raise ValueError(f"{src}: found a {key}, expected plain weights in floating point")
        return src, None
    found = sorted(name for name in os.listdir(src) if name.endswith(".gguf"))
    if unfinished(src):
        raise ValueError(f"{src}: found a model that is not complete, expected a whole one")
    if len(found) != 1:
        raise ValueError(f"{src}: found no config.json and {len(found)} .gguf files, expected one")
    return src, found[0]


def load_model(src):
    """A causal language model from a checkpoint's folder or a GGUF, on the CPU.

    In the dtype of the weights, whatever the config says, or in one that holds all of theirs.
    Nothing is fetched from anywhere.

    Raises
    ------
    FileNotFoundError, ValueError
        It is no model that transformers opens, or lacks some of its weights.
    """
    from transformers import AutoModelForCausalLM

    folder, gguf = find_source(src)
    extra = {} if gguf is None else {"gguf_file": gguf}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_dtype(folder) if gguf is None else "auto", local_files_only=True,
            output_loading_info=True, **extra,
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever transformers and what it calls may raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{src}: found a model that does not open ({reason}), expected a causal language model "
            "of transformers"
        ) from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers
        raise ValueError(
            f"{src}: found no {missing[0]} ({len(missing)} tensors are missing), expected all "
            "weights"
        )
    if gguf is not None:
        # The weights are floats now; a config that still names GGUF would be refused.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
    return model.eval()


def _dtype(folder):
    """The dtype of the weights in a folder's safetensors; "auto" where there are none."""
    index, names = os.path.join(folder, "model.safetensors.index.json"), {"model.safetensors"}
    if os.path.isfile(index):
        with open(index) as file:
            names = set(json.load(file)["weight_map"].values())
    found = set()
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            return "auto"
        with safe_open(path, "pt") as stored:
            found |= {stored.get_slice(key).get_dtype() for key in stored.keys()}
    floats = [DTYPES[name] for name in found if name in DTYPES]
    if not floats or any(name.startswith("F8") for name in found):
        return "auto"
    return reduce(torch.promote_types, floats)


def load_tokenizer(src):
    """The tokenizer of a checkpoint's folder or a GGUF."""
    from transformers import AutoTokenizer

    folder, gguf = find_source(src)
    extra = {} if gguf is None else {"gguf_file": gguf}
    try:
        if gguf is None and not any(n.startswith(TOKENIZER) for n in os.listdir(folder)):
            raise ValueError("no file of one")  # transformers would make an empty one
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{src}: found no tokenizer that opens ({error}), expected one to read a text with; "
            "tokens.npz:key needs none"
        ) from None


def check_destination(src, dst, resume):
    """Refuse a folder that must not be written, before any work."""
    dst = os.fspath(dst)
    folder, gguf = find_source(src)
    source, place = os.path.realpath(folder), os.path.realpath(dst)
    if place == source or os.path.isdir(src) and place.startswith(source + os.sep):
        raise ValueError(f"{dst}: found the source itself, expected a folder outside it")
    if os.path.exists(dst) and not os.path.isdir(dst):
        raise FileExistsError(f"{dst}: found a file, expected a new folder")
    if unfinished(dst) and not resume:
        raise FileExistsError(
            f"{dst}: found an unfinished run, expected --resume to go on with it or a new folder"
        )
    present = os.path.isdir(dst) and [n for n in os.listdir(dst) if not n.startswith(LEFTOVER)]
    if not unfinished(dst) and present:
        what = "a finished model" if os.path.exists(os.path.join(dst, REPORT)) else "files"
        raise FileExistsError(f"{dst}: found {what}, expected a new or empty folder")
    os.makedirs(dst, exist_ok=True)
    files.check_output(os.path.join(dst, MARKER), force=True)


def unfinished(folder):
    """Whether a folder holds a run that has begun and is not complete."""
    return os.path.exists(os.path.join(folder, MARKER))


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
    identity = json.loads(json.dumps({"cuobs": cuobs.__version__, **identity}))
    os.makedirs(folder, exist_ok=True)
    marker = os.path.join(folder, MARKER)
    if os.path.exists(marker):
        if not resume:
            raise FileExistsError(f"{folder}: found an unfinished run, expected resume")
        try:
            with open(marker) as file:
                before = dict(json.load(file))
        except (ValueError, TypeError):
            raise ValueError(
                f"{marker}: found a damaged file, expected what the run began with; start again in "
                "a new folder"
            ) from None
        for key in sorted(before.keys() | identity.keys()):
            if key == "tokens" and before.get(key) != identity[key]:
                raise ValueError("resume: found other tokens than the run began with")
            if before.get(key) != identity.get(key):
                raise ValueError(
                    f"resume: found {key}={identity.get(key)!r}, expected {before.get(key)!r} as "
                    "the run began with"
                )
    else:
        files.write_text(marker, json.dumps(identity, indent=2) + "\n")
    os.makedirs(os.path.join(folder, BLOCKS), exist_ok=True)


def digest(block):
    """A fingerprint of all weights of a block, as they are now."""
    result = hashlib.sha256()
    for name, tensor in block.state_dict().items():
        tensor = tensor.cpu().contiguous()
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        result.update(tensor.flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def save_block(folder, index, prefix, block, masks, report, before):
    """Write a finished block, whole or not at all."""
    modules = linears(block)
    tensors = {}
    for name, mask in masks.items():
        weight = modules[name].weight.detach().cpu().contiguous()
        tensors[f"{prefix}.{name}.weight"] = weight
        tensors[f"{prefix}.{name}.mask"] = pack(mask)
    metadata = {"before": before, "report": json.dumps(asdict(report))}
    path = _block_path(folder, index)
    with files.replacing(path, force=True) as file:
        file.write(save(tensors, metadata))
    _sync(os.path.dirname(path))


def load_block(folder, index, prefix, block, before):
    """Put a finished block's weights in place; its report and masks, or None if there is none.

    Raises
    ------
    ValueError
        The file belongs to another model.
    """
    path = _block_path(folder, index)
    if not os.path.exists(path):
        return None
    try:
        return _read_block(path, prefix, block, before)
    except (SafetensorError, KeyError):
        raise ValueError(
            f"resume: found that {path} is damaged, expected a whole file; without it the block is "
            "pruned again"
        ) from None


def _read_block(path, prefix, block, before):
    modules = linears(block)
    masks = {}
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
        if metadata["before"] != before:
            raise ValueError(f"resume: found that {path} was made from another model's weights")
        for key in stored.keys():
            name = key.removeprefix(prefix + ".")
            if name.endswith(".mask"):
                name = name.removesuffix(".mask")
                shape = modules[name].weight.shape
                mask = unpack(stored.get_tensor(key), shape[1])
                masks[name] = mask.to(modules[name].weight.device)
            else:
                name = name.removesuffix(".weight")
                modules[name].weight.data.copy_(stored.get_tensor(key))
    report = BlockReport.from_dict(json.loads(metadata["report"]))
    report.resumed = True
    return report, masks


def pack(mask):
    """Eight elements of a mask in a byte, row by row, the first in the highest bit."""
    packed = np.packbits(mask.cpu().numpy(), axis=1)
    return torch.from_numpy(np.ascontiguousarray(packed))


def unpack(packed, columns):
    """The inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns).astype(bool))


def save_masks(path, masks):
    """Write masks by the name of their linear, packed, with the number of columns of each."""
    tensors = {f"{name}.mask": pack(mask) for name, mask in masks.items()}
    columns = {f"{name}.mask": mask.shape[1] for name, mask in masks.items()}
    with files.replacing(path, force=True) as file:
        # One entry: safetensors writes several in no fixed order.
        file.write(save(tensors, {"columns": json.dumps(columns, sort_keys=True)}))


def load_masks(path):
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


def finish(src, dst, model, report, masks=None, shard_size=5 * 10**9):
    """Write the pruned model and all that belongs to it, then take the marker away.

    Parameters
    ----------
    src, dst : path
    model : transformers.PreTrainedModel
    report : ModelReport
    masks : dict of tensor, optional
    shard_size : int
        Bytes of the largest file of weights.
    """
    staging = os.path.join(dst, STAGING)
    shutil.rmtree(staging, ignore_errors=True)
    if find_source(src)[1] is None:
        # The source's own file is copied; one that contradicts itself could not be written.
        model.generation_config = type(model.generation_config)()
    try:
        model.save_pretrained(staging, max_shard_size=shard_size)
    except SafetensorError as error:
        raise OSError(f"{dst}: found that the weights can't be written ({error})") from None
    _copy_others(src, staging)
    if masks is not None:
        save_masks(os.path.join(staging, MASKS), masks)
    files.write_text(os.path.join(staging, REPORT), report.to_json(), force=True)
    mode = os.stat(os.path.join(staging, REPORT)).st_mode
    for name in os.listdir(staging):
        path = os.path.join(staging, name)
        if name.endswith(WEIGHTS):
            os.chmod(path, mode)  # safetensors makes files that their owner alone may read
        _sync(path)
    for name in os.listdir(dst):  # an earlier try may have left others, of another size
        if name.startswith((LEFTOVER, "model")) and name.endswith((".tmp", *WEIGHTS)):
            os.unlink(os.path.join(dst, name))
    # The config comes last: without it nothing opens the folder as a model.
    for name in sorted(os.listdir(staging), key=lambda n: n == "config.json"):
        path = os.path.join(dst, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        os.replace(os.path.join(staging, name), path)
    os.rmdir(staging)
    _sync(dst)
    os.unlink(os.path.join(dst, MARKER))
    _sync(dst)
    shutil.rmtree(os.path.join(dst, BLOCKS), ignore_errors=True)


def _copy_others(src, staging):
    """Tokenizer, config, generation and other files as they are in the source."""
    folder, gguf = find_source(src)
    if gguf is not None:
        with contextlib.suppress(ValueError):
            load_tokenizer(src).save_pretrained(staging)
        return
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        wanted = [n for n in names if n not in (REPORT, MASKS) and not n.endswith(WEIGHTS)]
        for name in wanted:
            origin = os.path.join(place, name)
            if not name.startswith(".") and os.path.exists(origin):  # a link may lead nowhere
                target = os.path.join(staging, os.path.relpath(place, folder), name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copyfile(origin, target)


def _block_path(folder, index):
    return os.path.join(folder, BLOCKS, f"{index:05}.safetensors")


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
