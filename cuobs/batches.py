"""Batches of rows: as many as fit the memory, shared by workers, halved when memory runs out."""

import collections
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cuobs import blas
from cuobs.arrays import device_name, size_text
from cuobs.cores import cores

# On the CPU, row groups that make little of the time between products, and bytes for each worker,
# which are filled again and again: more of them are slower.
CPU_ROWS = 16
CPU_BYTES = 2**27
# Ranges that wait for each of them.
AHEAD = 4
# On a GPU, row groups that keep it busy, and bytes that they may take unless told otherwise.
GPU_ROWS = 256
GPU_BYTES = 24 * 2**30
# What CUDA, its libraries and what a product needs take beside the arrays.
GPU_LIBRARIES = 2**29


class Workspace(threading.local):
    """Memory that a thread's batches use again and again, by name."""

    def __init__(self):
        self.buffers = {}

    def array(self, name, shape, dtype, xp=np):
        """An uninitialised array in the buffer of a name, which grows where it is too small."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self.buffers or self.buffers[name].size < size:
            self.buffers.pop(name, None)
            self.buffers[name] = xp.empty(size, np.uint8)
        return self.buffers[name][:size].view(dtype).reshape(shape)

    def clear(self):
        """Let go of all memory."""
        self.buffers.clear()


def run_batches(
    function, count, problem, bytes_per_row=0, bytes_per_worker=0, held=0, unit=1, most=None
):
    """Call ``function(start, stop)`` on ranges that cover 0 to count.

    Parameters
    ----------
    function : callable
        Writes its own rows.
    count : int
        Row groups in all.
    problem : Problem
        Whose settings and free memory size the batches.
    bytes_per_row : int
        Memory that one row group needs.
    bytes_per_worker : int
        What each thread on the CPU needs beside, however many row groups it takes at once.
    held : int
        What the caller holds beside the problem.
    unit : int
        On a GPU ranges hold a multiple of so many row groups where memory allows, so that none is
        computed in smaller company than another; they may overlap then.
    most : int, optional
        Row groups that a range may hold on a GPU.

    Raises
    ------
    MemoryError
        Even a single row group does not fit.
    ValueError
        Not under the limit of the settings.
    """
    settings, xp = problem.settings, problem.xp
    if device_name(xp) == "cuda":
        _run_on_device(function, count, problem, bytes_per_row, held, unit, most or count)
        return
    workers = settings.workers or cores()
    free = problem.free_bytes(held)
    if settings.memory_limit is not None:
        least = bytes_per_row + bytes_per_worker
        _check_limit(settings, free, least)
        workers = min(workers, free // max(1, least))
    fit = (min(free // workers, CPU_BYTES) - bytes_per_worker) // max(1, bytes_per_row)
    rows = settings.batch_rows or max(1, min(CPU_ROWS, fit, -(-count // workers)))
    _share(function, count, rows, workers, settings)


def _check_limit(settings, free, bytes_per_row):
    """Refuse a limit that leaves no room for a row group."""
    limit = settings.memory_limit
    if limit is not None and free < bytes_per_row:
        raise ValueError(
            f"memory_limit: found {size_text(limit)}, of which {size_text(max(free, 0))} are left "
            f"beside what is held, expected {size_text(bytes_per_row)} for a row at least"
        )


def _run_on_device(function, count, problem, bytes_per_row, held, unit, most):
    settings, xp = problem.settings, problem.xp
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    if settings.memory_limit is None:
        free = min(problem.free_bytes(), GPU_BYTES)
    else:
        free = problem.free_bytes(held)
        _check_limit(settings, free, bytes_per_row)
    rows = -(-(settings.batch_rows or GPU_ROWS) // unit) * unit
    rows = _whole(min(rows, max(1, free // bytes_per_row), count, most), unit)
    start = 0
    while start < count:
        stop = min(start + rows, count)
        missing = -(stop - start) % unit if rows % unit == 0 else 0
        try:
            function(max(0, start - missing), stop)
        except xp.cuda.memory.OutOfMemoryError:
            if rows == 1:
                raise MemoryError(
                    f"memory: one row needs about {bytes_per_row / 2**20:.0f} MiB of GPU memory, "
                    "expected as much to be free; a smaller group needs less"
                ) from None
        else:
            start = stop
            settings.report(start, count)
            continue
        # Only now has the failed call let go of its arrays.
        rows = _whole(max(1, rows // 2), unit)
        pool.free_all_blocks()


def _whole(rows, unit):
    """The largest multiple of `unit` up to `rows`, or `rows` itself where there is none."""
    return rows // unit * unit or rows


def _share(function, count, rows, workers, settings):
    """Spread ranges over threads, each with one BLAS thread: on small products more of them wait
    for each other longer than they compute."""
    ranges = ((start, min(start + rows, count)) for start in range(0, count, rows))
    with blas.one_thread():
        if workers == 1 or rows >= count:
            for start, stop in ranges:
                function(start, stop)
                settings.report(stop, count)
        else:
            _spread(function, ranges, count, workers, settings)


def _spread(function, ranges, count, workers, settings):
    waiting = collections.deque()

    def finish():
        stop, future = waiting.popleft()
        future.result()
        settings.report(stop, count)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for start, stop in ranges:
                # Each that waits takes a kilobyte.
                if len(waiting) == AHEAD * workers:
                    finish()
                waiting.append((stop, pool.submit(function, start, stop)))
            while waiting:
                finish()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
