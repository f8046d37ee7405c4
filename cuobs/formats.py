"""Arrays in .npy, .npz and .safetensors files, mapped where the format allows; damage is named."""

import contextlib
import errno
import lzma
import math
import os
import struct
import zipfile
import zlib

import numpy as np

from cuobs import containers, extras

# What zipfile raises on a damaged archive.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, OverflowError,
    UnicodeDecodeError,
)  # fmt: skip


def _npy_header(f, name):
    try:
        version = np.lib.format.read_magic(f)
    except ValueError:
        raise ValueError(
            f"{name}: found no .npy header (a pickle, or truncated), expected numpy.save's"
        ) from None
    try:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(f)
        broken = any(n < 0 for n in shape)
    except Exception:  # NumPy parses the header as Python, which fails in any way that Python can
        broken = True
    if broken:
        raise ValueError(f"{name}: found a broken or truncated .npy header")
    if dtype.hasobject:
        raise ValueError(f"{name}: found pickled Python objects, expected an array of floats")
    return shape, fortran, dtype


def load_npy(path):
    """The array of a .npy file, mapped."""
    with open(path, "rb") as f:
        shape, fortran, dtype = _npy_header(f, path)
        offset = f.tell()
    _check_length(shape, dtype, os.path.getsize(path) - offset, path)
    return _map(path, offset, shape, dtype, "F" if fortran else "C")


def _check_length(shape, dtype, found, name):
    wanted = math.prod(shape) * dtype.itemsize
    if found < wanted:
        raise ValueError(
            f"{name}: found {max(found, 0)} bytes of data (truncated), expected {wanted} for "
            f"{dtype} {shape}"
        )


def _map(path, offset, shape, dtype, order):
    if math.prod(shape) * dtype.itemsize == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, order)


@contextlib.contextmanager
def unpacking(name):
    """Whatever a damaged archive may raise, in one sentence."""
    try:
        yield
    except RuntimeError as error:  # encrypted, or packed in a way that is not known
        raise ValueError(f"{name}: found an archive that can't be unpacked ({error})") from None
    except (*_DAMAGE, OSError) as error:
        # A seek before the file's beginning is no failure of the disk.
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise
        raise ValueError(
            f"{name}: found damaged data that does not unpack, expected a .npz file as numpy.savez "
            "writes it"
        ) from None


def open_zip(path):
    """A .npz file as an archive."""
    try:
        return zipfile.ZipFile(path)
    except (*_DAMAGE, ValueError, RuntimeError):
        raise ValueError(f"{path}: found a broken or truncated .npz file") from None


def load_npz(path, key):
    """An array of a .npz file by name: mapped, or read where it is compressed."""
    name = f"{path}:{key}"
    with open_zip(path) as archive:
        members = {n.removesuffix(".npy"): n for n in archive.namelist()}
        member = archive.getinfo(members[key])
        with unpacking(name), archive.open(member) as f:
            shape, fortran, dtype = _npy_header(f, name)
            header = f.tell()
            _check_length(shape, dtype, member.file_size - header, name)
            packed = member.compress_type != zipfile.ZIP_STORED
            if packed:
                f.seek(0)
                array = np.lib.format.read_array(f, allow_pickle=False)
            # At the end of the member its CRC is looked at.
            while f.read(containers.PIECE):
                pass
        if packed:
            return array
    with open(path, "rb") as f:
        f.seek(member.header_offset)
        local = f.read(30)
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:], "little")
    offset = member.header_offset + 30 + lengths + header
    return _map(path, offset, shape, dtype, "F" if fortran else "C")


def safetensors_numpy():
    """The package safetensors, with bfloat16 known to NumPy."""
    try:
        import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
        import safetensors.numpy
    except ImportError as e:
        raise ImportError(
            f".safetensors files need {e.name}, which is not installed: "
            + extras.hint("safetensors")
        ) from None
    return safetensors


def open_safetensors(path):
    """A .safetensors file whose header was checked."""
    safetensors = safetensors_numpy()
    try:
        return safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: found a broken or truncated .safetensors file ({e})") from None


def load_safetensors(path, key):
    """A tensor of a .safetensors file by name, mapped."""
    # keys() had safe_open check the header; it would copy the whole tensor, so map it instead
    entry = containers.read_header(path)[0][key]
    if entry.dtype not in containers.DTYPES:
        raise TypeError(f"{path}:{key}: found dtype {entry.dtype}, expected F16, BF16, F32 or F64")
    dtype = np.dtype(containers.DTYPES[entry.dtype])
    return _map(path, entry.offset, tuple(entry.shape), dtype, "C")
