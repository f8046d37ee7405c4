"""CUDA sources, compiled on first use for the current device.

One kernel family is one `.cu` file beside this one. Types and sizes come in as macros: `REAL` is
float or double, the others are what the header comment of a file lists.
"""

import re
from functools import cache, lru_cache
from importlib import import_module, resources

import numpy as np

# NVRTC of CUDA 12 takes a lambda for a host function unless it is told otherwise.
OPTIONS = ("--std=c++17", "-default-device")
NULL = np.uint64(0)
# Columns of a scope and elements in all up to which kernels are unrolled over one.
MAX_PLACES, MAX_ELEMENTS = 16, 64
# The modules of cuobs.ops that launch kernels; each lists what it may compile in `variants`.
USERS = (
    "gram", "selection", "masked_solve", "sweep", "projection", "conjugate_gradient", "cholesky",
    "schur",
)


def kernel(file, function, **defines):
    """A kernel of a file, compiled with the given macros.

    Parameters
    ----------
    file : str
        Name of the source, such as "select.cu".
    function : str
        Name of an ``extern "C"`` kernel in it.
    **defines : str, int, bool or sequence of int
        Macros; a sequence becomes a braced initialiser.

    Returns
    -------
    cupy.RawKernel
        Which compiles itself once for each device it is launched on.
    """
    return _kernel(file, function, options(defines))


@lru_cache(maxsize=1024)
def kernel_for(file, function, define, *args):
    """The kernel whose macros are ``define(*args)``, looked up by the arguments.

    A method launches one kernel for many blocks of columns; to write its macros each time would
    take longer than the launch.
    """
    return kernel(file, function, **define(*args))


def options(defines):
    """The compiler's options for a set of macros."""
    return OPTIONS + tuple(f"-D{name}={_literal(defines[name])}" for name in sorted(defines))


def real(dtype):
    """The C type of a floating-point dtype."""
    return {"float16": "__half", "float32": "float", "float64": "double"}[str(dtype)]


def scope_defines(layout, dtype):
    """The macros of scope.cuh."""
    r, c = layout.blocks.shape
    return {
        "REAL": real(dtype), "ROWS": r, "PLACES": c, "BLOCKS": layout.blocks.ravel(),
        "N_BLOCKS": layout.n_blocks, "N_PRUNED": layout.n_blocks - layout.keep,
    }


def unrolls(layout):
    """Whether a scope is small enough for a kernel that is unrolled over its elements."""
    r, c = layout.blocks.shape
    return c <= MAX_PLACES and r * c <= MAX_ELEMENTS and layout.n_blocks <= 32


def launch(function, grid, block, args, shared=0):
    """Launch a kernel, with more than the usual 48 KiB of shared memory where it asks for it."""
    if shared > 48 * 1024:
        function.max_dynamic_shared_size_bytes = shared
    function(grid, block, args, shared_mem=shared)


def strides(array):
    """Strides in elements, as kernels take them; 0 along axes that are broadcast."""
    return [np.int64(s // array.itemsize) for s in array.strides]


@cache
def source(file):
    """The text of a source with the headers that lie beside it written out.

    A compiler's cache that hashes one text then notices a change in a header too.
    """
    text = resources.files(__name__).joinpath(file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda match: source(match[1]), text, flags=re.MULTILINE)


def sources():
    """Names of the sources."""
    return sorted(f.name for f in resources.files(__name__).iterdir() if f.name.endswith(".cu"))


def variants():
    """(file, defines) of all that the named patterns and a few others compile, for CI."""
    for user in USERS:
        yield from getattr(import_module(f"cuobs.ops.{user}"), "variants", list)()


def samples():
    """(layout, dtype) of the named patterns and of some that a user may write."""
    from cuobs.pattern import parse, patterns

    for text in (*patterns(), "2:3", "8:16",
                 "view=(M/2,2,K):(2K,K,1) block=(1,1,1) scope=(1,2,4) keep=5"):
        for dtype in ("float32", "float64"):
            yield parse(text).compile(16, 48), dtype


def _literal(value):
    if isinstance(value, str):
        return value
    if hasattr(value, "__iter__"):
        return "{" + ",".join(str(int(v)) for v in value) + "}"
    return str(int(value))


@cache
def _kernel(file, function, options):
    return _module(file, options).get_function(function)


@cache
def _module(file, options):
    import cupy

    return cupy.RawModule(code=source(file), options=options)
