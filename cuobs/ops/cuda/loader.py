"""CUDA sources, compiled on first use for the current device.

A kernel family is one `.cu` file, and the module of the same name beside it launches its kernels
and lists in `variants()` with which macros they may be compiled. Types and sizes come in as macros:
`REAL` is float or double, the others are what the header comment of a file lists.
"""

import re
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np

# NVRTC of CUDA 12 takes a lambda for a host function unless it is told otherwise.
OPTIONS = ("--std=c++17", "-default-device")
NULL = np.uint64(0)
HEADERS = Path(__file__).parent
PACKAGE = HEADERS.parent.parent
# Shared memory that a block may use without asking for it.
USUAL_SHARED = 48 * 1024


def kernel(source, function, **defines):
    """A kernel of a source, compiled with the given macros.

    Parameters
    ----------
    source : Path
        The `.cu` file.
    function : str
        Name of an ``extern "C"`` kernel in it.
    **defines : str, int, bool or sequence of int
        Macros; a sequence becomes a braced initialiser.

    Returns
    -------
    cupy.RawKernel
        Which compiles itself once for each device it is launched on.
    """
    return _kernel(source, function, options(defines))


@lru_cache(maxsize=1024)
def kernel_for(source, function, define, *args):
    """The kernel whose macros are ``define(*args)``, looked up by the arguments.

    A method launches one kernel for many blocks of columns; to write its macros each time would
    take longer than the launch.
    """
    return kernel(source, function, **define(*args))


def options(defines):
    """The compiler's options for a set of macros."""
    return OPTIONS + tuple(f"-D{name}={_literal(defines[name])}" for name in sorted(defines))


def real(dtype):
    """The C type of a floating-point dtype."""
    return {"float16": "__half", "float32": "float", "float64": "double"}[str(dtype)]


def launch(function, grid, block, args, shared=0):
    """Launch a kernel, with more than the usual shared memory where it asks for it."""
    if shared > USUAL_SHARED:
        function.max_dynamic_shared_size_bytes = shared
    function(grid, block, args, shared_mem=shared)


def largest_shared():
    """Bytes of shared memory that a block may have on the current device."""
    from cupy.cuda import runtime

    return _largest_shared(runtime.getDevice())


@cache
def _largest_shared(device):
    from cupy.cuda import runtime

    return runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device)


def strides(array):
    """Strides in elements, as kernels take them; 0 along axes that are broadcast."""
    return [np.int64(s // array.itemsize) for s in array.strides]


@cache
def text(source):
    """The text of a source with its headers written out: those beside it, or beside this file.

    A compiler's cache that hashes one text then notices a change in a header too.
    """

    def included(match):
        beside = source.with_name(match[1])
        return text(beside if beside.exists() else HEADERS / match[1])

    return re.sub(
        r'^#include "(.+)"$', included, source.read_text(encoding="utf-8"), flags=re.MULTILINE
    )


def sources():
    """The sources of the whole package."""
    return sorted(PACKAGE.rglob("*.cu"))


def variants():
    """(source, defines) of all that the named patterns and a few others compile, for CI."""
    for source in sources():
        parts = source.relative_to(PACKAGE.parent).with_suffix("").parts
        for defines in import_module(".".join(parts)).variants():
            yield source, defines


def _literal(value):
    if isinstance(value, str):
        return value
    if hasattr(value, "__iter__"):
        return "{" + ",".join(str(int(v)) for v in value) + "}"
    return str(int(value))


@cache
def _kernel(source, function, options):
    return _module(source, options).get_function(function)


@cache
def _module(source, options):
    import cupy

    return cupy.RawModule(code=text(source), options=options)
