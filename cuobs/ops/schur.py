"""Schur complements of one inverse Hessian for all rows."""

from typing import Any

from cuobs.ops.checks import precise, real, same_dtype, shaped, square
from cuobs.ops.factors import cholesky_inverse
from cuobs.ops.products import gemm, matmul


def eliminate(C: Any, group: Any, cross: Any, precision: str = "fp32") -> None:
    """C −= crossᵀ group⁻¹ cross: what is left of an inverse Hessian after a group of its columns.

    Parameters
    ----------
    C : array, shape (K, K)
        Overwritten.
    group : array, shape (p, p)
        The inverse Hessian of the group. Overwritten.
    cross : array, shape (p, K)
        Between the group and the others.
    precision : {"tensor", "fp32"}

    Raises
    ------
    numpy.linalg.LinAlgError
        `group` is not positive definite.
    """
    square("C", C)
    real("C", C)
    square("group", group)
    shaped("cross", cross, (len(group), len(C)))
    for name, array in ("group", group), ("cross", cross):
        same_dtype("C", C, name, array)
    precise(precision)
    Y = matmul(cholesky_inverse(group[None], precision=precision)[0], cross, precision)
    gemm(Y.T, Y, C, alpha=-1, beta=1, precision=precision)
