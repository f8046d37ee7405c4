"""Products of many tokens with packed weights on Hopper: the kernel of `packed_hopper.cu`.

Its operands come into shared memory by tensor maps, which say how an array lies in memory; the
driver writes them.
"""

import ctypes
import math
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cuobs.ops.cuda import early, loader
from cuobs.ops.cuda.packed_layout import columns_of, layout_defines, order, rows_of
from cuobs.ops.packed import kept_places, tiling

SOURCE = Path(__file__).with_suffix(".cu")
KERNELS = ("sparse", "expanded")
BLOCK_ROWS, TILE_ROWS, FOLD = 128, 16, 64
BLOCK_TILES = BLOCK_ROWS // TILE_ROWS
# Of a block: warps that multiply; another brings everything in.
CONSUMERS = 8
THREADS = 32 * (CONSUMERS + 1)
# Of what is expanded: places of dense rows (one is written, two may still be multiplied), and tiles
# under way at most.
DENSE_SLOTS, MOST_AHEAD = 3, 12
# Bytes of shared memory beside the stages: the result on its way out, and barriers at most.
OTHER_SHARED = 2 * 32 * 144 + 512
# Tensor maps: 2 and 4 bytes an element; no swizzling, within 64 or 128 bytes; two lines at a time.
UINT16, UINT32 = 1, 2
PLAIN, SWIZZLE_64, SWIZZLE_128 = 0, 2, 3
PROMOTE_256 = 3


@lru_cache(maxsize=256)
def kernel_of(layout):
    """Which of the kernels takes a layout: "sparse", "expanded", or None.

    Tiles must have 16 neighbouring rows, in the same order in each, and 64 neighbouring columns or
    a multiple; results are written 8 rows at a time.
    """
    form = tiling(layout)
    r, c = layout.rows, layout.columns
    M = layout.shape[0]
    if r * form.cells != 2 or c * form.scopes % 16 or M % 8 or M < TILE_ROWS:
        return None
    tiles = rows_of(layout).reshape(-1, TILE_ROWS)
    expected = np.arange(len(tiles))[:, None] * TILE_ROWS + tiles[0]
    if order(layout) is None or not np.array_equal(np.where(expected < M, expected, -1), tiles):
        return None
    return "sparse" if fit(layout) else "expanded"


class Fit(NamedTuple):
    """How a layout keeps two of each four columns, once columns and values are put in order.

    Attributes
    ----------
    split : bool
        Whether the even columns of each 8 come before the odd ones.
    values : tuple of 8 int
        Where each of a lane's values in a row is taken from.
    scopes : tuple of 4 int
        The scope of each four columns of a lane.
    codes : list of int
        The two places of each mask, the same for all fours of a scope, two bits each.
    """

    split: bool
    values: tuple
    scopes: tuple
    codes: list


EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)
# What `Fit.scopes` may be: by the kernel's SPREAD.
SPREADS = ((0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1))


@lru_cache(maxsize=256)
def fit(layout):
    """The `Fit` of a layout, or None: 2:4, and patterns that are 2:4 in another order."""
    form = tiling(layout)
    c, M = layout.columns, layout.shape[0]
    plain = layout.rows == 1 and form.bits == 4 and c * form.scopes == 16
    if not plain or order(layout) is None or form.values * form.scopes != 8:
        return None
    if not np.array_equal(rows_of(layout)[:M], range(M)):
        return None
    found = (_fit(layout, split) for split in (False, True))
    return next((f for f in found if f and f.scopes in SPREADS), None)


