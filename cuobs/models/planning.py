"""What can be known of a run over a model's folder before its weights are read.

Neither PyTorch nor transformers is imported here: what is wrong is said in a second.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cuobs import arrays, files, validation
from cuobs.arrays import DEVICES
from cuobs.model_choices import SAVE_DTYPES
from cuobs.models.checkpoints.marker import check_destination
from cuobs.models.checkpoints.source import BYTES, FLOATS, Source, find_source, gguf_tensors
from cuobs.models.tokens.calibration import (
    POSITIONS,
    check_cut,
    check_tokens_file,
    is_tokens,
    load_tokens,
    self_written,
)
from cuobs.models.tokens.texts import read_documents

# What is public; the rest is for the package.
__all__ = ["check_packing", "check_timing"]

# How the names of a tokenizer's files begin.
TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


@dataclass(frozen=True)
class Run:
    """A run from folder to folder, as it was asked for; see `prune_folder`."""

    source: Source
    dst: str
    calibration: list
    samples: int
    sequence_length: int | None
    seed: int
    attention_mask: str | None
    shard_bytes: int
    save_dtype: str | None
    trust_remote_code: bool
    device: str
    evaluate: tuple = ()
    resume: bool = False
    save_masks: bool = False
    packed: bool = False
    distill_calibration: list = ()
    command: str | None = None
    host_memory: int | None = None


def whole_for(run, recipe):
    """What needs the whole model in memory, None where its blocks may stay in their files."""
    found = next((name for name in ("distill", "rotate") if getattr(recipe, name)), None)
    if found is None and run.source.gguf is not None:
        return "a GGUF"
    if found is None and any(self_written(spec) is not None for spec in run.calibration):
        return "calibration by windows of the model's own"
    return found


def whole_text(run, recipe):
    """What a model that has to be in memory takes there, at least, and why: bytes and a text."""
    stored, beside = run.source.stored.values(), ""
    floats = {tensor.dtype for tensor in stored} & set(FLOATS) or {"F32"}
    # float16 and bfloat16 are held in float32 where there are both.
    item = max(2 * len(floats & {"F16", "BF16"}), *(BYTES[dtype] for dtype in floats))
    size = sum(item * math.prod(tensor.shape) for tensor in stored)
    if run.source.gguf is not None:
        size = 4 * sum(math.prod(shape) for _, _, shape in gguf_tensors(run.source))
        beside = ", in float32"
    if recipe.distill:
        size, beside = 2 * size, f"{beside}, and the dense one beside it"
    return size, f"{whole_for(run, recipe)} needs the whole model in memory{beside}"


def check_host_memory(run, recipe):
    """Refuse a limit of the host's memory that does not hold a model that has to be there whole."""
    if run.host_memory is None or whole_for(run, recipe) is None:
        return
    size, why = whole_text(run, recipe)
    if size > run.host_memory:
        raise ValueError(
            f"host_memory: found {arrays.size_text(run.host_memory)}, expected at least "
            f"{arrays.size_text(size)}, since {why}"
        )


class View(NamedTuple):
    """Who is told what a run does; see `prune_folder`."""

    say: Callable
    progress: Callable | None
    starting: Callable
    on_block: Callable


def _rank():
    return int(os.environ.get("RANK", 0))


def check_run(run):
    """Refuse what is wrong with a run whatever the weights are.

    Raises
    ------
    ValueError, TypeError, OSError
    """
    check_cut(run.samples, run.sequence_length)
    validation.integer("seed", run.seed, low=0)
    if run.save_dtype is not None:
        validation.name_of("save_dtype", run.save_dtype, SAVE_DTYPES)
    check_device(run.device)
    if _rank() == 0:  # the first process makes what the others would find
        check_destination(run.source, run.dst, run.resume)
    check_model(run.source)
    length = check_sources(run.source, run.calibration, run.samples, run.sequence_length)
    for spec in run.evaluate:
        check_text(run.source, spec, None, length)
    if run.attention_mask:
        if len(run.calibration) != 1:
            raise ValueError(
                f"attention_mask: found it with {len(run.calibration)} calibrations, expected the "
                "one whose windows it belongs to"
            )
        _check_mask(run.attention_mask, run.calibration[0], run.samples, run.sequence_length)


def check_packing(src, dst, packed=False, shard_size="5GB", device="auto", resume=False):
    """Refuse what can't be packed into a folder, or unpacked, whatever the weights are.

    Parameters
    ----------
    src, dst, shard_size, device, resume
        See `cuobs.models.pack_folder`.
    packed : bool
        Whether SRC is to be packed already.

    Returns
    -------
    Source
    """
    check_device(device)
    shard_bytes(shard_size)
    source = find_source(src, packed=packed)
    if source.gguf is not None:
        raise ValueError(f"{source.name}: found a GGUF, expected the folder of a pruned model")
    check_destination(source, dst, resume)
    return source


