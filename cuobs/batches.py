"""Batches of rows: as many as fit the free memory, shared by workers, halved when memory runs out."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
from threadpoolctl import threadpool_limits

# On the CPU a batch is kept small enough for a core's cache.
CPU_ROWS = 8


def run_batches(function, count, problem, bytes_per_row):
    """Call ``function(start, stop)`` on ranges that cover 0 to count.

    Parameters
    ----------
    function : callable
        Writes its own rows; the ranges do not overlap.
    count : int
        Row groups in all.
    problem : Problem
        Whose settings and free memory size the batches.
    bytes_per_row : int
        Memory that one row group needs.

    Raises
    ------
    MemoryError
        Even a single row group does not fit.
    """
    settings, xp = problem.settings, problem.xp
    fit = max(1, problem.free_bytes() // max(1, bytes_per_row))
    if xp is np:
        workers = settings.workers or os.cpu_count() or 1
        rows = settings.batch_rows or max(1, min(CPU_ROWS, fit // workers, -(-count // workers)))
        _share(function, count, rows, workers, settings)
        return
    rows = min(settings.batch_rows or 256, fit, count)
    start = 0
    while start < count:
        stop = min(start + rows, count)
        try:
            function(start, stop)
        except xp.cuda.memory.OutOfMemoryError:
            if rows == 1:
                raise MemoryError(
                    f"memory: one row needs about {bytes_per_row / 2**20:.0f} MiB of GPU memory, "
                    "expected as much to be free; a smaller group needs less"
                ) from None
            rows = max(1, rows // 2)
            xp.get_default_memory_pool().free_all_blocks()
            continue
        start = stop
        settings.report(start, count)


def _share(function, count, rows, workers, settings):
    """Spread ranges over threads, each with one BLAS thread: small products leave no room for two
    pools on the same cores."""
    ranges = [(a, min(a + rows, count)) for a in range(0, count, rows)]
    with threadpool_limits(1) if workers > 1 else nullcontext():
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(function, *limits) for limits in ranges]
            try:
                for (_, stop), future in zip(ranges, futures, strict=True):
                    future.result()
                    settings.report(stop, count)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
