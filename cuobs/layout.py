"""What a pattern compiles to on a weight: row groups, column groups, and one map of blocks."""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

# Scopes with more masks than this are pruned by separable block scores instead of trying them all.
MAX_CANDIDATES = 128


@dataclass(frozen=True, eq=False)
class Layout:
    """A pattern compiled for one shape: m row groups of r rows, n column groups of c columns.

    A scope is where a row group and a column group meet.

    Attributes
    ----------
    row_order : ndarray of int, shape (m, r)
        Rows of the weight, by row group.
    column_order : ndarray of int, shape (n, c)
        Columns of the weight, by column group.
    blocks : ndarray of int, shape (r, c)
        Block that each element of a scope belongs to, the same for every scope. None of these
        arrays can be written to: a layout is shared by all who compile its pattern.
    keep : int
        Blocks that each scope keeps.
    """

    row_order: np.ndarray
    column_order: np.ndarray
    blocks: np.ndarray
    keep: int

    def __post_init__(self):
        for name in ("row_order", "column_order", "blocks"):
            object.__setattr__(self, name, _read_only(np.array(getattr(self, name))))

    @classmethod
    def plain(cls, M, K):
        """The layout of no pattern: rows and columns as they are, everything kept."""
        return cls(np.arange(M)[:, None], np.arange(K)[:, None], np.zeros((1, 1), int), 1)

    @property
    def shape(self):
        """Shape (M, K) of the weight."""
        return self.row_order.size, self.column_order.size

    @property
    def row_groups(self):
        """Row groups m of the weight."""
        return self.row_order.shape[0]

    @property
    def rows(self):
        """Rows r of a scope."""
        return self.row_order.shape[1]

    @property
    def column_groups(self):
        """Column groups n of the weight."""
        return self.column_order.shape[0]

    @property
    def columns(self):
        """Columns c of a scope."""
        return self.column_order.shape[1]

    @cached_property
    def n_blocks(self):
        """Blocks in a scope."""
        return int(self.blocks.max()) + 1

    @cached_property
    def elementwise(self):
        """Whether each place of a scope of one row is a block of its own."""
        return np.array_equal(self.blocks, np.arange(self.blocks.size)[None])

    @cached_property
    def candidate_blocks(self):
        """The masks to choose from, by block: bool, shape (n_blocks, n), True = pruned.

        With `enumerated`, each is a whole mask of a scope, in lexicographic order of the blocks
        that it prunes, so that the first minimum prunes the lowest index. Without, each prunes
        one block alone, and the n_blocks - keep cheapest are taken together.
        """
        blocks = range(self.n_blocks)
        size = self.n_blocks - self.keep if self.enumerated else 1
        return _read_only(np.stack(
            [np.isin(blocks, pruned) for pruned in itertools.combinations(blocks, size)], axis=1
        ))

    @cached_property
    def candidates(self):
        """The masks to choose from, by element: bool, shape (n, r, c), True = pruned."""
        return _read_only(self.candidate_blocks.T[:, self.blocks])

    @cached_property
    def pruned_columns(self):
        """The fewest and the most columns that a scope loses of one row."""
        n_pruned = self.n_blocks - self.keep
        counts = (self.blocks[:, :, None] == np.arange(self.n_blocks)).sum(1)
        counts.sort(axis=1)
        least, most = counts[:, :n_pruned].sum(1).min(), counts[:, -n_pruned:].sum(1).max()
        return (int(least), int(most)) if n_pruned else (0, 0)

    @property
    def enumerated(self):
        """Whether a scope has few enough masks to try them all."""
        return math.comb(self.n_blocks, self.keep) <= MAX_CANDIDATES


def _read_only(array):
    array.flags.writeable = False
    return array


