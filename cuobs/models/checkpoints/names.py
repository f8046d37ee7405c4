"""Which tensor of a checkpoint's files each tensor of its loaded model is.

transformers renames tensors while it loads: it adds or drops the prefix of a class, follows
tables of renamings, and puts some together. Here a pair is found by name and shape and believed
only where some of its numbers are the same, so it does not depend on how that is done.
"""

import math
from threading import Lock

import numpy as np
import torch

from cuobs.containers import Entry
from cuobs.models import memory
from cuobs.models.checkpoints.source import Stored, StoredPacked, torch_name
from cuobs.torch.packed import unpack_tensor

# The dtypes of PyTorch by the names that safetensors gives them.
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
# Rows of a tensor that are compared to know that two are the same.
ROWS = 16
# Bytes that are read as quickly as some of their rows.
SMALL = 2**16


class TensorReader:
    """The tensors of a checkpoint's files, each read when it is asked for, into memory of its own.

    Files are not mapped: what is mapped counts as this process's memory once it was looked at.

    Parameters
    ----------
    source : Source
    stored : dict of str to (Stored or StoredPacked)
    """

    def __init__(self, source, stored):
        self._source, self.stored = source, stored
        self._open, self._lock = (None, None), Lock()

    def __call__(self, name, rows=None, device=None):
        """A tensor on the CPU, or some of its rows; what lies packed is unpacked on a device."""
        entry = self.stored[name]
        if not isinstance(entry, StoredPacked):
            return self._read(name, entry, rows)
        parts = (self._read(name, part).to(device) for part in (entry.values, entry.index))
        weight = unpack_tensor(*parts, entry.pattern, *entry.shape)
        return weight.T.contiguous() if entry.transposed else weight

    def _read(self, name, entry, rows=None):
        path = self._source.path(entry.file)
        if entry.start is None:
            with self._lock:
                tensor = self._pickled(path)[name]
                return (tensor if rows is None else tensor[rows]).clone()
        rows = None if not entry.shape else rows
        with open(path, "rb", buffering=0) as file:
            if rows is None or entry.nbytes <= SMALL:
                whole = _take(file, entry.start, entry.shape, TORCH[entry.dtype])
                return whole if rows is None else whole[rows]
            row = entry._replace(shape=entry.shape[1:])
            parts = [
                _take(file, entry.start + i * row.nbytes, row.shape, TORCH[entry.dtype])
                for i in rows
            ]
        return torch.stack(parts)

    def mapped(self, name):
        """A tensor that is mapped after all, its own pages alone; None where that can't be."""
        entry = self.stored[name]
        if entry.start is None or entry.start % TORCH[entry.dtype].itemsize or not entry.nbytes:
            return None
        path = self._source.path(entry.file)
        content = np.memmap(path, np.uint8, "c", entry.start, (entry.nbytes,))
        return torch.from_numpy(content).view(TORCH[entry.dtype]).reshape(entry.shape)

    def _pickled(self, path):
        """The tensors of a file of torch.save, mapped where it is new enough; one at a time."""
        if self._open[0] != path:
            self._open = None, None
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # of a time when torch.save wrote no zip
                content = torch.load(path, map_location="cpu", weights_only=True)
            self._open = path, content.get("state_dict", content)
        return self._open[1]


