"""CUDA sources, compiled on first use for the current device.

One kernel family is one `.cu` file beside this one. Types and sizes come in as macros: `REAL` is
float or double, the others are what the header comment of a file lists.
"""

import re
from functools import cache, lru_cache
from importlib import import_module, resources

OPTIONS = ("--std=c++17",)
# The modules of cuobs.ops that launch kernels; each lists what it may compile in `variants`.
USERS = (
    "selection", "sweep", "projection", "masked_solve", "conjugate_gradient", "cholesky", "schur",
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


def options(defines):
    """The compiler's options for a set of macros."""
    return OPTIONS + tuple(f"-D{name}={_literal(defines[name])}" for name in sorted(defines))


def real(dtype):
    """The C type of a floating-point dtype."""
    return {"float16": "__half", "float32": "float", "float64": "double"}[str(dtype)]


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