@lru_cache(maxsize=64)
def compile_layout(pattern, M, K):
    """The `Layout` of a pattern on a weight (M, K); see `Pattern.compile`."""
    where = f"pattern {pattern.label}: the view {pattern.view}"
    shape, strides = pattern.view.sizes(M, K)
    for size, stride, block, scope in zip(shape, strides, pattern.block, pattern.scope,
                                          strict=True):
        if not size or stride is None or size % (block * scope):
            raise ValueError(_indivisible(pattern, M, K))
    _check_cover(shape, strides, M, K, where)

    # Every dimension is scopes x blocks x elements; only the place within a scope has a block.
    origins = []
    offsets = blocks = np.zeros(1, dtype=np.int64)
    weight = math.prod(pattern.scope)
    for size, stride, block, scope in zip(shape, strides, pattern.block, pattern.scope,
                                          strict=True):
        weight //= scope
        origins.append((size // (block * scope), stride * block * scope))
        for n, step, w in (scope, stride * block, weight), (block, stride, 0):
            offsets = np.add.outer(offsets, np.arange(n) * step).ravel()
            blocks = np.add.outer(blocks, np.arange(n) * w).ravel()
    order = np.argsort(offsets)
    scope_rows, scope_columns = np.unique(offsets // K), np.unique(offsets % K)
    parts = _by_axis(origins, K)
    if parts and scope_rows.size * scope_columns.size == offsets.size:
        rows = parts[0][:, None] + scope_rows
        columns = parts[1][:, None] + scope_columns
        whole = (np.array_equal(np.sort(a, axis=None), np.arange(n))
                 for a, n in ((rows, M), (columns, K)))
        if all(whole):
            blocks = blocks[order].reshape(scope_rows.size, scope_columns.size)
            return Layout(rows, columns, blocks, pattern.keep)
    raise ValueError(
        f"{where} with block {pattern.block} and scope {pattern.scope} has scopes that are not "
        f"rows times columns, the same for all, on a weight of shape ({M}, {K})"
    )


def _indivisible(pattern, M, K):
    rows, columns = pattern.smallest()
    if M % rows or K % columns:
        expected = f"multiples of ({rows}, {columns})"
    else:
        expected = f"what {pattern} divides"
    return (
        f"pattern: found {pattern.label}, which does not divide a weight of shape ({M}, {K}), "
        f"expected {expected}"
    )


def _check_cover(shape, strides, M, K, where):
    """Raise unless the view holds every element exactly once.

    The positions are a sum of arithmetic progressions from 0. They are 0..n-1, each once, just
    where every stride is the product of the sizes of the smaller ones.
    """
    total = math.prod(shape)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= M * K:
        raise ValueError(
            f"{where} reaches element {last}, outside a weight of shape ({M}, {K})"
        )
    expected = 1
    for stride, size in sorted((t, n) for t, n in zip(strides, shape, strict=True) if n > 1):
        if stride != expected:
            fault = "overlaps itself" if stride < expected else "leaves elements out"
            raise ValueError(f"{where} {fault} on a weight of shape ({M}, {K})")
        expected *= size
    if total != M * K:
        raise ValueError(f"{where} leaves elements out on a weight of shape ({M}, {K})")


def _by_axis(progressions, K):
    """Sums of progressions (size, stride) as row offsets and column offsets, both ascending.

    None where the sums are not all row offsets with all column offsets.
    """
    joined = []
    for stride, size in sorted((t, n) for n, t in progressions if n > 1):
        # One that goes on where the last one ends may pass the end of a row only with it.
        if joined and stride == joined[-1][0] * joined[-1][1]:
            joined[-1] = joined[-1][0] * size, joined[-1][1]
        else:
            joined.append((size, stride))
    rows = columns = np.zeros(1, dtype=np.int64)
    for size, stride in joined:
        across = size
        if stride % K == 0:
            across = 1
        elif stride * size > K:
            across, rest = divmod(K, stride)
            if rest or size % across:
                return None
        columns = np.add.outer(columns, np.arange(across) * stride).ravel()
        down = np.arange(size // across) * max(1, stride // K)
        rows = np.add.outer(rows, down).ravel()
    return np.sort(rows), np.sort(columns)
