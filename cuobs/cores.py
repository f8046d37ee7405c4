"""How many cores this process may use."""

import contextlib
import math
import os

__all__ = ["cores"]


def cores(groups="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Cores by the process's affinity (taskset) and the quotas of its control groups.

    Parameters
    ----------
    groups, root : path
        Where Linux lists the control groups of a process, and where they are.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quotas = [count, *_quotas(groups, str(root))]
    return max(1, math.ceil(min(quotas)))


def _quotas(groups, root):
    """The quotas of all groups that the process is in, inner and outer, in cores."""
    try:
        lines = _read(groups).splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The first version of control groups has a tree for each controller.
        outer = os.path.join(root, controllers)
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            with contextlib.suppress(OSError, ValueError):
                yield _quota(os.path.join(outer, *parts[:depth]))


def _quota(folder):
    """The quota of a group in cores; ValueError or OSError where it has none."""
    try:
        quota, period = _read(os.path.join(folder, "cpu.max")).split()
    except FileNotFoundError:
        quota, period = (
            _read(os.path.join(folder, f"cpu.cfs_{name}_us")) for name in ("quota", "period")
        )
    if int(quota) <= 0:
        raise ValueError
    return int(quota) / int(period)


def _read(path):
    with open(path) as file:
        return file.read()
