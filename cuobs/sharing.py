"""The rows of a weight shared out over processes or devices, no scope torn apart."""

from dataclasses import dataclass, field, fields
from functools import lru_cache

import numpy as np

from cuobs.recipe import Settings

# Methods that prune a row without a look at others, or add up over all of them where they do look.
BY_ROW = (
    "magnitude", "wanda", "obs-local", "obs-full", "obs-split", "obs-interleaved", "sparsegpt",
    "true-obs", "admm",
)  # fmt: skip
# What the rows of a share may be a multiple of.
UNITS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class SharedRows(Settings):
    """Settings of whoever has some rows of a weight, and can ask the others.

    Attributes
    ----------
    others : object
        With a method `total` that adds up a number over all shares.
    """

    others: object = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, settings, others, **changes):
        """Settings of one of those that share rows."""
        same = {f.name: getattr(settings, f.name) for f in fields(Settings)}
        return cls(**{**same, **changes}, others=others)

    def over_all_rows(self, number):
        """The sum over all rows of a number that is one over those at hand."""
        return self.others.total(number)


def row_counts(recipe, rows, K, size):
    """So many rows for each of so many shares; None where a recipe's rows can't be shared out."""
    if size == 1 or recipe.method not in BY_ROW or recipe.options.get("order") == "shared":
        return None
    for unit in UNITS:
        whole, rest = divmod(rows, unit)
        edges = [whole * share // size * unit for share in range(size)] + [rows]
        counts = tuple(stop - start for start, stop in zip(edges, edges[1:], strict=False))
        if not rest and 0 not in counts and stackable(recipe.pattern, counts, K):
            return counts
    return None


@lru_cache(maxsize=256)
def stackable(pattern, counts, K):
    """Whether weights set one below the other have the scopes that each has alone."""
    try:
        stacked = pattern.compile(sum(counts), K)
        alone = [pattern.compile(count, K) for count in counts]
    except ValueError:
        return False
    starts = np.cumsum([0, *counts[:-1]])
    rows = [layout.row_order + start for layout, start in zip(alone, starts, strict=True)]
    if any(layout.rows != stacked.rows for layout in alone):
        return False
    found = {tuple(group) for group in np.concatenate(rows).tolist()}
    same = all(
        np.array_equal(layout.column_order, stacked.column_order)
        and np.array_equal(layout.blocks, stacked.blocks)
        for layout in alone
    )
    return same and found == {tuple(group) for group in stacked.row_order.tolist()}
