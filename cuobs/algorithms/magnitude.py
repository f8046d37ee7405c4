"""Magnitude pruning."""

from cuobs.footprint import Memory
from cuobs.ops.pieces import piece_bytes, pieces
from cuobs.ops.selection import keep_highest, score_bytes
from cuobs.problem import Pruned
from cuobs.recipe import Method


def magnitude(problem):
    """Prune the blocks with the smallest sum of squared weights; no compensation."""
    return prune_by_score(problem, lambda W: W * W)


def prune_by_score(problem, score):
    """Prune the blocks whose elements' scores have the lowest sum.

    ``score(W)`` gives those of some rows of the weight, shape (rows, K), in a new array.
    """
    xp, W, layout = problem.xp, problem.W, problem.layout
    weight, mask = xp.empty_like(W), xp.empty(W.shape, bool)
    each = score_bytes(layout, W.shape[1], W.dtype.itemsize)
    for part in pieces(xp, layout.row_groups, each):
        rows = slice(part.start * layout.rows, part.stop * layout.rows)
        mask[rows] = keep_highest(score(W[rows]), layout)
        xp.multiply(W[rows], mask[rows], out=weight[rows])
    return Pruned(mask, weight)


def memory(size):
    """Weight, mask and the scores of a piece."""
    layout = size.layout
    each = score_bytes(layout, layout.shape[1], size.itemsize)
    return Memory(size.weight + size.mask + piece_bytes(layout.row_groups, each, size.device))


METHOD = Method(
    "magnitude",
    "smallest weights, no compensation",
    magnitude,
    memory=memory,
    by_row=True,
    operations=(0, 0),
    held=(3, 5),
)
