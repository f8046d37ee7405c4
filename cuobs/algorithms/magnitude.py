"""Magnitude pruning."""

from cuobs.ops.selection import block_sums, expand, prune_lowest
from cuobs.problem import Pruned
from cuobs.recipe import Method


def magnitude(problem):
    """Prune the blocks with the smallest sum of squared weights; no compensation."""
    return prune_by_score(problem, problem.W**2)


def prune_by_score(problem, scores):
    """Prune the blocks whose elements' scores, shape (M, K), have the lowest sum."""
    layout = problem.layout
    sums = block_sums(problem.by_scope(scores), layout)
    pruned = prune_lowest(sums, layout.n_blocks - layout.keep)
    mask = ~expand(pruned, layout).reshape(problem.W.shape)
    return Pruned(mask, problem.W * mask)


METHOD = Method("magnitude", "smallest weights, no compensation", magnitude)
