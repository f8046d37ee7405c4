"""Open the model and the tokenizer of a checkpoint: nothing is fetched, no code of it is run."""

import contextlib
import json
import math
import os
from collections import Counter
from functools import reduce
from os import PathLike
from typing import Any

import torch

from cuobs.models.checkpoints.names import TORCH
from cuobs.models.checkpoints.source import (
    FLOATS,
    Source,
    find_source,
    gguf_tensors,
    read_config,
)
from cuobs.models.planning import TOKENIZER, check_model

DTYPES = {name: TORCH[name] for name in FLOATS}


def load_model(src: str | PathLike, trust_remote_code: bool = False, dtype: Any = None) -> Any:
    """The model of a checkpoint's folder or of a GGUF, on the CPU.

    Of the class that the config names (``architectures``), and in the dtype of the weights,
    whatever the config says of that, or in one that holds all of theirs.

    Parameters
    ----------
    src : path or Source
        See `cuobs.models.checkpoints.source.find_source`.
    trust_remote_code : bool
        Run the code that the folder holds, where its model needs it.
    dtype : torch.dtype, optional
        Another one for the weights; not of a GGUF.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    FileNotFoundError, ValueError
        It is no model that transformers opens, lacks some of its weights, or needs code of its
        own to run.
    """
    source = find_source(src, packed=None)
    check_model(source)
    extra = {"gguf_file": source.gguf, "dtype": "auto"}
    if source.gguf is None:
        extra = {"dtype": dtype or weights_dtype(source.stored)}
    found = model_class(source, trust_remote_code)
    with _opening(source):
        model, info = found.from_pretrained(
            source.folder, local_files_only=True, output_loading_info=True,
            trust_remote_code=trust_remote_code, **extra,
        )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers
        raise ValueError(
            f"{source.name}: found no {missing[0]} ({len(missing)} tensors are missing), expected "
            "all weights"
        )
    if source.gguf is not None:
        _check_gguf(source, model)
        # The weights are floats now; a config that still names GGUF would be refused.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
    return model.eval()


def empty_model(source, trust_remote_code=False):
    """The model of a `Source`, or of a folder's ``config.json``, on the meta device."""
    from transformers import AutoConfig

    if not isinstance(source, Source):
        source = Source(source, source, config=read_config(os.path.join(source, "config.json")))
    found = model_class(source, trust_remote_code)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if source.gguf is not None:
        options["gguf_file"] = source.gguf
    with _opening(source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.folder, **options)
        return from_config(found, config, trust_remote_code)


def empty_as_stored(source, trust_remote_code=False):
    """`empty_model` in the dtype that its weights are read in, float32 of a GGUF."""
    return empty_model(source, trust_remote_code).to(weights_dtype(source.stored))


