"""`cuobs.torch.PackedLinear`: a module like any other, on every device that is there."""

import copy
import warnings
from functools import lru_cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cuobs  # noqa: E402
from cuobs.torch import PackedLinear  # noqa: E402
from cuobs.torch import packed as packed_module  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = "view=(M/2,2,K):(2K,K,1) block=(1,1,1) scope=(1,2,4) keep=5"
HALVES = "view=(M,2,K/2):(K,K/2,1) block=(1,1,1) scope=(1,2,2) keep=2"
PATTERNS = ["2:4", "4:8", "coupled-2:4", "block16-row8", "4:8x1", ROWS, HALVES]

pytestmark = pytest.mark.filterwarnings("ignore:cuobs. packed weights are unpacked")


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return request.param


def weight(pattern, M, K, dtype=torch.float32, device="cpu"):
    layout = cuobs.pattern.parse(pattern).compile(M, K)
    rng = np.random.default_rng(0)
    kept = ~layout.candidates[rng.integers(len(layout.candidates),
                                           size=(layout.row_groups, layout.column_groups))]
    W = np.zeros((M, K))
    kept = kept.transpose(0, 2, 1, 3).reshape(M, K)
    W[np.ix_(layout.row_order.ravel(), layout.column_order.ravel())] = (
        kept * rng.standard_normal((M, K)))
    return torch.from_numpy(W).to(device, dtype)


def module(pattern="2:4", M=48, K=160, dtype=torch.float32, device="cpu", bias=True):
    W = weight(pattern, M, K, dtype, device)
    b = torch.linspace(-1, 1, M, dtype=dtype, device=device) if bias else None
    return PackedLinear.from_weight(W, pattern, b), W, b


def close(found, x, W, b, tolerance):
    expected = x.double() @ W.double().T + (0 if b is None else b.double())
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-6)
    assert found.dtype == x.dtype and error < tolerance, float(error)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-4),
])  # fmt: skip
@pytest.mark.parametrize("pattern", PATTERNS)
def test_products(pattern, dtype, tolerance, device):
    for bias in (True, False):
        packed, W, b = module(pattern, dtype=dtype, device=device, bias=bias)
        assert torch.equal(packed.unpack(), W)
        for shape in ((160,), (1, 160), (2, 3, 160), (70, 160), (0, 160)):
            x = torch.randn(shape, device=device).to(dtype)
            found = packed(x)
            assert found.shape == (*shape[:-1], 48)
            if len(x):
                close(found, x, W, b, tolerance)


def test_inputs_that_are_not_contiguous_or_aligned(device):
    packed, W, b = module(dtype=torch.float16, device=device)
    wide = torch.randn(9, 2 * 160 + 1, device=device).half()
    for x in (wide[:, 1:161], wide[:, :320:2], wide[:, :160].T.contiguous().T, wide[::2, 3:163]):
        close(packed(x), x, W, b, 2e-3)


def test_not_a_number_stays_with_its_token(device):
    packed, W, b = module(dtype=torch.float16, device=device)
    for tokens in (5, 40, 90):
        x = torch.randn(tokens, 160, device=device).half()
        x[1, 7], x[3, 0] = float("nan"), float("inf")
        found = packed(x)
        good = [t for t in range(tokens) if t not in (1, 3)]
        close(found[good], x[good], W, b, 2e-3)
        assert not torch.isfinite(found[1]).any() or W[:, 7].eq(0).any()
        assert torch.isnan(found[1][W[:, 7] != 0]).all()


def test_like_any_module(device):
    packed, W, b = module(dtype=torch.float32, device=device)
    twin = copy.deepcopy(packed)
    twin.weight.zero_()
    assert torch.equal(packed.unpack(), W)
    fresh = PackedLinear(160, 48, "2:4", device=device)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh.unpack(), W)
    half = copy.deepcopy(packed).half()
    assert torch.equal(half.unpack(), W.half()) and half.index.dtype == torch.int32
    assert half.bias.dtype == torch.float16
    assert torch.equal(packed.to("cpu").unpack(), W.cpu())
    assert "in_features=160, out_features=48, pattern=2:4, bias=True" in repr(packed)
    assert not list(packed.parameters())


