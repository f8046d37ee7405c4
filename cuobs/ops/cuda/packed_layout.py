"""How the lanes of a warp expand packed scopes, as the macros of packed.cu; no device is needed."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuobs.ops.packed import LANE_COLUMNS, LANE_ROWS, kept_places, tiling

# What one lane holds of a tile where it is expanded in registers.
MAX_COLUMNS, MAX_SLOTS, MAX_TABLE = 64, 8, 4096


def expands(layout):
    """Whether a lane can expand its part of a tile in registers."""
    form = tiling(layout)
    r, c = layout.rows, layout.columns
    return (
        c * form.scopes <= MAX_COLUMNS
        and r * form.cells <= MAX_SLOTS
        and expansion(layout).table.size <= MAX_TABLE
    )


class Expansion(NamedTuple):
    """How the values of a lane become pairs of neighbouring columns.

    Attributes
    ----------
    table : ndarray of uint32, shape (masks, words)
        Selectors of ``permute(two values, selector)``, two in a word. Words beyond those of
        ``used`` are 0: 2, or 4 and a multiple, are read together.
    used : int
    first : list of int
        The first step of each scope, and the number of all.
    steps : list of (int, int, int)
        The pair that a step adds to, the register of two values that it takes, its selector.
    """

    table: np.ndarray
    used: int
    first: list
    steps: list


@lru_cache(maxsize=64)
def expansion(layout):
    """The steps of a layout; selectors that agree for all masks are kept once."""
    form = tiling(layout)
    c = layout.columns
    places = kept_places(layout)
    pairs = c * form.scopes // 2
    selectors, steps, first = {}, [], []
    for scope in range(form.scopes):
        first.append(len(steps))
        # (pair, register) -> the four bytes of the pair for each mask, 4 = a byte of zero
        found = {}
        for mask, kept in enumerate(places):
            for rank, place in enumerate(kept):
                row, column = divmod(int(place), c)
                column += scope * c
                value = scope * form.values + rank
                key = row * pairs + column // 2, value // 2
                chosen = found.setdefault(key, [[4, 4] for _ in places])
                chosen[mask][column % 2] = value % 2
        for (pair, register), chosen in sorted(found.items()):
            words = tuple(sum(_half(v) << 8 * i for i, v in enumerate(m)) for m in chosen)
            steps.append((pair, register, selectors.setdefault(words, len(selectors))))
    first.append(len(steps))
    used = -(-len(selectors) // 2)
    table = np.zeros((len(places), used if used <= 2 else -(-used // 4) * 4), np.uint32)
    for words, n in selectors.items():
        table[:, n // 2] |= np.array(words, np.uint32) << np.uint32(n % 2 * 16)
    return Expansion(table, used, first, steps)


def _half(value):
    """The selectors of both bytes of a value, or of zeros."""
    return 0x44 if value == 4 else 0x10 if value == 0 else 0x32


@lru_cache(maxsize=64)
def order(layout):
    """Where a lane's pairs of columns lie among its inputs, or None.

    None where the columns of a lane are not neighbours: inputs and weights are then rearranged
    column by column.
    """
    form = tiling(layout)
    c = layout.columns
    width = c * form.scopes
    columns = columns_of(layout)
    lanes = columns.reshape(-1, width)
    whole = lanes[(lanes >= 0).all(axis=1)]
    if not len(whole):
        return None
    pattern = whole[0] - whole[0].min()
    starts = np.arange(len(lanes)) * width
    expected = starts[:, None] + pattern
    tail = expected >= layout.shape[1]
    if not np.array_equal(np.where(tail, -1, expected), lanes):
        return None
    if (pattern[::2] % 2).any() or not np.array_equal(pattern[::2] + 1, pattern[1::2]):
        return None
    return tuple(int(p) // 2 for p in pattern[::2])


@lru_cache(maxsize=64)
def columns_of(layout):
    """The weight's column in each place of the packed order, -1 outside it: int32."""
    form = tiling(layout)
    c = layout.columns
    full = np.full(form.column_tiles * LANE_COLUMNS * form.scopes * c, -1, np.int32)
    full[: layout.column_order.size] = layout.column_order.ravel()
    return full


@lru_cache(maxsize=64)
def rows_of(layout):
    """The weight's row in each place of the packed order, -1 outside it: int32."""
    form = tiling(layout)
    full = np.full((form.row_tiles * form.cells * LANE_ROWS, layout.rows), -1, np.int32)
    full[: layout.row_groups] = layout.row_order
    return full.ravel()


def layout_defines(layout, dtype):
    """The macros of a layout."""
    form = tiling(layout)
    r, c = layout.rows, layout.columns
    steps = expansion(layout)
    width = c * form.scopes
    pairs = order(layout) or range(width // 2)
    return {
        "BFLOAT": dtype == "bfloat16",
        "ROWS": r, "CELLS": form.cells, "SCOPES": form.scopes, "BITS": form.bits,
        "LOADS": form.loads, "WORDS": form.words, "WORD_TILES": form.word_tiles,
        "COLUMNS": width, "MASKS": len(steps.table), "SELECTORS": steps.table.shape[1],
        "USED": steps.used,
        "TABLE": steps.table.ravel(), "FIRST": steps.first,
        "STEPS": np.array(steps.steps).ravel(), "ORDER": pairs, "PLACE": np.argsort(pairs),
    }  # fmt: skip
