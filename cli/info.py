"""cuobs info"""

import importlib.metadata
import platform

import click
from cuobs_cli import options

import cuobs
from cuobs import arrays
from cuobs.extras import hint

# Packages beside NumPy and SciPy, each by the first name that is installed, and what brings it.
PACKAGES = {
    "cupy": (("cupy-cuda13x", "cupy-cuda12x", "cupy"), hint("cuda13")),
    "safetensors": (("safetensors",), hint("safetensors")),
    "ml_dtypes": (("ml_dtypes",), hint("safetensors")),
    "matplotlib": (("matplotlib",), hint("plot")),
    "torch": (("torch",), hint("model")),
    "transformers": (("transformers",), hint("model")),
    "gguf": (("gguf",), hint("model")),
    "cuSPARSELt": (
        ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"), "PyTorch for CUDA brings it"
    ),
}  # fmt: skip

# The header is what CuPy without [ctk] does not bring.
KERNEL = """
#include <cuda_fp16.h>
extern "C" __global__ void probe(__half* x) { x[threadIdx.x] = __float2half(1.0f); }
"""


@click.command(cls=options.Command, short_help="Show versions, device and compiler.")
def info():
    """Show versions, whether a device is found and whether a kernel compiles."""
    click.echo(f"cuobs        {cuobs.__version__}, Python {platform.python_version()}")
    for name in ("numpy", "scipy"):
        click.echo(f"{name:<12} {_version(name)}")
    for name, (packages, how) in PACKAGES.items():
        found = next(filter(None, map(_version, packages)), f"not installed: {how}")
        click.echo(f"{name:<12} {found}")
    fault = arrays.cupy_fault()
    click.echo(f"device       {fault or _device()}")
    click.echo(f"kernels      {'not tried without a device' if fault else _kernel()}")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device():
    cupy = arrays.find_cupy()
    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    free, total = (n / 2**30 for n in runtime.memGetInfo())
    return f"{name}, {free:.1f} of {total:.1f} GiB free, CuPy {cupy.__version__}"


def _kernel():
    try:
        arrays.find_cupy().RawKernel(KERNEL, "probe").compile()
    except Exception as error:
        reason = next((s for s in str(error).splitlines() if s.strip()), type(error).__name__)
        return f"do not compile ({reason.strip()}): pip install 'cupy-cuda12x[ctk]' or -cuda13x"
    return "compile"
