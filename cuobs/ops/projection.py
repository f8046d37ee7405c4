"""ADMM's projection onto a pattern and its multiplier update, in one pass."""

from cuobs.arrays import namespace
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
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
    squares = (B * B).reshape(R, r, G, c).transpose(3, 0, 1, 2)
    pruned = prune_lowest(block_sums(squares, layout), layout.n_blocks - layout.keep)
    new = ~expand(pruned, layout).reshape(mask.shape)
    changed = int(xp.count_nonzero(new != mask))
    mask[...] = new
    return changed
