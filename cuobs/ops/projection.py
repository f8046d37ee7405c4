"""ADMM's projection onto a pattern and its multiplier update, in one pass."""

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops import cuda
from cuobs.ops.selection import block_sums, expand, prune_lowest


def project_update(B, V, D, mask, rho, layout):
    """D ← project(B + V/ρ), V ← V + ρ (B − D).

    The projection keeps, in each scope, the blocks with the largest sum of squares.

    Parameters
    ----------
    B : array, shape (M, K)
    V, D : array, shape (M, K)
        Overwritten.
    mask : array of bool, shape (M, K)
        The mask of the last projection, True = kept. Overwritten.
    rho : float
    layout : Layout

    Returns
    -------
    int
        Elements whose mask changed.
    """
    xp = namespace(B)
    if xp is not np and cuda.unrolls(layout):
        real = B.dtype.type
        return _launch("project_update", (B, V, D, mask, real(rho), real(1 / rho)), B, layout)
    xp.multiply(V, 1 / rho, out=D)
    D += B
    changed = project_mask(D, mask, layout)
    # Where kept, D = B + V/ρ makes the new V zero; where pruned, D = 0.
    xp.multiply(D, rho, out=V)
    V *= ~mask
    D *= mask
    return changed


def project_mask(B, mask, layout):
    """The mask of project(B), into `mask`; returns the number of elements that changed."""
    xp = namespace(B)
    if xp is not np and cuda.unrolls(layout):
        return _launch("project_mask", (B, mask), B, layout)
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
    squares = (B * B).reshape(R, r, G, c).transpose(3, 0, 1, 2)
    pruned = prune_lowest(block_sums(squares, layout), layout.n_blocks - layout.keep)
    new = ~expand(pruned, layout).reshape(mask.shape)
    changed = int(xp.count_nonzero(new != mask))
    mask[...] = new
    return changed


def ridge_right_side(D, V, G, rho, out, B=None):
    """The right-hand side ρD − V + G of ADMM's ridge solve, less ρB where B is given.

    Parameters
    ----------
    D, V, G : array, shape (M, K)
    rho : float
    out : array, shape (M, K)
        Overwritten.
    B : array, shape (M, K), optional
    """
    xp = namespace(D)
    if xp is not np:
        kernel = cuda.kernel("project.cu", "right_side", REAL=cuda.real(D.dtype))
        blocks = min(-(-D.size // 256), 2**16)
        kernel((blocks,), (256,), (D, V, G, cuda.NULL if B is None else B, D.dtype.type(rho),
                                   out, np.int64(D.size)))
        return
    if B is None:
        xp.multiply(D, rho, out=out)
    else:
        xp.subtract(D, B, out=out)
        out *= rho
    out -= V
    out += G


def _launch(name, args, B, layout):
    """Launch a thread for each scope; returns the count of changed elements."""
    xp = namespace(B)
    c = layout.blocks.shape[1]
    R, G = len(B) // layout.blocks.shape[0], B.shape[1] // c
    changed = xp.zeros((), np.uint64)
    kernel = cuda.kernel_for("project.cu", name, cuda.scope_defines, layout, B.dtype)
    grid = -(-G // 32), min(-(-R // 16), 65535)
    kernel(grid, (32, 4), (*args, np.int32(R), np.int32(G), changed))
    return int(changed)


def variants():
    """What the kernels here compile for some patterns."""
    for dtype in ("float32", "float64"):
        yield "project.cu", {"REAL": cuda.real(dtype)}
    for layout, dtype in cuda.samples():
        if cuda.unrolls(layout):
            yield "project.cu", cuda.scope_defines(layout, dtype)