def test_refusals(device):
    packed, W, _ = module(device=device)
    with pytest.raises(TypeError, match="x: found torch.float16, expected torch.float32"):
        packed(torch.ones(1, 160, device=device).half())
    with pytest.raises(ValueError, match=r"x: found the shape \(1, 4\), expected \(tokens, 160\)"):
        packed(torch.ones(1, 4, device=device))
    W[0, :4] = 1
    with pytest.raises(ValueError, match="breaks 2:4 in 1 of 1920 scopes"):
        PackedLinear.from_weight(W)
    with pytest.raises(TypeError, match="expected float16, bfloat16 or wider"):
        PackedLinear.from_weight(W.int())


def test_the_op_as_pytorch_wants_it(device):
    packed, _, _ = module(dtype=torch.float16, device=device)
    x = torch.randn(3, 160, device=device).half()
    args = (x, packed.weight, packed.index, packed.bias, "2:4", 48, 160)
    torch.library.opcheck(torch.ops.cuobs.packed_linear.default, args)


def test_compiled_as_one_graph(device):
    packed, W, b = module(dtype=torch.float16, device=device)
    backend = "inductor" if device == "cuda" else "eager"
    compiled = torch.compile(lambda x: packed(x).relu(), fullgraph=True, backend=backend)
    x = torch.randn(4, 160, device=device).half()
    torch.testing.assert_close(compiled(x), packed(x).relu())


def test_it_says_once_that_it_is_not_faster():
    packed, _, _ = module()
    packed_module._say_once.cache_clear()
    with pytest.warns(UserWarning, match="not faster"):
        packed(torch.ones(1, 160))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(torch.ones(1, 160))


def test_arrays_of_pytorch(device):
    W = weight("2:4", 24, 96, torch.bfloat16, device)
    packed = cuobs.pack(W)
    x = torch.randn(96, 5, device=device).bfloat16()
    assert torch.equal(packed.unpack(), W)
    close((packed @ x).T, x.T, W, None, 1e-2)


def test_bfloat16_in_files(tmp_path):
    W = weight("2:4", 24, 96, torch.bfloat16)
    packed = cuobs.pack(W)
    with pytest.raises(ValueError, match="expected .safetensors"):
        packed.save(str(tmp_path / "w.npz"))
    packed.save(str(tmp_path / "w.safetensors"))
    found = cuobs.Packed.load(str(tmp_path / "w.safetensors")).unpack()
    assert np.array_equal(found.astype(np.float32), W.float().numpy())


def replayed(packed, x):
    """What a captured graph writes for other inputs than it was captured with; x takes them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64, 100, 300])
def test_captured_in_a_graph(tokens):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    packed, W, b = module(M=272, K=1056, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, 1056, device="cuda").bfloat16()
    packed(x)
    out = replayed(packed, x)
    close(out, x, W, b, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 70])
def test_ways_are_timed_in_graphs(tokens, tmp_path, monkeypatch):
    """While another stream goes on, and also where no graph can be captured."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    from cuobs.ops.cuda import packed_ways

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed, W, b = module(M=272, K=1056, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, 1056, device="cuda").bfloat16()
    taken = []
    for name in ("_graph_seconds", "_event_seconds"):
        own = getattr(packed_ways, name)
        monkeypatch.setattr(packed_ways, name, lambda trial, way, products, name=name, own=own:
                            (own(trial, way, products), taken.append(name))[0])  # fmt: skip
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 50
    packed_ways._known.cache_clear()
    close(packed(x), x, W, b, 1e-2)
    assert set(taken) == {"_graph_seconds"}

    def refuse(function, warm_up):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(packed_module, "record", refuse)
    packed_ways._known.cache_clear()
    (tmp_path / "cuobs").rename(tmp_path / "elsewhere")
    close(packed(x), x, W, b, 1e-2)
    assert set(taken) == {"_graph_seconds", "_event_seconds"}
    packed_ways._known.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_dtypes_captured_in_a_graph(dtype):
    """They are unpacked by a kernel, two bytes at a time."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    for pattern in PATTERNS:
        packed, W, b = module(pattern, dtype=dtype, device="cuda")
        x = torch.randn(5, 160, device="cuda", dtype=dtype)
        packed(x)
        out = replayed(packed, x)
        assert torch.equal(packed.unpack(), W)
        close(out, x, W, b, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 20, 60, 200])
def test_on_a_second_device(monkeypatch, tokens):
    """After the same on the first: kernels and what they may use are each device's own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from cuobs.ops.cuda import packed_ways

    ways = packed_ways.ways
    # One way for each: to compile all and to measure them takes a minute.
    monkeypatch.setattr(packed_ways, "ways", lambda *given: ways(*given)[:1])
    monkeypatch.setattr(packed_ways, "_known", lru_cache(packed_ways._known.__wrapped__))
    for pattern in PATTERNS:
        for device in ("cuda:0", "cuda:1"):
            packed, W, b = module(pattern, dtype=torch.float16, device=device)
            x = torch.randn(tokens, 160, device=device, dtype=torch.float16)
            close(packed(x), x, W, b, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_slices_of_rows(count):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    from cuobs.ops.cuda import packed as kernels

    for pattern, bias in (("2:4", True), ("block16-row8", False), (ROWS, True)):
        packed, W, b = module(pattern, M=208, dtype=torch.float16, device="cuda", bias=bias)
        layout = cuobs.pattern.parse(pattern).compile(208, 160)
        x = torch.randn(30, 160, device="cuda").half()
        found = packed_module._unpack_and_multiply(
            kernels, x, packed.weight, packed.index, packed.bias, layout, count
        )
        close(found, x, W, b, 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "block16-row8"])
