"""The projection onto a pattern on a GPU, a thread a scope."""

from pathlib import Path

import cupy
import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.scope import samples, scope_defines, scope_grid, thread_defines, unrolls

SOURCE = Path(__file__).with_suffix(".cu")


def project_mask(B, mask, layout):
    if not unrolls(layout):
        return NotImplemented
    changed = cupy.zeros((), np.uint64)
    prepare_projection(SOURCE, "project_mask", B, layout)((B, mask), changed)
    return int(changed)


def prepare_projection(source, name, B, layout):
    """What launches a thread for each scope of B, given a kernel's arrays and where it counts."""
    m, n = B.shape[0] // layout.rows, B.shape[1] // layout.columns
    sizes = np.int32(m), np.int32(n)
    kernel = loader.kernel_for(source, name, projection_defines, layout, B.dtype)
    grid, block = scope_grid(m, n)
    return lambda args, changed: kernel(grid, block, (*args, *sizes, changed))


def projection_defines(layout, dtype):
    """The macros of project.cuh."""
    return scope_defines(layout, dtype) | thread_defines()


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for layout, dtype in samples():
        if unrolls(layout):
            yield projection_defines(layout, dtype)
