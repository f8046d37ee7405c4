"""cuobs info"""

import importlib.metadata
import platform

import click

import cuobs
from cuobs import arrays

EXTRAS = {"safetensors": "safetensors", "ml_dtypes": "safetensors", "matplotlib": "plot"}

# The header is what CuPy without [ctk] does not bring.
KERNEL = """
#include <cuda_fp16.h>
extern "C" __global__ void probe(__half* x) { x[threadIdx.x] = __float2half(1.0f); }
"""


@click.command(short_help="Show versions, device and compiler.")
def info():
    """Show versions, whether a device is found and whether a kernel compiles."""
    click.echo(f"cuobs        {cuobs.__version__}, Python {platform.python_version()}")
    for name in ("numpy", "scipy"):
        click.echo(f"{name:<11}  {importlib.metadata.version(name)}")
    for name, extra in EXTRAS.items():
        try:
            click.echo(f"{name:<11}  {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            click.echo(f"{name:<11}  not installed: pip install 'cuobs[{extra}]'")
    fault = arrays.cupy_fault()
    click.echo(f"device       {fault or _device()}")
    click.echo(f"kernels      {'not tried without a device' if fault else _kernel()}")


def _device():
    import cupy

    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    free, total = (n / 2**30 for n in runtime.memGetInfo())
    return f"{name}, {free:.1f} of {total:.1f} GiB free, CuPy {cupy.__version__}"


def _kernel():
    import cupy

    try:
        cupy.RawKernel(KERNEL, "probe").compile()
    except Exception as error:
        reason = next((s for s in str(error).splitlines() if s.strip()), type(error).__name__)
        return f"do not compile ({reason.strip()}): pip install 'cupy-cuda12x[ctk]' or -cuda13x"
    return "compile"