def check_timing(source):
    """Refuse a source of layer shapes that is none, and a machine without a CUDA device.

    Parameters
    ----------
    source : str
        See `cuobs.models.speedup`.
    """
    if not re.fullmatch(r"\s*\d+\s*[xX×]\s*\d+\s*", source) and not os.path.isfile(
        os.path.join(source, "config.json")
    ):
        what = "config.json" if os.path.isdir(source) else "such folder"
        raise FileNotFoundError(
            f"{source}: found no {what}, expected a checkpoint's folder or a shape MxK"
        )
    if not arrays.count_devices():
        raise ValueError(
            "device: found no CUDA device, expected one: packed weights pay on NVIDIA GPUs from "
            "Ampere on, nowhere else"
        )


def check_device(device):
    """Refuse a device that there is not."""
    validation.name_of("device", device, DEVICES)
    if device == "cuda":
        arrays.choose(device)


def shard_bytes(shard_size):
    """Bytes of the largest file of weights, from a number or a size."""
    try:
        return arrays.parse_size(shard_size)
    except ValueError:
        raise ValueError(
            f"shard_size: found {shard_size!r}, expected bytes, or a size like '5GB'"
        ) from None


def check_sources(source, specs, samples, length):
    """Refuse sources of windows that can't be, or of several lengths; the length, if known."""
    if not specs:
        raise ValueError("calibration: found none, expected a text, tokens.npz:key or self:1024")
    if twice := [spec for spec in specs if specs.count(spec) > 1]:
        raise ValueError(f"calibration: found {twice[0]} twice, expected each source once")
    asked = length
    for spec in sorted(specs, key=is_tokens, reverse=True):  # their length is that of all
        if self_written(spec) is not None:
            if length is not None:
                check_length(source, f"{spec}: tokens", length)
            continue
        found = check_text(source, spec, samples, asked if is_tokens(spec) else length)
        if length is not None and found != length:
            raise ValueError(
                f"{spec}: found windows of {found} tokens, expected {length} as of the others; "
                "sequence_length cuts them"
            )
        length = found
    return length


def check_model(source):
    """Refuse a checkpoint whose config says that it can't be pruned."""
    names = source.config.get("architectures") or [""]
    if source.config.get("is_encoder_decoder") and "CausalLM" not in names[0]:
        raise ValueError(
            f"{source.name}: found {names[0]}, an encoder with a decoder, expected a causal "
            "language model"
        )


def check_text(source, spec, samples, length):
    """Refuse a text or tokens that can't be windows for a model; the length of theirs, if known."""
    if is_tokens(spec):
        found = check_tokens_file(spec, vocabulary_of(source), samples, length).shape[1]
        check_length(source, f"{spec}: tokens", found)
        return found
    read_documents(spec)
    if length is not None:
        check_length(source, f"{spec}: tokens", length)
    if source.gguf is None and not any(n.startswith(TOKENIZER) for n in os.listdir(source.folder)):
        raise ValueError(
            f"{source.name}: found no tokenizer, expected one to read {spec} with; tokens.npz:key "
            "needs none"
        )
    return length


def vocabulary_of(source):
    """Tokens that a config says its model to know; None where it does not say it."""
    config = source.config.get("text_config") or source.config
    return config.get("vocab_size") or source.config.get("vocab_size")


def check_length(source, name, length):
    """Refuse windows of a name that are longer than a config says that its model may read."""
    places = (source.config, source.config.get("text_config") or {})
    known = [place.get(key) for place in places for key in POSITIONS]
    longest = min((n for n in known if isinstance(n, int) and n > 0), default=length)
    if length > longest:
        raise ValueError(
            f"{name}: found windows of {length}, expected at most {longest}, the model's "
            "longest"
        )


def _check_mask(mask, calibration, samples, length):
    if not is_tokens(calibration):
        raise ValueError(
            f"attention_mask: found it with the text {calibration}, expected tokens.npz:key, whose "
            "windows it belongs to"
        )
    validation.existing_file(files.split(mask)[0], "an array like the tokens", mask)
    found = load_tokens(mask, samples, length, kinds="biu").shape
    tokens = load_tokens(calibration, samples, length).shape
    if found != tokens:
        raise ValueError(
            f"attention_mask: found shape {found}, expected {tokens} as the tokens"
        )
