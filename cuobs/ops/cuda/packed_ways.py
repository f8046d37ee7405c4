"""Which kernel multiplies how many tokens: the ways that there are, and the one that is fastest.

A way is measured once for a shape, a dtype, a layout and a number of tokens (by powers of two) on a
device, and kept in a file of the user's cache.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

import cuobs
from cuobs import files
from cuobs.ops.cuda import packed_hopper
from cuobs.ops.cuda.packed_layout import (
    MAX_TABLE,
    expansion,
    layout_defines,
    order,
    rows_of,
)
from cuobs.ops.packed import LANE_ROWS, VERSION, tiling


class Way(NamedTuple):
    """One way to multiply: a kernel, what it is compiled with, and how it shares the columns.

    Attributes
    ----------
    kernel : {"few", "many", "sparse", "expanded", "unpack"}
        "sparse" and "expanded" are those of `packed_hopper`; the last unpacks the weight for dense
        products.
    groups : int
        Tokens of a block of threads, in groups of 8.
    warps : int
        Of a block of threads.
    depth : int
        Tiles under way: of a warp in registers, or stages in shared memory.
    tiles : int
        Tile rows of a warp.
    resident : int
        Blocks that a multiprocessor is to hold at once.
    ahead : bool
        Whether the next tiles are loaded before the last ones are multiplied.
    splits : int
        Blocks that share the columns of a tile row: of "many", another kernel adds their sums, of
        those of Hopper, they do so themselves. Of "unpack", slices of rows: what is unpacked is
        multiplied while it is in the cache.
    sharing : int
        Blocks of neighbouring rows that bring in their inputs together.
    rest : int
        Blocks that share the columns of the last rows, see `shares`.
    """

    kernel: str
    groups: int = 0
    warps: int = 4
    depth: int = 2
    tiles: int = 1
    resident: int = 1
    ahead: bool = False
    splits: int = 1
    sharing: int = 1
    rest: int = 1


UNPACK = Way("unpack")
# What was fastest for one shape or another on an H100, by groups of 8 tokens.
FEW = {
    1: (Way("few", 1, 16, 2, 1, 2), Way("few", 1, 8, 4, 1, 2), Way("few", 1, 8, 2, 1, 2, True),
        Way("few", 1, 4, 2, 1, 6)),
    2: (Way("few", 2, 8, 2, 1, 2, True), Way("few", 2, 8, 2, 2, 2), Way("few", 2, 4, 2, 2, 4)),
    4: (Way("few", 4, 8, 1, 2, 2), Way("few", 4, 8, 2, 1, 2), Way("few", 4, 16, 1, 2, 1)),
}
SLICES = (1, 2, 4, 8)
# Blocks of a cluster that share columns. Of some numbers not as many clusters fit as there are
# processors for, since these lie in groups of a few sizes.
SPLITS = (8, 6, 4, 3, 2, 1)
MIN_STAGES, MAX_STAGES = 3, 9


class Device(NamedTuple):
    """What decides which ways a device has: its name, 90 for 9.0, and its sizes."""

    name: str
    capability: int
    processors: int
    shared: int


@lru_cache(maxsize=16)
def device(number):
    """The device of a number."""
    from cupy.cuda import runtime

    found = runtime.getDeviceProperties(number)
    return Device(
        found["name"].decode(), found["major"] * 10 + found["minor"],
        found["multiProcessorCount"], found["sharedMemPerBlockOptin"],
    )  # fmt: skip


def ways(layout, tokens, device):
    """The ways that may serve so many tokens; the first is taken where none was measured."""
    groups = next((g for g in (1, 2, 4, 8, 16) if tokens <= 8 * g), 32)
    room = device.shared - 4 * MAX_TABLE
    found = [way for way in FEW.get(groups, ()) if shared_bytes(layout, way) <= room]
    if groups >= 4:
        found += _hopper_ways(layout, groups, tokens, device) or _many_ways(
            layout, groups, tokens, device
        )
    if groups > 4 or not found:
        found += [UNPACK._replace(splits=n) for n in SLICES if n == 1 or sliced(layout)]
    return found


@lru_cache(maxsize=256)
def sliced(layout):
    """Whether each tile row holds neighbouring rows, so that slices of them can be multiplied."""
    height = LANE_ROWS * tiling(layout).cells * layout.rows
    tiles = rows_of(layout).reshape(-1, height)
    expected = np.arange(tiles.size).reshape(tiles.shape)
    expected[expected >= layout.shape[0]] = -1
    return np.array_equal(np.sort(tiles, axis=1), np.sort(expected, axis=1))


def _many_ways(layout, groups, tokens, device):
    """Ways of the kernel that brings inputs into shared memory, in stages."""
    form = tiling(layout)
    way = Way("many", groups, 8, 0, 2)
    stages = min(MAX_STAGES, (device.shared - 4 * MAX_TABLE) // shared_bytes(
        layout, way._replace(depth=1)))  # fmt: skip
    if stages < MIN_STAGES or groups > 8:
        return []
    blocks = -(-form.row_tiles // (way.warps * way.tiles)) * -(-tokens // (8 * groups))
    splits = device.processors // blocks
    return [
        way._replace(depth=stages, splits=n)
        for n in sorted({max(1, splits), max(1, splits // 2)}, reverse=True)
        if n <= form.column_tiles
    ]


def _hopper_ways(layout, groups, tokens, device):
    """Ways of Hopper's kernels: tokens of a block, and who shares its columns or its inputs."""
    kernel = packed_hopper.kernel_of(layout)
    if device.capability != 90 or kernel is None:
        return []
    form = tiling(layout)
    rows = -(-form.row_tiles // 8)
    found = []
    for size in dict.fromkeys((groups, max(4, groups // 2))):
        blocks = rows * -(-tokens // (8 * size))
        splits = _splits(form, blocks, device.processors)
        found += [Way(kernel, size, splits=n) for n in splits]
        if splits in ([], [1]):
            alone = [Way(kernel, size, sharing=n) for n in (2, 4, 1) if n <= rows]
            found += alone
            found += [way._replace(rest=n) for way in alone if way.sharing < 4 and size == groups
                      for n in _rests(layout, way, tokens, device)]  # fmt: skip
        # Two blocks of few tokens have room beside each other; one would often wait for itself.
        if size == groups <= 8:
            splits = _splits(form, blocks, 2 * device.processors)
            found += [Way(kernel, size, splits=n, resident=2) for n in splits]
    deep = [deepest(layout, way, device) for way in dict.fromkeys(found)]
    return [way for way in deep if way.depth >= MIN_STAGES]


class Share(NamedTuple):
    """What one launch of Hopper's kernels does: so many blocks of rows, from one on, in one way."""

    way: Way
    first: int
    count: int


@lru_cache(maxsize=4096)
def shares(layout, way, tokens, device):
    """The launches of one of Hopper's ways.

    Blocks of threads multiply one part of the result after the other. Where the last parts would
    occupy few of them, the rows of these are a launch of their own, in which ``way.rest`` blocks
    share the columns.
    """
    rows = packed_hopper.row_blocks(layout)
    full = _full_rows(layout, way, tokens, device)
    main = way._replace(rest=1)
    if way.rest == 1 or way.rest not in _rests(layout, main, tokens, device):
        return [Share(main, 0, rows)]
    last = deepest(layout, Way(way.kernel, way.groups, splits=way.rest), device)
    return [Share(main, 0, full), Share(last, full, rows - full)]


def _full_rows(layout, way, tokens, device):
    """Blocks of rows whose parts keep all processors busy for whole rounds."""
    columns = -(-tokens // (8 * way.groups))
    room = device.processors // way.sharing
    clusters = -(-packed_hopper.row_blocks(layout) // way.sharing)
    return clusters * columns // room * room // columns * way.sharing


def _rests(layout, way, tokens, device):
    """Into how many parts the columns of the last rows may be split."""
    full = _full_rows(layout, way, tokens, device)
    blocks = (packed_hopper.row_blocks(layout) - full) * -(-tokens // (8 * way.groups))
    if not full or blocks <= 0 or layout.shape[0] % packed_hopper.BLOCK_ROWS:
        return []
    most = min(device.processors // blocks, tiling(layout).column_tiles)
    return [n for n in SPLITS if 1 < n <= most][:1]


def _splits(form, blocks, room):
    """Into how many parts the columns may be split where there is room for so many blocks."""
    most = min(5 * room // 4 // blocks, form.column_tiles)
    return [n for n in SPLITS if n <= most][:3]


def deepest(layout, way, device):
    """A way of Hopper's with as many stages as a multiprocessor's shared memory has room for."""
    # What a block may have, and a kilobyte that it takes beside that.
    room = (device.shared + 1024) // way.resident - 1024 - packed_hopper.OTHER_SHARED
    if way.kernel == "expanded":
        room -= 4 * expansion(layout).table.size
    beside = packed_hopper.shared_bytes(layout, way._replace(depth=0, splits=1))
    stages = (room - beside) // packed_hopper.stage_bytes(layout, way)
    return way._replace(depth=min(MAX_STAGES, stages))


def shared_bytes(layout, way):
    """Dynamic shared memory of a way."""
    if way.kernel == "unpack":
        return 0
    if way.kernel in packed_hopper.KERNELS:
        return packed_hopper.shared_bytes(layout, way)
    if way.kernel == "few":  # the sums of all its warps
        slots = layout.rows * tiling(layout).cells
        return way.warps * way.tiles * way.groups * slots * 2 * 32 * 4
    form = tiling(layout)
    width = layout.columns * form.scopes
    pieces = way.groups * width // 8 * 32
    own = way.warps * way.tiles * (form.loads * 32 + form.words * 8)
    return way.depth * (pieces + own) * 16


def entry(way):
    """The kernel of a way, by its name in the source."""
    return "product" if way.kernel in packed_hopper.KERNELS else way.kernel


def compiled(way):
    """A way as it is compiled: some kernels know their splits by the size of the grid."""
    return way if way.kernel in packed_hopper.KERNELS else way._replace(splits=1)


def programs(layout, way, tokens, device):
    """The ways that are compiled for one."""
    if way.kernel not in packed_hopper.KERNELS:
        return [compiled(way)]
    return [share.way for share in shares(layout, way, tokens, device)]


def defines(layout, dtype, way):
    """The macros of a way."""
    if way.kernel in packed_hopper.KERNELS:
        return packed_hopper.defines(layout, dtype, way)
    common = layout_defines(layout, dtype)
    if way.kernel == "unpack":
        return common | {"UNPACK": 1, "WARPS": 4, "AHEAD": 2, "WHOLE": whole(layout)}
    common |= {"GROUPS": way.groups, "WARPS": way.warps, "RESIDENT": way.resident}
    if way.kernel == "few":
        return common | {
            "FEW": 1, "TILES": way.tiles, "AHEAD": way.depth, "PREFETCH": way.ahead,
        }
    return common | {"MANY": 1, "TILES": way.tiles, "STAGES": way.depth}


def whole(layout):
    """Whether `unpack` can write 8 neighbouring columns at once."""
    form = tiling(layout)
    r, c = layout.rows, layout.columns
    tile = 8 * r * form.cells * (8 * c * form.scopes + 16)
    return order(layout) is not None and layout.shape[1] % 8 == 0 and 4 * tile <= 40 * 1024


def chosen(layout, dtype, tokens, number, trial=None):
    """The way for so many tokens on a device.

    Parameters
    ----------
    layout : Layout
    dtype : {"float16", "bfloat16"}
    tokens : int
    number : int
        Of the device.
    trial : callable, optional
        Gives a `Trial` of the product. Without it nothing is measured, and what was measured
        before, or the first way that there is, is taken.
    """
    tokens = _class(tokens)
    known = _known(layout, dtype, tokens, number)
    if known:
        return known[0]
    found = ways(layout, tokens, device(number))
    if len(found) == 1:
        known.append(found[0])
    elif trial is None:
        return found[0]
    else:
        known.append(_recall(layout, dtype, tokens, number, found) or
                     _measure(layout, dtype, tokens, number, found, trial()))
    return known[0]


def known(layout, dtype, tokens, number):
    """The way for so many tokens, where it is known already, or None."""
    return next(iter(_known(layout, dtype, _class(tokens), number)), None)


def _class(tokens):
    return 1 << max(3, (tokens - 1).bit_length())


@lru_cache(maxsize=4096)
def _known(layout, dtype, tokens, number):
    """A list that holds the way once it is known."""
    return []


def _key(layout, dtype, tokens, number):
    pattern = hashlib.sha256(repr((layout.blocks.tolist(), layout.keep, order(layout))).encode())
    M, K = layout.shape
    return f"{device(number).name} {M}x{K} {dtype} {pattern.hexdigest()[:12]} {tokens}"


def cache_path():
    """The file that keeps what was measured, of this release and this order of the bytes."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(folder, "cuobs", f"packed-{cuobs.__version__}-{VERSION}.json")


def _stored():
    with contextlib.suppress(OSError, ValueError), open(cache_path()) as file:
        return dict(json.load(file))
    return {}


def _recall(layout, dtype, tokens, number, found):
    stored = _stored().get(_key(layout, dtype, tokens, number))
    return next((way for way in found if list(way) == stored), None)


class Trial(NamedTuple):
    """A product that can be measured.

    Attributes
    ----------
    run : callable
        Enqueues it, by a way and with a weight, on the current stream.
    weights : list
        Copies of the weight, which take turns, as those of a model do: see `turns`.
    record : callable
        Captures what a function enqueues as a CUDA graph; gives what replays it on the current
        stream. RuntimeError or NotImplementedError where that can't be done.
    """

    run: Callable
    weights: list
    record: Callable


# Products in a graph, at least, of few and of many tokens; replays; how near to the fastest a way
# has to be to be timed again, and how often.
PRODUCTS = 8, 2
REPLAYS, NEAR, AGAIN = 5, 1.1, 2


def turns(size):
    """Weights of so many bytes that take turns, so that none finds itself in the L2 cache.

    Fewer where their copies would take more than half of the memory that is free.
    """
    return max(1, min(16, -(-3 * _cache_bytes() // size), 1 + _free_bytes() // 2 // size))


def _free_bytes():
    from cupy.cuda import runtime

    return runtime.memGetInfo()[0]


def _cache_bytes():
    from cupy.cuda import runtime

    return runtime.getDeviceProperties(runtime.getDevice())["l2CacheSize"]


def _measure(layout, dtype, tokens, number, found, trial):
    """The fastest way, kept in the file where that can be written."""
    best = _fastest(trial, found, PRODUCTS[tokens > 256])
    path = cache_path()
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        stored = _stored() | {_key(layout, dtype, tokens, number): list(best)}
        files.write_text(path, json.dumps(stored, indent=1, sort_keys=True) + "\n", force=True)
    return best


def _fastest(trial, found, products):
    """The fastest way; those that come near to it are timed again in turn, and count by their best.

    A device's clocks change meanwhile, by more than ways differ.
    """

    def timed(seconds):
        best = {way: seconds(trial, way, products) for way in found}
        near = [way for way in found if best[way] <= NEAR * min(best.values())]
        for way in AGAIN * near if len(near) > 1 else ():
            best[way] = min(best[way], seconds(trial, way, products))
        return min(near, key=best.get)

    try:
        return timed(_graph_seconds)
    except (RuntimeError, NotImplementedError):  # no graph can be captured here
        return timed(_event_seconds)


def _graph_seconds(trial, way, products):
    """The time of a product in a CUDA graph, with weights in turn."""
    rounds = -(-products // len(trial.weights))
    trial.run(way, trial.weights[0])

    def enqueue():
        for _ in range(rounds):
            for weight in trial.weights:
                trial.run(way, weight)

    replay = trial.record(enqueue)
    replay()
    return _median(lambda: None, replay, REPLAYS) / (rounds * len(trial.weights))


def _event_seconds(trial, way, products):
    """The time of a product by itself, with nothing of it in the L2 cache."""
    import cupy

    trial.run(way, trial.weights[0])
    size = 2 * _cache_bytes()
    other = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
    stream = cupy.cuda.get_current_stream()
    # Empties the cache, and gives the host the time to launch what is timed.
    return _median(lambda: other.memset_async(0, size, stream),
                   lambda: trial.run(way, trial.weights[0]), 3 * REPLAYS)  # fmt: skip


def _median(prepare, enqueue, repeats):
    """The median time of what is enqueued on the current stream, each time after something else."""
    import cupy

    times = []
    for _ in range(repeats):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        prepare()
        start.record()
        enqueue()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return float(np.median(times))
