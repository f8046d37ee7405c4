"""ADMM's passes over all elements: projection with its multipliers, and the right-hand side."""

from cuobs.arrays import namespace
from cuobs.ops.checks import contiguous, same_dtype, shaped
from cuobs.ops.dispatch import twinned
from cuobs.ops.projection import check_project_mask, project_mask


def _check_project_update(B, V, D, mask, rho, layout):
    check_project_mask(B, mask, layout)
    for name, array in ("V", V), ("D", D):
        _check_like("B", B, name, array)


def _check_ridge_right_side(D, V, G, rho, out, B=None, operand=None):
    contiguous("D", D)
    if operand is not None:
        shaped("operand", operand, D.shape)
        contiguous("operand", operand)
        if operand.dtype != "float16" or B is None:
            raise TypeError(f"operand: found dtype {operand.dtype}, expected float16 beside a B")
    for name, array in ("V", V), ("G", G), ("out", out), ("B", D if B is None else B):
        _check_like("D", D, name, array)


def _check_like(name, array, other_name, other):
    same_dtype(name, array, other_name, other)
    shaped(other_name, other, array.shape)
    contiguous(other_name, other)


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


@twinned(_check_ridge_right_side)
def ridge_right_side(D, V, G, rho, out, B=None, operand=None):
    """The right-hand side ρD − V + G of ADMM's ridge solve, less ρB where B is given.

    Parameters
    ----------
    D, V, G : array, shape (M, K)
    rho : float
    out : array, shape (M, K)
        Overwritten.
    B : array, shape (M, K), optional
    operand : array of float16, shape (M, K), optional
        Overwritten by B, which is read anyway.
    """
    xp = namespace(D)
    if operand is not None:
        operand[...] = B
    if B is None:
        xp.multiply(D, rho, out=out)
    else:
        xp.subtract(D, B, out=out)
        out *= rho
    out -= V
    out += G
