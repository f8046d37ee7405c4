"""Products with packed weights on a GPU: the kernels of `packed.cu`, launched."""

from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import cupy
import numpy as np

from cuobs.ops.cuda import loader, packed_hopper
from cuobs.ops.cuda.packed_layout import columns_of, expands, order, rows_of
from cuobs.ops.cuda.packed_ways import (
    FEW,
    UNPACK,
    Trial,
    Way,
    chosen,
    compiled,
    defines,
    device,
    entry,
    shared_bytes,
    shares,
    turns,
)
from cuobs.ops.packed import LANE_ROWS, tiling

SOURCE = Path(__file__).with_suffix(".cu")
# Dtypes that the kernels take, and from which devices on; others are unpacked by CuPy.
HALVES = ("float16", "bfloat16")
CAPABILITY = 80


def unpack(values, index, layout):
    if not _runs(values, layout):
        return NotImplemented
    rows, columns = tables(layout, values.device.id)
    weight = cupy.empty(layout.shape, values.dtype)
    unpack_into(layout, values.dtype.name, _aligned(values), _aligned(index), rows, columns,
                weight.data.ptr, _current())
    return weight


def packed_matmul(values, index, layout, X, bias=None):
    halves = X.dtype == values.dtype and (bias is None or bias.dtype == X.dtype)
    if not _runs(values, layout) or not halves:
        return NotImplemented
    tokens, dtype, number = len(X), values.dtype.name, values.device.id
    out = cupy.empty((tokens, layout.shape[0]), X.dtype)
    if not tokens:
        return out
    values, index = cupy.ascontiguousarray(values), cupy.ascontiguousarray(index)
    inputs = arranged(X, layout)
    bias = None if bias is None else cupy.ascontiguousarray(bias)
    rows, _ = tables(layout, number)

    def run(way, weight):
        values, index = weight
        if way.kernel == "unpack":
            cupy.matmul(X, unpack(values, index, layout).T, out=out)
            if bias is not None:
                cupy.add(out, bias, out=out)
            return
        room = cupy.empty(room_bytes(layout, way, tokens), np.uint8)
        multiply(layout, dtype, way, Operands(
            values.data.ptr, index.data.ptr, inputs.data.ptr,
            0 if bias is None else bias.data.ptr, out.data.ptr, room.data.ptr, rows, tokens,
        ), _current())  # fmt: skip

    def trial():
        copies = turns(values.nbytes + index.nbytes) - 1
        weights = [(values, index), *((values.copy(), index.copy()) for _ in range(copies))]
        return Trial(run, weights, _record)

    # While the caller captures a graph nothing can be measured.
    capturing = cupy.cuda.get_current_stream().is_capturing()
    run(chosen(layout, dtype, tokens, number, None if capturing else trial), (values, index))
    return out


def _record(function):
    """What a function enqueues, as a graph that keeps its memory to itself."""
    # A new stream each time: one that is kept would record what other threads enqueue on it, and
    # would have to be locked.
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with cupy.cuda.using_allocator(pool.malloc), stream:
        function()  # nothing is allocated while it is captured
        stream.synchronize()  # nor goes on beside what the caller does where that fails
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            function()
        finally:
            graph = stream.end_capture()

    def replay(pool=pool):
        graph.launch(cupy.cuda.get_current_stream())

    return replay


def arranged(X, layout):
    """Inputs in the packed order of the columns, contiguous and with zeros where there are none."""
    columns = columns_of(layout)
    K = layout.shape[1]
    if order(layout) is not None and K == len(columns):
        X = cupy.ascontiguousarray(X)
        return X if X.data.ptr % 16 == 0 else X.copy()
    full = cupy.zeros((len(X), len(columns)), X.dtype)
    if order(layout) is not None:
        full[:, :K] = X
    else:
        places = np.flatnonzero(columns >= 0)
        full[:, cupy.asarray(places)] = X[:, cupy.asarray(columns[places])]
    return full


@lru_cache(maxsize=256)
def _tables(layout, number):
    with cupy.cuda.Device(number):
        return cupy.asarray(rows_of(layout)), cupy.asarray(columns_of(layout))


def tables(layout, number):
    """Addresses of `rows_of` and `columns_of` on a device."""
    return tuple(table.data.ptr for table in _tables(layout, number))


def _runs(values, layout):
    return values.dtype.name in HALVES and supported(layout, values.device.id)


@lru_cache(maxsize=256)
def supported(layout, number):
    """Whether the kernels take a layout on a device."""
    return expands(layout) and device(number).capability >= CAPABILITY


def _aligned(array):
    return cupy.ascontiguousarray(array).data.ptr


def _current():
    return Stream(cupy.cuda.get_current_stream().ptr)


def function(layout, dtype, way, name):
    """A kernel of a way, ready to launch on the current device."""
    return _function(layout, dtype, way, name, cupy.cuda.runtime.getDevice())