def _fit(layout, split):
    c, form = layout.columns, tiling(layout)
    # The place of each natural column of a lane in its packed order, in the order of the product.
    pairs = np.argsort(order(layout))
    natural = [2 * int(pairs[n // 2]) + n % 2 for n in range(16)]
    fours = [natural[n // 8 * 8 + EVEN_FIRST[n % 8]] if split else natural[n] for n in range(16)]
    values, scopes, codes = [], [], None
    for four in np.reshape(fours, (4, 4)):
        if len({place // c for place in four}) > 1:
            return None
        scopes.append(int(four[0]) // c)
        kept = [[n for n, place in enumerate(four) if place % c in mask]
                for mask in kept_places(layout)]  # fmt: skip
        if any(len(two) != 2 for two in kept):
            return None
        ranks = {tuple(mask.tolist().index(four[n] % c) for n in two)
                 for two, mask in zip(kept, kept_places(layout), strict=True)}  # fmt: skip
        mine = [a | b << 2 for a, b in kept]
        if len(ranks) > 1 or codes not in (None, mine):
            return None
        codes = mine
        values += [scopes[-1] * form.values + rank for rank in ranks.pop()]
    return Fit(split, tuple(values), tuple(scopes), codes)


def sparse_defines(layout):
    """The macros that say how a layout is read by sparse tensor cores."""
    found = fit(layout)
    spread = SPREADS.index(found.scopes)
    both = 0x11 if spread == 1 else 1
    word = sum(code * both << 8 * mask for mask, code in enumerate(found.codes))
    return {
        "PLACES": [word & 0xFFFFFFFF, word >> 32], "SPREAD": spread, "SPLIT": found.split,
        "VALUE_ORDER": found.values, "IN_PLACE": found.values == tuple(range(8)),
    }  # fmt: skip


NOT_SPARSE = {"PLACES": [0, 0], "SPREAD": 0, "SPLIT": 0, "VALUE_ORDER": range(8), "IN_PLACE": 0}


def folds(layout):
    """Rows of 64 columns in a stage."""
    return layout.columns * tiling(layout).scopes // 16


def tile_bytes(layout):
    """Bytes of the tiles of a block's rows, values and index words."""
    form = tiling(layout)
    return BLOCK_TILES * (512 * form.loads + 128 * form.words)


def stage_bytes(layout, way):
    """Bytes of a stage: inputs and the weight, where it stays packed."""
    inputs = folds(layout) * 8 * way.groups * 128
    return inputs + tile_bytes(layout) if way.kernel == "sparse" else inputs


def shared_bytes(layout, way):
    """Dynamic shared memory; what is used of it begins on 1024 bytes."""
    sums = 8 * way.groups * (BLOCK_ROWS + 4) * 4 if way.splits > 1 else 0
    used = way.depth * stage_bytes(layout, way)
    if way.kernel == "expanded":
        used += DENSE_SLOTS * folds(layout) * BLOCK_ROWS * 128
        used += ahead(layout, way) * tile_bytes(layout)
    return max(used, sums) + 1024


def ahead(layout, way):
    """Tiles of columns on their way to be expanded: fewer where a stage is large, or two blocks."""
    if way.kernel == "sparse":
        return 1
    room = 40 if way.groups > 16 else 96 if way.resident == 1 else 28
    return max(2, min(MOST_AHEAD, room * 1024 // tile_bytes(layout)))


def defines(layout, dtype, way):
    """The macros of a way."""
    sparse = way.kernel == "sparse"
    return layout_defines(layout, dtype) | {
        "SPARSE": sparse, "GROUPS": way.groups, "STAGES": way.depth, "SHARING": way.sharing,
        "SPLITS": way.splits, "AHEAD": ahead(layout, way), "RESIDENT": way.resident,
        "BLOCK_ROWS": BLOCK_ROWS, "CONSUMERS": CONSUMERS, "DENSE_SLOTS": DENSE_SLOTS,
        **(sparse_defines(layout) if sparse else NOT_SPARSE),
    }  # fmt: skip


@lru_cache(maxsize=1024)
def module(options, number):
    """The source, compiled for sm_90a, on the current device, which has a number."""
    import cupy

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(_binary(options))
        file.flush()
        found = cupy.RawModule(path=file.name)
        found.compile()
    return found


@lru_cache(maxsize=1024)
def _binary(options):
    """The source in the code of sm_90a, which CuPy by itself does not compile for."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(loader.text(SOURCE), SOURCE.name, (), ())
    try:
        nvrtc.compileProgram(program, (*options, "-arch=sm_90a"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)


class TensorMap(NamedTuple):
    """The address of a tensor map, and the memory that it lies in."""

    address: int
    memory: object


@lru_cache(maxsize=8192)
def tensor_map(address, element, sizes, strides, box, swizzle):
    """The driver's description of an array, of which boxes are copied into shared memory.

    Parameters
    ----------
    address : int
        Of the array, on 16 bytes.
    element : {UINT16, UINT32}
    sizes, box : tuple of int
        Elements along each axis of the array and of a box, the innermost first. What a box has
        outside the array is 0.
    strides : tuple of int
        Bytes along all axes but the innermost, multiples of 16.
    swizzle : {PLAIN, SWIZZLE_64, SWIZZLE_128}
    """
    memory = ctypes.create_string_buffer(128 + 64)
    aligned = -(-ctypes.addressof(memory) // 64) * 64
    rank = len(sizes)
    wide, narrow = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    fault = early.driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned), element, rank, ctypes.c_void_p(address), wide(*sizes),
        wide(*strides), narrow(*box), narrow(*(1,) * rank), 0, swizzle, PROMOTE_256, 0,
    )  # fmt: skip
    if fault:
        raise RuntimeError(f"cuTensorMapEncodeTiled: found error {fault}, expected none")
    return TensorMap(aligned, memory)


def row_blocks(layout):
    """Blocks of rows of the weight, each of a block of threads."""
    return -(-tiling(layout).row_tiles * TILE_ROWS // BLOCK_ROWS)


def maps(layout, way, operands, row_tiles):
    """Tensor maps of values and index words, of so many tiles of rows, and of inputs."""
    form = tiling(layout)
    o, width = operands, len(columns_of(layout))
    inputs = tensor_map(
        o.room if arranges(layout) else o.inputs, UINT16, (width, o.tokens), (2 * width,),
        (FOLD, 8 * way.groups // way.sharing), SWIZZLE_128,
    )  # fmt: skip
    # What stays packed is multiplied as rows of 32 values; what is expanded is read load by load.
    lines = (32, TILE_ROWS) if way.kernel == "sparse" else (256, form.loads)
    values = _tiles(o.values, UINT16, lines, form.column_tiles, row_tiles,
                    SWIZZLE_64 if way.kernel == "sparse" else PLAIN)  # fmt: skip
    index = _tiles(o.index, UINT32, (32, form.words), form.index_shape[1], row_tiles, PLAIN)
    return values, index, inputs


def _tiles(address, element, lines, across, down, swizzle):
    """The map of tiles of so many lines: boxes of as many below each other as a block has rows."""
    line = lines[0] * 2 * element
    tile = line * lines[1]
    return tensor_map(
        address, element, (*lines, across, down), (line, tile, tile * across),
        (*lines, 1, BLOCK_TILES), swizzle,
    )  # fmt: skip


def grid_blocks(way, rows, tokens, processors):
    """Blocks of a launch on so many blocks of rows: all of them where they share columns, else as
    many as run at once."""
    clusters = -(-rows // way.sharing) * -(-tokens // (8 * way.groups))
    if way.splits == 1:
        clusters = min(clusters, max(1, way.resident * processors // way.sharing))
    return clusters * way.sharing * way.splits


def arranges(layout):
    """Whether inputs are put in another order first."""
    return kernel_of(layout) == "sparse" and fit(layout).split


def room_bytes(layout, tokens):
    """Bytes of inputs in another order."""
    return 2 * tokens * len(columns_of(layout)) if arranges(layout) else 0


def multiply(function, layout, shares, operands, processors, number, stream):
    """Launch products on a device.

    Parameters
    ----------
    function : callable
        Gives a kernel of a way by its name.
    layout : Layout
    shares : list of Share
        See `packed_ways.shares`.
    operands : Operands
    processors, number : int
        Of the device.
    stream : Stream
    """
    o = operands
    if arranges(layout):
        pieces = room_bytes(layout, o.tokens) // 16
        args = np.uint64(o.inputs), np.uint64(o.room), np.int64(pieces)
        grid = -(-pieces // THREADS), 1, 1
        kernel = function(shares[0].way, "arrange")
        early.launch(kernel, grid, (THREADS, 1, 1), args, 0, stream, number)
    for share in shares:
        args = arguments(layout, share, o)
        kernel = function(share.way, "product")
        grid = grid_blocks(share.way, share.count, o.tokens, processors), 1, 1
        shared = shared_bytes(layout, share.way)
        early.launch(kernel, grid, (THREADS, 1, 1), args, shared, stream, number)


def arguments(layout, share, operands):
    """What the product of some blocks of rows is launched with."""
    o, form = _from_row(layout, operands, share.first), tiling(layout)
    row_tiles = min(share.count * BLOCK_TILES, form.row_tiles - share.first * BLOCK_TILES)
    sizes = layout.shape[0], o.tokens, row_tiles, form.column_tiles
    return [
        *maps(layout, share.way, o, row_tiles), *(np.uint64(a) for a in (o.bias, o.rows, o.out)),
        *(np.int32(n) for n in sizes),
    ]  # fmt: skip


def _from_row(layout, operands, first):
    """Operands of the rows from a block on."""
    if not first:
        return operands
    o, form = operands, tiling(layout)
    tiles, rows = first * BLOCK_TILES, first * BLOCK_ROWS
    return o._replace(
        values=o.values + 2 * tiles * math.prod(form.values_shape[1:]),
        index=o.index + 4 * tiles * math.prod(form.index_shape[1:]),
        bias=o.bias and o.bias + 2 * rows, out=o.out + 2 * rows,
    )  # fmt: skip


def variants():
    """The macros that the kernel may be compiled with, for some patterns."""
    from cuobs.ops.cuda.packed_ways import Way
    from cuobs.pattern import parse, patterns

    for text in (*patterns(), "1:4"):
        layout = parse(text).compile(96, 128)
        way = Way(kernel_of(layout), 8, depth=4)
        for dtype in ("float16", "bfloat16"):
            yield defines(layout, dtype, way)
        yield defines(layout, "float16", way._replace(splits=4))
        yield defines(layout, "float16", way._replace(groups=32, depth=3, sharing=2))
