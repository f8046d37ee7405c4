"""The front door: what it refuses, what it gives back, options, targets, reconstruct."""

import layers
import numpy as np
import oracles
import pytest
from layers import host, layer, prune
from test_methods import ALL

import cuobs
from cuobs.loss import energies_together, loss

CPU = {"device": "cpu", "dtype": "float64"}


@pytest.fixture(scope="module")
def small():
    return layers.random_layer(8, 32)


# Refusals


def refused(error, words, W=None, X=None, **arguments):
    """prune raises this with one sentence that holds these words; returns it."""
    W = layers.random_layer(8, 32)[0] if W is None else W
    if X is None and "hessian" not in arguments:
        arguments["hessian"] = layers.random_layer(8, 32)[1]
    with pytest.raises(error, match=words) as raised:
        cuobs.prune(W, X, **{"device": "cpu"} | arguments)
    said = str(raised.value)
    assert "\n" not in said
    return said


def broken(value, *places):
    W = np.ones((8, 32))
    for place in places:
        W[place] = value
    return W


@pytest.mark.parametrize("W, error, words", [
    (np.ones(32), ValueError, "W: .*2 dimensions"),
    (np.ones((2, 4, 4)), ValueError, "W: .*2 dimensions"),
    (np.ones((0, 32)), ValueError, r"W: .*\(0, 32\)"),
    (np.ones((8, 0)), ValueError, r"W: .*\(8, 0\)"),
    (np.ones((8, 32), int), TypeError, "W: .*int64"),
    (np.ones((8, 32), complex), TypeError, "W: .*complex128"),
    (np.ones((8, 32), bool), TypeError, "W: .*bool"),
    (np.full((8, 32), None), TypeError, "W: .*object"),
    (broken(np.nan, (3, 5)), ValueError, r"W: found 1 .*\(3, 5\)"),
    (broken(-np.inf, (7, 1), (2, 31)), ValueError, r"W: found 2 .*\(2, 31\)"),
    ("W.npy", TypeError, "W: .*str"),
    (np.ma.masked_invalid(broken(np.nan, (3, 5))), ValueError, "W: found an array with 1 masked"),
    ([np.ones((8, 32))] * 2, ValueError, r"W: found \(2, 8, 32\)"),
    (np.ones((8, 16)), ValueError, r"hessian: .*\(32, 32\).*\(16, 16\)"),
])
def test_weights_refused(W, error, words):
    refused(error, words, W=W)


@pytest.mark.parametrize("X, error, words", [
    (np.ones((10, 31)), ValueError, "X: .*31 features.*K=32"),
    (np.ones(32), ValueError, "X: .*1 dimension"),
    (np.ones((0, 32)), ValueError, "X: .*at least one"),
    (np.ones((10, 32), int), TypeError, "X: .*int64"),
    (np.full((10, 32), np.nan), ValueError, r"X: found 320 .*\(0, 0\)"),
])
def test_activations_refused(X, error, words):
    refused(error, words, X=X)


@pytest.mark.parametrize("hessian, error, words", [
    (np.ones((32, 31)), ValueError, "hessian: .*31"),
    (np.ones(32), ValueError, "hessian: .*2 dimensions"),
    (np.eye(32, dtype=int), TypeError, "hessian: .*int64"),
    (np.full((32, 32), np.nan), ValueError, "hessian: found 1024 "),
    (np.triu(np.ones((32, 32))), ValueError, "hessian: .*symmetric"),
    (-np.eye(32), ValueError, "hessian: .*negative"),
])
def test_hessians_refused(hessian, error, words):
    refused(error, words, hessian=hessian)


def test_x_or_hessian(small):
    W, H = small
    with pytest.raises(ValueError, match="found neither"):
        cuobs.prune(W, device="cpu")
    with pytest.raises(ValueError, match="found both"):
        cuobs.prune(W, np.ones((4, 32)), hessian=H, device="cpu")


