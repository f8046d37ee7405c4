"""Launches of kernels that may begin before the kernel before them is done.

The hardware then starts a kernel's blocks as soon as there is room for them, and the kernel itself
waits, by ``griddepcontrol.wait``, before it reads what the other writes: programmatic dependent
launch, from Hopper on, in streams and in the CUDA graphs that are captured from them.

Such a kernel reads nothing by ``ld.global.nc``, of which ``__ldg`` and ``const __restrict__`` make
use: what that needs, data that nobody writes from the kernel's start on, is not so here, and the
compiler moves such loads to before the wait.
"""

import ctypes
import os
from functools import lru_cache

import numpy as np

# The first device and the first driver that capture such launches in a graph.
CAPABILITY, DRIVER = 90, 12040
PROGRAMMATIC_STREAM_SERIALIZATION = 6
TYPES = {np.uint64: ctypes.c_uint64, np.int64: ctypes.c_int64, np.int32: ctypes.c_int32}


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is one of many of up to 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]  # fmt: skip


ATTRIBUTE = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))


@lru_cache(maxsize=1)
def driver():
    """The library of the CUDA driver."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@lru_cache(maxsize=16)
def may(number):
    """Whether a device and its driver take such launches."""
    from cupy.cuda import runtime

    found = runtime.getDeviceProperties(number)
    capability = found["major"] * 10 + found["minor"]
    return capability >= CAPABILITY and runtime.driverGetVersion() >= DRIVER


def launch(kernel, grid, block, args, shared, stream, number):
    """Launch a kernel that waits for the one before by itself, where the device takes that.

    Parameters
    ----------
    kernel : cupy.RawKernel
    grid, block : tuple of three int
    args : sequence
        NumPy scalars, 64-bit unsigned or signed, or 32-bit signed; or what has an ``address``.
    shared : int
        Dynamic shared memory in bytes.
    stream : object
        Its address is ``stream.ptr``.
    number : int
        Of the device, which is the current one.
    """
    held = [TYPES[type(a)](int(a)) if type(a) in TYPES else a for a in args]
    pointers = (ctypes.c_void_p * len(held))(*(
        a.address if hasattr(a, "address") else ctypes.addressof(a) for a in held
    ))  # fmt: skip
    config = Launch(grid, block, shared, stream.ptr, ctypes.pointer(ATTRIBUTE), int(may(number)))
    fault = driver().cuLaunchKernelEx(
        ctypes.byref(config), ctypes.c_void_p(kernel.kernel.ptr), pointers, None
    )
    if fault:
        raise RuntimeError(f"cuLaunchKernelEx: found error {fault}, expected none")
