"""What a call takes under ``memory_limit``: no more than that, or one sentence that says how much.

Memory is what tracemalloc sees, NumPy's arrays among it. Objects of Python are counted by a bound
for each row and column; beside it a call of many small groups may make as much as `SLACK`.
"""

import re
import tracemalloc

import layers
import numpy as np
import pytest

import cuobs
from cuobs import arrays, batches, footprint

M, K = 64, 128
SLACK = 1.01
PATTERNS = ("2:4", "4:8", "coupled-2:4", "block16-row8", "16:32")
OWN = ("magnitude", "wanda", "obs-local", "obs-full", "obs-split", "obs-interleaved", "sparsegpt",
       "obs-ordered", "true-obs", "admm")  # fmt: skip


def layer(method, rows=M, columns=K, dtype="float32", few=8):
    """A random layer, of few rows for true-obs, which takes them one by one under a tight limit."""
    rows = min(rows, few) if method == "true-obs" else rows
    return (a.astype(dtype) for a in layers.random_layer(rows, columns))


def peak(W, **arguments):
    """Bytes of new memory at the most, and the result."""
    tracemalloc.start()
    try:
        result = cuobs.prune(W, **arguments)
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def asked(W, **arguments):
    """What a refusal says is needed, as text."""
    with pytest.raises(ValueError) as refused:
        cuobs.prune(W, **arguments, memory_limit=2**16)
    found = re.fullmatch(
        r"memory_limit: found 64 KiB, expected at least (.* [KMG]iB), which .* needs for W .*",
        str(refused.value),
    )
    assert found, refused.value
    return found[1]


def check(W, plenty=True, **arguments):
    """Far too little, a little less than needed, as much, and more."""
    arguments = {"device": "cpu"} | arguments
    plain = cuobs.prune(W, **arguments)
    needed = asked(W, **arguments)
    least = arrays.parse_size(needed)
    for limit in (least // 4, int(least * 0.98)):
        with pytest.raises(ValueError, match="memory_limit: found .*, expected at least"):
            cuobs.prune(W, **arguments, memory_limit=max(limit, 2**16))
    for limit in (needed, least * 2)[: 1 + plenty]:
        taken, result = peak(W, **arguments, memory_limit=limit)
        assert taken <= SLACK * arrays.parse_size(limit)
        np.testing.assert_array_equal(result.mask, plain.mask)
        if limit == needed:
            # No one is sent away who could have been served, but for objects of Python.
            assert least <= 1.5 * taken + 2**16
    return least


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", OWN)
def test_a_limit_is_kept_or_refused(method, pattern, dtype):
    W, H = layer(method, dtype=dtype, few=16 if pattern == "block16-row8" else 8)
    check(W, plenty=pattern == "2:4", hessian=H, method=method, pattern=pattern, dtype=dtype)


@pytest.mark.parametrize("method", OWN)
def test_the_weights_solved_again_are_counted(method):
    W, H = layer(method)
    check(W, hessian=H, method=method, refine="exact")


@pytest.mark.parametrize("pattern", ["2:4", "block16-row8"])
def test_conjugate_gradients_are_counted(pattern):
    """Rows that keep more than about 1000 columns are no longer solved by a factor each."""
    W, H = layer("magnitude", 64, 1024)
    check(W, hessian=H, method="magnitude", pattern=pattern, refine="exact")


@pytest.mark.parametrize("shape", [(16, 512), (256, 64)])
@pytest.mark.parametrize("method", OWN)
def test_wide_and_tall_layers(method, shape):
    W, H = layer(method, *shape)
    check(W, hessian=H, method=method)


@pytest.mark.parametrize("method", OWN)
def test_no_weight_is_counted_that_is_not_there(method):
    """Where weights are far larger than all that is small, one more or less of them shows."""
    W, H = layer(method, 2048, 128)
    arguments = {"hessian": H, "method": method, "device": "cpu"}
    least = arrays.parse_size(asked(W, **arguments))
    taken, _ = peak(W, **arguments, memory_limit=least)
    bound = footprint.small(footprint.size_of(
        cuobs.Recipe("2:4", method), cuobs.Settings(), W.shape, np
    ))  # fmt: skip
    assert bound < W.nbytes / 2 or method == "true-obs"
    assert taken <= SLACK * least
    assert least <= SLACK * (taken + bound + 0.5 * W.nbytes)


@pytest.mark.parametrize("method", ["obs-local", "obs-full", "obs-interleaved", "obs-ordered"])
def test_a_piece_of_scopes_goes_before_the_next_comes(method):
    W, H = layer(method, 256, 256)
    arguments = {"hessian": H, "method": method, "device": "cpu"}
    least = asked(W, **arguments)
    taken, _ = peak(W, **arguments, memory_limit=least)
    assert taken <= SLACK * arrays.parse_size(least)


@pytest.mark.parametrize("options", [
    {"method": "true-obs", "group": 1}, {"method": "true-obs", "order": "shared"},
    {"method": "obs-ordered", "group": 1}, {"method": "obs-ordered", "group": 1000},
    {"method": "obs-split", "splits": 1}, {"method": "obs-interleaved", "splits": 3},
    {"method": "admm", "schedule": "slow"},
], ids=str)  # fmt: skip
def test_options_are_counted(options):
    W, H = layer(options["method"])
    check(W, hessian=H, **options)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "admm"])
