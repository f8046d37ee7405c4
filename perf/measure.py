"""Timing with the device waited for, and what a device reaches at most."""

import functools
import os
import platform
import re
import statistics
import time
from pathlib import Path

import numpy as np

from cuobs import arrays
from cuobs.ops.products import gemm


def namespace():
    """CuPy where there is a GPU, else NumPy."""
    return arrays.choose("auto")


def timed(function, xp, repeats=3):
    """Call once to warm up and then `repeats` times, waiting for the device each time.

    Returns
    -------
    result, median seconds, seconds of the warm-up
    """
    seconds = []
    for _ in range(1 + repeats):
        result = None  # what the last call returned is freed before the next one
        arrays.synchronize(xp)
        begin = time.perf_counter()
        result = function()
        arrays.synchronize(xp)
        seconds.append(time.perf_counter() - begin)
    return result, statistics.median(seconds[1:] or seconds), seconds[0]


def ceilings(xp):
    """Measured limits: TFLOP/s of square products, GB/s of a copy, read and written."""
    n = 2048 if xp is np else 8192
    modes = {"fp32": (np.float32, "fp32")}
    if xp is not np:
        modes |= {"tf32": (np.float32, "tensor"), "fp16": (np.float16, "tensor")}
    limits = {}
    for name, (dtype, mode) in modes.items():
        A = xp.random.default_rng(0).standard_normal((n, n), dtype=np.float32).astype(dtype)
        out = xp.empty_like(A)
        limits[name] = 2e-12 * n**3 / _best(functools.partial(gemm, A, A, out, precision=mode), xp)
    source = xp.ones(2**24 if xp is np else 2**28, np.float32)
    target = xp.empty_like(source)
    limits["copy"] = 2e-9 * source.nbytes / _best(lambda: xp.copyto(target, source), xp)
    return limits


def _best(function, xp):
    """Seconds of the fastest of ten calls."""
    return min(timed(function, xp, 1)[1] for _ in range(10))


def device(xp):
    """The device's name."""
    if xp is not np:
        return xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)["name"].decode()
    information = Path("/proc/cpuinfo")
    found = information.is_file() and re.search(r"model name\s*: (.*)", information.read_text())
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
