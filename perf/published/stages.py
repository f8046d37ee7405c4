"""Where the time of a call goes, by function of cuobs."""

import contextlib
import functools
import inspect
import sys
import threading
import time

from cuobs import arrays

STAGED = (
    "cuobs.ops", "cuobs.algorithms.admm_ops", "cuobs.algorithms.true_obs_ops", "cuobs.refine",
    "cuobs.loss", "cuobs.hessian", "cuobs.pruning",
)


@contextlib.contextmanager
def stages(xp):
    """Time the public functions of cuobs while the context lasts.

    The device is waited for before and after each, so that small functions cost a little more
    than they do alone.

    Yields
    ------
    dict
        Function name to [calls, seconds without those of the functions that it calls itself]; on
        the CPU the seconds of all worker threads add up.
    """
    spent = {}
    local = threading.local()

    def staged(function):
        label = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

        @functools.wraps(function)
        def call(*args, **kwargs):
            inner = local.__dict__.setdefault("inner", [])
            arrays.synchronize(xp)
            begin = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                arrays.synchronize(xp)
                whole = time.perf_counter() - begin
                entry = spent.setdefault(label, [0, 0.0])
                entry[0] += 1
                entry[1] += whole - inner.pop()
                if inner:
                    inner[-1] += whole

        return call

    replaced = []
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "cuobs"]:
        for name, value in list(vars(module).items()):
            if (
                inspect.isfunction(value)
                and value.__module__.startswith(STAGED)
                and not name.startswith("_")
            ):
                replaced.append((module, name, value))
                setattr(module, name, staged(value))
    try:
        yield spent
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def table(spent):
    """Lines of milliseconds, calls and function, the longest first."""
    ordered = sorted(spent.items(), key=lambda item: -item[1][1])
    return [
        f"{1e3 * seconds:10.2f} ms  {calls:6d} x  {name}" for name, (calls, seconds) in ordered
    ]
