"""Which body of an op runs: its array form, or its CUDA twin.

An op's array form is written for both namespaces. A twin has its name and its arguments, in the
module of the same name in the package ``cuda`` beside it: that of ``cuobs.ops.gram.add_gram`` is
``cuobs.ops.cuda.gram.add_gram``.
"""

import functools
from importlib import import_module

import numpy as np


def twinned(check=None):
    """Let an op's CUDA twin do its work where its first argument is no NumPy array.

    Parameters
    ----------
    check : callable, optional
        Called first, with the op's arguments: raises where one is of a wrong dtype or shape.

    Notes
    -----
    A twin declines what its kernel does not hold by returning NotImplemented; the array form then
    runs on the device.
    """

    def decorate(function):
        @functools.cache
        def twin():
            package, _, module = function.__module__.rpartition(".")
            return getattr(import_module(f"{package}.cuda.{module}"), function.__name__)

        @functools.wraps(function)
        def op(*args, **kwargs):
            if check:
                check(*args, **kwargs)
            first = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(first, np.ndarray):
                result = twin()(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*args, **kwargs)

        return op

    return decorate
