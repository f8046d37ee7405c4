"""Products of matrices and of batches of matrices.

`precision` says how a GPU multiplies float32: "tensor" lets tensor cores do so, in tf32 or, where a
caller asks for it, in float16; "fp32" keeps its digits. float64 is always multiplied as it is.
"""

from typing import Any

from cuobs.arrays import namespace
from cuobs.ops.checks import precise, same_dtype
from cuobs.ops.dispatch import twinned

# Matrices of a batch that one call of cuBLAS multiplies. It may choose its kernel by their number,
# and with it the last bits; a fixed one gives a matrix the same bits in whatever batch it comes.
CHUNK = 32


def _check_gemm(A, B, out, alpha=1.0, beta=0.0, precision="fp32", exact=False):
    same_dtype("A", A, "B", B)
    precise(precision)
    fits = (
        A.ndim == B.ndim == out.ndim
        and out.ndim in (2, 3)
        and A.shape[-1] == B.shape[-2]
        and A.shape[:-2] == B.shape[:-2]
        and (*A.shape[:-1], B.shape[-1]) == out.shape
    )
    if not fits:
        raise ValueError(
            f"A, B, out: found shapes {A.shape}, {B.shape}, {out.shape}, expected (m, k), (k, n), "
            "(m, n), or batches of these"
        )


@twinned(_check_gemm)
def gemm(
    A: Any,
    B: Any,
    out: Any,
    alpha: float = 1.0,
    beta: float = 0.0,
    precision: str = "fp32",
    exact: bool = False,
) -> None:
    """out ← alpha A B + beta out.

    Parameters
    ----------
    A : array, shape (m, k) or (batch, m, k)
        A slice of a larger array or the transpose of one; a GPU copies it only where neither its
        rows nor its columns are runs of memory.
    B : array, shape (k, n) or (batch, k, n)
        Likewise, of the same dtype.
    out : array, shape (m, n) or (batch, m, n)
        Rows contiguous on a GPU. There float16 and float32 may come from float16, and float32 from
        bfloat16, which are summed in float32. Overwritten.
    alpha, beta : float
    precision : {"tensor", "fp32"}
        How a GPU multiplies float32.
    exact : bool
        Whether a float32 product has to keep the digits of float32 on tensor cores too. They then
        multiply the upper and the lower halves of the digits one by one.

    Raises
    ------
    TypeError
        A and B are of different dtypes.
    ValueError
        The shapes are not those of a product.
    """
    xp = namespace(out)
    if alpha == 1 and not beta:
        xp.matmul(A, B, out=out)
        return
    product = A @ B
    if beta == 1 and alpha in (1, -1):
        (xp.add if alpha == 1 else xp.subtract)(out, product, out=out)
        return
    if alpha != 1:
        product *= alpha
    if beta:
        product += beta * out
    out[...] = product


def matmul(A: Any, B: Any, precision: str = "fp32") -> Any:
    """A B in a new array of their dtype: `gemm` without a place to write to.

    Parameters
    ----------
    A : array, shape (m, k) or (batch, m, k)
    B : array, shape (k, n) or (batch, k, n)
        Of the same dtype.
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (m, n) or (batch, m, n)
    """
    out = namespace(A).empty((*A.shape[:-1], B.shape[-1]), A.dtype)
    gemm(A, B, out, precision=precision)
    return out


@twinned()
def tensor_operand(array, precision):
    """A float32 operand as tensor cores take it best: in float16 where `precision` lets them.

    float16 keeps as many digits as tf32 and is multiplied twice as fast, but holds no more than
    65504 and fewer digits below 6e-5. Anything else, and anything on the CPU, stays as it is.
    """
    return array
