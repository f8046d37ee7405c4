"""ADMM's passes over all elements: the projection onto a pattern, multipliers, right-hand side."""

from cuobs.arrays import namespace
from cuobs.ops.checks import boolean, real, same_dtype, shaped
from cuobs.ops.dispatch import twinned
from cuobs.ops.selection import block_sums, expand, prune_lowest


def _check_project_update(B, V, D, mask, rho, layout):
    _check_project_mask(B, mask, layout)
    for name, array in ("V", V), ("D", D):
        _check_like("B", B, name, array)


def _check_project_mask(B, mask, layout):
    real("B", B)
    r, c = layout.blocks.shape
    if B.ndim != 2 or B.shape[0] % r or B.shape[1] % c:
        raise ValueError(f"B: found shape {B.shape}, expected whole scopes of {r} x {c}")
    boolean("mask", mask)
    shaped("mask", mask, B.shape)
    for name, array in ("B", B), ("mask", mask):
        _check_contiguous(name, array)


def _check_ridge_right_side(D, V, G, rho, out, B=None):
    real("D", D)
    _check_contiguous("D", D)
    for name, array in ("V", V), ("G", G), ("out", out), ("B", D if B is None else B):
        _check_like("D", D, name, array)


def _check_like(name, array, other_name, other):
    same_dtype(name, array, other_name, other)
    shaped(other_name, other, array.shape)
    _check_contiguous(other_name, other)


def _check_contiguous(name, array):
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: found strides {array.strides}, expected one run of memory")


@twinned(_check_project_update)
def project_update(B, V, D, mask, rho, layout):
    """D ← project(B + V/ρ), V ← V + ρ (B − D).

    The projection keeps, in each scope, the blocks with the largest sum of squares.

    Parameters
    ----------
    B : array, shape (M, K)
        All arrays are whole, row after row.
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
    xp.multiply(V, 1 / rho, out=D)
    D += B
    changed = project_mask(D, mask, layout)
    # Where kept, D = B + V/ρ makes the new V zero; where pruned, D = 0.
    xp.multiply(D, rho, out=V)
    V *= ~mask
    D *= mask
    return changed


@twinned(_check_project_mask)
def project_mask(B, mask, layout):
    """The mask of project(B), into `mask`; returns the number of elements that changed."""
    r, c = layout.blocks.shape
    m, n = B.shape[0] // r, B.shape[1] // c
    squares = (B * B).reshape(m, r, n, c).transpose(3, 0, 1, 2)
    pruned = prune_lowest(block_sums(squares, layout), layout.n_blocks - layout.keep)
    new = ~expand(pruned, layout).reshape(mask.shape)
    changed = int(namespace(B).count_nonzero(new != mask))
    mask[...] = new
    return changed


@twinned(_check_ridge_right_side)
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
    if B is None:
        xp.multiply(D, rho, out=out)
    else:
        xp.subtract(D, B, out=out)
        out *= rho
    out -= V
    out += G
