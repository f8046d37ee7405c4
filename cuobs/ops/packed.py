"""Packed weights: the kept values of every scope and the number of the mask that it has.

The bytes lie in the order in which a warp's threads multiply them (docs/packed.rst draws it): a
tile is what the 32 lanes of a warp hold at once, a lane holds whole scopes, and the values that a
lane loads together are 16 bytes of half precision.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuobs.arrays import device_name, namespace
from cuobs.ops.dispatch import twinned

# Of the order of the bytes; a reader refuses what it does not know.
VERSION = 1
# A warp's lanes lie in 8 rows of 4.
LANE_ROWS, LANE_COLUMNS = 8, 4
LANES = LANE_ROWS * LANE_COLUMNS
# Values of one load: 16 bytes of half precision.
LOAD = 8
# Elements that are rearranged at a time.
PIECE = {"cpu": 1 << 22, "cuda": 1 << 26}
# Scopes with more blocks than this have masks of one block, or of all but one.
FEW_BLOCKS = 16


class Tiling(NamedTuple):
    """How scopes are dealt out to the lanes of a warp.

    Attributes
    ----------
    cells : int
        Row groups of a lane; they lie 8 groups apart.
    scopes : int
        Neighbouring scopes that a lane holds of each.
    values : int
        Values that a scope keeps.
    bits : int
        Of the number of a mask: 1, 2, 4 or 8.
    loads : int
        Loads of 8 values with which a lane takes a tile's values in.
    word_tiles : int
        Neighbouring tiles whose indices share a word.
    words : int
        Index words of a lane for them.
    row_tiles, column_tiles : int
        Tiles down and across; what lies outside the weight is 0.
    """

    cells: int
    scopes: int
    values: int
    bits: int
    loads: int
    word_tiles: int
    words: int
    row_tiles: int
    column_tiles: int

    @property
    def values_shape(self):
        """Shape of the values: tile row, tile column, load, lane, value."""
        return self.row_tiles, self.column_tiles, self.loads, LANES, LOAD

    @property
    def index_shape(self):
        """Shape of the index words: tile row, tile columns that share words, word, lane."""
        return self.row_tiles, -(-self.column_tiles // self.word_tiles), self.words, LANES


@lru_cache(maxsize=256)
def tiling(layout: Any) -> Tiling:
    """How the scopes of a layout are dealt out to the lanes of a warp.

    Parameters
    ----------
    layout : Layout

    Returns
    -------
    Tiling

    Raises
    ------
    ValueError
        A scope has more masks than an index can number.
    """
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    check(layout)
    values = kept_places(layout).shape[1]
    # Whole loads of values and whole loads of inputs.
    scopes = math.lcm(LOAD // math.gcd(LOAD, values), LOAD // math.gcd(LOAD, c))
    cells = 1 if r % 2 == 0 else 2
    bits = next(b for b in (1, 2, 4, 8) if len(layout.candidates) <= 1 << b)
    tile_bits = cells * scopes * bits
    if tile_bits < 32:
        tile_bits = 1 << (tile_bits - 1).bit_length()
    return Tiling(
        cells, scopes, values, bits, cells * scopes * values // LOAD,
        max(1, 32 // tile_bits), -(-tile_bits // 32),
        -(-m // (LANE_ROWS * cells)), -(-n // (LANE_COLUMNS * scopes)),
    )  # fmt: skip


def check(layout):
    """Refuse a layout whose scopes have too many masks to number them."""
    if not layout.enumerated:
        raise ValueError(
            f"pattern: found {math.comb(layout.n_blocks, layout.keep)} masks of a scope, expected "
            "at most 128 to pack it"
        )


@lru_cache(maxsize=256)
def kept_places(layout):
    """Places of a scope, row by row, that each mask keeps: int, shape (masks, values)."""
    kept = ~layout.candidates.reshape(len(layout.candidates), -1)
    return np.stack([np.flatnonzero(mask) for mask in kept])


def pack(weight: Any, layout: Any) -> tuple:
    """Take a weight that obeys a layout apart into kept values and the numbers of its masks.

    A scope that keeps fewer blocks than it may gets the mask that also keeps its lowest others.
    A pruned -0.0 becomes 0.0.

    Parameters
    ----------
    weight : array, shape (M, K)
        NumPy or CuPy, of any float or of unsigned integers that hold a float's bits.
    layout : Layout

    Returns
    -------
    values : array, shape `Tiling.values_shape`
        In the dtype of the weight.
    index : array of int32, shape `Tiling.index_shape`
        Masks by their place in ``layout.candidates``.

    Raises
    ------
    ValueError
        A scope keeps more blocks than the layout allows, or has more masks than are numbered.
    """
    xp = namespace(weight)
    form = tiling(layout)
    values = xp.zeros(form.values_shape, weight.dtype)
    index = xp.zeros(form.index_shape, np.int32)
    rows, columns = xp.asarray(layout.row_order), xp.asarray(layout.column_order.ravel())
    places = xp.asarray(kept_places(layout))
    group = LANE_ROWS * form.cells
    broken = 0
    for tiles in _pieces(form, layout, xp):
        part = rows[tiles.start * group : tiles.stop * group]
        scopes = weight[part.ravel()][:, columns].reshape(*part.shape, layout.column_groups, -1)
        scopes = scopes.transpose(0, 2, 1, 3).reshape(len(part), layout.column_groups, -1)
        masks, faults = _masks(_nonzero(scopes), layout)
        broken += faults
        kept = xp.take_along_axis(scopes, places[masks], axis=2)
        values[tiles] = _deal(kept, form, tiles)
        index[tiles] = _write_index(masks, form, tiles)
    if broken:
        scopes = layout.row_groups * layout.column_groups
        raise ValueError(
            f"weight: found more than {layout.keep} of {layout.n_blocks} blocks kept in {broken} "
            f"of {scopes} scopes, expected no more"
        )
    return values, index


@twinned()
def unpack(values: Any, index: Any, layout: Any) -> Any:
    """The weight that was packed: the inverse of `pack`.

    Parameters
    ----------
    values : array, shape `Tiling.values_shape`
    index : array of int32, shape `Tiling.index_shape`
    layout : Layout

    Returns
    -------
    array, shape (M, K)
        In the dtype of the values.
    """
    xp = namespace(values)
    weight = xp.empty(layout.shape, values.dtype)
    for rows, part in unpacked_rows(values, index, layout):
        weight[rows] = part
    return weight


def unpacked_rows(values, index, layout):
    """The weight in pieces: pairs of rows (an array of int) and what they hold."""
    xp = namespace(values)
    form = tiling(layout)
    r, n, c = layout.rows, layout.column_groups, layout.columns
    rows, columns = xp.asarray(layout.row_order), xp.asarray(layout.column_order.ravel())
    places = kept_places(layout)
    # Of each place, the value that is put there; one more value is 0.
    source = np.full((len(places), r * c), form.values)
    np.put_along_axis(source, places, np.arange(form.values)[None], axis=1)
    source = xp.asarray(source)
    group = LANE_ROWS * form.cells
    for tiles in _pieces(form, layout, xp):
        part = rows[tiles.start * group : tiles.stop * group]
        masks = _read_index(index[tiles], form)[: len(part), :n]
        kept = _collect(values[tiles], form)[: len(part), :n]
        kept = xp.concatenate([kept, xp.zeros((*kept.shape[:2], 1), kept.dtype)], axis=2)
        scopes = xp.take_along_axis(kept, source[masks], axis=2).reshape(len(part), n, r, c)
        piece = xp.empty((part.size, n * c), values.dtype)
        piece[:, columns] = scopes.transpose(0, 2, 1, 3).reshape(part.size, n * c)
        yield part.ravel(), piece


@twinned()
def packed_matmul(values: Any, index: Any, layout: Any, X: Any, bias: Any = None) -> Any:
    """X Wᵀ + bias for a packed weight W, unpacked a few rows at a time.

    Parameters
    ----------
    values : array, shape `Tiling.values_shape`
    index : array of int32, shape `Tiling.index_shape`
    layout : Layout
    X : array, shape (tokens, K)
    bias : array, shape (M,), optional

    Returns
    -------
    array, shape (tokens, M)
        In the dtype of X. Sums are float64 where X or the weight is, else float32.
    """
    xp = namespace(X)
    wide = np.float64 if "float64" in (values.dtype.name, X.dtype.name) else np.float32
    out = xp.empty((len(X), layout.shape[0]), X.dtype)
    wide_X = X.astype(wide, copy=False)
    for rows, part in unpacked_rows(values, index, layout):
        product = wide_X @ part.astype(wide, copy=False).T
        if bias is not None:
            product += bias[rows].astype(wide, copy=False)
        with np.errstate(over="ignore"):
            out[:, rows] = product.astype(X.dtype, copy=False)
    return out


def _pieces(form, layout, xp):
    """Slices of tile rows that are rearranged at once."""
    elements = math.prod(layout.shape) // form.row_tiles + 1
    step = max(1, PIECE[device_name(xp)] // elements)
    for start in range(0, form.row_tiles, step):
        yield slice(start, min(start + step, form.row_tiles))


def _nonzero(scopes):
    if scopes.dtype.kind != "u":
        return scopes != 0
    # All bits of a float but its sign.
    return (scopes << 1) != 0


def _masks(nonzero, layout):
    """The number of the mask of each scope, and how many scopes have none."""
    xp = namespace(nonzero)
    blocks = layout.blocks.ravel()
    used = xp.stack(
        [nonzero[..., xp.asarray(np.flatnonzero(blocks == b))].any(-1)
         for b in range(layout.n_blocks)], axis=-1,
    )  # fmt: skip
    broken = int((used.sum(-1) > layout.keep).sum())
    if layout.n_blocks > FEW_BLOCKS:
        return _mask_numbers(used, layout, xp), broken
    bits = xp.zeros(used.shape[:-1], np.int32)
    for b in range(layout.n_blocks):
        bits |= used[..., b].astype(np.int32) << b
    return xp.asarray(_mask_of_bits(layout))[bits], broken


@lru_cache(maxsize=64)
def _mask_of_bits(layout):
    """The number of the mask for each set of used blocks, as bits."""
    sets = np.arange(1 << layout.n_blocks)[:, None] >> np.arange(layout.n_blocks) & 1
    return _mask_numbers(sets.astype(bool), layout, np)


def _mask_numbers(used, layout, xp):
    """The number of the mask that keeps the used blocks and the lowest of the others."""
    others = xp.cumsum(~used, axis=-1) <= layout.keep - used.sum(-1, keepdims=True)
    kept = used | others & ~used
    masks = ~layout.candidate_blocks
    hits = kept.astype(np.float32) @ xp.asarray(masks, dtype=np.float32)
    return hits.argmax(-1).astype(np.uint8)


def _padded(array, form, tiles):
    """(row groups, scopes, n) as (tile row, cell, lane row, tile column, lane column, scope, n)."""
    xp = namespace(array)
    shape = (
        tiles.stop - tiles.start, form.cells, LANE_ROWS,
        form.column_tiles, LANE_COLUMNS, form.scopes, array.shape[2],
    )  # fmt: skip
    full = xp.zeros((math.prod(shape[:3]), math.prod(shape[3:6]), shape[6]), array.dtype)
    full[: array.shape[0], : array.shape[1]] = array
    return full.reshape(shape)


def _deal(kept, form, tiles):
    dealt = _padded(kept, form, tiles).transpose(0, 3, 2, 4, 1, 5, 6)
    dealt = dealt.reshape(*dealt.shape[:2], LANES, form.loads, LOAD)
    return dealt.transpose(0, 1, 3, 2, 4)


def _collect(values, form):
    xp = namespace(values)
    down, across = values.shape[:2]
    lanes = xp.ascontiguousarray(values.transpose(0, 1, 3, 2, 4)).reshape(
        down, across, LANE_ROWS, LANE_COLUMNS, form.cells, form.scopes, form.values
    )
    return lanes.transpose(0, 4, 2, 1, 3, 5, 6).reshape(
        down * form.cells * LANE_ROWS, across * LANE_COLUMNS * form.scopes, form.values
    )


def _write_index(masks, form, tiles):
    """Numbers of masks (row groups, scopes) as words, the first in the lowest bits."""
    xp = namespace(masks)
    dealt = _padded(masks[..., None].astype(np.uint32), form, tiles)
    dealt = dealt.transpose(0, 3, 2, 4, 1, 5, 6)
    down, across = dealt.shape[:2]
    _, groups, words, _ = form.index_shape
    per_word = 32 // form.bits
    fields = xp.zeros((down, groups * form.word_tiles, LANES, words * per_word // form.word_tiles),
                      np.uint32)  # fmt: skip
    fields[:, :across, :, : form.cells * form.scopes] = dealt.reshape(down, across, LANES, -1)
    fields = fields.reshape(down, groups, form.word_tiles, LANES, -1).transpose(0, 1, 3, 2, 4)
    shifts = xp.arange(0, 32, form.bits, dtype=np.uint32)
    found = (fields.reshape(down, groups, LANES, words, per_word) << shifts).sum(-1)
    return found.transpose(0, 1, 3, 2).astype(np.uint32).view(np.int32)


def _read_index(index, form):
    """The numbers of the masks (row groups, scopes) from words."""
    xp = namespace(index)
    words = xp.ascontiguousarray(index.transpose(0, 1, 3, 2)).view(np.uint32)[..., None]
    shifts = xp.arange(0, 32, form.bits, dtype=np.uint32)
    fields = words >> shifts & xp.uint32((1 << form.bits) - 1)
    down, groups = fields.shape[:2]
    fields = fields.reshape(down, groups, LANES, form.word_tiles, -1).transpose(0, 1, 3, 2, 4)
    fields = fields.reshape(down, groups * form.word_tiles, LANES, -1)
    fields = fields[..., : form.cells * form.scopes].reshape(
        down, -1, LANE_ROWS, LANE_COLUMNS, form.cells, form.scopes
    )
    return fields.transpose(0, 4, 2, 1, 3, 5).reshape(down * form.cells * LANE_ROWS, -1)