def from_config(found, config, trust_remote_code=False):
    """A model of a class, or of one of transformers' "Auto" classes, with random weights."""
    if hasattr(found, "forward"):
        return found(config)
    # Not given it asks on standard input.
    return found.from_config(config, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _opening(source):
    """Say in one sentence why a model does not open."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever transformers and what it calls may raise
        if "trust_remote_code" in str(error):
            raise _own_code(source) from error
        raise ValueError(
            f"{source.name}: found a model that does not open ({_reason(error)}), expected a "
            "causal language model of transformers"
        ) from error


def _own_code(source):
    names = source.config.get("architectures") or [source.config.get("model_type")]
    return ValueError(
        f"{source.name}: found a model that runs code of its own ({names[0]}), expected "
        "trust_remote_code (--trust-remote-code) from who trusts it"
    )


def model_class(source, trust_remote_code=False):
    """The class that opens a checkpoint: the one that its config names.

    Raises
    ------
    ValueError
        It is no class of transformers.
    """
    import transformers

    names = source.config.get("architectures") or []
    if source.gguf is not None or not names:
        return transformers.AutoModelForCausalLM
    if "AutoModelForCausalLM" in (source.config.get("auto_map") or {}):
        # Own code may call its classes as transformers does: as there, the kind of model decides.
        if trust_remote_code:
            return transformers.AutoModelForCausalLM
        if source.config.get("model_type") not in transformers.CONFIG_MAPPING:
            raise _own_code(source)
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        if "auto_map" not in source.config:
            raise ValueError(
                f"{source.name}: found the architecture {names[0]}, which transformers "
                f"{transformers.__version__} does not have, expected one that it has"
            )
        if not trust_remote_code:
            raise _own_code(source)
        return transformers.AutoModelForCausalLM
    return found


def weights_dtype(stored):
    """The dtype that holds all floating-point tensors of a checkpoint.

    Parameters
    ----------
    stored : dict of str to Stored

    Returns
    -------
    torch.dtype
    """
    found = {DTYPES[tensor.dtype] for tensor in stored.values() if tensor.dtype in FLOATS}
    return reduce(torch.promote_types, found) if found else torch.float32


def cast_stored(model, dtype):
    """Cast what a model stores to a dtype, as if it had been read in it.

    ``model.to(dtype)`` would round buffers that no file holds as well, such as the frequencies of
    rotary positions, which a model that is read computes anew in float32.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def round_stored(model, dtypes):
    """Give what a model holds in memory the values that it has in the dtypes of its files.

    Parameters
    ----------
    model : torch.nn.Module
    dtypes : dict of str to torch.dtype
        By the names of the model's tensors.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        dtype = dtypes.get(name, tensor.dtype)
        if dtype != tensor.dtype and not tensor.is_meta:
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)


def main_dtype(stored):
    """The dtype in which most of a checkpoint's weights lie: those are mapped and not copied."""
    sizes = Counter()
    for tensor in stored.values():
        if tensor.dtype in FLOATS:
            sizes[DTYPES[tensor.dtype]] += tensor.nbytes
    return max(sizes, key=sizes.get, default=torch.float32)


def gguf_dtype(source):
    """The dtype to save the weights of a GGUF in: bytes of it, or near them.

    That of its matrices where none is quantised. Else half precision, which holds what few bits
    stand for: float16 where it has matrices in it, bfloat16 otherwise, whose range suits most
    models.

    Returns
    -------
    dtype : torch.dtype
    kinds : list of str
        What the matrices are held in.
    """
    kinds = {kind for _, kind, shape in gguf_tensors(source) if len(shape) > 1}
    plain = {name: DTYPES[name] for name in kinds if name in FLOATS}
    if kinds == plain.keys() and plain:
        return reduce(torch.promote_types, plain.values()), sorted(kinds)
    return torch.float16 if "F16" in kinds else torch.bfloat16, sorted(kinds)


def _check_gguf(source, model):
    """Refuse a GGUF with tensors that transformers has not read: they would be lost."""
    own = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    sizes = Counter(tensor.numel() for tensor in own.values())
    unread = []
    for name, _, shape in gguf_tensors(source):
        sizes[math.prod(shape)] -= 1
        if sizes[math.prod(shape)] < 0 and not name.startswith("rope_"):  # of the config's own
            unread.append(name)
    if unread:
        raise ValueError(
            f"{source.name}: found {len(unread)} tensors that transformers does not read, "
            f"{unread[-1]} among them, expected a model that it reads whole"
        )


def as_checkpoint(model):
    """What a model that came out of a GGUF is as a checkpoint of transformers.

    Returns
    -------
    tensors : dict of str to tensor
        Each once, where several names share one.
    config : dict
    files : dict of str to str
        Further files by name.
    """
    seen, tensors = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = tensor.detach()
        seen.add(id(tensor))
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    generation = model.generation_config.to_json_string()
    return tensors, config, {"generation_config.json": generation}


def load_tokenizer(src, trust_remote_code=False):
    """The tokenizer of a checkpoint's folder or of a GGUF.

    Raises
    ------
    ValueError
        There is none that opens without code of its own.
    """
    from transformers import AutoTokenizer

    source = find_source(src)
    extra = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        names = os.listdir(source.folder)
        if source.gguf is None and not any(n.startswith(TOKENIZER) for n in names):
            raise ValueError("no file of one")  # transformers would make an empty one
        return AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            error = "it runs code of its own, which trust_remote_code (--trust-remote-code) allows"
        raise ValueError(
            f"{source.name}: found no tokenizer that opens ({error}), expected one to read a text "
            "with; tokens.npz:key needs none"
        ) from None


def _reason(error):
    return str(error).strip().partition("\n")[0][:200]
