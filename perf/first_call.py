"""Seconds that the first `cuobs prune` on a GPU takes over a later one, where nothing is cached.

    python -m perf.first_call [--methods admm ...] [--patterns 2:4 4:8 ...]

The example layer, each command in a process of its own. Of each case two begin with an empty cache
of CuPy's kernels and two with what was left there; the faster of either counts. The first of all
reads CUDA's libraries from the disk too, and is shown apart. ``--list`` lists the kernels that were
compiled, those of a program together.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["admm", "sparsegpt", "true-obs"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "block16-row8"])
    parser.add_argument("--list", action="store_true", help="print each case's programs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"magnitude, before all: {seconds(folder, 'magnitude', '2:4'):.2f} s")
    print(f"{'method':16} {'pattern':14} {'first':>7} {'later':>7} {'more':>7} programs")
    for method in options.methods:
        for pattern in options.patterns:
            with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
                first, later = (min(seconds(folder, method, pattern) for folder in (one, other))
                                for _ in range(2))
                programs = names(one)
            print(f"{method:16} {pattern:14} {first:7.2f} {later:7.2f} {first - later:7.2f} "
                  f"{len(programs)}", flush=True)
            if options.list:
                print("   ", "  ".join(programs))


def seconds(folder, method, pattern):
    """Those of one command, which keeps kernels in a folder."""
    command = [
        sys.executable, "-m", "cuobs", "prune", EXAMPLE / "W.npy", EXAMPLE / "X.npy", "--device",
        "cuda", "--method", method, "--pattern", pattern, "-o", Path(folder, "out.npy"), "--force",
        "--quiet",
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"CUPY_CACHE_DIR": folder})
    return time.perf_counter() - began


def names(cache):
    """The kernels of each program that CuPy kept, which the machine code names."""
    found = (set(re.findall(rb"\0\.text\.(\w+)", path.read_bytes()))
             for path in Path(cache).glob("*.cubin"))
    return sorted("+".join(sorted(name.decode() for name in each)) for each in found)


if __name__ == "__main__":
    main()
