"""What a checkpoint's folder holds: its config, the tensors that it stores, its further files.

Only headers are read here, and neither PyTorch nor transformers is imported for safetensors.
"""

import contextlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from cuobs.containers import read_header

# What is public; the rest is for the package.
__all__ = ["unfinished"]

# A run that has begun and is not complete; it goes last, when everything else is in its place.
MARKER = "cuobs_incomplete.json"
BLOCKS = "cuobs_blocks"
SHARDS = os.path.join(BLOCKS, "weights")
STAGING = "cuobs_staging"
REPORT = "cuobs_report.json"
MASKS = "cuobs_masks.safetensors"
RECIPE = "cuobs_recipe.toml"
# How a file begins that a killed run may leave, written by halves.
LEFTOVER = ".cuobs_"

# The weights that transformers looks for, in its order: the index of several files, or one.
CHECKPOINTS = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
INDEX = ".index.json"
HOLDERS = (".safetensors", ".bin", ".pt", ".pth")
# The same weights for other programs: they would go on being dense beside the pruned ones.
OTHER_FORMS = (
    ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".tflite", ".h5.index.json",
    ".msgpack.index.json",
)  # fmt: skip

# Why files whose names begin with a dot are left out: they belong to the place, not to the model.
HIDDEN = "hidden"

# What a config says of weights that are not plain floats, and files that say so beside it.
COMPRESSED = ("quantization_config", "compression_config", "sparsity_config")
# The quantization of a config that says which linears are packed.
METHOD = "cuobs"
COMPRESSED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
ADAPTER = "adapter_config.json"
# Tensors that stand beside codes: without them the codes are no weights.
SCALES = re.compile(
    r"(^|\.)(((weight|input|output|activation|[kvq]|kv|prob)_scale(_\w+)?)|qweight|qzeros|g_idx|"
    r"scales|weight_(packed|zero_point|shape)|absmax|quant_map|SCB|weight\.(absmax|quant\w*))"
    r"(\.|$)"
)
# A scale of some other tensor: X.scale or X_scales is one where X, or X's weight, is a matrix.
SCALE = re.compile(r"(.+)[._](?:weight_)?(?:de)?scales?(?:_inv|_weight|_\d+)?")
# Names under which integers are codes; as a mask or as positions a model keeps them under others.
CODES = re.compile(r"(.+[._])?(weight|blocks|codes|codebooks|packed|quantized|qdata)(_\d+)?")
# Bytes of an element, by the names that safetensors gives to dtypes.
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")


class Stored(NamedTuple):
    """A tensor of a checkpoint.

    Attributes
    ----------
    file : str
        Inside the folder.
    dtype : str
        As safetensors names it: "BF16", "F32", ...
    shape : tuple of int
    start : int or None
        Where its bytes begin in a safetensors file.
    """

    file: str
    dtype: str
    shape: tuple
    start: int | None = None

    @property
    def nbytes(self):
        """Bytes of its elements."""
        count = BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


class StoredPacked(NamedTuple):
    """A weight that lies packed in a checkpoint's files.

    Attributes
    ----------
    values, index : Stored
    pattern : str
    shape : tuple of int
        (outputs, inputs) of the weight.
    transposed : bool
        Whether a model holds it as (inputs, outputs).
    """

    values: Stored
    index: Stored
    pattern: str
    shape: tuple
    transposed: bool = False

    @property
    def dtype(self):
        """As safetensors names it."""
        return self.values.dtype


@dataclass(frozen=True)
class Source:
    """A checkpoint that is read.

    Attributes
    ----------
    name : str
        As it was asked for: a folder, a .gguf, or a name of the Hub.
    folder : str
        Where it lies.
    gguf : str or None
        The file inside the folder, where it is one.
    config : dict
        What ``config.json`` says; nothing for a GGUF.
    weights : tuple of str
        Files that hold the model's tensors, inside the folder.
    carried : tuple of str
        All other files that belong to the model, inside the folder.
    left_out : dict of str to str
        Files that do not, and why.
    stored : dict of str to Stored
        The model's tensors in the order in which they lie there, from the headers of their files;
        empty for a GGUF.
    """

    name: str
    folder: str
    gguf: str | None = None
    config: dict = field(default_factory=dict)
    weights: tuple = ()
    carried: tuple = ()
    left_out: dict = field(default_factory=dict)
    stored: dict = field(default_factory=dict)

    def path(self, name):
        """A file of the folder."""
        return os.path.join(self.folder, name)

    def lines(self):
        """Lines of text: which files are not carried over, and why."""
        for why in dict.fromkeys(self.left_out.values()):
            yield f"left out     {some([n for n, w in self.left_out.items() if w == why])}: {why}"


