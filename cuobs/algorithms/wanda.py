"""Wanda: weights times activation norms."""

from cuobs.algorithms.magnitude import memory, prune_by_score
from cuobs.recipe import Method


def wanda(problem):
    """Prune the blocks with the smallest sum of w² H_jj; no compensation.

    References
    ----------
    .. [1] Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for large language
       models", ICLR 2024.
    """

    def score(W):
        squares = W * W
        squares *= problem.diagonal
        return squares

    return prune_by_score(problem, score)


METHOD = Method(
    "wanda",
    "smallest weights times activation norms, no compensation",
    wanda,
    memory=memory,
    by_row=True,
    operations=(0, 0),
    held=(3, 5),
)
