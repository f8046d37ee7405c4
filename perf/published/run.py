"""The published benchmark on one GPU: every row of `rows.py`, with its time, loss and memory.

    python -m perf.published run FOLDER [--rows '2:4/*,*/admm'] [--update results.json]

Makes the layer once, accumulates its Hessian, and runs each row from the Hessian on: once to warm
up, then the median of three, the device waited for each time. FOLDER gets results.json, written
anew after every row, and RESULTS.rst. A row's `seconds` end with the pruned weight; `whole` also
counts cuobs's own checks and the loss. Without a GPU the same runs at example size.
"""

import argparse
import contextlib
import datetime
import fnmatch
import functools
import gc
import json
import shlex
import statistics
import time
import traceback
from pathlib import Path

import cuobs
from cuobs import arrays
from perf import layer, measure
from perf.published import report, stages
from perf.published.rows import ROWS


def main(argv):
    """Run the rows that were asked for."""
    arguments = _arguments(argv)
    if arguments.rows_list:
        print("\n".join(row.name for row in ROWS))
        return
    chosen = [row for row in ROWS if _matches(row.name, arguments.rows)]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    xp = measure.namespace()
    W, X, name = layer.load(xp)
    arrays.synchronize(xp)
    print(f"{measure.device(xp)}: {name}, W {W.shape}, X {X.shape}, ready after "
          f"{time.perf_counter() - begin:.1f} s")
    results = json.loads(arguments.update.read_text()) if arguments.update else {"rows": {}}
    results |= {
        "device": measure.device(xp),
        "date": datetime.date.today().isoformat(),
        "command": "python -m perf.published run " + shlex.join(argv),
        "layer": name,
        "shapes": f"W {W.shape}, X {X.shape}, {W.dtype}",
        "ceilings": measure.ceilings(xp),
    }
    print("  ".join(f"{key} {value:.4g}" for key, value in results["ceilings"].items()))

    gram = next((row for row in chosen if row.method == "gram"), None)
    repeats = arguments.repeats if gram else 0
    H, seconds, warm_up = measure.timed(functools.partial(hessian, X, xp), xp, repeats)
    if gram:
        _keep(results, arguments.folder, gram, {"seconds": seconds, "warm_up": warm_up})
        chosen.remove(gram)
    del X  # the rows start from the Hessian, and the memory they take is measured without X

    for row in chosen:
        if time.perf_counter() - begin > arguments.budget:
            print(f"{row.name}: left out, the budget of {arguments.budget:.0f} s is spent")
            continue
        try:
            record = run(row, W, H, xp, arguments)
        except Exception:
            traceback.print_exc()
            record = {"error": traceback.format_exc(limit=0).strip()}
        _keep(results, arguments.folder, row, record)
    report.write(results, arguments.folder / "RESULTS.rst")


def hessian(X, xp):
    """XᵀX."""
    h = cuobs.Hessian(X.shape[1], device=arrays.device_name(xp))
    h.update(X)
    return h.matrix


def run(row, W, H, xp, arguments):
    """Time one row, check what came out, and return its record."""
    W = W[: row.first]
    call = _call(row, W, H)
    pruning = []

    def counted():
        result = call()
        pruning.append(getattr(result, "seconds", None))
        return result

    _empty_pool(xp)
    result, whole, warm_up = measure.timed(counted, xp, arguments.repeats)
    record = {"seconds": whole, "whole": whole, "warm_up": warm_up, "peak": _pool_size(xp)}
    if pruning[0] is not None:
        record["seconds"] = statistics.median(pruning[1:])
    weight = getattr(result, "weight", result)
    if not cuobs.verify(weight, row.pattern):
        raise RuntimeError(f"{row.name}: the weight breaks the pattern")
    record["loss"] = 100 * cuobs.relative_loss(W, weight, H)
    record["sparsity"] = 1 - int((weight != 0).sum()) / weight.size
    if hasattr(result, "loss") and abs(100 * result.loss - record["loss"]) > 0.01:
        raise RuntimeError(f"{row.name}: says {100 * result.loss}, loses {record['loss']}")
    if arguments.profile:
        with stages.stages(xp) as spent:
            _call(row, W, H)()
        record["stages"] = spent
        print("\n".join(stages.table(spent)[:12]))
    if arguments.kernels:
        print(kernels(_call(row, W, H), xp))
    return record


def _call(row, W, H):
    """The function to time."""
    if row.method == "resolve":
        mask = cuobs.prune(W, hessian=H, pattern=row.pattern, method="sparsegpt").mask
        return lambda: cuobs.reconstruct(W, mask, H)
    return lambda: cuobs.prune(
        W, hessian=H, pattern=row.pattern, method=row.method, **row.options
    )


def kernels(call, xp):
    """The longest kernels of a call, by PyTorch's profiler, which sees those of CuPy too."""
    from torch import profiler

    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as seen:
        call()
        arrays.synchronize(xp)
    return seen.key_averages().table(
        sort_by="cuda_time_total", row_limit=15, max_name_column_width=80
    )


def _keep(results, folder, row, record):
    """Add a row's record to the file, and print it in a line."""
    results["rows"][row.name] = record
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    if "error" in record:
        print(f"{row.name}: {record['error']}")
        return
    figures = report.measured(row, record, report.judged(results))
    print("  ".join([f"{row.name:40}", *figures]), flush=True)


def _matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split(","))


def _empty_pool(xp):
    gc.collect()
    with contextlib.suppress(AttributeError):
        xp.get_default_memory_pool().free_all_blocks()


def _pool_size(xp):
    """Bytes that CuPy's pool holds: since `_empty_pool`, the most that were in use at once."""
    try:
        return xp.get_default_memory_pool().total_bytes()
    except AttributeError:
        return None


def _arguments(argv):
    parser = argparse.ArgumentParser("perf.published run", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("perf-results"))
    parser.add_argument("--rows", default="*", help="names or globs, with commas between them")
    parser.add_argument("--rows-list", action="store_true", help="print the names and stop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--update", type=Path, help="results.json of an earlier run to add to")
    parser.add_argument("--budget", type=float, default=float("inf"),
                        help="seconds after which no further row starts")
    parser.add_argument("--profile", action="store_true", help="time by function of cuobs, too")
    parser.add_argument("--kernels", action="store_true", help="print the longest kernels, too")
    return parser.parse_args(argv)