@pytest.mark.parametrize("given", ["float16", "float64", "list", "generator"])
def test_the_hessian_is_made_under_the_limit(method, given):
    """Of many more tokens than the limit holds in the compute dtype, in one array or in batches."""
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((M, K)), rng.standard_normal((16384, K))
    half = given if given.startswith("float") else "float16"
    W, X = W.astype(half), X.astype(half)
    parts = [X[a : a + 1000] for a in range(0, len(X), 1000)]
    make = {"list": lambda: parts, "generator": lambda: iter(parts)}
    for limit in (None, "least", 2**24):
        arguments = {"X": make.get(given, lambda: X)(), "method": method, "device": "cpu"}
        if limit == "least":
            limit = asked(W, **arguments)
            arguments["X"] = make.get(given, lambda: X)()
        if limit is None:
            plain = cuobs.prune(W, **arguments)
            continue
        taken, result = peak(W, **arguments, memory_limit=limit)
        assert taken <= SLACK * arrays.parse_size(limit)
        assert result.loss == pytest.approx(plain.loss, rel=1e-3)


def test_half_precision_of_pytorch_is_counted():
    torch = pytest.importorskip("torch")
    W, H = layers.random_layer(M, K)
    check(torch.tensor(W).bfloat16(), hessian=H.astype("float32"), method="sparsegpt")


def test_workers_and_rows_are_as_many_as_fit(monkeypatch):
    W, H = (a.astype("float32") for a in layers.random_layer(32, 512))
    arguments = {"hessian": H, "method": "true-obs", "device": "cpu", "workers": 4}
    least = arrays.parse_size(asked(W, **arguments))
    seen, share = [], batches._share

    def watched(function, count, rows, workers, settings):
        seen.append((rows, workers))
        return share(function, count, rows, workers, settings)

    monkeypatch.setattr(batches, "_share", watched)
    plain = cuobs.prune(W, **arguments)
    for more in (0, 2**20, 2**23, 2**26):
        taken, result = peak(W, **arguments, memory_limit=least + more)
        assert taken <= SLACK * (least + more)
        np.testing.assert_array_equal(result.mask, plain.mask)
    pruning = seen[::2]
    assert pruning[0] == pruning[-1] and pruning[1] == (1, 1)
    assert [w for _, w in pruning[1:]] == sorted(w for _, w in pruning[1:])


def test_comparing_is_refused_before_it_starts():
    W, H = layers.random_layer(64, 192)
    started = []
    with pytest.raises(ValueError, match="memory_limit: .* which admm needs for W 64 x 192"):
        cuobs.compare(W, hessian=H, methods=["magnitude", "admm"], memory_limit="1MiB",
                      device="cpu", starting=started.append)
    assert not started


def test_every_method_says_what_it_needs():
    assert set(OWN) <= set(cuobs.methods())
    assert all(cuobs.methods()[name].memory for name in OWN)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, precision", [
    ("float32", "tensor"), ("float32", "fp32"), ("float64", "fp32"),
])
@pytest.mark.parametrize("refine", [None, "exact"])
@pytest.mark.parametrize("method", OWN)
def test_a_limit_is_kept_on_a_gpu(cp, method, refine, dtype, precision):
    """CuPy's pool gives no more than what is left of the limit beside CUDA's own."""
    W, H = (cp.asarray(a, dtype) for a in layers.random_layer(1024, 2048))
    arguments = {"hessian": H, "method": method, "refine": refine, "dtype": dtype,
                 "precision": precision}  # fmt: skip
    with pytest.raises(ValueError, match="memory_limit: found 8 MiB, expected") as refused:
        cuobs.prune(W, **arguments, memory_limit="8MiB")
    least = re.search(r"at least (.*), which", str(refused.value))[1]
    cuobs.prune(W, **arguments)
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(
        size=pool.total_bytes() + arrays.parse_size(least) - batches.GPU_LIBRARIES
    )
    try:
        result = cuobs.prune(W, **arguments, memory_limit=least)
    finally:
        pool.set_limit(size=0)
    assert result.loss < 1
