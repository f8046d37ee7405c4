"""Files of several arrays, .npz and .safetensors: written whole, or again with one array replaced.

What is kept is copied piece by piece and not decoded, whatever its dtype; no array is held twice.
"""

import json
import os
import shutil
import zipfile
from typing import NamedTuple

import numpy as np

# Bytes that are copied at once.
PIECE = 2**24
METADATA = "__metadata__"

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
_CODES = {name: code for code, name in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a .safetensors file.

    Attributes
    ----------
    dtype : str
        As the format calls it.
    shape : list of int
    size : int
        Bytes.
    array : ndarray or None
        None where it is copied from another file.
    offset : int
        Where it begins there.
    """

    dtype: str
    shape: list
    size: int
    array: object = None
    offset: int = 0

    @property
    def item(self):
        """Bytes of an element."""
        return self.size / max(1, np.prod(self.shape, dtype=float))


def write_npy(f, array):
    """Write an array as .npy."""
    # Given a true file, NumPy leaves writing to C, whose errors have no reason.
    np.lib.format.write_array(_Stream(f), array, allow_pickle=False)


class _Stream:
    """What can be written to, and no more."""

    def __init__(self, f):
        self.write = f.write


def write_npz(f, content):
    """Write arrays by name as .npz, uncompressed."""
    # numpy.savez takes the names as keywords, so one called "file" would break it
    with zipfile.ZipFile(f, "w") as archive:
        for name, array in content.items():
            _write_member(archive, name, array)


def replace_in_npz(f, path, name, array):
    """Write the .npz file at a path again with one array replaced or added."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(f, "w") as new:
        members = {member.filename: member for member in old.infolist()}
        for member in members.values():
            if member.filename.removesuffix(".npy") == name:
                continue
            copy = zipfile.ZipInfo(member.filename, member.date_time)
            copy.compress_type, copy.external_attr = member.compress_type, member.external_attr
            with old.open(member) as source, new.open(copy, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, PIECE)
        _write_member(new, name, array)


def _write_member(archive, name, array):
    with archive.open(name + ".npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def read_header(path):
    """The entries of a .safetensors file by name, and its metadata or None."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > os.fstat(f.fileno()).st_size:
            raise ValueError(f"{path}: found a broken or truncated .safetensors file")
        header = json.loads(f.read(length))
    metadata = header.pop(METADATA, None)
    entries = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        entries[name] = Entry(
            entry["dtype"], entry["shape"], end - begin, offset=8 + length + begin
        )
    return entries, metadata


def write_safetensors(f, content):
    """Write arrays by name as .safetensors."""
    _write_entries(f, {name: _entry(array) for name, array in content.items()})


def replace_in_safetensors(f, path, name, array):
    """Write the .safetensors file at a path again with one tensor replaced or added."""
    entries, metadata = read_header(path)
    entries[name] = _entry(array)
    with open(path, "rb") as source:
        _write_entries(f, entries, metadata, source)


def write_tensors(f, entries, take, metadata=None):
    """Write .safetensors tensor by tensor, so that one at a time has to be in memory.

    Parameters
    ----------
    f : file
        Open for writing bytes.
    entries : dict of str to Entry
        What each is; arrays in it are not looked at.
    take : callable
        Gives the bytes of a tensor by its name, in one or several pieces.
    metadata : dict of str, optional
    """
    text, starts = header_of(entries, metadata)
    f.write(text)
    for name in starts:
        for piece in take(name):
            f.write(piece)


def header_of(entries, metadata=None):
    """What a .safetensors file begins with.

    Parameters
    ----------
    entries : dict of str to Entry
    metadata : dict of str, optional

    Returns
    -------
    text : bytes
    starts : dict of str to int
        Where in the file each tensor begins, in the order in which they lie there.
    """
    # Larger elements first: each then begins at a multiple of its size.
    order = sorted(entries, key=lambda name: (-entries[name].item, entries[name].offset))
    header, starts, end = {} if metadata is None else {METADATA: metadata}, {}, 0
    for name in order:
        dtype, shape, size, *_ = entries[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        starts[name], end = end, end + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return text, {name: len(text) + start for name, start in starts.items()}


def _entry(array):
    return Entry(_CODES[array.dtype.name], list(array.shape), array.nbytes, array)


def _write_entries(f, entries, metadata=None, source=None):
    def take(name):
        entry = entries[name]
        if entry.array is None:
            source.seek(entry.offset)
            for start in range(0, entry.size, PIECE):
                yield source.read(min(PIECE, entry.size - start))
        else:
            plain = np.asarray(entry.array, order="C")
            if plain.dtype.byteorder == ">":
                plain = plain.astype(plain.dtype.newbyteorder("<"))
            yield plain.reshape(-1).view(np.uint8)

    write_tensors(f, entries, take, metadata)
