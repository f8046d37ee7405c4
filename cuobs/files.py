"""Arrays in and out of files: .npy, .npz, .safetensors; memory-mapped in, atomic out.

A file is named by its path, and inside a file of several arrays by ``path:key``, for example
``model.safetensors:layers.0.down_proj.weight``. Reading maps the file where its format allows
(all but compressed .npz), so a large array is only read where it is used. Writing goes to a
temporary file in the same folder, renamed when it is complete.
"""

import contextlib
import difflib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cuobs import containers, formats
from cuobs.validation import existing_file, naming

__all__ = [
    "by_name",
    "check_format",
    "check_output",
    "check_replaced",
    "existing_file",
    "keys",
    "load",
    "load_arrays",
    "naming",
    "replacing",
    "save",
    "save_arrays",
    "split",
    "write_text",
]

SUFFIXES = (".npy", ".npz", ".safetensors")


def split(spec: str) -> tuple:
    """Split ``path:key`` into the path and the key of an array in it, None where there is none.

    >>> split("model.safetensors:layers.0.weight")
    ('model.safetensors', 'layers.0.weight')
    >>> split("W.npy")
    ('W.npy', None)
    """
    found = re.fullmatch(r"(.+?\.(?:npz|safetensors)):(.+)", os.fspath(spec), re.IGNORECASE)
    return found.groups() if found else (os.fspath(spec), None)


def by_name(path: str) -> bool:
    """Whether the format of a path holds arrays by name."""
    return path.lower().endswith(SUFFIXES[1:])


def load(spec: str, mmap: bool = True) -> Any:
    """Load one array from ``path`` or ``path:key``.

    Parameters
    ----------
    spec : str or path
        A .npy file, or a .npz or .safetensors file with the key of the array; without a key the
        file must hold exactly one array.
    mmap : bool
        Map the file read-only instead of reading it. A compressed .npz is always read.

    Returns
    -------
    ndarray
        In the file's own dtype (bfloat16 by ml_dtypes).

    Raises
    ------
    FileNotFoundError, OSError
        The file is missing or cannot be read.
    ValueError
        The file is no array file, truncated or pickled, or has no such key.
    ImportError
        A .safetensors file without the extra ``safetensors``.
    """
    path, key = split(spec)
    names = keys(path)
    array = _load(path, names[0] if names == [None] else _pick(path, names, key))
    return array if mmap else np.array(array)


def load_arrays(path: str) -> dict:
    """Load every array of a .npz or .safetensors file, by name; see `load`."""
    names = keys(path)
    if names == [None]:
        raise ValueError(f"{path}: found one array without a name, expected .npz or .safetensors")
    return {name: _load(path, name) for name in names}


def keys(path: str) -> list:
    """Names of the arrays in a file; a .npy file holds one, called None."""
    suffix = _suffix(path)
    existing_file(path, _one_of(SUFFIXES))
    if not os.path.isfile(path):
        raise OSError(f"{path}: found something that is not a file, expected {_one_of(SUFFIXES)}")
    with _readable(path):
        if suffix == ".npy":
            return [None]
        if suffix == ".npz":
            with formats.open_zip(path) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        with formats.open_safetensors(path) as tensors:
            return list(tensors.keys())


def save(spec: str, array: Any, force: bool = False) -> None:
    """Save an array under ``path`` or ``path:key``, whole or not at all.

    In a .npz or .safetensors file it is called ``key``, or ``weight`` without one. Where the file
    exists, the key names what is replaced or added; its other arrays and its metadata stay.

    Parameters
    ----------
    spec : str or path
    array : ndarray
    force : bool
        Overwrite an existing file, or what it holds under the key.

    Raises
    ------
    FileExistsError
        The path exists and ``force`` is not given.
    OSError
        The folder is missing or not writable, or the disk is full; no partial file is left.
    ValueError, ImportError
        The format is not known, cannot hold the dtype or the name, or needs the extra
        ``safetensors``; or the file holds several arrays and no key says which one is meant.
    """
    path, key = split(spec)
    array = np.asarray(array)
    check_format(spec, array.dtype)
    check_replaced(spec)
    suffix = _suffix(path)
    if suffix != ".npy" and (key is None or not os.path.exists(path)):
        return save_arrays(path, {key or "weight": array}, force)
    with replacing(path, force) as f:
        if suffix == ".npy":
            containers.write_npy(f, array)
        elif suffix == ".npz":
            with formats.unpacking(path):
                containers.replace_in_npz(f, path, key, array)
        else:
            containers.replace_in_safetensors(f, path, key, array)


def save_arrays(path: str, content: dict, force: bool = False) -> None:
    """Save arrays by name as a .npz or .safetensors file, whole or not at all; see `save`.

    Other arrays that the file held before are gone.
    """
    content = {name: np.asarray(a) for name, a in content.items()}
    if _suffix(path) == ".npy":
        raise ValueError(f"{path}: found .npy for named arrays, expected .npz or .safetensors")
    for name, a in content.items():
        check_format(f"{path}:{name}", a.dtype)
    with replacing(path, force) as f:
        write = containers.write_npz if _suffix(path) == ".npz" else containers.write_safetensors
        write(f, content)


