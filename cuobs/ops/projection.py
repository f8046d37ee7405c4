"""The projection of a weight onto a pattern: the nearest one that obeys it."""

from typing import Any

from cuobs.arrays import namespace
from cuobs.ops.checks import boolean, contiguous, real, shaped
from cuobs.ops.dispatch import twinned
from cuobs.ops.selection import block_sums, expand, prune_lowest


def check_project_mask(B, mask, layout):
    """Refuse what is no weight of whole scopes, or no mask of it."""
    real("B", B)
    r, c = layout.blocks.shape
    if B.ndim != 2 or B.shape[0] % r or B.shape[1] % c:
        raise ValueError(f"B: found shape {B.shape}, expected whole scopes of {r} x {c}")
    boolean("mask", mask)
    shaped("mask", mask, B.shape)
    for name, array in ("B", B), ("mask", mask):
        contiguous(name, array)


@twinned(check_project_mask)
def project_mask(B: Any, mask: Any, layout: Any) -> int:
    """Where the nearest weight that obeys a pattern is not zero.

    Each scope keeps the blocks with the largest sum of squares.

    Parameters
    ----------
    B : array, shape (M, K)
        In layout order, row after row.
    mask : array of bool, shape (M, K)
        Likewise; True = kept. Overwritten.
    layout : Layout

    Returns
    -------
    int
        Elements whose mask changed.
    """
    r, c = layout.blocks.shape
    m, n = B.shape[0] // r, B.shape[1] // c
    squares = (B * B).reshape(m, r, n, c).transpose(3, 0, 1, 2)
    pruned = prune_lowest(block_sums(squares, layout), layout.n_blocks - layout.keep)
    new = ~expand(pruned, layout).reshape(mask.shape)
    changed = int(namespace(B).count_nonzero(new != mask))
    mask[...] = new
    return changed
