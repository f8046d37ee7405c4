"""Checks of what a caller brings, made before any work starts.

Each raises with one sentence that names the argument, what was found and what was expected:
ValueError for shapes and values, TypeError for dtypes.
"""

import contextlib
import difflib
import math
import numbers
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from cuobs.arrays import FLOATS, dtype_of, largest, namespace, receive, typed

# A larger share of the mean diagonal leaves no digit of the Hessian in float32.
MAX_DAMP = 1e6


@contextlib.contextmanager
def naming(spec: str) -> Iterator:
    """Put a file's name before what is wrong with its content."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{spec}: {error}") from error


@contextlib.contextmanager
def renaming(inner, name):
    """Say what is wrong with an argument by the name that it has for the caller."""
    try:
        yield
    except (ValueError, TypeError) as error:
        text = str(error)
        if not text.startswith(f"{inner}: "):
            raise
        raise type(error)(name + text.removeprefix(inner)) from error


def existing_file(path: str, expected: str, name: str | None = None) -> None:
    """Refuse a path where there is nothing; what is there may still be no file."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name or path}: found no such file, expected {expected}")


def matrix(name, array, shape=None, finite=True):
    """A floating-point matrix, as an array of NumPy or CuPy.

    Parameters
    ----------
    name : str
        The argument's name.
    array : array
    shape : tuple of (int or None), optional
        What each dimension has to be; None leaves it free.
    finite : bool
        Whether to look for NaN and infinity.
    """
    array = typed(array, name)
    floating(name, array)
    if array.ndim != 2:
        raise ValueError(f"{name}: found {_shape(array)}, expected 2 dimensions (rows, columns)")
    nonempty(name, array)
    if shape and any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: found shape {_shape(array)}, expected ({expected})")
    array = receive(array, name)
    if finite:
        all_finite(name, array)
    return array


def mask(name, array, shape):
    """A matrix of bool of a given shape, as an array of NumPy or CuPy."""
    array = receive(array, name)
    if array.dtype != bool:
        raise TypeError(f"{name}: found dtype {array.dtype}, expected bool (True = kept)")
    if array.shape != tuple(shape):
        raise ValueError(f"{name}: found shape {_shape(array)}, expected {tuple(shape)}")
    return array


def floating(name, array):
    """Refuse integers, complex numbers and whatever else is no float."""
    if dtype_of(array) not in FLOATS:
        raise TypeError(f"{name}: found dtype {dtype_of(array)}, expected {', '.join(FLOATS)}")


def nonempty(name, array):
    """Refuse an array without elements."""
    if 0 in array.shape:
        raise ValueError(f"{name}: found shape {_shape(array)}, expected at least one element")


def all_finite(name, array, offset=0):
    """Refuse NaN and infinity, saying how many there are and where the first one is."""
    if _is_finite(array):
        return
    xp = namespace(array)
    bad = xp.argwhere(~xp.isfinite(array))
    first = [int(v) for v in bad[0]]
    first[0] += offset
    raise ValueError(
        f"{name}: found {len(bad)} elements that are NaN or infinite, the first at "
        f"{tuple(first)}, expected finite numbers"
    )


def _is_finite(array):
    """Whether an array holds neither NaN nor infinity."""
    if namespace(array) is not np:
        # A sum of half precision would be compiled first, for seconds.
        return math.isfinite(largest(array))
    # Half precision has no fast largest. A sum is one pass without a temporary; one that is not
    # finite may have overflowed, and only then does the slow look follow.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(array, dtype=np.float32 if array.dtype.itemsize < 8 else None)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


def squares(name, array, dtype):
    """Refuse a matrix whose largest square is no normal number of the compute dtype."""
    size, limits = largest(array), np.finfo(dtype)
    if size and not float(limits.tiny) <= size * size <= float(limits.max):
        wider = " or dtype='float64'" if np.dtype(dtype) != np.float64 else ""
        raise ValueError(
            f"{name}: found values up to {size:.3g}, whose squares {dtype} can't hold, expected "
            f"others{wider}"
        )


def holds(array, like):
    """Refuse pruned weights that became infinite in the dtype of `like`."""
    if not _is_finite(array):
        raise ValueError(
            f"W: found pruned weights that {dtype_of(like)} can't hold, expected a wider dtype"
        )


def name_of(kind, name, known):
    """Refuse an unknown name, saying which known one is nearest."""
    if not isinstance(name, str):
        raise TypeError(f"{kind}: found {type(name).__name__}, expected a name")
    if name in known:
        return
    raise ValueError(
        f"{kind}: found {name!r}, expected one of {', '.join(known)}{nearest(name, known)}"
    )


def nearest(name, known):
    """The known name that an unknown one was likely to be, in parentheses; else nothing."""
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f" (nearest: {found[0]})" if found else ""


def integer(name, value, low=1, high=None):
    """Refuse anything but an integer in a range."""
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)
        or value < low
        or (high is not None and value > high)
    ):
        upper = "" if high is None else f" to {high}"
        raise ValueError(f"{name}: found {shown(value)}, expected an integer from {low}{upper}")
    return int(value)


def number(name, value, low=-math.inf, high=math.inf):
    """Refuse anything but a finite number in a range; it as a float."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if real else math.nan
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and low <= found <= high):
        limits = (
            f"from {low:g} to {high:g}" if high < math.inf
            else f"that is at least {low:g}" if low > -math.inf
            else "that is finite"
        )
        raise ValueError(f"{name}: found {shown(value)}, expected a number {limits}")
    return found


def positive(name, value):
    """Refuse anything but a finite number above 0."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:
        raise ValueError(f"{name}: found {shown(value)}, expected a positive number")


def damping(value):
    """Refuse a damping that is negative, no number, or leaves nothing of the Hessian."""
    return number("damp", value, 0, MAX_DAMP)


def shown(value):
    """A value as a message shows it: on one line, and not all digits of one that has hundreds."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:20]}... ({len(text)} characters)"


def warn(text):
    """Warn the one who called into the package, through context managers that decorate or not."""
    level, frame = 1, sys._getframe(0)
    own = "cuobs", "contextlib"
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in own:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _shape(array):
    return "(" + ", ".join(str(n) for n in array.shape) + ("," if array.ndim == 1 else "") + ")"
