"""Memory that pruning a model takes: predicted before it starts, measured as it goes."""

import contextlib
import ctypes
import math
import re
import resource
import sys

import torch

# A process that has imported PyTorch and transformers and holds no model.
LIBRARIES = 400 * 2**20


def predict(
    shapes, windows, length, width, batch, *, dense, tune, device, element, model, forward=None
):
    """Bytes that will be in use at the peak.

    Parameters
    ----------
    shapes : list of (int, int)
        Of the weights of a block's linears.
    windows, length, width : int
        Of the hidden states.
    batch : int
        Windows in a batch.
    dense : bool
        Whether the dense model's hidden states are followed too.
    tune : int
        Windows in a step of tuning; 0 where blocks are not tuned.
    device : torch.device
        On the CPU the process as it is now counts too, and the whole model.
    element : int
        Bytes of an element of the hidden states.
    model : int
        Bytes of all weights. Those that are mapped from a file come into memory as they are used.
    forward : int, optional
        Bytes that a window's forward of the block takes, if `taken` has measured them: they can't
        be told from the weights, since an attention without a fused kernel holds its scores.

    Returns
    -------
    int
    """
    sizes = [math.prod(shape) for shape in shapes]
    weights, elements = sum(sizes), max(sizes)
    side = max(max(shape) for shape in shapes)
    # Dense ones before and after the block, and the pruned model's.
    states = windows * length * width * element * (3 if dense else 1)
    if forward is None:
        window = length * (sum(max(shape) for shape in shapes) + 4 * side) * element
    else:
        # Inputs and residual stream of the pruned model wait for those of the dense one; then
        # both are widened.
        waiting = length * (side + 2 * width) * element if dense else 0
        window = max(forward + waiting, length * side * 16)
    # What backpropagation keeps of a window in float32 is about three times as much.
    activations = max(batch * window, 3 * min(batch, tune) * window * 4 // element)
    grams = side**2 * (4 * (1 + dense) + 8 * 3)
    method = 10 * 4 * (side**2 + elements)
    total = weights * element * 2 + states + activations + grams + method
    if tune:
        total += 16 * weights
    if device.type == "cpu":
        total += max(resident(), LIBRARIES + model)
    return int(total)


def taken(function, device):
    """Bytes of PyTorch's memory on a GPU that a call needs while it runs."""
    function()  # what libraries keep for themselves, they have from now on
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def resident():
    """Bytes of this process in memory now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return _maximum()


def peak(device):
    """Bytes in use at the peak so far: on the device since `reset`, else of the process."""
    if device.type != "cuda":
        return _maximum()
    held = torch.cuda.max_memory_allocated(device)
    if "cupy" in sys.modules:
        held += sys.modules["cupy"].get_default_memory_pool().total_bytes()
    return held


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
    """Where the device is nearly full, `give_back`."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < total // 4:
            give_back()


def give_back():
    """Free what PyTorch and CuPy keep of the device for themselves.

    Each has a pool of its own and can't use what lies in the other's.
    """
    torch.cuda.empty_cache()
    if "cupy" in sys.modules and torch.cuda.is_available():
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def trim(device):
    """On the CPU, give back what the C library keeps: it would grow with every block."""
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)


def reset(device):
    """Begin to measure the peak anew."""
    if device.type == "cuda":
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
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
