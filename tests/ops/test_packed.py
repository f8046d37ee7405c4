"""Packed weights: the bytes, the products, and the kernels beside the NumPy body."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuobs import arrays
from cuobs.ops import packed
from cuobs.ops.cuda import packed_hopper, packed_layout, packed_ways
from cuobs.pattern import parse

ROWS = "view=(M/2,2,K):(2K,K,1) block=(1,1,1) scope=(1,2,4) keep=5"
HALVES = "view=(M,2,K/2):(K,K/2,1) block=(1,1,1) scope=(1,2,2) keep=2"
PATTERNS = ["2:4", "4:8", "coupled-2:4", "block16-row8", "2:3", "3:4", "4:8x1", "1:2", "2:4x16",
            "1:128", "127:128", ROWS, HALVES]  # fmt: skip
# Rows and columns that a pattern divides, and that no tile does.
UNEVEN = {"block16-row8": (48, 80), "2:3": (19, 87), "2:4x16": (5, 192), "1:128": (3, 256),
          "127:128": (2, 256), "coupled-2:4": (21, 144)}  # fmt: skip


def shape_of(text):
    return UNEVEN.get(text, (22, 72))


def random_weight(layout, rng, dtype=np.float16, fill=1.0):
    """A weight that keeps random blocks of each scope, some of them 0 too."""
    kept = ~layout.candidates[rng.integers(len(layout.candidates),
                                           size=(layout.row_groups, layout.column_groups))]
    kept = kept.transpose(0, 2, 1, 3).reshape(layout.shape)
    values = rng.standard_normal(layout.shape) * (rng.random(layout.shape) < fill)
    W = np.zeros(layout.shape, dtype)
    W[np.ix_(layout.row_order.ravel(), layout.column_order.ravel())] = np.where(kept, values, 0)
    return W


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("text", PATTERNS)
def test_unpack_gives_back_what_was_packed(text, dtype):
    layout = parse(text).compile(*shape_of(text))
    for fill in (1.0, 0.6, 0.0):
        W = random_weight(layout, np.random.default_rng(0), dtype, fill)
        values, index = packed.pack(W, layout)
        form = packed.tiling(layout)
        assert values.shape == form.values_shape and index.shape == form.index_shape
        assert values.dtype == dtype and index.dtype == np.int32
        np.testing.assert_array_equal(packed.unpack(values, index, layout), W)


@settings(max_examples=60, deadline=None)
@given(
    keep=st.integers(1, 6), blocks=st.integers(2, 8), width=st.integers(1, 5),
    rows=st.integers(1, 40), scopes=st.integers(1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_pattern_and_shape(keep, blocks, width, rows, scopes, seed):
    keep = min(keep, blocks - 1)
    layout = parse(f"{keep}:{blocks}x{width}").compile(rows, scopes * blocks * width)
    W = random_weight(layout, np.random.default_rng(seed), fill=0.8)
    values, index = packed.pack(W, layout)
    np.testing.assert_array_equal(packed.unpack(values, index, layout), W)


def test_bits_are_kept():
    """NaN, infinities and -0.0 where they are kept; of bfloat16 too, by its bits."""
    W = np.array([[np.nan, 0, -np.inf, 0, 0, -0.0, 1, 2]], np.float16)
    layout = parse("2:4").compile(1, 8)
    back = packed.unpack(*packed.pack(W.view(np.uint16), layout), layout)
    expected = W.view(np.uint16).copy()
    expected[0, 5] = 0  # a pruned -0.0 is 0.0
    np.testing.assert_array_equal(back, expected)


def test_where_a_value_lies():
    """The place of each value and index by the formula of the documentation, 2:4."""
    M, K = 32, 128
    layout = parse("2:4").compile(M, K)
    W = random_weight(layout, np.random.default_rng(1))
    values, index = packed.pack(W, layout)
    assert values.shape == (2, 2, 2, 32, 8) and index.shape == (2, 2, 1, 32)
    masks = [(2, 3), (1, 3), (1, 2), (0, 3), (0, 2), (0, 1)]  # kept places, by number
    for row in range(M):
        for scope in range(K // 4):
            lane = row % 8 * 4 + scope % 16 // 4
            cell = row // 8 % 2
            word = int(index[row // 16, scope // 16, 0, lane]) & 0xFFFFFFFF
            mask = word >> (cell * 4 + scope % 4) * 4 & 15
            for n, place in enumerate(masks[mask]):
                found = values[row // 16, scope // 16, cell, lane, scope % 4 * 2 + n]
                assert found == W[row, scope * 4 + place]


@pytest.mark.parametrize(
    "text, share", [("2:4", 0.5625), ("4:8", 0.53125), ("coupled-2:4", 0.53125),
                    ("block16-row8", 0.501953125)],
)  # fmt: skip
def test_bytes(text, share):
    """Of those of the dense weight in half precision."""
    form = packed.tiling(parse(text).compile(4096, 4096))
    found = 2 * math.prod(form.values_shape) + 4 * math.prod(form.index_shape)
    assert found / (2 * 4096 * 4096) == share


def test_broken_scopes_are_refused(xp):
    W = np.ones((4, 16), np.float32)
    W[:, 8:] = 0
    layout = parse("2:4").compile(4, 16)
    with pytest.raises(ValueError, match="more than 2 of 4 blocks kept in 8 of 16 scopes"):
        packed.pack(xp.asarray(W), layout)


def test_too_many_masks():
    layout = parse("8:16").compile(4, 32)
    with pytest.raises(ValueError, match="found 12870 masks of a scope, expected at most 128"):
        packed.pack(np.zeros((4, 32)), layout)


@pytest.mark.parametrize("text", PATTERNS)
def test_products(text):
    layout = parse(text).compile(*shape_of(text))
    rng = np.random.default_rng(0)
    W = random_weight(layout, rng, np.float32)
    values, index = packed.pack(W, layout)
    X = rng.standard_normal((5, layout.shape[1])).astype(np.float32)
    bias = rng.standard_normal(len(W)).astype(np.float32)
    expected = X.astype(np.float64) @ W.T.astype(np.float64) + bias
    found = packed.packed_matmul(values, index, layout, X, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert packed.packed_matmul(values, index, layout, X[:0]).shape == (0, len(W))


def permuted_bytes(value, selector):
    """``__byte_perm(value, 0, selector)``."""
    source = value.to_bytes(4, "little") + bytes(4)
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


@pytest.mark.parametrize("text", [t for t in PATTERNS if ":128" not in t])
def test_expansion_by_steps(text):
    """The steps that the kernels are compiled with, done one by one for one lane's cell."""
    layout = parse(text).compile(*shape_of(text))
    assert packed_layout.expands(layout)
    form, plan = packed.tiling(layout), packed_layout.expansion(layout)
    r, c = layout.rows, layout.columns
    rng = np.random.default_rng(3)
    masks = rng.integers(len(layout.candidates), size=form.scopes)
    values = rng.integers(1, 1 << 16, size=form.scopes * form.values)
    expected = np.zeros((r, c * form.scopes), int)
    for s, mask in enumerate(masks):
        for n, place in enumerate(packed.kept_places(layout)[mask]):
            expected[place // c, s * c + place % c] = values[s * form.values + n]
    pairs = [0] * (r * c * form.scopes // 2)
    for s, mask in enumerate(masks):
        for to, register, which in plan.steps[plan.first[s] : plan.first[s + 1]]:
            two = int(values[2 * register] | values[2 * register + 1] << 16)
            selector = int(plan.table[mask, which // 2]) >> which % 2 * 16 & 0xFFFF
            pairs[to] |= permuted_bytes(two, selector)
    found = np.array([[p & 0xFFFF, p >> 16] for p in pairs]).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)


def test_order_of_the_inputs():
    """Where a lane's columns are neighbours the kernels read inputs as they lie."""
    assert packed_layout.order(parse("2:4").compile(16, 128)) == tuple(range(8))
    assert packed_layout.order(parse("coupled-2:4").compile(16, 128)) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert packed_layout.order(parse(HALVES).compile(8, 64)) is None


def test_slices_of_rows():
    assert packed_ways.sliced(parse("2:4").compile(40, 64))
    assert packed_ways.sliced(parse("block16-row8").compile(48, 64))
    assert packed_ways.sliced(parse(ROWS).compile(22, 72))
    apart = "view=(2,24,K):(24K,K,1) block=(1,1,1) scope=(2,1,4) keep=4"
    assert not packed_ways.sliced(parse(apart).compile(48, 64))


H100 = packed_ways.Device("H100", 90, 132, 227 * 1024)
A100 = packed_ways.Device("A100", 80, 108, 163 * 1024)
RTX = packed_ways.Device("RTX", 89, 128, 99 * 1024)


@pytest.mark.parametrize("device", [H100, A100, RTX])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("text", [t for t in PATTERNS if ":128" not in t])
def test_ways_fit_the_device(text, large, device):
    layout = parse(text).compile(*(4096, 6144) if large else shape_of(text))
    for tokens in (1, 8, 9, 16, 17, 33, 64, 65, 200, 257, 5000):
        found = packed_ways.ways(layout, tokens, device)
        assert found and len(set(found)) == len(found)
        for way in found:
            shared = packed_ways.shared_bytes(layout, way)
            if way.kernel in packed_hopper.KERNELS:
                assert device is H100 and way.depth >= 3 and way.sharing * way.splits <= 8
                # Results, barriers of both rings, a table.
                static = 2 * 32 * 144 + 16 * (way.depth + packed_hopper.ahead(layout, way))
                assert static <= packed_hopper.OTHER_SHARED
                static += 4 * packed_layout.expansion(layout).table.size
                assert shared + static <= device.shared
            elif way.kernel == "many":
                assert shared + 8 * 1024 <= device.shared
            most = packed.tiling(layout).column_tiles
            assert 1 <= way.splits <= (8 if way.kernel == "unpack" else most)
        assert (packed_ways.UNPACK in found) == (tokens > 32)


def test_which_kernel_of_hopper():
    """Tiles of 16 neighbouring rows and whole 64 columns; results are written 8 rows at a time."""
    found = {text: packed_hopper.kernel_of(parse(text).compile(4096, 6144))
             for text in ("2:4", "4:8", "coupled-2:4", "block16-row8", "1:4", "2:3", ROWS)}
    assert found == {"2:4": "sparse", "4:8": "sparse", "coupled-2:4": "sparse",
                     "block16-row8": "expanded", "1:4": "expanded", "2:3": None, ROWS: "expanded"}
    assert packed_hopper.kernel_of(parse("2:4").compile(1000, 64)) == "sparse"
    assert packed_hopper.kernel_of(parse("2:4").compile(1001, 64)) is None
    apart = "view=(M/2,2,K):(2K,K,1) block=(1,1,1) scope=(1,1,4) keep=2"
    assert packed_hopper.kernel_of(parse(apart).compile(64, 64)) in ("sparse", "expanded")


@pytest.mark.parametrize("text", ["2:4", "4:8", "coupled-2:4"])
def test_what_sparse_tensor_cores_read(text):
    """A lane's rows of 16 columns, from the values and places that they are given."""
    layout = parse(text).compile(16, 64)
    rng = np.random.default_rng(0)
    W = random_weight(layout, rng, np.float32)
    values, index = packed.pack(W, layout)
    macros = packed_hopper.sparse_defines(layout)
    places = [macros["PLACES"][m // 4] >> 8 * (m % 4) & 0xFF for m in range(6)]
    for lane in range(32):
        word = int(index[0, 0, 0, lane]) & 0xFFFFFFFF
        masks = [word >> 4 * n & 15 for n in range(8)]
        # As the kernel does it: bytes by masks, put together.
        chosen = [places[m] for m in masks[: 4 if macros["SPREAD"] else 8]]
        if macros["SPREAD"] == 0:
            chosen = [chosen[n] | chosen[n + 1] << 4 for n in range(0, 8, 2)]
        if macros["SPREAD"] == 2:
            chosen = [chosen[n // 2 * 2] | chosen[n // 2 * 2 + 1] << 4 for n in range(4)]
        for q in range(2):
            kept = values[0, 0, q, lane][list(macros["VALUE_ORDER"])]
            found = np.zeros(16, np.float32)
            for n in range(8):  # two of each four, the places of a value in two bits
                place = chosen[2 * q + n // 4] >> 2 * (n % 4) & 3
                found[n // 2 * 4 + place] = kept[n]
            own = W[lane // 4 + 8 * q, lane % 4 * 16 :][:16]
            if macros["SPLIT"]:
                own = own.reshape(2, 4, 2).transpose(0, 2, 1).ravel()
            np.testing.assert_array_equal(found, own)


def test_what_begins_early_reads_no_cache_of_constants():
    """Which may hold what was there before the kernel that it did not wait for to begin.

    The compiler moves such loads to before the wait, too. What "few" has of them is launched
    plainly.
    """
    source = packed_hopper.SOURCE.read_text()
    assert source.count("griddepcontrol.wait") == source.count("griddepcontrol.launch") == 2
    for word in ("__ldg", "__restrict__", "global.nc", "stream("):
        assert word not in source
    assert "griddepcontrol" not in (packed_hopper.SOURCE.parent / "packed.cu").read_text()


def test_blocks_of_hopper():
    """As many as run at once, or all where they add up among themselves."""
    layout = parse("2:4").compile(1000, 4096)
    way = packed_ways.Way("sparse", 4)
    rows = packed_hopper.row_blocks(layout)
    assert rows == 8
    assert packed_hopper.grid_blocks(way, rows, 33, 132) == 8 * 2
    assert packed_hopper.grid_blocks(way._replace(splits=4), rows, 33, 132) == 8 * 2 * 4
    assert packed_hopper.grid_blocks(way._replace(sharing=2), rows, 4096, 133) == 132


@pytest.mark.parametrize("text", ["2:4", "block16-row8"])
def test_the_last_rows_share_columns(text):
    """Rows that fill the processors whole times, and the rest: together all, and each once."""
    layout = parse(text).compile(14336, 4096)
    found = [way for way in packed_ways.ways(layout, 1024, H100) if way.rest > 1]
    assert {way.sharing for way in found} == {1, 2}
    for way in found:
        main, last = packed_ways.shares(layout, way, 1024, H100)
        assert (main.first, main.count + last.count) == (0, 112) and last.first == main.count
        parts = main.count // way.sharing * 4
        assert parts <= 3 * (132 // way.sharing) < parts + 4
        assert last.way.splits == way.rest and last.way.sharing == 1
        assert 66 < last.count * 4 * way.rest <= 132
        assert packed_ways.programs(layout, way, 1024, H100) == [main.way, last.way]
        # Of fewer tokens, where there is nothing to win: as without.
        assert packed_ways.shares(layout, way, 100, H100) == [(main.way, 0, 112)]
    for M, tokens in ((4096, 1024), (14336 + 64, 1024), (14336, 64)):
        layout = parse(text).compile(M, 4096)
        assert all(way.rest == 1 for way in packed_ways.ways(layout, tokens, H100))


@pytest.mark.parametrize("kernel", ["many", "sparse"])
def test_each_device_has_a_kernel_of_its_own(kernel, monkeypatch):
    """What a device allows of shared memory, and what it has loaded, is not another's."""
    cupy = pytest.importorskip("cupy")
    from cuobs.ops.cuda import packed as kernels

    here, allowed, loaded = [0], [], []

    class Kernel:
        def __setattr__(self, name, value):
            allowed.append((name, here[0], value))

    class Module:
        def __init__(self, path):
            self.path = path

        def compile(self):
            loaded.append((here[0], Path(self.path).read_bytes()))

        def get_function(self, name):
            return Kernel()

    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: here[0])
    monkeypatch.setattr(cupy, "RawModule", Module)
    monkeypatch.setattr(packed_hopper, "_binary", lambda options: b"code")
    monkeypatch.setattr(kernels.loader, "kernel", lambda *args, **macros: Kernel())
    layout = parse("2:4").compile(128, 256)
    way = packed_ways.Way(kernel, 8, 8, 5, 2, splits=7)  # no other test's
    for here[0] in (0, 1, 1, 0):
        kernels.function(layout, "float16", way, packed_ways.entry(way))
    kernels._function.cache_clear()
    packed_hopper.module.cache_clear()
    shared = packed_ways.shared_bytes(layout, way)
    assert shared > kernels.loader.USUAL_SHARED
    assert allowed == [("max_dynamic_shared_size_bytes", n, shared) for n in (0, 1)]
    assert loaded == ([] if kernel == "many" else [(0, b"code"), (1, b"code")])


def test_a_measured_way_is_kept(tmp_path, monkeypatch):
    """One measurement a shape, kept in a file; a file that is damaged is measured again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packed_ways, "device", lambda number: H100)
    seconds = {}
    monkeypatch.setattr(packed_ways, "_graph_seconds", lambda trial, way, products: seconds[way])
    layout = parse("2:4").compile(64, 1024)
    found = packed_ways.ways(layout, 8, H100)
    seconds.update({way: 2.0 for way in found} | {found[1]: 1.0})
    packed_ways._known.cache_clear()
    assert packed_ways.chosen(layout, "float16", 5, 0) == found[0]  # nothing may be measured
    assert packed_ways.chosen(layout, "float16", 5, 0, print) == found[1]
    seconds.clear()
    packed_ways._known.cache_clear()
    assert packed_ways.chosen(layout, "float16", 8, 0, print) == found[1]
    with open(packed_ways.cache_path(), "w") as file:
        file.write("{")
    packed_ways._known.cache_clear()
    seconds.update({way: 2.0 for way in found} | {found[2]: 1.0})
    assert packed_ways.chosen(layout, "float16", 8, 0, print) == found[2]
    packed_ways._known.cache_clear()


def test_ways_that_come_near_are_timed_again(monkeypatch):
    """In turn, and count by their best; where no graph can be captured all are timed by events."""
    times = {"a": [1.0, 1.2, 1.1], "b": [1.08, 1.1, 0.9], "c": [1.2]}
    order = []
    monkeypatch.setattr(packed_ways, "_graph_seconds",
                        lambda trial, way, n: order.append(way) or times[way].pop(0))
    assert packed_ways._fastest(None, ["a", "b", "c"], 8) == "b"
    assert "".join(order) == "abcabab"
    times = {"a": [1.0], "b": [1.2]}
    assert packed_ways._fastest(None, ["a", "b"], 8) == "a"

    def refuse(function):
        raise RuntimeError("captured by another")

    monkeypatch.undo()
    monkeypatch.setattr(packed_ways, "_event_seconds", lambda trial, way, n: {"a": 2, "b": 1}[way])
    ran = []
    trial = packed_ways.Trial(lambda way, weight: ran.append((way, weight)), [0], refuse)
    assert packed_ways._fastest(trial, ["a", "b"], 8) == "b" and ran == [("a", 0)]


def test_weights_that_take_turns(monkeypatch):
    monkeypatch.setattr(packed_ways, "_cache_bytes", lambda: 50)
    monkeypatch.setattr(packed_ways, "_free_bytes", lambda: 10**6)
    assert [packed_ways.turns(size) for size in (1, 10, 50, 51, 149, 150, 1000)] == [
        16, 15, 3, 3, 2, 1, 1]  # fmt: skip
    monkeypatch.setattr(packed_ways, "_free_bytes", lambda: 45)
    assert [packed_ways.turns(size) for size in (1, 10, 50)] == [16, 3, 1]


@pytest.fixture
def cupy():
    if fault := arrays.cupy_fault():
        pytest.skip(fault)
    return __import__("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("text", PATTERNS)
def test_kernels_beside_the_body(text, cupy):
    layout = parse(text).compile(*shape_of(text))
    rng = np.random.default_rng(0)
    W = random_weight(layout, rng)
    host = packed.pack(W, layout)
    on_device = packed.pack(cupy.asarray(W), layout)
    for a, b in zip(host, on_device, strict=True):
        np.testing.assert_array_equal(a, b.get())
    np.testing.assert_array_equal(packed.unpack(*on_device, layout).get(), W)
    bias = rng.standard_normal(len(W)).astype(np.float16)
    for tokens in (0, 1, 7, 8, 9, 16, 31, 33, 64, 65, 130, 300):
        X = rng.standard_normal((tokens, W.shape[1])).astype(np.float16)
        expected = X.astype(np.float64) @ W.T.astype(np.float64) + bias
        found = packed.packed_matmul(*on_device, layout, cupy.asarray(X), cupy.asarray(bias))
        np.testing.assert_allclose(found.get(), expected, rtol=2e-3, atol=2e-2)


def halves_of(dtype):
    """Functions that give the bits of float32 in half precision, and bits as float64."""
    if dtype == "float16":
        return (lambda a: a.astype(np.float16).view(np.uint16),
                lambda a: a.view(np.float16).astype(np.float64))  # fmt: skip
    return (lambda a: (a.view(np.uint32) + 0x8000 >> 16).astype(np.uint16),
            lambda a: (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["2:4", "coupled-2:4", "block16-row8", "4:8", "2:4x16", ROWS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_way_gives_the_product(text, dtype, cupy):
    from cuobs.ops.cuda import packed as kernels

    rng = np.random.default_rng(0)
    layout = parse(text).compile(*{"block16-row8": (272, 1040)}.get(text, (262, 1088)))
    W = random_weight(layout, rng, np.float32)
    X = rng.standard_normal((70, layout.shape[1])).astype(np.float32)
    half, wide = halves_of(dtype)
    W, X = half(W), half(X)
    expected = wide(X) @ wide(W).T
    values, index = packed.pack(cupy.asarray(W), layout)
    inputs = kernels.arranged(cupy.asarray(X), layout)
    rows, _ = kernels.tables(layout, 0)
    for limit in (1, 8, 16, 32, 64, 70):
        for way in packed_ways.ways(layout, limit, packed_ways.device(0)):
            if way.kernel == "unpack":
                continue
            for splits in {1, min(3, packed.tiling(layout).column_tiles)} if (
                way.kernel == "many") else {way.splits}:
                way = way._replace(splits=splits)
                out = cupy.full((limit, len(W)), 0x7E00, np.uint16)
                room = cupy.full(kernels.room_bytes(layout, way, limit), 0xFF, np.uint8)
                kernels.multiply(layout, dtype, way, kernels.Operands(
                    values.data.ptr, index.data.ptr, inputs.data.ptr, 0, out.data.ptr,
                    room.data.ptr, rows, limit,
                ), kernels.Stream(cupy.cuda.get_current_stream().ptr))  # fmt: skip
                error = np.linalg.norm(wide(out.get()) - expected[:limit])
                assert error <= 4e-3 * np.linalg.norm(expected[:limit]), way


# Of groups of 8 tokens: blocks that share columns, that share inputs, that are beside each other.
TOGETHER = {
    4: ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4)), 8: ((2, 1), (1, 2), (2, 1, 2)),
    16: ((1, 1), (1, 4)), 32: ((1, 1), (4, 1), (1, 2)),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("text, dtype", [("2:4", "float16"), ("2:4", "bfloat16"),
                                         ("4:8", "float16"), ("4:8", "bfloat16"),
                                         ("coupled-2:4", "float16"), ("1:4", "bfloat16"),
                                         ("block16-row8", "float16"), (ROWS, "float16")])
def test_blocks_of_hopper_that_work_together(text, dtype, cupy):
    """Blocks that share columns, or their inputs, on shapes that fill none; nothing is left out."""
    from cuobs.ops.cuda import packed as kernels

    device = packed_ways.device(0)
    if device.capability != 90:
        pytest.skip("not Hopper")
    rng = np.random.default_rng(0)
    for M, K in ((16, 64), (400, 1088)):
        layout = parse(text).compile(M, K)
        W = random_weight(layout, rng, np.float32)
        X = rng.standard_normal((300, K)).astype(np.float32)
        bias = rng.standard_normal(M).astype(np.float32)
        half, wide = halves_of(dtype)
        W, X, bias = half(W), half(X), half(bias)
        expected = wide(X) @ wide(W).T + wide(bias)
        values, index = packed.pack(cupy.asarray(W), layout)
        inputs, on_device = kernels.arranged(cupy.asarray(X), layout), cupy.asarray(bias)
        rows, _ = kernels.tables(layout, 0)
        for size, together in TOGETHER.items():
            for splits, sharing, *resident in together:
                way = packed_ways.Way(packed_hopper.kernel_of(layout), size, splits=splits,
                                      sharing=sharing, resident=(*resident, 1)[0])  # fmt: skip
                way = packed_ways.deepest(layout, way, device)
                if way.depth < 3 or splits > packed.tiling(layout).column_tiles:
                    continue
                for tokens in (33, 300):
                    out = cupy.full((tokens, M), 0x7E00, np.uint16)
                    room = cupy.full(kernels.room_bytes(layout, way, tokens), 0xFF, np.uint8)
                    kernels.multiply(layout, dtype, way, kernels.Operands(
                        values.data.ptr, index.data.ptr, inputs.data.ptr, on_device.data.ptr,
                        out.data.ptr, room.data.ptr, rows, tokens,
                    ), kernels.Stream(cupy.cuda.get_current_stream().ptr))  # fmt: skip
                    error = np.linalg.norm(wide(out.get()) - expected[:tokens])
                    assert error <= 4e-3 * np.linalg.norm(expected[:tokens]), way


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["2:4", "4:8", "block16-row8"])
def test_the_last_rows_together(text, cupy):
    """What two launches write lies in its rows, with its bias; nothing is left out."""
    from cuobs.ops.cuda import packed as kernels

    device = packed_ways.device(0)
    if device.capability != 90:
        pytest.skip("not Hopper")
    rng = np.random.default_rng(0)
    layout = parse(text).compile(128 * (device.processors + 9), 320)
    W = random_weight(layout, rng)
    X = rng.standard_normal((33, 320)).astype(np.float16)
    bias = rng.standard_normal(len(W)).astype(np.float16)
    expected = X.astype(np.float32) @ W.T.astype(np.float32) + bias
    values, index = packed.pack(cupy.asarray(W), layout)
    inputs, on_device = kernels.arranged(cupy.asarray(X), layout), cupy.asarray(bias)
    rows, _ = kernels.tables(layout, 0)
    for sharing in (1, 2):
        way = packed_ways.deepest(layout, packed_ways.Way(
            packed_hopper.kernel_of(layout), 8, sharing=sharing), device)  # fmt: skip
        rest, *_ = packed_ways._rests(layout, way, 33, device)
        assert len(packed_ways.shares(layout, way._replace(rest=rest), 33, device)) == 2
        out = cupy.full((33, len(W)), 0x7E00, np.uint16)
        room = cupy.full(kernels.room_bytes(layout, way, 33), 0xFF, np.uint8)
        kernels.multiply(layout, "float16", way._replace(rest=rest), kernels.Operands(
            values.data.ptr, index.data.ptr, inputs.data.ptr, on_device.data.ptr, out.data.ptr,
            room.data.ptr, rows, 33,
        ), kernels.Stream(cupy.cuda.get_current_stream().ptr))  # fmt: skip
        error = np.linalg.norm(out.get().view(np.float16) - expected)
        assert error <= 4e-3 * np.linalg.norm(expected), way


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 90])
def test_the_measurement(tokens, cupy, tmp_path, monkeypatch):
    """It changes no result, and there is none while the caller captures a graph."""
    layout = parse("2:4").compile(64, 320)
    rng = np.random.default_rng(0)
    W, X = random_weight(layout, rng), rng.standard_normal((tokens, 320)).astype(np.float16)
    expected = X.astype(np.float64) @ W.T.astype(np.float64)
    operands = *packed.pack(cupy.asarray(W), layout), layout, cupy.asarray(X)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    own = packed_ways._fastest
    monkeypatch.setattr(packed_ways, "_fastest",
                        lambda *given: measured.append(own(*given)) or measured[-1])
    packed_ways._known.cache_clear()
    for _ in range(2):
        found = packed.packed_matmul(*operands)
        np.testing.assert_allclose(found.get(), expected, rtol=2e-3, atol=2e-2)
    assert len(measured) == 1
    (tmp_path / "cuobs").rename(tmp_path / "elsewhere")
    packed_ways._known.cache_clear()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        if tokens < 9:  # CuPy captures no product of cuBLAS
            packed.packed_matmul(*operands)
            packed_ways._known.cache_clear()
            (tmp_path / "cuobs").rename(tmp_path / "again")
            del measured[1:]
            stream.begin_capture()
            found = packed.packed_matmul(*operands)
            stream.end_capture().launch()
            np.testing.assert_allclose(found.get(), expected, rtol=2e-3, atol=2e-2)
    assert len(measured) == 1
    packed_ways._known.cache_clear()


@pytest.mark.gpu
def test_other_dtypes_and_strides(cupy):
    layout = parse("2:4").compile(40, 128)
    rng = np.random.default_rng(0)
    W = random_weight(layout, rng, np.float32)
    for dtype in ("float16", "float32", "float64"):
        values, index = packed.pack(cupy.asarray(W.astype(dtype)), layout)
        wide = cupy.asarray(rng.standard_normal((9, 2 * 128 + 1)).astype(dtype))
        for X in (wide[:, 1:129], wide[:, 0:256:2], cupy.asfortranarray(wide[:, :128])):
            expected = X.get().astype(np.float64) @ W.astype(dtype).T.astype(np.float64)
            found = packed.packed_matmul(values, index, layout, X)
            np.testing.assert_allclose(found.get(), expected, rtol=3e-3, atol=3e-2)
