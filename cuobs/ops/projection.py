"""The projection of a weight onto a pattern: the nearest one that obeys it."""

from typing import Any

from cuobs.arrays import namespace
from cuobs.ops.checks import boolean, contiguous, real, shaped
from cuobs.ops.dispatch import twinned
from cuobs.ops.pieces import piece_bytes, pieces
from cuobs.ops.selection import keep_highest, score_bytes
from cuobs.ops.sums import count_true


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


def projection_bytes(size):
    """Bytes that `project_mask` makes on the way."""
    each = score_bytes(size.layout, size.layout.shape[1], size.itemsize)
    return piece_bytes(size.layout.row_groups, each, size.device)


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
    xp, r, changed = namespace(B), layout.rows, 0
    for part in pieces(xp, len(B) // r, score_bytes(layout, B.shape[1], B.dtype.itemsize)):
        rows = slice(part.start * r, part.stop * r)
        new = keep_highest(B[rows] * B[rows], layout)
        changed += count_true(new != mask[rows])
        mask[rows] = new
    return changed
