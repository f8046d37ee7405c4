"""What holds for every method, whatever the pattern and the shape."""

import layers
import numpy as np
import oracles
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import TILE, prune
from test_methods import ALL
from test_pattern import views

import cuobs

NAMED = ["2:4", "4:8", "coupled-2:4", "block16-row8", TILE]
METHODS = pytest.mark.parametrize("method, options", ALL, ids=[name for name, _ in ALL])


@METHODS
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(view=views(), seed=st.integers(0, 999), dead=st.integers(0, 3))
def test_random_patterns_are_obeyed(method, options, view, seed, dead):
    """Exactly `keep` whole blocks a scope, zeros elsewhere, never a loss below the best's."""
    pattern, M, K = view
    W, H = layers.random_layer(M, K, seed, dead=range(dead))
    result = prune(np, W, H, pattern=pattern, method=method, **options)
    assert oracles.obeys(result.mask, pattern)
    assert (result.weight[~result.mask] == 0).all()
    assert cuobs.verify(result.weight, pattern)
    assert (result.weight[:, :dead] == 0).all()
    target, Hl = oracles.damped(W, H)
    cost = oracles.damped_costs(target, result.weight, Hl)
    least = oracles.damped_costs(target, oracles.exact(target, Hl, result.mask), Hl)
    tiny = 1e-12 * oracles.damped_costs(target, 0 * target, Hl)
    assert (cost >= least - tiny).all()
    if result.refine:
        assert (cost <= least * (1 + 1e-9) + tiny).all()


@pytest.mark.parametrize("pattern", NAMED)
@METHODS
def test_scaling_changes_no_mask(xp, pattern, method, options):
    W, H = layers.random_layer(32, 96, seed=1)
    options = {"pattern": pattern, "method": method, **options}
    result = prune(xp, W, H, **options)
    for w, x in (37.0, 1.0), (1.0, 1e-3), (2e-4, 530.0):
        scaled = prune(xp, w * W, x**2 * H, **options)
        np.testing.assert_array_equal(scaled.mask, result.mask)
        np.testing.assert_allclose(scaled.weight, w * result.weight, rtol=0, atol=1e-9 * w)
        assert scaled.loss == pytest.approx(result.loss, rel=1e-9)


@pytest.mark.parametrize("pattern", NAMED)
@METHODS
def test_permuted_rows(xp, pattern, method, options):
    """Groups of rows that no scope joins may come in any order."""
    W, H = layers.random_layer(32, 96, seed=2)
    groups = oracles.scopes(pattern, 32, 96).rows
    order = np.empty(32, int)
    order[groups.ravel()] = groups[np.random.default_rng(0).permutation(len(groups))].ravel()
    result = prune(xp, W, H, pattern=pattern, method=method, **options)
    permuted = prune(xp, W[order], H, pattern=pattern, method=method, **options)
    np.testing.assert_array_equal(permuted.mask, result.mask[order])
    np.testing.assert_allclose(permuted.weight, result.weight[order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", NAMED)
@METHODS
def test_batches_and_workers_change_nothing(xp, pattern, method, options):
    W, H = layers.random_layer(48, 96, seed=3)
    options = {"pattern": pattern, "method": method, **options}
    result = prune(xp, W, H, **options)
    for how in ({"workers": 1}, {"workers": 3}, {"batch_rows": 1}, {"batch_rows": 5, "workers": 2},
                {"batch_rows": 1000}, {"memory_limit": 2 * 10**6 if xp is np else "800MiB"},
                {"memory_limit": "1GiB"}):
        other = prune(xp, W, H, **options, **how)
        np.testing.assert_array_equal(other.mask, result.mask)
        np.testing.assert_allclose(other.weight, result.weight, rtol=0, atol=1e-10)


@METHODS
def test_batches_change_no_mask_in_single_precision(method, options):
    W, H = layers.random_layer(48, 96, seed=4)
    options = {"pattern": "2:4", "method": method, "dtype": "float32", **options}
    result = prune(np, W, H, **options)
    for how in {"workers": 1}, {"batch_rows": 1}, {"batch_rows": 7, "workers": 3}:
        other = prune(np, W, H, **options, **how)
        np.testing.assert_array_equal(other.mask, result.mask)


@pytest.mark.parametrize("method, options", [
    ("magnitude", {}), ("wanda", {}), ("obs-local", {}), ("obs-ordered", {"group": 4}),
    ("true-obs", {"group": 1, "order": "gap"}), ("true-obs", {"group": 4, "order": "largest"}),
    ("admm", {}),
])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_permuted_scopes(method, options, pattern):
    """Methods that know no left and right don't care where a scope lies."""
    W, H = layers.random_layer(16, 96, seed=5)
    scopes = oracles.scopes(pattern, 16, 96).columns
    order = scopes[np.random.default_rng(0).permutation(len(scopes))].ravel()
    result = prune(np, W, H, pattern=pattern, method=method, **options)
    permuted = prune(np, W[:, order], H[np.ix_(order, order)], pattern=pattern, method=method,
                     **options)
    np.testing.assert_array_equal(permuted.mask, result.mask[:, order])
    np.testing.assert_allclose(permuted.weight, result.weight[:, order], rtol=0, atol=1e-9)


@METHODS
def test_independent_columns_need_no_compensation(method, options):
    """With a diagonal Hessian the best mask is Wanda's and the kept weights stay."""
    W, _ = layers.random_layer(8, 64, seed=6)
    H = np.diag(np.random.default_rng(0).uniform(1, 2, 64))
    result = prune(np, W, H, pattern="2:4", method=method, damp=0.0, **options)
    # ADMM may stop at a mask nearby.
    if method not in ("magnitude", "admm"):
        np.testing.assert_array_equal(
            result.mask, oracles.wanda(W, np.diag(H), oracles.scopes("2:4", 8, 64))[1])
    np.testing.assert_allclose(result.weight, W * result.mask, rtol=0, atol=1e-12)


@METHODS
def test_a_weight_that_obeys_already(method, options):
    """Pruning again by the same pattern finds weights that need no change."""
    W, H = layers.random_layer(8, 64, seed=7)
    W = W * oracles.magnitude(W, oracles.scopes("2:4", 8, 64))[1]
    result = prune(np, W, H, pattern="2:4", method=method, **options)
    np.testing.assert_allclose(result.weight, W, rtol=0, atol=1e-9)
    assert result.loss < 1e-9
