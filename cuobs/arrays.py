"""The only place that knows NumPy, CuPy and PyTorch: namespaces, devices, free memory.

A computation takes its arrays in with `receive`, works on the namespace of `choose`, and gives
its result back in the kind that came with `hand_back`.
"""

import contextlib
import ctypes
import math
import numbers
import os
import re
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuobs import extras

# What is public; the rest is for the package.
__all__ = ["cupy_fault", "find_cupy", "size_text"]

DEVICES = ("auto", "cpu", "cuda")
FLOATS = ("float16", "bfloat16", "float32", "float64")


@lru_cache(maxsize=1)
def find_cupy():
    """CuPy with a device that works, or None."""
    return None if cupy_fault() else __import__("cupy")


@lru_cache(maxsize=1)
def cupy_fault():
    """Why CuPy can't be used, in one sentence, or an empty text."""
    try:
        import cupy
    except ImportError:
        return (
            f"CuPy is not installed: {extras.hint('cuda13')}, '.[cuda12]' for a driver of CUDA 12"
        )
    try:
        if cupy.cuda.runtime.getDeviceCount() > 0:
            return ""
        fault = "no device"
    except Exception as error:
        fault = str(error).splitlines()[0]
    return f"CuPy {cupy.__version__} finds no CUDA device ({fault}): check the NVIDIA driver"


def count_devices():
    """How many CUDA devices the driver shows, whatever packages there are to use them."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def namespace(array):
    """The module (numpy or cupy) whose arrays hold this one's data."""
    if type(array) is not np.ndarray and _is_cuda(array):
        import cupy

        return cupy
    return np


