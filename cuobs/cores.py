"""How many cores this process may use."""

import contextlib
import math
import os
from pathlib import Path

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
    quotas = [count, *_quotas(groups, Path(root))]
    return max(1, math.ceil(min(quotas)))


def _quotas(groups, root):
    """The quotas of all groups that the process is in, inner and outer, in cores."""
    try:
        lines = Path(groups).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The first version of control groups has a tree for each controller.
        inner = (root / controllers if controllers else root) / path.lstrip("/")
        for folder in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):
                yield _quota(folder)
            if folder == root:
                break


def _quota(folder):
    """The quota of a group in cores; ValueError or OSError where it has none."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
    if int(quota) <= 0:
        raise ValueError
    return int(quota) / int(period)
