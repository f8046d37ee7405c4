"""Which body of an op runs: its array form, or its CUDA twin.

An op's array form is written for both namespaces. A twin has its name and its arguments, in the
module of the same name in the package ``cuda`` beside it: that of ``cuobs.ops.gram.add_gram`` is
``cuobs.ops.cuda.gram.add_gram``.

What a method does again and again on the same arrays, it prepares: ``gemm.prepared(A, B, out)`` is
a function that does what ``gemm(A, B, out)`` does. Arguments are checked then, and ``prepare_gemm``
beside the twin finds out what a launch is given. What is left is a launch.
"""

import functools
import inspect
from importlib import import_module

import numpy as np

from cuobs.arrays import find_cupy


def twinned(check=None):
    """Let an op's CUDA twin do its work where its first argument is no NumPy array.

    Parameters
    ----------
    check : callable, optional
        Called first, with the op's arguments: raises where one is of a wrong dtype or shape.

    Notes
    -----
    A twin declines what its kernel does not hold by returning NotImplemented; the array form then
    runs on the device. So does what prepares one.
    """

    def decorate(function):
        name = next(iter(inspect.signature(function).parameters))

        @functools.cache
        def twin(prefix=""):
            package, _, module = function.__module__.rpartition(".")
            return getattr(import_module(f"{package}.cuda.{module}"), prefix + function.__name__)

        def on_device(*args, **kwargs):
            first = args[0] if args else kwargs.get(name)
            elsewhere = not isinstance(first, np.ndarray)
            if elsewhere and not _is_cupy(first):
                raise TypeError(
                    f"{name}: found {type(first).__name__}, expected an array of NumPy or CuPy"
                )
            if check:
                check(*args, **kwargs)
            return elsewhere

        @functools.wraps(function)
        def op(*args, **kwargs):
            if on_device(*args, **kwargs):
                result = twin()(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*args, **kwargs)

        def prepared(*args, **kwargs):
            if on_device(*args, **kwargs):
                launch = twin("prepare_")(*args, **kwargs)  # which an op has that is prepared
                if launch is not NotImplemented:
                    return launch
            return functools.partial(function, *args, **kwargs)

        op.twin, op.prepared = twin, prepared
        return op

    return decorate


def _is_cupy(array):
    cupy = find_cupy()
    return cupy is not None and isinstance(array, cupy.ndarray)
