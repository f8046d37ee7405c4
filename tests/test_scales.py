"""The sizes of W and X: a power of two in either changes no mask and no digit of a weight."""

from functools import cache

import layers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuobs

METHODS = (*cuobs.methods(), "magnitude+exact", "wanda+exact")
DEAD = (3, 9)


def prune(W, name, **arguments):
    method, _, refine = name.partition("+")
    return cuobs.prune(W, method=method, refine=refine or None, device="cpu", **arguments)


@cache
def small():
    """W, X and what each method makes of them, float32."""
    rng = np.random.default_rng(0)
    X = (rng.standard_normal((200, 32)) + rng.standard_normal((200, 1))).astype("float32")
    X[:, list(DEAD)] = 0
    W = rng.standard_normal((8, 32)).astype("float32")
    return W, X, {name: prune(W, name, X=X) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None)
@given(a=st.integers(-60, 60), b=st.integers(-38, 55), target=st.booleans())
def test_powers_of_two_move_nothing(name, a, b, target):
    """From 1e-18 to 1e18 in W and 1e-11 to 1e16 in X, together and against each other."""
    W, X, known = small()
    if target:  # which the loss sets beside W itself
        a, b = a // 4, b // 2
    by = np.ldexp(np.float32(1), a), np.ldexp(np.float32(1), b)
    goal = {"target": W * by[0]} if target else {}
    result = prune(W * (1 if target else by[0]), name, X=X * by[1], **goal)
    np.testing.assert_array_equal(result.mask, known[name].mask)
    np.testing.assert_array_equal(result.weight, known[name].weight * by[0])
    if not target:
        assert result.loss == known[name].loss
    if result.cost is not None:
        np.testing.assert_array_equal(result.cost, np.ldexp(known[name].cost, 2 * (a + b)))


@settings(max_examples=20, deadline=None)
@given(a=st.integers(-400, 400), b=st.integers(-400, 400), name=st.sampled_from(METHODS))
def test_powers_of_two_move_nothing_in_float64(a, b, name):
    W, H = layers.random_layer(4, 16, dead=(2,))
    expected = prune(W, name, hessian=H, dtype="float64")
    result = prune(np.ldexp(W, a), name, hessian=np.ldexp(H, 2 * b), dtype="float64")
    np.testing.assert_array_equal(result.mask, expected.mask)
    np.testing.assert_array_equal(result.weight, np.ldexp(expected.weight, a))
    assert result.loss == expected.loss


@settings(max_examples=20, deadline=None)
@given(a=st.integers(-60, 60), b=st.integers(-38, 55))
def test_powers_of_two_move_no_reconstruction(a, b):
    W, X, known = small()
    mask, H = known["admm"].mask, np.float64(X).T @ X
    expected = cuobs.reconstruct(W, mask, H, device="cpu")
    scaled = cuobs.reconstruct(np.ldexp(W, a), mask, np.ldexp(H, 2 * b), device="cpu")
    np.testing.assert_array_equal(scaled, np.ldexp(expected, a))


@pytest.mark.parametrize("dtype, scale", [("float32", 1e-30), ("float64", 1e-200)])
@pytest.mark.parametrize("name", METHODS)
def test_activations_whose_squares_vanish(name, dtype, scale):
    W, X, _ = small()
    tiny = (X.astype("float64") * scale).astype(dtype)
    with pytest.raises(ValueError, match=f"X: found values up to .*whose squares {dtype} can't"):
        prune(W, name, X=tiny, dtype=dtype)
    h = cuobs.Hessian(32, dtype=dtype)
    with pytest.raises(ValueError, match="X: found values up to"):
        h.update(tiny)
    assert h.tokens == 0
    h.update(X)
    h.update(tiny)  # beside others, they are as good as none
    assert h.tokens == 400


def test_tiny_activations_in_a_wider_dtype():
    W, X, _ = small()
    wide = prune(W, "sparsegpt", X=X, dtype="float64")
    tiny = prune(W, "sparsegpt", X=np.ldexp(X, -100), dtype="float64")
    np.testing.assert_array_equal(tiny.weight, wide.weight)
    assert tiny.loss == wide.loss


@pytest.mark.parametrize("scale, words", [
    (1e-40, "with all digits.*dtype='float64'"), (1e80, "more than float32 can hold"),
])
def test_hessians_that_float32_cannot_hold(scale, words):
    W, X, _ = small()
    H = scale * (np.float64(X).T @ X)
    for matrix in (H, H.astype("float32")) if scale < 1 else (H,):
        with pytest.raises(ValueError, match=f"hessian: found values up to .*{words}"):
            prune(W, "true-obs", hessian=matrix)
    plain = prune(W, "true-obs", hessian=np.float64(X).T @ X, dtype="float64")
    scaled = prune(W, "true-obs", hessian=H, dtype="float64")
    np.testing.assert_array_equal(scaled.mask, plain.mask)
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-40, 2.0**-100, 1.0, 2.0**100])
def test_a_loss_by_a_hessian_of_any_size(scale):
    W, X, known = small()
    H = np.float64(X).T @ X
    for w in (1e-25, 1.0, 1e25):
        loss = cuobs.relative_loss(w * W, w * known["admm"].weight, scale * H)
        assert loss == pytest.approx(known["admm"].loss, rel=1e-4)
