"""The most memory that pruning a layer from files takes, on the device and on the host.

    python -m perf.published memory FOLDER [--limit 8GiB] [--method admm --method true-obs]

Writes W.npy and X.npy of the published size (4.8 GB) into FOLDER unless they are there, then runs
each method in a process of its own, from memory-mapped X to weights, and prints the most device
memory (all of it, libraries included, over what was in use before) and anonymous host memory seen
by a thread that looks every 5 ms.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import cuobs
from perf import layer, measure


class Watch(threading.Thread):
    """Keep the largest of what the functions return."""

    def __init__(self, *functions):
        super().__init__(daemon=True)
        self.functions = functions
        self.first = [f() for f in functions]
        self.most = list(self.first)

    def run(self):
        """Look until the process ends."""
        while True:
            self.most = [max(m, f()) for m, f in zip(self.most, self.functions, strict=True)]
            time.sleep(0.005)


def host():
    """Bytes of anonymous memory of this process: pages of mapped files are not counted."""
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1])


def device():
    """Bytes of device memory in use by anyone."""
    xp = measure.namespace()
    if xp is np:
        return 0
    free, total = xp.cuda.runtime.memGetInfo()
    return total - free


def run(folder, method, limit):
    """Prune from the files and print one line."""
    W, X = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in "WX")
    watch = Watch(device, host)
    watch.start()
    result = cuobs.prune(W, X, method=method, memory_limit=limit)
    used, held = ((m - f) / 2**30 for m, f in zip(watch.most, watch.first, strict=True))
    print(
        f"{method:16} limit {limit or 'none':8} device {used:6.2f} GiB  host {held:6.2f} GiB  "
        f"loss {100 * result.loss:.3f} %  H {result.hessian_seconds:.2f} s  "
        f"pruning {result.seconds:.2f} s",
        flush=True,
    )


def main(argv):
    """Make the files, then one process a method."""
    parser = argparse.ArgumentParser("perf.published memory", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit")
    parser.add_argument("--method", action="append")
    parser.add_argument("--tokens", type=int, default=layer.PUBLISHED[2])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    methods = arguments.method or ["sparsegpt", "admm", "true-obs"]
    if arguments.here:
        run(arguments.folder, methods[0], arguments.limit)
        return
    if not (arguments.folder / "W.npy").exists():
        layer.make_to_files(
            arguments.folder, tokens=arguments.tokens, xp=measure.namespace()
        )
    limit = ["--limit", arguments.limit] if arguments.limit else []
    for method in methods:
        subprocess.run(
            [sys.executable, "-m", "perf.published", "memory", arguments.folder, "--here",
             "--method", method, *limit],
            check=True,
        )
