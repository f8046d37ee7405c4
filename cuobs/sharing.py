"""The rows of a weight shared out over processes or devices, no scope torn apart."""

import contextlib
import dataclasses
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuobs import arrays

__all__ = ["first"]

# What the rows of a share may be a multiple of.
UNITS = (1, 2, 4, 8, 16, 32, 64)
# Operations on rows that another device has to take over to pay for itself: for as long as H100 and
# H200 take for them, about 30 ms, its thread copies the Hessian and waits for Python's lock.
WORTH = 1.2e13
# Those of an exact re-solve, in terms of M K², as `Method.operations` has them.
RESOLVE = 100


def row_counts(recipe, rows, K, size):
    """So many rows for each of so many shares; None where a recipe's rows can't be shared out."""
    if size == 1 or not recipe.by_row:
        return None
    for unit in UNITS:
        whole, rest = divmod(rows, unit)
        edges = [whole * share // size * unit for share in range(size)] + [rows]
        counts = tuple(stop - start for start, stop in zip(edges, edges[1:], strict=False))
        if not rest and 0 not in counts and stackable(recipe.pattern, counts, K):
            return counts
    return None


def shares_of(count, size):
    """Of so many things in a row, those of each share, as slices."""
    edges = [count * share // size for share in range(size + 1)]
    return [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]


@lru_cache(maxsize=256)
def stackable(pattern, counts, K):
    """Whether weights set one below the other have the scopes that each has alone."""
    try:
        stacked = pattern.compile(sum(counts), K)
        alone = [pattern.compile(count, K) for count in counts]
    except ValueError:
        return False
    starts = np.cumsum([0, *counts[:-1]])
    rows = [layout.row_order + start for layout, start in zip(alone, starts, strict=True)]
    return all(
        layout.rows == stacked.rows
        and np.array_equal(layout.column_order, stacked.column_order)
        and np.array_equal(layout.blocks, stacked.blocks)
        for layout in alone
    ) and np.array_equal(_in_order(np.concatenate(rows)), _in_order(stacked.row_order))


def _in_order(groups):
    """Row groups by their first rows, which no two have in common."""
    return groups[np.argsort(groups[:, 0])]


def paying(recipe, shape, most):
    """How many devices make it quickest to prune a weight of a shape, where there are so many.

    Fewer than there are, where its rows can be shared out over as many.
    """
    M, K = shape
    if recipe.entry.operations is None:
        return most
    each = recipe.entry.operations[1] + RESOLVE * (recipe.exact and not recipe.entry.resolves)
    pays = [n for n in range(2, most + 1) if each * M * K**2 >= WORTH * n * (n - 1)]
    return max((n for n in pays if row_counts(recipe, M, K, n)), default=1)


class Place(NamedTuple):
    """A device that some rows are pruned on.

    Attributes
    ----------
    number : int or None
        Of a GPU; None is the CPU.
    """

    number: int | None

    def here(self):
        """A context in which this is the current device."""
        if self.number is None:
            return contextlib.nullcontext()
        return arrays.find_cupy().cuda.Device(self.number)

    def take(self, array):
        """An array of NumPy as it is, one of CuPy copied here where it lies on another device."""
        elsewhere = not isinstance(array, np.ndarray) and array.device.id != self.number
        return array.copy() if elsewhere else array


def places(settings):
    """The GPUs that settings name.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    list of Place

    Raises
    ------
    ValueError
        There are not so many, or the rows are pruned on the CPU.
    """
    devices = settings.devices
    if arrays.device_name(arrays.choose(settings.device)) == "cpu":
        raise ValueError(
            f"devices: found {devices!r} on the CPU, whose cores share the rows as they are, "
            "expected it with GPUs alone"
        )
    there = arrays.find_cupy().cuda.runtime.getDeviceCount()
    numbers = numbers_of(devices, there)
    if not 0 <= max(numbers) < there:
        raise ValueError(f"devices: found {devices!r}, expected no more than the {there} there are")
    return [Place(number) for number in numbers]


def numbers_of(devices, there):
    """The numbers of devices that a setting names, of so many that there are.

    Raises
    ------
    ValueError
        It names none.
    """
    text = str(devices)
    try:
        if text == "all":
            return list(range(there))
        which = [int(part) for part in text.split(",") if part.strip()]
        numbers = which if "," in text else list(range(*which))
    except (ValueError, TypeError):
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"devices: found {devices!r}, expected 'all', how many, or which, such as '0,2'"
        )
    return numbers


class _Board:
    """What threads show each other."""

    def __init__(self, size):
        self.shown = [None] * size
        self.barrier = threading.Barrier(size)


class _Share:
    """One of the threads that share rows, as `Settings.others`."""

    def __init__(self, board, number, device):
        self._board, self._number, self._device = board, number, device
        self.size = len(board.shown)

    def total(self, number):
        """The sum of a number over all threads."""
        return self._show(number, sum)

    def by_rows(self, function, rows):
        """An array of so many rows, some of them made by each thread and copied by all."""
        own = function(shares_of(rows, self.size)[self._number])
        xp = arrays.namespace(own)
        arrays.synchronize(xp)

        def copied(shown):
            whole = xp.concatenate([self._device.take(part) for part in shown])
            arrays.synchronize(xp)
            return whole

        return self._show(own, copied)

    def _show(self, own, read):
        """What a function reads of what all threads show."""
        self._board.shown[self._number] = own
        self._board.barrier.wait()
        found = read(self._board.shown)
        self._board.barrier.wait()  # nobody shows anything else before all have read
        return found


def first(settings):
    """A context in which the first of several devices is the current one."""
    return contextlib.nullcontext() if settings.devices is None else places(settings)[0].here()


def check(recipe, settings, shape):
    """Refuse devices that are not there, and a recipe whose rows they can't share.

    Parameters
    ----------
    recipe : Recipe
    settings : Settings
    shape : (int, int)
        Of the weight.
    """
    if settings.devices is None:
        return
    size = len(places(settings))
    if size > 1 and row_counts(recipe, *shape, size) is None:
        raise ValueError(
            f"devices: found {size} for {recipe.method} and {recipe.pattern.label} on "
            f"{shape[0]} rows, expected a method that looks at few rows at once, and whole scopes "
            "for each device"
        )


def solve_on(solve, recipe, settings, layer, H):
    """What a function gives of a layer whose rows are shared out over the devices of settings.

    Parameters
    ----------
    solve : callable
        `cuobs.layer.solve_layer`.
    recipe : Recipe
    settings : Settings
    layer : Layer
    H : array, shape (K, K)

    Returns
    -------
    weight, mask : array, shape (M, K)
    cost : array, shape (M,), or None
    converged : bool
    """
    devices = places(settings)
    devices = devices[: paying(recipe, layer.weight.shape, len(devices))]
    arrays.synchronize(arrays.namespace(H))
    if len(devices) == 1:
        *parts, converged = _solve_part(devices[0], solve, recipe, settings, layer, H, slice(None))
        return (*(_together([part]) for part in parts), converged)
    counts = row_counts(recipe, *layer.weight.shape, len(devices))
    stops = np.cumsum(counts).tolist()
    board, found, errors = _Board(len(devices)), [None] * len(devices), []

    def run(number, device):
        rows = slice(stops[number] - counts[number], stops[number])
        share = _Share(board, number, device)
        own = dataclasses.replace(
            settings, others=share, progress=None if number else settings.progress
        )
        try:
            found[number] = _solve_part(device, solve, recipe, own, layer, H, rows)
        except threading.BrokenBarrierError:
            pass  # another says why
        except BaseException as error:
            errors.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(devices)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # Ctrl-C just before a wait does not end it
    finally:
        board.barrier.abort()  # who is interrupted here leaves nobody to wait for the others
    if errors:
        raise errors[0]
    new, mask, cost, converged = zip(*found, strict=True)
    return _together(new), _together(mask), _together(cost), all(converged)


def _solve_part(device, solve, recipe, settings, layer, H, rows):
    """What a function gives of some rows of a layer, on a device."""
    with device.here():
        weight, target = (
            None if a is None else device.take(a[rows]) for a in (layer.weight, layer.target)
        )
        own = layer._replace(weight=weight, target=target)
        found = solve(recipe, settings, own, device.take(H))
        arrays.synchronize(arrays.namespace(H))
    return found


def _together(parts):
    """Rows that lie on several devices in one array on the current one; None of None."""
    if parts[0] is None:
        return None
    xp = arrays.namespace(parts[0])
    if arrays.device_name(xp) == "cuda":
        parts = [Place(xp.cuda.Device().id).take(part) for part in parts]
    return parts[0] if len(parts) == 1 else xp.concatenate(parts)