@pytest.mark.parametrize("target, error, words", [
    (np.ones((8, 31)), ValueError, r"target: .*\(8, 31\)"),
    (np.ones(32), ValueError, "target: "),
    (np.ones((8, 32), int), TypeError, "target: .*int64"),
    (np.full((8, 32), np.inf), ValueError, "target: found 256 "),
])
def test_targets_refused(target, error, words):
    refused(error, words, target=target)


@pytest.mark.parametrize("arguments, words", [
    ({"method": "sparsegp"}, "method: .*'sparsegp'.*nearest: sparsegpt"),
    ({"method": "ADMM"}, "method: .*nearest: admm"),
    ({"pattern": "4:9"}, "divide"),
    ({"pattern": "coupled"}, "nearest: coupled-2:4"),
    ({"pattern": "block16-row8"}, "divide"),
    ({"refine": "search"}, "refine: .*'search'"),
    ({"damp": -0.1}, "damp: .*-0.1"),
    ({"damp": float("nan")}, "damp: "),
    ({"damp": float("inf")}, "damp: "),
    ({"damp": "0.01"}, "damp: "),
    ({"damp": 1e37}, r"damp: found 1e\+37, expected a number from 0 to 1e\+06"),
    ({"damp": 10**400}, r"damp: found 1000.*\(401 characters\), expected a number"),
    ({"damp": -(10**400)}, "damp: found -1000"),
    ({"pattern": "view=(M,K/0):(K,1) block=(1,1) scope=(1,4) keep=2"}, "view: found 'K/0'"),
    ({"dtype": "float16"}, "dtype: .*'float16'"),
    ({"device": "gpu"}, "device: .*'gpu'"),
    ({"precision": "tf32"}, "precision: "),
    ({"workers": 0}, "workers: "),
    ({"workers": 1.5}, "workers: "),
    ({"batch_rows": 0}, "batch_rows: "),
    ({"memory_limit": "lots"}, "memory_limit: .*'lots'"),
    ({"memory_limit": 0}, "memory_limit: "),
    ({"memory_limit": "-3GB"}, "memory_limit: "),
    ({"method": "obs-split", "splits": 0}, "splits: "),
    ({"method": "obs-split", "splits": 2.5}, "splits: "),
    ({"method": "true-obs", "group": 0}, "group: "),
    ({"method": "true-obs", "group": "all"}, "group: "),
    ({"method": "true-obs", "order": "right"}, "order: .*'right'.*gap"),
    ({"method": "obs-ordered", "order": "gap"}, "order: .*'gap'.*largest"),
    ({"method": "admm", "schedule": "fast"}, "schedule: .*'fast'"),
])
def test_values_refused(arguments, words):
    refused(ValueError, words, **arguments)


@pytest.mark.parametrize("method, option", [
    ("magnitude", {"splits": 8}), ("sparsegpt", {"group": 4}), ("admm", {"order": "gap"}),
    ("true-obs", {"splits": 8}), ("obs-full", {"splits": 8}), ("obs-split", {"schedule": "slow"}),
])
def test_options_of_another_method_refused(method, option):
    said = refused(ValueError, next(iter(option)), method=method, **option)
    assert method in said


def test_a_device_that_is_not_there(small):
    from cuobs import arrays

    if not arrays.cupy_fault():
        pytest.skip("a CUDA device is there")
    W, H = small
    with pytest.raises(ValueError, match="device: found 'cuda', but"):
        cuobs.prune(W, hessian=H, device="cuda")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method, options", [
    (name, options) for name, options in ALL if name not in ("magnitude", "wanda")
])
def test_not_positive_definite(xp, method, options, dtype):
    """20 tokens, 32 columns and no damping, or no Gram matrix: says so, whatever the method."""
    W, H = layers.random_layer(8, 32, tokens=20)
    if xp is np:  # elsewhere rounding may leave a singular matrix a little definite
        with pytest.raises(np.linalg.LinAlgError, match="not positive definite.*damp"):
            prune(xp, W, H, dtype, method=method, damp=0.0, **options)
    indefinite = np.full((32, 32), 2.0)
    np.fill_diagonal(indefinite, 1.0)
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite.*damp"):
        prune(xp, W, indefinite, dtype, method=method, **options)
    assert issubclass(np.linalg.LinAlgError, ValueError)
    result = prune(xp, W, H, method=method, dtype=dtype, **options)
    assert np.isfinite(result.weight).all()