def bytes_of(tensor):
    """The bytes of a tensor, as a file holds them."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def cast(name, tensor, dtype):
    """A tensor of a name in another dtype, refused where that does not hold its numbers."""
    if dtype == tensor.dtype:
        return tensor
    result = tensor.to(dtype)
    if torch.isinf(result).any() and not torch.isinf(tensor).any():
        raise ValueError(
            f"{name}: found weights up to {float(tensor.abs().max()):.3g}, which "
            f"{str(dtype).removeprefix('torch.')} can't hold, expected a wider --save-dtype"
        )
    return result


def described(tensor):
    """What a whole tensor is, wherever it lies: a `Stored`, of one in memory without a file."""
    if torch.is_tensor(tensor):
        return Stored("", torch_name(tensor.dtype), tuple(tensor.shape))
    if isinstance(tensor, StoredPacked):
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        return Stored("", tensor.dtype, shape)
    return tensor


def entry_of(tensor):
    """What a header of safetensors says of a tensor or of a `Stored`."""
    found = described(tensor)
    return Entry(found.dtype, found.shape, found.nbytes)


def _take(file, start, shape, dtype):
    """A tensor of which the bytes begin somewhere in a file."""
    content = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    left = memoryview(content.numpy())
    file.seek(start)
    while left:
        if not (count := file.readinto(left)):
            raise OSError(f"{file.name}: found it truncated, expected the file that it was")
        left = left[count:]
    return content.view(dtype).reshape(shape)


def index_name(name):
    """What the index of a packed weight is called beside its values, which have its own name."""
    return name.removesuffix("weight") + "index"


def match(model, source, stored):
    """Pair the tensors of a model with those of the files that it was loaded from.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As it was loaded, not yet changed.
    source : Source
    stored : dict of str to Stored
        See `cuobs.models.checkpoints.source.Source`.

    Returns
    -------
    dict of str to str
        The name in the files by the name in ``model.state_dict()``. What the model makes of
        several tensors, or holds without having read it, is not in it; nor is what the model
        does not hold, see `ignored`.
    """
    read, found = TensorReader(source, stored), {}
    own, files = model.state_dict(), memory.mapped_files()
    rest = []
    for name, tensor in own.items():
        if name in stored and _same(tensor, name, stored, read):
            found[name] = name
            _leave(tensor, files)
        else:
            rest.append(name)
    shapes = {}
    for name in stored.keys() - set(found.values()):
        shapes.setdefault(stored[name].shape, []).append(name)
    for name in rest:
        candidates = sorted(shapes.get(tuple(own[name].shape), ()), key=_likeness(name))
        for other in reversed(candidates):
            if _same(own[name], other, stored, read):
                found[name] = other
                _leave(own[name], files)
                shapes[stored[other].shape].remove(other)
                break
    return found


def _leave(tensor, files):
    """Have a tensor leave memory that is mapped from one of some files, whose numbers it has.

    A few rows of each weight, and all that comes into memory with every row, are gigabytes.
    """
    if any(tensor.data_ptr() in place for place in files):
        memory.let_go(tensor)


def ignored(stored, names, model):
    """Names of stored tensors that a model does not hold.

    Those that it does hold by another name, because two share one tensor, are not among them.
    """
    held = {id(t) for n, t in model.state_dict(keep_vars=True).items() if n in names}
    shared = {n for n, t in model.state_dict(keep_vars=True).items() if id(t) in held}
    return [n for n in stored if n not in set(names.values()) and n not in shared]


def check_all_known(model, source, names):
    """Refuse a checkpoint with tensors that would stay in the old basis.

    Raises
    ------
    ValueError
        The files hold tensors that the model does not, or the model makes some of several.
    """
    if source.gguf is not None:
        return
    unknown = [
        name
        for name in ignored(source.stored, names, model)
        if not name.endswith("inv_freq")  # frequencies of old checkpoints, which have no basis
    ]
    if unknown:
        raise ValueError(
            f"rotate: found {len(unknown)} tensors of {source.name} that {type(model).__name__} "
            f"does not hold, {unknown[0]} among them, expected none: they would go on reading the "
            "residual stream in its old basis"
        )
    own = model.state_dict(keep_vars=True)
    named = {id(own[name]) for name in names if name in own}
    for name, _ in model.named_parameters():
        if id(own[name]) not in named:
            raise ValueError(
                f"rotate: found that {name} is put together from several tensors of "
                f"{source.name}, expected one that lies in the files as the model holds it"
            )


def _likeness(name):
    """Order other names by how much of this one they have: its end first, then any part."""
    parts = name.split(".")

    def key(other):
        theirs = other.split(".")
        end = 0
        for a, b in zip(reversed(parts), reversed(theirs), strict=False):
            if a != b:
                break
            end += 1
        return end, len(set(parts) & set(theirs)), other

    return key


def _same(tensor, name, stored, read):
    """Whether a tensor of a model holds the numbers of a stored one, by some of their rows."""
    if tuple(tensor.shape) != stored[name].shape:
        return False
    if not tensor.ndim or tensor.numel() == 0:
        return equal(tensor, read(name))
    count = len(tensor)
    rows = sorted({i * (count - 1) // (ROWS - 1) for i in range(ROWS)})
    return equal(tensor[rows], read(name, rows))


def equal(tensor, stored):
    """Whether a tensor of a model is a stored one in the model's dtype; NaN is NaN."""
    tensor, stored = tensor.cpu(), stored.to(tensor.dtype)
    if torch.equal(tensor, stored):
        return True
    alike = (tensor == stored) | (tensor.isnan() & stored.isnan())
    return tensor.is_floating_point() and bool(alike.all())
