"""Memory while a model is pruned: measured, shared between libraries, given back."""

import contextlib
import ctypes
import mmap
import os
import re
import resource
import sys
from functools import lru_cache

import numpy as np
import torch

from cuobs import arrays


@contextlib.contextmanager
def one_pool(device):
    """Let CuPy take the device's memory from PyTorch's pool: one can't use what lies in another."""
    if device.type != "cuda":
        yield
        return
    cupy = arrays.find_cupy()

    def take(size, device_id):
        stream = torch.cuda.current_stream(device_id).cuda_stream
        try:
            return torch.cuda.caching_allocator_alloc(size, device_id, stream)
        except torch.cuda.OutOfMemoryError:
            raise cupy.cuda.memory.OutOfMemoryError(size, 0) from None

    def give(pointer, _):
        torch.cuda.caching_allocator_delete(pointer)

    allocator = cupy.cuda.PythonFunctionAllocator(take, give)
    with cupy.cuda.using_allocator(allocator.malloc):
        yield


def resident():
    """Bytes of this process in memory now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return _maximum()


def free(device):
    """Bytes that can still be taken: on the device, or of the host."""
    if device.type != "cuda":
        return arrays.free_memory(np)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def whole(device):
    """Bytes that there are, free or not: of the device, or of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak(device):
    """Bytes in use at the peak so far: on the device since `reset`, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _maximum()


class Room:
    """How many windows at once the device has room for: half as many each time it runs full.

    Parameters
    ----------
    windows : int
        To begin with.
    """

    def __init__(self, windows):
        self.windows = windows

    def each(self, count, function):
        """The results of ``function(start, stop)`` on ranges that cover windows 0 to count.

        A call that runs out of memory is made again for half of its windows; until its end it must
        leave nothing behind.

        Raises
        ------
        MemoryError
            A single window does not fit.
        """
        results, start = [], 0
        while start < count:
            stop = min(start + self.windows, count)
            try:
                results.append(function(start, stop))
                start = stop
                continue
            except torch.cuda.OutOfMemoryError:
                if stop - start == 1:
                    raise MemoryError(
                        "memory: found that one window takes more than the device has free, "
                        "expected shorter ones"
                    ) from None
            # Only now has the failed call let go of its tensors.
            self.windows = (stop - start) // 2
            give_back()
        return results


def make_room(device):
    """Where the device is nearly full, `give_back`; on the CPU, `trim`."""
    trim(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < total // 4:
            give_back()


def give_back():
    """Free what PyTorch and CuPy keep of the device for themselves.

    Each has a pool of its own and can't use what lies in the other's.
    """
    torch.cuda.empty_cache()
    arrays.give_back()


@lru_cache(maxsize=1)
def _c_library():
    return ctypes.CDLL(None)


def trim(device):
    """On the CPU, give back what the C library keeps: it would grow with every block."""
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
            _c_library().malloc_trim(0)


def let_go(tensor):
    """Have the pages of a tensor that is mapped from a file leave memory until they are wanted.

    Of one that is not shared with the file, what was changed would be lost.
    """
    page = resource.getpagesize()
    start = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.nbytes - start
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not everywhere
        _c_library().madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED
        )


def mapped_files():
    """Where this process has mapped files into its memory: ranges of addresses, as Linux tells."""
    found = []
    with contextlib.suppress(OSError), open("/proc/self/maps") as file:
        for line in file:
            where, _, _, _, inode, *_ = line.split()
            if inode != "0":
                found.append(range(*(int(address, 16) for address in where.split("-"))))
    return found


def reset(device):
    """Begin to measure the peak anew."""
    trim(device)
    if device.type == "cuda":
        arrays.give_back()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: the peak is what is in use now


def _maximum():
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        if match := re.search(r"VmHWM:\s+(\d+) kB", file.read()):
            return 1024 * int(match[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