def test_undamped_where_there_are_tokens_enough(small):
    W, H = small
    target, Hl = oracles.damped(W, H, damp=0)
    s = oracles.scopes("2:4", *W.shape)
    result = prune(np, W, H, method="sparsegpt", damp=0.0)
    np.testing.assert_allclose(result.weight, oracles.sparsegpt(target, Hl, s)[0], atol=1e-9)


def test_nothing_is_overwritten(small):
    W, H = (a.copy() for a in small)
    for method, options in ALL:
        cuobs.prune(W, hessian=H, target=W, method=method, **CPU, **options)
        np.testing.assert_array_equal(W, small[0])
        np.testing.assert_array_equal(H, small[1])
    one = W[:1].copy()
    for method, options in ALL:
        cuobs.prune(one, hessian=H, method=method, **CPU, **options)
        np.testing.assert_array_equal(one, W[:1])


# Results


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "true-obs", "admm"])
def test_result_is_like_the_weight(xp, dtype, compute, method):
    W, H = layers.random_layer(8, 32)
    W = W.astype(dtype)
    device = "cpu" if xp is np else "cuda"
    given = xp.asarray(W)
    result = cuobs.prune(given, hessian=xp.asarray(H), method=method, dtype=compute, device=device)
    assert type(result.weight) is xp.ndarray and type(result.mask) is xp.ndarray
    assert result.weight.dtype == dtype and result.weight.shape == W.shape
    assert result.mask.dtype == bool and result.mask.shape == W.shape
    weight, mask = host(result.weight), host(result.mask)
    assert (weight[~mask] == 0).all() and mask.sum() == W.size / 2
    assert result.sparsity == (weight == 0).mean()
    assert result.loss == pytest.approx(oracles.relative_loss(W, weight, H), rel=1e-5)
    assert cuobs.verify(result.weight, "2:4")
    assert result.method == method and result.device == device
    assert str(result.pattern) == oracles.text_form("2:4") and result.pattern.name == "2:4"
    assert result.damp == 0.01 and result.seconds > 0
    assert isinstance(result.loss, float) and isinstance(result.sparsity, float)


def test_options_used_are_told(small):
    W, H = small
    assert prune(np, W, H, method="magnitude").options == {}
    told = prune(np, W, H, method="true-obs", group=3, order="left").options
    assert told == {"group": 3, "order": "left"}
    assert prune(np, W, H, method="obs-split", splits=7).options == {"splits": 7}
    assert prune(np, W, H, schedule="slow").options == {"schedule": "slow"}
    assert prune(np, W, H).method == "admm"


def test_bfloat16_weights():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    W, H = layers.random_layer(8, 32)
    W = W.astype(ml_dtypes.bfloat16)
    result = cuobs.prune(W, hessian=H, method="sparsegpt", device="cpu")
    assert result.weight.dtype == ml_dtypes.bfloat16
    assert cuobs.verify(result.weight, "2:4")
    wide = cuobs.prune(W.astype("float32"), hessian=H, method="sparsegpt", device="cpu")
    np.testing.assert_array_equal(result.mask, wide.mask)
    np.testing.assert_allclose(result.weight.astype("float32"), wide.weight, rtol=2**-8)


def test_weights_that_no_longer_fit():
    """Compensation that passes the largest float16 is refused, not turned into infinity."""
    W, H = layers.random_layer(8, 32)
    W = (W * 65000 / np.abs(W).max()).astype("float16")
    with pytest.raises(ValueError, match="float16"):
        for seed in range(5):
            H = layers.random_layer(8, 32, seed, tokens=33)[1]
            cuobs.prune(W, hessian=H, method="sparsegpt", damp=1e-6, **CPU)


