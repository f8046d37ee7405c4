"""The layer, one way to time a call, and the table at the end.

    pytest perf --benchmark-only

On a GPU with the pack (see `layer.py`) everything runs at the published size, otherwise at the
size of the example layer. What is timed has been checked first.
"""

import statistics
import time
from typing import NamedTuple

import numpy as np
import pytest

import cuobs
from cuobs import arrays
from cuobs.comparing import text_table
from perf import layer, measure

LINES = pytest.StashKey()
LIMITS = pytest.StashKey()


class Layer(NamedTuple):
    """What is measured: weight (M, K), activations (N, K), and their Hessian (K, K) float32."""

    xp: object
    W: object
    X: object
    H: object
    name: str

    @property
    def large(self):
        """Whether this is the published size."""
        return self.name == "seven layers"


def pytest_collect_file(file_path, parent):
    """Collect bench_*.py, here only; a file that was named itself pytest collects anyway."""
    named = parent.session.isinitpath(file_path)
    if file_path.match("bench_*.py") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_configure(config):
    """Leave the reporting to the table below: pytest-benchmark's own is too wide for a terminal."""
    config.option.benchmark_quiet = True
    config.stash[LINES] = []


@pytest.fixture(scope="session")
def problem(request):
    """The `Layer`."""
    xp = measure.namespace()
    W, X, name = layer.load(xp)
    if xp is np:
        W, X = W.astype(np.float32), X.astype(np.float32)
    h = cuobs.Hessian(W.shape[1], device=arrays.device_name(xp))
    h.update(X)
    request.config.stash[LIMITS] = measure.ceilings(xp)
    request.config.stash[LINES].append((measure.device(xp), f"{name}, W {W.shape}, X {X.shape}"))
    return Layer(xp, W, X, h.matrix, name)


@pytest.fixture
def clock(benchmark, request, problem):
    """``clock(function, check, flop=0, traffic=0, limit="fp32")``: check a call, then time it.

    `check(result)` asserts that the first result is right and returns what else the table is to
    say of it. `flop` and `traffic` (bytes) are what the call must compute and move at the least;
    the table sets the rate beside the ceiling named by `limit`. A call of `cuobs.prune` also
    measures the loss: its pruning alone is a column beside the whole call.
    """

    def clock(function, check, *, flop=0, traffic=0, limit="fp32"):
        pruning = []

        def call():
            result = function()
            arrays.synchronize(problem.xp)
            pruning.append(getattr(result, "seconds", None))
            return result

        begin = time.perf_counter()
        result = call()
        once = time.perf_counter() - begin
        facts = check(result) or {}
        del result
        benchmark.pedantic(call, rounds=max(2, min(20, int(1 / once))))
        seconds = benchmark.stats.stats.median
        if pruning[0] is not None:
            facts = {"of it pruning": f"{1e3 * statistics.median(pruning[1:]):.3f}", **facts}
        limits = request.config.stash[LIMITS]
        benchmark.extra_info.update(facts, limits=limits)
        rate = ceiling = "-"
        if flop:
            unit, size = ("TFLOP/s", 1e12) if problem.large else ("GFLOP/s", 1e9)
            rate = f"{flop / seconds / size:.3g} {unit}"
            limit = limit if limit in limits else "fp32"
            ceiling = f"{limits[limit] * 1e12 / size:.3g} {limit}"
        elif traffic:
            rate = f"{traffic / seconds / 1e9:.3g} GB/s"
            ceiling = f"{limits['copy']:.3g} copy"
        if flop or traffic:
            benchmark.extra_info.update(rate=rate, ceiling=ceiling)
        request.config.stash[LINES].append(
            (benchmark.group, benchmark.name, seconds, rate, ceiling, facts)
        )

    return clock


def pytest_terminal_summary(terminalreporter, config):
    """One table a group: ops with their rates, methods with their losses."""
    device, *lines = config.stash[LINES] or [None]
    if not device:
        return
    terminalreporter.section(f"{device[0]}: {device[1]}")
    for group in dict.fromkeys(line[0] for line in lines):
        members = [line for line in lines if line[0] == group]
        names = list(dict.fromkeys(name for line in members for name in line[5]))
        rated = any(line[3] != "-" for line in members)
        header = [group, "median ms", *(["reached", "ceiling"] if rated else []), *names]
        rows = [
            [
                name.partition("[")[2].rstrip("]") or name.removeprefix("test_"),
                f"{1e3 * seconds:.3f}",
                *([rate, ceiling] if rated else []),
                *(facts.get(key, "-") for key in names),
            ]
            for _, name, seconds, rate, ceiling, facts in members
        ]
        terminalreporter.write_line(text_table(header, rows) + "\n")
