"""ADMM's passes over all elements: projection with its multipliers, and the right-hand side."""

from cuobs.arrays import namespace
from cuobs.ops.checks import contiguous, same_dtype, shaped
from cuobs.ops.dispatch import twinned
from cuobs.ops.projection import check_project_mask, project_mask


def _check_project_update(B, V, D, mask, operand, layout, rho=None):
    check_project_mask(B, mask, layout)
    if operand is not None:
        _check_operand(B, operand)
    for name, array in ("V", V), ("D", D):
        _check_like("B", B, name, array)


def _check_ridge_right_side(D, V, G, B, product, out, rho=None):
    contiguous("D", D)
    for name, array in ("V", V), ("G", G), ("B", B), ("product", product):
        _check_like("D", D, name, array)
    if out.dtype != "float16":
        same_dtype("D", D, "out", out)
    shaped("out", out, D.shape)
    contiguous("out", out)


def _check_operand(B, operand):
    if (B.dtype, operand.dtype) != ("float32", "float16"):
        raise TypeError(
            f"operand: found {operand.dtype} for {B.dtype}, expected float16 for float32"
        )
    shaped("operand", operand, B.shape)
    contiguous("operand", operand)


def _check_like(name, array, other_name, other):
    same_dtype(name, array, other_name, other)
    shaped(other_name, other, array.shape)
    contiguous(other_name, other)


@twinned(_check_project_update)
def project_update(B, V, D, mask, operand, layout, rho):
    """D ← project(B + V/ρ), V ← V + ρ (B − D), operand ← B.

    The projection keeps, in each scope, the blocks with the largest sum of squares.

    Parameters
    ----------
    B : array, shape (M, K)
        All arrays are whole, row after row.
    V, D : array, shape (M, K)
        Overwritten.
    mask : array of bool, shape (M, K)
        The mask of the last projection, True = kept. Overwritten.
    operand : array of float16, shape (M, K), or None
        B of float32 as tensor cores take it. Overwritten.
    layout : Layout
    rho : float

    Returns
    -------
    int, or what `int` makes one of
        Elements whose mask changed; a GPU is waited for when it is asked for.
    """
    xp = namespace(B)
    xp.multiply(V, 1 / rho, out=D)
    D += B
    changed = project_mask(D, mask, layout)
    # Where kept, D = B + V/ρ makes the new V zero; where pruned, D = 0.
    xp.multiply(D, rho, out=V)
    V *= ~mask
    D *= mask
    if operand is not None:
        operand[...] = B
    return changed


@twinned(_check_ridge_right_side)
def ridge_right_side(D, V, G, B, product, out, rho):
    """out ← ρ(D − B) − V + G − product, the right-hand side of ADMM's ridge solve less B (H + ρI).

    Parameters
    ----------
    D : array, shape (M, K)
        May be overwritten.
    V, G, B : array, shape (M, K)
    product : array, shape (M, K)
        B H.
    out : array, shape (M, K)
        Of the same dtype, such as `product` itself, or of float16. Overwritten.
    rho : float
    """
    xp = namespace(D)
    D -= B
    D *= rho
    D -= V
    D += G
    xp.subtract(D, product, out=out)