class ByProtocol:
    """An array that offers DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **how):
        return self._array.__dlpack__(**how)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("form", [np.ndarray.tolist, ByProtocol])
def test_lists_and_mere_protocols(small, form):
    """What has no kind of its own comes back as an array of NumPy."""
    W, H = small
    plain = prune(np, W, H, method="sparsegpt")
    result = cuobs.prune(form(W), hessian=form(H), target=form(W), method="sparsegpt", **CPU)
    np.testing.assert_array_equal(result.weight, plain.weight)
    assert cuobs.verify(form(result.weight), "2:4")
    assert not cuobs.verify(form(W), "2:4")
    assert cuobs.relative_loss(form(W), form(result.weight), form(H)) == result.loss
    new = cuobs.reconstruct(form(W), plain.mask, form(H), **CPU)
    np.testing.assert_array_equal(new, cuobs.reconstruct(W, plain.mask, H, **CPU))
    assert type(new) is np.ndarray
    table = cuobs.compare(form(W), hessian=form(H), methods="sparsegpt", device="cpu")
    assert table.shape == W.shape and [row.method for row in table] == ["sparsegpt"]


def test_subclasses_of_arrays(small):
    """Products of np.matrix are not element by element; a masked array without a mask is one."""
    W, H = small
    plain = prune(np, W, H, method="sparsegpt")
    for form in (np.asmatrix, np.ma.array):
        result = cuobs.prune(form(W), hessian=form(H), method="sparsegpt", **CPU)
        np.testing.assert_array_equal(result.weight, plain.weight)
        assert type(result.weight) is np.ndarray


def test_columns_in_memory_order(small):
    W, H = small
    plain = prune(np, W, H, method="sparsegpt")
    for other in (np.asfortranarray(W), np.repeat(W, 2, axis=1)[:, ::2], W[::-1][::-1]):
        result = prune(np, other, np.asfortranarray(H), method="sparsegpt")
        np.testing.assert_array_equal(result.weight, plain.weight)


@pytest.mark.parametrize("method, options", ALL)
def test_x_and_its_hessian_are_the_same(method, options):
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((8, 32)), rng.standard_normal((4, 50, 32))
    flat = X.reshape(-1, 32)
    by_x = cuobs.prune(W, X, method=method, **CPU, **options)
    by_matrix = cuobs.prune(W, hessian=flat.T @ flat, method=method, **CPU, **options)
    part = cuobs.Hessian(32, dtype="float64", device="cpu")
    part.update(X[:1])
    part.update(X[1:])
    by_hessian = cuobs.prune(W, hessian=part, method=method, **CPU, **options)
    for other in by_matrix, by_hessian:
        np.testing.assert_array_equal(other.mask, by_x.mask)
        np.testing.assert_allclose(other.weight, by_x.weight, rtol=0, atol=1e-10)
    error = np.linalg.norm(flat @ (by_x.weight - W).T) / np.linalg.norm(flat @ W.T)
    assert by_x.loss == pytest.approx(error, rel=1e-10)


@pytest.mark.parametrize("method, options", ALL)
def test_loss_is_against_w_not_the_target(method, options):
    W, H, *_ = layer("2:4")
    target = W + 0.5
    result = prune(np, W, H, method=method, target=target, **options)
    assert result.loss == pytest.approx(oracles.relative_loss(W, result.weight, H), rel=1e-9)
    alone = prune(np, target, H, method=method, **options)
    np.testing.assert_array_equal(result.weight, alone.weight)
    assert result.loss != pytest.approx(alone.loss, rel=1e-3)


@pytest.mark.parametrize("method, options", ALL)
def test_dead_columns(method, options):
    """A column that no token uses is 0 in the end, and its loss is none."""
    W, H = layers.random_layer(8, 32, dead=(0, 5, 6, *range(12, 17)))
    result = prune(np, W, H, method=method, **options)
    dead = H.diagonal() == 0
    assert not result.weight[:, dead].any()
    assert oracles.obeys(result.mask, "2:4")
    # Two dead columns in the second scope, one in the first, four in the fourth.
    assert (result.mask[:, 4:8] == [True, False, False, True]).all()
    assert not result.mask[:, 0].any()
    assert (result.mask[:, 12:16] == [False, False, True, True]).all()
    other = W.copy()
    other[:, dead] = 1e6
    again = prune(np, other, H, method=method, **options)
    np.testing.assert_array_equal(again.weight, result.weight)


@pytest.mark.parametrize("given", [
    {"hessian": np.zeros((8, 8))}, {"hessian": cuobs.Hessian(8)}, {"X": np.zeros((20, 8))},
])
def test_nothing_to_prune_by(given):
    """Everything would be pruned, and the loss given as 0."""
    name = next(iter(given))
    for method, options in ALL:
        with pytest.raises(ValueError, match=f"{name}: found nothing but zeros, or no token"):
            cuobs.prune(np.ones((2, 8)), method=method, **given, **CPU, **options)
    with pytest.raises(ValueError, match="^H: found nothing but zeros"):
        cuobs.reconstruct(np.ones((2, 8)), np.ones((2, 8), bool), np.zeros((8, 8)), device="cpu")
    if "X" in given:
        given = {"X": given["X"].astype("float32")}
        h = cuobs.Hessian(8)
        h.update(given["X"])
        assert h.tokens == 20


def test_a_weight_of_zeros():
    H = layers.random_layer(4, 16)[1]
    for method, options in ALL:
        result = prune(np, np.zeros((4, 16)), H, method=method, **options)
        assert result.sparsity == 1 and result.loss == 0
        assert (result.mask == [False, False, True, True] * 4).all()


@pytest.mark.parametrize("method, options", ALL)
def test_ties_prune_the_lowest_index(method, options):
    W = np.ones((3, 16)) * [[1.0], [-2.0], [0.5]]
    result = prune(np, W, np.eye(16), method=method, **options)
    assert (result.mask == [False, False, True, True] * 4).all()


@pytest.mark.parametrize("method, options", ALL)
def test_progress(method, options):
    W, H = layers.random_layer(24, 64)
    seen = []
    cuobs.prune(W, hessian=H, method=method, progress=lambda *at: seen.append(at), **CPU,
                **options)
    assert all(0 <= done <= total for done, total in seen)


# reconstruct and relative_loss


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reconstruct_any_mask(xp, dtype):
    """A mask of no pattern, with an empty row and a full one."""
    W, H = layers.random_layer(8, 32, dead=(3,))
    mask = np.random.default_rng(0).random(W.shape) < 0.6
    mask[0], mask[1] = False, True
    target, Hl = oracles.damped(W, H)
    new = cuobs.reconstruct(xp.asarray(W), xp.asarray(mask), xp.asarray(H), dtype=dtype,
                            device="cpu" if xp is np else "cuda")
    assert type(new) is xp.ndarray and new.dtype == W.dtype
    new = host(new)
    expected = oracles.exact(target, Hl, mask)
    assert (new[~mask] == 0).all()
    if xp is not np and dtype == "float32":
        # There the iterations stop when the loss no longer falls, before all weights have settled.
        left, least = (np.einsum("mk,kl,ml", w - target, Hl, w - target) for w in (new, expected))
        assert least <= left <= 1.01 * least
        return
    tolerance = 1e-9 if dtype == "float64" else 2e-3
    np.testing.assert_allclose(new, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(new[1], target[1], rtol=0, atol=tolerance)


def test_reconstruct_by_conjugate_gradients():
    """Many kept columns take the other way; it solves as exactly."""
    W, H = layers.random_layer(3, 1700, tokens=3400)
    mask = np.random.default_rng(0).random(W.shape) < 0.98
    target, Hl = oracles.damped(W, H)
    new = cuobs.reconstruct(W, mask, H, **CPU)
    gradient = ((new - target) @ Hl)[mask]
    assert np.abs(gradient).max() <= 1e-9 * np.abs(target @ Hl).max()


def test_reconstruct_another_target_and_damping():
    W, H = layers.random_layer(8, 32)
    mask = np.random.default_rng(0).random(W.shape) < 0.5
    goal = W + 1
    target, Hl = oracles.damped(W, H, 0.2, goal)
    h = cuobs.Hessian(32, dtype="float64", device="cpu")
    h.matrix[...] = H
    for given in H, h:
        new = cuobs.reconstruct(W, mask, given, 0.2, target=goal, **CPU)
        np.testing.assert_allclose(new, oracles.exact(target, Hl, mask), rtol=0, atol=1e-9)


def test_reconstruct_refuses_weights_that_no_longer_fit():
    """Two columns nearly alike, of which one is to do the work of both."""
    X = np.random.default_rng(0).standard_normal((64, 1)) * [1.0, 1.0]
    H = X.T @ X
    W = np.full((1, 2), 60000, "float16")
    with pytest.raises(ValueError, match="W: found pruned weights that float16 can't hold"):
        cuobs.reconstruct(W, np.array([[True, False]]), H, **CPU)


def test_reconstruct_keeps_the_dtype():
    W, H = layers.random_layer(8, 32)
    mask = np.ones(W.shape, bool)
    assert cuobs.reconstruct(W.astype("float16"), mask, H, device="cpu").dtype == np.float16


@pytest.mark.parametrize("mask, error", [
    (np.ones((8, 32)), TypeError), (np.ones((8, 31), bool), ValueError),
    (np.ones((8, 32), int), TypeError), (np.ones(32, bool), ValueError),
])
def test_reconstruct_refuses(small, mask, error):
    W, H = small
    with pytest.raises(error, match="mask: found"):
        cuobs.reconstruct(W, mask, H, device="cpu")


def test_reconstruct_not_positive_definite():
    W, H = layers.random_layer(8, 32, tokens=20)
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite.*damp"):
        cuobs.reconstruct(W, np.ones(W.shape, bool), H, damp=0.0, **CPU)


@pytest.mark.parametrize("method, options", [
    ("admm", {}), ("sparsegpt", {"refine": "exact"}), ("obs-ordered", {}),
])
def test_a_weight_nearly_zero(xp, method, options):
    """What float32 can square comes out as its size says: nothing overflows or is given up."""
    W, H = layers.random_layer(8, 64)
    whole = prune(xp, W, H, "float32", method=method, **options)
    small = prune(xp, 2.0**-50 * W, H, "float32", method=method, **options)
    np.testing.assert_allclose(2.0**50 * small.weight, whole.weight, rtol=0, atol=0.02)
    assert abs(small.loss - whole.loss) < 1e-3


def test_a_row_nearly_zero(xp):
    W, H = layers.random_layer(8, 64)
    size = 2.0 ** -np.arange(0, 56, 7)[:, None]
    whole = prune(xp, W, H, "float32", method="sparsegpt", refine="exact")
    mixed = prune(xp, size * W, H, "float32", method="sparsegpt", refine="exact")
    np.testing.assert_allclose(mixed.weight / size, whole.weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("scale", [1e25, -1e25, 1e-25])
def test_squares_that_float32_cannot_hold(xp, scale):
    """Costs would be infinite or 0, and masks chance."""
    W, H = layers.random_layer(8, 64)
    for given in {"W": W * scale}, {"W": W, "target": W * scale}:
        with pytest.raises(ValueError, match=f"{[*given][-1]}: found values up to .*float64"):
            prune(xp, H=H, dtype="float32", **given)
    whole, scaled = (prune(xp, s * W, H, method="sparsegpt") for s in (1, scale))
    np.testing.assert_array_equal(scaled.mask, whole.mask)
    assert scaled.loss == pytest.approx(whole.loss, rel=1e-12)


@pytest.mark.parametrize("scale", [5e37, 1e30, 1e-30])
def test_a_loss_neither_overflows_nor_vanishes(xp, scale):
    W, H = (a.astype("float32") for a in layers.random_layer(8, 64))
    pruned = W * np.tile([True, False], 32)
    losses = [
        cuobs.relative_loss(xp.asarray(s * W), xp.asarray(s * pruned), xp.asarray(H))
        for s in (np.float32(1), np.float32(scale))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    H = xp.full((64, 64), 3e38, "float32")
    with pytest.raises(ValueError, match="overflows float32"):
        loss(xp.asarray(W), xp.asarray(pruned), H)


def test_energies_of_several_weights(xp, monkeypatch):
    """Multiplied together, each in terms of its own unit; one has no rows at hand."""
    monkeypatch.setattr("cuobs.loss.COLUMNS", 8)
    D, H = layers.random_layer(28, 40)
    parts, expected = [], []
    for rows, unit in (slice(0, 5), 4.0), (slice(5, 5), 1.0), (slice(5, 14), 2.0**-20):
        W, pruned = D[rows], D[14 + rows.start : 14 + rows.stop]
        pair = (part / unit for part in (W, pruned - W))
        expected.append([np.trace(part @ H @ part.T) for part in pair])
        parts.append((xp.asarray(W), xp.asarray(pruned), unit))
    found = energies_together(parts, xp.asarray(H), "tensor")
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    with pytest.raises(ValueError, match="overflows float64"):
        energies_together([(*parts[0][:2], 1e-160)], xp.asarray(H), "fp32")


@pytest.mark.gpu
def test_energies_on_tensor_cores(cp, monkeypatch):
    monkeypatch.setattr("cuobs.ops.cuda.products.SPLIT_FROM", 1)
    W, H = layers.random_layer(64, 512)
    pruned = W * np.tile([True, False], 256)
    expected = [np.trace(part @ H @ part.T) for part in (W, pruned - W)]
    given = [cp.asarray(array, "float32") for array in (W, pruned, H)]
    found = energies_together([(*given[:2], 1.0)], given[2], "tensor")
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_a_hessian_that_is_none():
    """No output has a negative energy: where one does, a loss would say nothing."""
    W, H = np.array([[1.0, 1.0]]), np.array([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="^H: found outputs of negative energy"):
        cuobs.relative_loss(W, np.array([[2.0, 0.0]]), H)


@pytest.mark.parametrize("H, error, words", [
    (np.ones((32, 31)), ValueError, "31"),
    (np.eye(32, dtype=int), TypeError, "int64"),
    (np.triu(np.ones((32, 32))), ValueError, "not symmetric"),
    (-np.eye(32), ValueError, "negative"),
])
def test_an_argument_has_the_name_that_the_caller_gave_it(small, H, error, words):
    W, mask = small[0], np.ones((8, 32), bool)
    for call in (
        lambda: cuobs.relative_loss(W, W, H),
        lambda: cuobs.reconstruct(W, mask, H, device="cpu"),
    ):
        with pytest.raises(error, match=f"^H: found .*{words}"):
            call()
    with pytest.raises(np.linalg.LinAlgError, match="^H: found a matrix that is not positive"):
        cuobs.reconstruct(W, mask, np.ones((32, 32)), damp=0.0, device="cpu")
    few = cuobs.Hessian(32)
    few.update(np.eye(32)[:20])
    with pytest.warns(UserWarning, match="^H: found 20 tokens for 32 columns"):
        cuobs.reconstruct(W, mask, few, device="cpu")


def test_relative_loss(xp):
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((8, 32)), rng.standard_normal((100, 32))
    pruned = W * (rng.random(W.shape) < 0.5)
    expected = np.linalg.norm(X @ (pruned - W).T) / np.linalg.norm(X @ W.T)
    found = cuobs.relative_loss(*map(xp.asarray, (W, pruned, X.T @ X)))
    assert found == pytest.approx(expected, rel=1e-12)
    assert cuobs.relative_loss(xp.asarray(W), xp.asarray(W), xp.asarray(X.T @ X)) == 0
    with pytest.raises(ValueError, match="W_pruned"):
        cuobs.relative_loss(W, W[:4], X.T @ X)


# Limits of memory


@pytest.mark.parametrize("limit", [8, "8", "63KiB", 65535])
def test_a_limit_without_its_unit_is_refused(limit):
    refused(ValueError, "memory_limit: found .*, which is .* expected at least 64 KiB",
            memory_limit=limit)
