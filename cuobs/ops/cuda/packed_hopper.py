"""Products of many tokens with packed weights on Hopper: the kernel of `packed_hopper.cu`.

Its operands come into shared memory by tensor maps, which say how an array lies in memory; the
driver writes them.
"""

import ctypes
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cuobs.ops.cuda import loader
from cuobs.ops.cuda.packed_layout import columns_of, layout_defines, order, rows_of
from cuobs.ops.packed import kept_places, tiling

SOURCE = Path(__file__).with_suffix(".cu")
KERNELS = ("sparse", "expanded")
BLOCK_ROWS, TILE_ROWS, FOLD = 128, 16, 64
# Warps of a block that multiply.
CONSUMERS = 8
# Bytes of shared memory beside the stages: the result on its way out, tables and barriers.
OTHER_SHARED = 2 * 32 * 144 + 256
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
    plain = r == 1 and c == 4 and form.values == 2 and np.array_equal(rows_of(layout)[:M], range(M))
    return "sparse" if plain and order(layout) == tuple(range(8)) else "expanded"


def places(layout):
    """Two words: byte m has the two places that mask m keeps, two bits each."""
    pairs = kept_places(layout).astype(np.uint64)
    word = sum(int(a | b << np.uint64(2)) << 8 * m for m, (a, b) in enumerate(pairs))
    return [word & 0xFFFFFFFF, word >> 32]


def stage_bytes(layout, way):
    """Bytes of a stage: inputs, the weight and, where it stays packed, its index words."""
    folds = layout.columns * tiling(layout).scopes // 16
    inputs = folds * 8 * way.groups * 128
    return inputs + BLOCK_ROWS * 64 + 1024 if way.kernel == "sparse" else (
        inputs + folds * BLOCK_ROWS * 128
    )


def shared_bytes(layout, way):
    """Dynamic shared memory; what is used of it begins on 1024 bytes."""
    form = tiling(layout)
    sums = 8 * way.groups * (BLOCK_ROWS + 4) * 4 if way.splits > 1 else 0
    # Of what is expanded, tiles as they lie in memory.
    tiles = ahead(way) * BLOCK_ROWS // TILE_ROWS * (512 * form.loads + 128 * form.words)
    used = way.depth * stage_bytes(layout, way) + (tiles if way.kernel == "expanded" else 0)
    return max(used, sums) + 1024


def expanders(way):
    """Warps that expand tiles: fewer where the sums take most of the registers."""
    return 0 if way.kernel == "sparse" else 3 if way.groups > 16 else 8


def ahead(way):
    """Tiles of columns on their way to those that expand: fewer where a stage is large."""
    return 2 if way.groups > 16 else 4


def defines(layout, dtype, way):
    """The macros of a way."""
    sparse = way.kernel == "sparse"
    return layout_defines(layout, dtype) | {
        "SPARSE": sparse, "PLACES": places(layout) if sparse else [0, 0], "GROUPS": way.groups,
        "STAGES": way.depth, "SHARING": way.sharing, "SPLITS": way.splits,
        "AHEAD": ahead(way), "EXPANDERS": expanders(way),
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
    """A tensor map, as a launch takes it, and the memory that it lies in."""

    argument: object
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
    from cupy.cuda.function import CPointer

    memory = ctypes.create_string_buffer(128 + 64)
    aligned = -(-ctypes.addressof(memory) // 64) * 64
    rank = len(sizes)
    wide, narrow = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    fault = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned), element, rank, ctypes.c_void_p(address), wide(*sizes),
        wide(*strides), narrow(*box), narrow(*(1,) * rank), 0, swizzle, PROMOTE_256, 0,
    )  # fmt: skip
    if fault:
        raise RuntimeError(f"cuTensorMapEncodeTiled: found error {fault}, expected none")
    return TensorMap(CPointer(aligned), memory)


@lru_cache(maxsize=1)
def _driver():
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def maps(layout, way, operands):
    """Tensor maps of values, index words and inputs."""
    form = tiling(layout)
    o, width = operands, len(columns_of(layout))
    inputs = tensor_map(
        o.inputs, UINT16, (width, o.tokens), (2 * width,),
        (FOLD, 8 * way.groups // way.sharing), SWIZZLE_128,
    )  # fmt: skip
    # What stays packed is multiplied as rows of 32 values; what is expanded is read load by load.
    lines = (32, TILE_ROWS) if way.kernel == "sparse" else (256, form.loads)
    values = _tiles(o.values, UINT16, lines, form.column_tiles, form.row_tiles,
                    SWIZZLE_64 if way.kernel == "sparse" else PLAIN)  # fmt: skip
    groups = -(-form.column_tiles // form.word_tiles)
    index = _tiles(o.index, UINT32, (32, form.words), groups, form.row_tiles, PLAIN)
    return values, index, inputs


def _tiles(address, element, lines, across, down, swizzle):
    """The map of tiles of so many lines: boxes of as many below each other as a block has rows."""
    line = lines[0] * 2 * element
    tile = line * lines[1]
    return tensor_map(
        address, element, (*lines, across, down), (line, tile, tile * across),
        (*lines, 1, BLOCK_ROWS // TILE_ROWS), swizzle,
    )  # fmt: skip


def grid_blocks(layout, way, tokens, processors):
    """Blocks of a launch: all of them where they share columns, else as many as run at once."""
    rows = -(-tiling(layout).row_tiles * TILE_ROWS // BLOCK_ROWS)
    clusters = -(-rows // way.sharing) * -(-tokens // (8 * way.groups))
    if way.splits == 1:
        clusters = min(clusters, max(1, processors // way.sharing))
    return clusters * way.sharing * way.splits


def multiply(kernel, layout, way, operands, processors, stream):
    """Launch the product of a way."""
    form, o = tiling(layout), operands
    found = maps(layout, way, o)
    args = [m.argument for m in found]
    args += [np.uint64(a) for a in (o.bias, o.rows, o.out)]
    args += [np.int32(n) for n in (layout.shape[0], o.tokens, form.row_tiles, form.column_tiles)]
    blocks = grid_blocks(layout, way, o.tokens, processors)
    threads = 32 * (CONSUMERS + 1 + expanders(way))
    shared = shared_bytes(layout, way)
    kernel.kernel((blocks, 1, 1), (threads, 1, 1), tuple(args), shared, stream)


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