def choose(device, *arrays):
    """The namespace to compute on.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        "auto" takes the GPU where an array lies there or where one is found.

    Raises
    ------
    ValueError
        An unknown device, or "cuda" where CuPy or its device is missing.
    """
    if device == "cpu":
        return np
    if device not in ("auto", "cuda"):
        raise ValueError(f"device: found {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and cupy_fault():
        raise ValueError(f"device: found 'cuda', but {cupy_fault()}")
    return find_cupy() or np


def device_name(xp):
    """ "cpu" or "cuda"."""
    return "cpu" if xp is np else "cuda"


def receive(array, name="array"):
    """An array of NumPy or CuPy on the data of whatever came, without a copy where possible.

    Raises
    ------
    TypeError, ValueError
        It is no array, or one that holds no plain numbers: masked, sparse, quantised, without data.
    """
    array = _plain(array, name)
    if isinstance(array, np.ndarray):
        return array
    if _is_torch(array):
        return _from_torch(array)
    if hasattr(array, "__cuda_array_interface__"):
        import cupy

        return cupy.asarray(array)
    if hasattr(array, "__dlpack__"):
        if _is_cuda(array):
            import cupy

            return cupy.from_dlpack(array)
        return np.from_dlpack(array)
    if isinstance(array, list | tuple) or hasattr(array, "__array__"):
        try:
            return _stacked(array, name)
        except ValueError as error:
            if str(error).startswith(name):
                raise
            raise ValueError(f"{name}: found rows of unequal lengths, expected an array") from None
    raise TypeError(f"{name}: found {type(array).__name__}, expected an array")


def typed(array, name="array"):
    """An array as it is where it names its dtype, else (a list, a mere protocol) as `receive`."""
    array = _plain(array, name)
    whole = all(hasattr(array, attribute) for attribute in ("dtype", "shape", "ndim"))
    return array if whole else receive(array, name)


def _plain(array, name):
    """Refuse arrays whose elements are no plain numbers; matrices of NumPy as arrays."""
    if isinstance(array, np.ma.MaskedArray):
        if masked := np.ma.count_masked(array):
            raise ValueError(
                f"{name}: found an array with {masked} masked elements, expected numbers alone"
            )
        return np.asarray(array.data)
    if isinstance(array, np.matrix):
        return np.asarray(array)
    if _is_torch(array):
        torch = sys.modules["torch"]
        own = type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        for wrong, found in (
            (array.is_nested, "a nested tensor"),
            (array.layout != torch.strided, f"a tensor of layout {array.layout}"),
            (array.is_meta, "a tensor on the meta device, which holds no numbers"),
            (own, f"{type(array).__name__}, a tensor of its own kind"),
        ):
            if wrong:
                raise TypeError(f"{name}: found {found}, expected a plain tensor")
    return array


def _stacked(rows, name):
    """An array of lists; of arrays, whose values NumPy can't always read, one by one."""
    if isinstance(rows, list | tuple) and any(_is_torch(row) or _is_cuda(row) for row in rows):
        rows = [receive(row, f"{name}[{i}]") for i, row in enumerate(rows)]
        if all(_is_cuda(row) for row in rows):
            return namespace(rows[0]).stack(rows)
        rows = [to_numpy(row) for row in rows]
    return np.asarray(rows)


def round_to(array, like):
    """`array` rounded to the dtype of `like`, on its own namespace.

    Where the namespace has no such dtype (bfloat16), the rounded values are held in float32.
    """
    xp = namespace(array)
    if dtype_of(like) != "bfloat16":
        # What does not fit becomes infinite, and `validation.holds` looks for that.
        with np.errstate(over="ignore"):
            return array.astype(dtype_of(like), copy=False)
    # Round half to even on the upper 16 bits.
    bits = array.astype(np.float32).view(np.uint32)
    carry = bits >> 16
    carry &= 1
    carry += 0x7FFF
    bits += carry
    bits &= xp.uint32(0xFFFF0000)
    return bits.view(np.float32)


def hand_back(array, like, cast=True):
    """`array` (NumPy or CuPy) as the kind and on the device of `like`.

    Floats take the dtype of `like` where `cast` says so; round to it first.
    """
    cast = cast and array.dtype.kind == "f"
    if _is_torch(like):
        import torch

        tensor = torch.from_dlpack(_cupy_of(array)) if like.is_cuda else torch.from_numpy(
            to_numpy(array)
        )
        return tensor.to(like.device, like.dtype if cast else tensor.dtype)
    with stream_of(like):
        array = _cupy_of(array) if _is_cuda(like) else to_numpy(array)
        return array.astype(like.dtype, copy=False) if cast else array


def to_numpy(array):
    """The data in host memory."""
    return array if isinstance(array, np.ndarray) else array.get()


def asarray(array, xp, dtype=None):
    """`array` (NumPy or CuPy) on a namespace, copied only where it has to be."""
    if xp is np:
        array = to_numpy(array)
    elif dtype_of(array) == "bfloat16":
        array = array.astype(np.float32)
    return xp.asarray(array, dtype=dtype)


def widened_bytes(array):
    """Bytes of what `receive` makes of an array, where it is not the same memory."""
    halves = _is_torch(array) and dtype_of(array) == "bfloat16"
    return array.numel() * np.dtype(np.float32).itemsize if halves else 0


def largest(array):
    """The largest magnitude, as a float; no second array is made on the way."""
    return max(abs(float(array.max())), abs(float(array.min())))


def pieces(array, xp, rows):
    """An array (NumPy or CuPy) on a namespace, so many rows at a time.

    On the way from host to GPU the next piece is read and copied while one is worked on, through
    two buffers of pinned memory.
    """
    starts = range(0, len(array), rows)
    if xp is np or not isinstance(array, np.ndarray) or dtype_of(array) == "bfloat16":
        for start in starts:
            yield asarray(array[start : start + rows], xp)
        return
    import cupyx

    shape = (min(rows, len(array)), *array.shape[1:])
    pinned = [cupyx.empty_pinned(shape, array.dtype) for _ in range(2)]
    buffers = [xp.empty(shape, array.dtype) for _ in range(2)]
    copied, used = ([xp.cuda.Event() for _ in range(2)] for _ in range(2))
    work, copies = xp.cuda.get_current_stream(), xp.cuda.Stream(non_blocking=True)
    copies.wait_event(work.record())
    for n, start in enumerate(starts):
        slot = n % 2
        size = min(rows, len(array) - start)
        copied[slot].synchronize()
        pinned[slot][:size] = array[start : start + size]
        copies.wait_event(used[slot])
        buffers[slot][:size].set(pinned[slot][:size], stream=copies)
        copied[slot].record(copies)
        work.wait_event(copied[slot])
        yield buffers[slot][:size]
        used[slot].record(work)
    copies.synchronize()


def dtype_of(array):
    """The name of an array's dtype, whatever kind it is."""
    return str(array.dtype).removeprefix("torch.")


@contextlib.contextmanager
def stream_of(*arrays):
    """Run on the device of the first CUDA array among these, on PyTorch's current stream if it is a
    tensor. Of a list the first array counts, of a Hessian its matrix.
    """
    first = next((a for a in map(_inside, arrays) if _is_cuda(a)), None)
    if first is None:
        yield
        return
    import cupy

    if not _is_torch(first):
        with cupy.cuda.Device(_device_number(first)):
            yield
        return
    import torch

    stream = _Stream(torch.cuda.current_stream(first.device).cuda_stream)
    with cupy.cuda.Device(first.device.index), cupy.cuda.Stream.from_external(stream):
        yield


class _Stream(NamedTuple):
    """A stream in CUDA's stream protocol, which older releases of PyTorch do not speak."""

    pointer: int

    def __cuda_stream__(self):
        return 0, self.pointer


def synchronize(xp):
    """Wait for the device; nothing on the CPU."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def free_memory(xp):
    """Bytes that can still be allocated."""
    if xp is not np:
        return xp.cuda.runtime.memGetInfo()[0] + xp.get_default_memory_pool().free_bytes()
    with contextlib.suppress(OSError):
        with open("/proc/meminfo") as file:
            if match := re.search(r"MemAvailable:\s+(\d+) kB", file.read()):
                return 1024 * int(match[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def give_back():
    """Free what CuPy keeps of the device for itself, where it is in use."""
    if "cupy" in sys.modules and find_cupy():
        find_cupy().get_default_memory_pool().free_all_blocks()


def size_text(n, up=False):
    """Bytes for people; with ``up`` no fewer, so that they are enough where so many are needed."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= unit:
            if up:
                n = math.ceil(n / unit * 100) * unit / 100
            if up or unit == 2**30:
                return f"{n / unit:.2f} {name}"
            return f"{n / unit:{'.3g' if n < 999.5 * unit else '.0f'}} {name}"
    return f"{n} bytes"


def parse_size(text, name="memory_limit"):
    """Bytes from a number or from a text like "8GiB" or "500 MB"; a name for what is refused."""
    found = str(text) if isinstance(text, str | numbers.Real) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", found, re.IGNORECASE)
    if not match or not 0 < float(match[1]) < float("inf"):
        found = repr(text) if len(found) in range(1, 60) else type(text).__name__
        raise ValueError(
            f"{name}: found {found}, expected bytes, or a size like '8GiB'"
        )
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def _is_torch(array):
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(array, tensor)


def _inside(thing):
    """The array that tells where something is."""
    while isinstance(thing, list | tuple) and thing:
        thing = thing[0]
    return getattr(thing, "held", thing)


def _is_cuda(array):
    if _is_torch(array):
        return array.is_cuda
    if hasattr(array, "__cuda_array_interface__"):
        return True
    if hasattr(array, "__dlpack_device__") and not isinstance(array, np.ndarray):
        return array.__dlpack_device__()[0] == 2
    return False


def _device_number(array):
    """Of the GPU that an array lies on; CuPy would copy one of another GPU to the current one."""
    if hasattr(array, "__dlpack_device__"):
        return array.__dlpack_device__()[1]
    import cupy

    pointer = array.__cuda_array_interface__["data"][0]
    return cupy.cuda.runtime.pointerGetAttributes(pointer).device


def _from_torch(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if str(tensor.dtype) == "torch.bfloat16":
        # NumPy has no bfloat16; float32 holds each of its values.
        tensor = tensor.float()
    if tensor.is_cuda:
        import cupy

        return cupy.from_dlpack(tensor)
    return tensor.cpu().numpy()


def tensor_view(tensor: Any) -> Any:
    """A tensor of PyTorch as an array on the same memory, bfloat16 as it is.

    For ops that take half precision, such as `cuobs.ops.add_gram`. What is written to the array is
    in the tensor. On a GPU, ops run on CuPy's current stream: call them under
    `cuobs.arrays.stream_of(tensor)`, which makes it PyTorch's.

    Parameters
    ----------
    tensor : torch.Tensor
        Of any strides, float16, bfloat16, float32 or float64.

    Returns
    -------
    array
        Of NumPy or, on a GPU, of CuPy; bfloat16 is that of the package ml_dtypes.
    """
    tensor = tensor.detach()
    half = dtype_of(tensor) == "bfloat16"
    if half:
        import ml_dtypes
        import torch

        # Neither NumPy nor every release of CuPy takes bfloat16 from another library.
        tensor = tensor.view(torch.int16)
    if tensor.is_cuda:
        import cupy

        array = cupy.from_dlpack(tensor)
    else:
        array = tensor.numpy()
    return array.view(ml_dtypes.bfloat16) if half else array


def _cupy_of(array):
    import cupy

    return cupy.asarray(array)