def some(names, most=3):
    """A few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def find_source(src, packed=False):
    """Look at a checkpoint without reading weights.

    Parameters
    ----------
    src : path or Source
        A folder, a .gguf, or the name of a model (``owner/name``) in the cache of the Hub.
    packed : bool or None
        Whether it is to be one that cuobs has packed, or a plain one; None takes both.

    Returns
    -------
    Source

    Raises
    ------
    FileNotFoundError
        There is no such folder and no such model in the cache.
    ValueError
        It holds no checkpoint, an unfinished or a damaged one, one whose weights are no plain
        floats, or something that can't be copied.
    """
    if isinstance(src, Source):
        return src
    src = os.fspath(src)
    if os.path.isfile(src) and src.endswith(".gguf"):
        return Source(src, os.path.dirname(src) or ".", os.path.basename(src))
    folder = src if os.path.isdir(src) else _cached(src)
    if unfinished(folder):
        raise ValueError(f"{src}: found a model that is not complete, expected a whole one")
    _refuse_adapter(src, folder)
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        found = sorted(name for name in os.listdir(folder) if name.endswith(".gguf"))
        if len(found) != 1:
            raise ValueError(
                f"{src}: found no config.json and {len(found)} .gguf files, expected one"
            )
        return Source(src, folder, found[0])
    config = read_config(path)
    if packed is False and _is_packed(config):
        raise ValueError(
            f"{src}: found a packed model, expected plain weights: cuobs unpack-model gives them"
        )
    if packed and not _is_packed(config):
        raise ValueError(f"{src}: found no packed model, expected one of cuobs pack-model")
    if not _is_packed(config):
        _refuse_quantized(src, folder, config)
    weights = _weight_files(src, folder)
    carried, left_out = _sort_files(src, folder, weights)
    stored = {}
    for name in weights:
        stored |= _header(src, folder, name)
    _refuse_codes(src, stored)
    return Source(src, folder, None, config, weights, carried, left_out, stored)


def unfinished(folder):
    """Whether a folder holds a run that has begun and is not complete."""
    return os.path.exists(os.path.join(folder, MARKER))


def gguf_tensors(source):
    """Name, kind and shape of each tensor of a GGUF, from its header."""
    path = source.path(source.gguf)
    return _read_gguf(path, os.path.getmtime(path))


@lru_cache(maxsize=1)
def _read_gguf(path, changed):
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    return [(t.name, t.tensor_type.name, tuple(int(n) for n in t.shape)) for t in tensors]


def _cached(src):
    """The folder of a model in the cache of the Hub, which is not asked."""
    form = re.fullmatch(r"[\w.-]+/[\w.-]+", src)
    if form and not src.startswith("."):
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            found = None
        else:
            found = try_to_load_from_cache(src, "config.json")
        if isinstance(found, str):
            return os.path.dirname(found)
    cached = ", or the name of a model in the Hub's cache" if form else ""
    raise FileNotFoundError(
        f"{src}: found no such folder, expected a checkpoint or a .gguf{cached}"
    )


def read_config(path):
    """A ``config.json`` as a dict."""
    with open(path, "rb") as file:
        try:
            config = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: found no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: found {type(config).__name__}, expected a config of a model")
    return config


def _is_packed(config):
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def _refuse_quantized(src, folder, config):
    """Refuse weights that are said to be codes: pruning them as numbers would ruin them."""
    for place in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in COMPRESSED:
            if place.get(key):
                raise ValueError(
                    f"{src}: found a {key}, expected plain weights in floating point"
                )
    for name in COMPRESSED_FILES:
        if os.path.exists(os.path.join(folder, name)):
            raise ValueError(f"{src}: found {name}, expected plain weights in floating point")


def _refuse_adapter(src, folder):
    """Refuse the folder of an adapter, which holds no model or one beside it."""
    path = os.path.join(folder, ADAPTER)
    if os.path.isfile(path):
        base = read_config(path).get("base_model_name_or_path")
        of = f" for {base}" if base else ""
        raise ValueError(
            f"{src}: found an adapter{of} ({ADAPTER}), expected a model into which it is merged: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(SRC).merge_and_unload()"
            ".save_pretrained(FOLDER), and the tokenizer's files beside it"
        )


def _refuse_codes(src, stored):
    for name, tensor in stored.items():
        code = tensor.dtype not in BYTES  # float8 and smaller
        integer = tensor.dtype[0] in "IU" and len(tensor.shape) > 1 and CODES.fullmatch(name)
        if code or integer or SCALES.search(name) or _scales_another(name, stored):
            raise ValueError(
                f"{src}: found {name} ({tensor.dtype}), quantised, expected plain weights in "
                "floating point"
            )


def _scales_another(name, stored):
    """Whether a tensor is called the scale of a matrix that lies beside it."""
    if not (found := SCALE.fullmatch(name)):
        return False
    others = (found[1] + ending for ending in ("", ".weight", "_blocks", ".blocks"))
    return any(other in stored and len(stored[other].shape) > 1 for other in others)


def _weight_files(src, folder):
    """The files that transformers reads a model's weights from."""
    for name in CHECKPOINTS:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        if not name.endswith(INDEX):
            return (name,)
        with open(path, "rb") as file:
            try:
                names = dict.fromkeys(json.load(file)["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ValueError(f"{path}: found no index of weights, expected one") from None
        for shard in names:
            if not os.path.isfile(os.path.join(folder, shard)):
                raise ValueError(
                    f"{src}: found a model that does not open ({shard} is missing), expected all "
                    f"files of {name}"
                )
        return tuple(names)
    raise ValueError(f"{src}: found no weights, expected {CHECKPOINTS[0]} or {CHECKPOINTS[2]}")


def _sort_files(src, folder, weights):
    """The files beside the weights: those that are carried over, and why others are not."""
    carried, main = [], None
    left_out = {name: HIDDEN for name in sorted(os.listdir(folder)) if name.startswith(".")}
    for name in _walk(src, folder):
        path = os.path.join(folder, name)
        base = os.path.basename(name)
        if name in weights or name in CHECKPOINTS and name.endswith(INDEX):
            continue
        if not os.path.exists(path):
            left_out[name] = "a link that leads nowhere"
        elif base.endswith(OTHER_FORMS) or base.startswith("consolidated"):
            left_out[name] = "another form of the weights"
        elif base.endswith(".safetensors"):
            main = _names(folder, weights) if main is None else main
            mine = _names(folder, (name,))
            if mine and mine <= main:
                left_out[name] = "the same tensors again"
            else:
                carried.append(name)
        elif name in CHECKPOINTS or re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name):
            left_out[name] = "another form of the weights"
        else:
            carried.append(name)
    return tuple(carried), left_out


def _names(folder, names):
    """Names and shapes of the tensors of safetensors files, as far as they can be read."""
    found = set()
    for name in names:
        if name.endswith(".safetensors"):
            with contextlib.suppress(ValueError):
                stored, _ = safetensors_header(folder, name)
                found |= {(key, tensor.shape) for key, tensor in stored.items()}
    return found


def _walk(src, folder):
    """Names of all files in a folder and the folders inside it, hidden ones apart."""
    for place, folders, names in os.walk(folder, followlinks=True):
        outside = os.path.realpath(os.path.dirname(place))
        if place != folder and (outside + os.sep).startswith(os.path.realpath(place) + os.sep):
            raise ValueError(f"{src}: found {place} inside itself, expected no circle of links")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(place, name)
            if name.startswith("."):
                continue
            if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(
                    f"{path}: found something that is neither a file nor a folder, expected none "
                    "in a checkpoint"
                )
            yield os.path.relpath(path, folder)


def _header(src, folder, name):
    if not name.endswith(".safetensors"):
        return _torch_header(src, folder, name)
    try:
        return safetensors_header(folder, name)[0]
    except ValueError as error:
        raise ValueError(
            f"{src}: found a model that does not open ({error}), expected whole weights"
        ) from None


def safetensors_header(folder, name):
    """The tensors of a safetensors file, in the order of its bytes, and its metadata or None.

    Returns
    -------
    stored : dict of str to Stored
    metadata : dict of str or None
    """
    path = os.path.join(folder, name)
    try:
        entries, metadata = read_header(path)
        ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size, item[0]))
        stored = {
            key: Stored(name, entry.dtype, tuple(entry.shape), entry.offset)
            for key, entry in ordered
        }
        end = max((entry.offset + entry.size for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{name} is damaged or no safetensors file") from None
    if end > os.path.getsize(path):
        raise ValueError(f"{name} is truncated")
    return stored, metadata


def _torch_header(src, folder, name):
    """The tensors of a file of torch.save, without its numbers: a dict of `Stored`."""
    import pickle

    import torch

    try:
        content = torch.load(os.path.join(folder, name), map_location="meta", weights_only=True)
        content = content.get("state_dict", content)
        tensors = {key: tensor for key, tensor in content.items() if torch.is_tensor(tensor)}
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{src}: found a model that does not open ({name}: {reason}), expected whole weights"
        ) from None
    return {key: Stored(name, torch_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}


def torch_name(dtype):
    """What safetensors calls a dtype of PyTorch; other names for those that it does not hold."""
    name = str(dtype).removeprefix("torch.")
    known = {"bool": "BOOL", "bfloat16": "BF16", "complex64": "C64"}
    plain = re.fullmatch(r"(float|int|uint)(16|32|64|8)", name)
    return known.get(name) or (plain and f"{plain[1][0].upper()}{plain[2]}") or name