@pytest.mark.parametrize("tokens", [1, 12, 40, 200])
def test_what_the_kernel_before_writes_is_read(pattern, tokens, monkeypatch):
    """A product may begin while the last one ends: its inputs, its weight, both in graphs too."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    from cuobs.ops.cuda import packed_ways

    first, W, _ = module(pattern, 1024, 1024, torch.float16, "cuda", bias=False)
    second, other = copy.deepcopy(first), copy.deepcopy(first)
    other.weight, other.index = first.weight.flip(0), first.index.flip(0)
    V = other.unpack()

    def chain(x):
        y = x
        for _ in range(2):
            y = first(first(y)) / 512
        for mine, its in ((second.weight, other.weight), (second.index, other.index)):
            mine.zero_()
            mine.copy_(its)
        return second(y)

    def expected(x):
        y = x.double()
        for _ in range(2):
            y = (y @ W.double().T).half().double() @ W.double().T / 512
        return y @ V.double().T

    x = torch.randn(tokens, 1024, device="cuda").half()
    ways = packed_ways.ways
    layout = cuobs.pattern.parse(pattern).compile(1024, 1024)
    found = [way for way in ways(layout, tokens, packed_ways.device(0)) if way.kernel != "unpack"]
    for way in found[: 4 if tokens < 32 else 1]:
        monkeypatch.setattr(packed_ways, "ways", lambda *given, way=way: [way])
        packed_ways._known.cache_clear()
        chain(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x)
        for _ in range(5):
            x.copy_(torch.randn_like(x))
            second.weight.zero_()
            graph.replay()
            for result in (out, chain(x)):
                error = (result.double() - expected(x)).norm() / expected(x).norm()
                assert error < 5e-3, (way, float(error))
    packed_ways._known.cache_clear()


@pytest.mark.gpu
def test_two_streams_at_once():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    packed, W, b = module(M=2048, K=4096, dtype=torch.float16, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    for tokens in (1, 48):
        inputs = [torch.randn(tokens, 4096, device="cuda").half() for _ in range(40)]
        torch.cuda.synchronize()
        found = []
        for n, x in enumerate(inputs):
            with torch.cuda.stream(streams[n % 2]):
                found.append(packed(x))
        torch.cuda.synchronize()
        for x, out in zip(inputs, found, strict=True):
            close(out, x, W, b, 2e-3)


def test_a_linear_layer_is_packed_as_its_weight():
    W = weight("2:4", 24, 96)
    layer = torch.nn.Linear(96, 24)
    with torch.no_grad():
        layer.weight.copy_(W)
    packed = cuobs.pack(layer, "2:4")
    assert torch.equal(packed.unpack(), W) and not packed.values.requires_grad
    with pytest.raises(TypeError, match="W: found a module GELU .*expected an array, an nn.Linear"):
        cuobs.pack(torch.nn.GELU())


def test_kinds_of_arrays_are_not_mixed():
    W = weight("2:4", 24, 96)
    with pytest.raises(TypeError, match="x: found ndarray, expected .*kind, Tensor"):
        cuobs.pack(W) @ np.ones(96, np.float32)
    with pytest.raises(TypeError, match="x: found Tensor, expected .*kind, ndarray"):
        cuobs.pack(W.numpy()) @ torch.ones(96)