def check_replaced(spec: str) -> None:
    """Refuse to replace one array of a file that is damaged, or of several without its name."""
    path, key = split(spec)
    if not (by_name(path) and os.path.isfile(path)):
        return
    # Without a key what is damaged is replaced as a whole.
    with contextlib.nullcontext() if key else contextlib.suppress(ValueError):
        names = keys(path)
        if key or len(names) < 2:
            return
        raise FileExistsError(
            f"{path}: found {len(names)} arrays in it, expected {path}:NAME for the one to replace"
        )


def check_format(spec: str, dtype: Any) -> None:
    """Refuse a path whose format is unknown or cannot hold ``dtype``, before any work."""
    path, key = split(spec)
    suffix = _suffix(path)
    dtype = np.dtype(dtype)
    if suffix == ".safetensors":
        formats.safetensors_numpy()
        if key == containers.METADATA:
            raise ValueError(f"{path}: found the name {key}, which the format keeps for itself")
        if dtype.name not in containers.DTYPES.values():
            raise ValueError(f"{path}: found {dtype} to write, expected .npy or .npz for it")
    elif dtype.name == "bfloat16":
        raise ValueError(f"{path}: found bfloat16 to write, expected .safetensors for it")


def check_output(path: str, force: bool = False) -> None:
    """Refuse a path that could not be written, before any work.

    Raises
    ------
    FileExistsError
        It exists and ``force`` is not given.
    OSError
        It is a folder or a device, or its folder is missing or not writable.
    """
    path = split(path)[0]
    _check_free(path, force)
    # only trying tells: access() says yes to root on a read-only file system
    with _temporary(path) as f:
        pass
    os.unlink(f.name)


@contextlib.contextmanager
def replacing(path: str, force: bool = False) -> Iterator:
    """Open a temporary file beside ``path`` for writing bytes; rename it when all went well.

    Whatever interrupts the block, ``path`` is as it was and the temporary file is removed.
    """
    _check_free(path, force)
    f = _temporary(path)
    try:
        with f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if not force and os.path.exists(path):
            raise FileExistsError(f"{path}: found a file that appeared meanwhile, left as it is")
        os.replace(f.name, os.path.realpath(path))
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f.name)
        if isinstance(error, OSError) and error.strerror:
            raise _unwritable(path, error) from None
        raise


@contextlib.contextmanager
def updating(path):
    """Open a file that is there to write parts of it anew; they are on disk at the end."""
    try:
        with open(path, "r+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise (_unwritable(path, error) if error.strerror else error) from None


def reserve(f, size):
    """Have room on disk for the first bytes of an open file: a full disk is said now."""
    if hasattr(os, "posix_fallocate"):
        f.flush()
        os.posix_fallocate(f.fileno(), 0, max(1, size))
    else:
        f.truncate(size)


def write_text(path: str, text: str, force: bool = False) -> None:
    """Write a text file, UTF-8; atomic."""
    with replacing(path, force) as f:
        f.write(text.encode())


def _check_free(path, force):
    folder = os.path.dirname(path) or "."
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{path}: found no folder {folder} to write it in")
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{path}: found that {folder} is not a folder")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise OSError(f"{path}: found something that is not a file, expected a path to write")
        if not force:
            raise FileExistsError(
                f"{path}: found an existing file, expected a new path or force (--force)"
            )


def _temporary(path):
    # through a link, the file that it points to is replaced and not the link
    folder, name = os.path.split(os.path.realpath(path))
    try:
        # not tempfile: its files are private to the user, and a rename would keep them so
        return open(os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp"), "xb")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path, error):
    return type(error)(f"{path}: found that it can't be written ({error.strerror})")


def _suffix(path):
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        if os.path.isdir(path):
            raise ValueError(f"{path}: found a folder, expected {_one_of(SUFFIXES)}")
        raise ValueError(
            f"{path}: found {repr(suffix) if suffix else 'no ending'}, expected "
            f"{_one_of(SUFFIXES)}"
        )
    return suffix


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except PermissionError:
        raise PermissionError(f"{path}: found a file that may not be read") from None


def _load(path, name):
    suffix = _suffix(path)
    with _readable(path):
        if suffix == ".npy":
            return formats.load_npy(path)
        return (formats.load_npz if suffix == ".npz" else formats.load_safetensors)(path, name)


def _one_of(names):
    names = list(names)
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _pick(path, names, key):
    names = list(names)
    if key is None:
        if len(names) == 1:
            return names[0]
        if not names:
            raise ValueError(f"{path}: found no arrays, expected one")
        some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ValueError(f"{path}: found {len(names)} arrays ({some}), expected {path}:NAME")
    if key not in names:
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
        raise ValueError(
            f"{path}: found no array {key!r} among {len(names)}"
            + (f" (nearest: {nearest[0]})" if nearest else "")
        )
    return key