@lru_cache(maxsize=1024)
def _function(layout, dtype, way, name, number):
    # Each device has a module of its own, and its own limit of shared memory.
    macros = defines(layout, dtype, way)
    if way.kernel in packed_hopper.KERNELS:
        found = packed_hopper.module(loader.options(macros), number).get_function(name)
    else:
        found = loader.kernel(SOURCE, name, **macros)
    shared = shared_bytes(layout, way)
    if shared > loader.USUAL_SHARED and name == entry(way):
        found.max_dynamic_shared_size_bytes = shared
    return found


class Stream(NamedTuple):
    """A stream by its address, as a launch takes it."""

    ptr: int


class Operands(NamedTuple):
    """Addresses of what a product reads and writes; 0 stands for none.

    Attributes
    ----------
    values, index : int
        Of the packed weight.
    inputs : int
        Of X, (tokens, columns of all tiles), contiguous, on 16 bytes, in packed order.
    bias, out : int
        Of the bias (M,) and the result (tokens, M).
    room : int
        Of so many bytes as `room_bytes` says, on 16.
    rows : int
        Of `rows_of` on the device.
    tokens : int
    """

    values: int
    index: int
    inputs: int
    bias: int
    out: int
    room: int
    rows: int
    tokens: int


def room_bytes(layout, way, tokens):
    """Bytes that a way needs beside its operands: sums of its splits, inputs in another order."""
    if way.kernel == "sparse":
        return packed_hopper.room_bytes(layout, tokens)
    shared = way.kernel == "many" and way.splits > 1
    return 4 * way.splits * tokens * layout.shape[0] if shared else 0


def multiply(layout, dtype, way, operands, stream):
    """Launch the kernels of a way that is not "unpack"."""
    o = operands
    if way.kernel in packed_hopper.KERNELS:
        number = cupy.cuda.runtime.getDevice()
        here = device(number)
        packed_hopper.multiply(
            partial(function, layout, dtype), layout, shares(layout, way, o.tokens, here), o,
            here.processors, number, stream,
        )  # fmt: skip
        return
    named = partial(function, layout, dtype, compiled(way))
    form = tiling(layout)
    M = layout.shape[0]
    per_block = way.tiles * (1 if way.kernel == "few" else way.warps)
    grid = -(-form.row_tiles // per_block), -(-o.tokens // (8 * way.groups)), way.splits
    args = [np.uint64(o.values), np.uint64(o.index), np.uint64(o.inputs),
            np.int64(len(columns_of(layout))), np.uint64(o.bias), np.uint64(o.rows),
            np.uint64(o.out)]  # fmt: skip
    if way.kernel != "few":
        args.append(np.uint64(o.room))
    args += [np.int32(v) for v in (M, o.tokens, form.row_tiles, form.column_tiles)]
    block, shared = (32 * way.warps, 1, 1), shared_bytes(layout, way)
    named(entry(way)).kernel(grid, block, tuple(args), shared, stream)
    if way.splits > 1:
        named("add").kernel(
            (-(-o.tokens * M // 256), 1, 1), (256, 1, 1),
            (np.uint64(o.room), np.uint64(o.bias), np.uint64(o.out), np.int32(M),
             np.int32(o.tokens), np.int32(way.splits)), 0, stream,
        )  # fmt: skip


def slices(layout, count):
    """Tile rows in slices: pairs (first, number), and the rows of each but the last."""
    form = tiling(layout)
    step = -(-form.row_tiles // count)
    parts = [(a, min(step, form.row_tiles - a)) for a in range(0, form.row_tiles, step)]
    return parts, step * LANE_ROWS * form.cells * layout.rows


def unpack_into(layout, dtype, values, index, rows, columns, weight, stream, part=None):
    """Launch the kernel that writes the dense weight (M, K); all arrays by their addresses.

    With a ``part`` (first, number) those tile rows alone are written, where they lie in the weight.
    """
    form = tiling(layout)
    first, count = part or (0, form.row_tiles)
    kernel = function(layout, dtype, UNPACK, "unpack")
    kernel.kernel(
        (-(-form.column_tiles // 8), count, 1), (128, 1, 1),
        (np.uint64(values), np.uint64(index), np.uint64(rows), np.uint64(columns),
         np.uint64(weight), np.int32(layout.shape[1]), np.int32(first),
         np.int32(form.column_tiles)), 0, stream,
    )  # fmt: skip


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    from cuobs.pattern import parse, patterns

    for text in (*patterns(), "2:3", "4:8x1"):
        layout = parse(text).compile(96, 96)
        for dtype in HALVES:
            for way in (FEW[1][0], FEW[4][0], Way("many", 8, 8, 3, 2), UNPACK):
                yield defines(layout, dtype, way)
