"""Every method against its textbook form, and the identities that OBS obeys."""

from functools import cache

import layers
import numpy as np
import oracles
import pytest
from layers import PATTERNS, ROWS, TALL, TILE, layer, prune

import cuobs

SPLIT = ("obs-split", "obs-interleaved")


@cache
def reference(pattern, method, options=(), damp=0.01, moved=False, M=None):
    """Weights, mask and costs (or None) by the textbook form, cached for every namespace."""
    W, H, target, Hl, s = layer(pattern, M)
    options = dict(options)
    if damp != 0.01 or moved:
        target, Hl = oracles.damped(W, H, damp, moved_target(pattern) if moved else None)
    if method == "magnitude":
        return *oracles.magnitude(target, s), None
    if method == "wanda":
        return *oracles.wanda(target, np.diag(H), s), None
    if method == "obs-local":
        return *oracles.obs_local(target, Hl, s), None
    if method == "obs-full":
        return *oracles.obs_full(target, Hl, s), None
    if method in SPLIT:
        interleaved = method == "obs-interleaved"
        return *oracles.obs_split(target, Hl, s, options["splits"], interleaved), None
    if method == "sparsegpt":
        return *oracles.sparsegpt(target, Hl, s), None
    if method == "obs-ordered":
        return oracles.obs_ordered(target, Hl, s, **options)
    if method == "true-obs":
        return oracles.true_obs(target, Hl, s, **options)
    growth = {"default": (1.06, 1.04, 1.03), "slow": (1.04, 1.02, 1.02)}
    mask, _ = oracles.admm_mask(
        target, Hl, s, 0.1, growth[options.get("schedule", "default")], every=1, kept=(1.2, 1.7)
    )
    return oracles.exact(target, Hl, mask), mask, None


def moved_target(pattern):
    W = layer(pattern)[0]
    return W + 0.3 * np.random.default_rng(0).standard_normal(W.shape)


def agree(xp, pattern, method, *, damp=0.01, moved=False, M=None, **options):
    """Prune and compare: equal masks, weights to 1e-9, costs to 1e-9, exact zeros, the loss."""
    W, H, *_ = layer(pattern, M)
    weight, mask, cost = reference(pattern, method, tuple(options.items()), damp, moved, M)
    result = prune(xp, W, H, pattern=pattern, method=method, damp=damp,
                   target=moved_target(pattern) if moved else None, **options)
    np.testing.assert_array_equal(result.mask, mask)
    np.testing.assert_allclose(result.weight, weight, rtol=0, atol=1e-9 * np.abs(W).max())
    assert (result.weight[~mask] == 0).all()
    assert oracles.obeys(result.mask, pattern)
    assert result.loss == pytest.approx(oracles.relative_loss(W, weight, H), rel=1e-9)
    if cost is None:
        assert result.cost is None
    else:
        np.testing.assert_allclose(result.cost, cost, rtol=1e-9, atol=1e-9 * cost.max())
    return result


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs-local", "obs-full", "sparsegpt"])
def test_textbook(xp, pattern, method):
    agree(xp, pattern, method)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("splits", [1, 3, 5, 64])
@pytest.mark.parametrize("method", SPLIT)
def test_textbook_splits(xp, pattern, method, splits):
    agree(xp, pattern, method, splits=splits)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("order", ["largest", "left", "smallest"])
def test_textbook_ordered(xp, pattern, order):
    agree(xp, pattern, "obs-ordered", group=5, order=order)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("order", ["gap", "left", "shared", "largest", "smallest"])
def test_textbook_true(xp, pattern, order):
    agree(xp, pattern, "true-obs", group=5, order=order)


@pytest.mark.parametrize("pattern", ["block16-row8", ROWS])
@pytest.mark.parametrize("group", [1, 2])
def test_rows_that_lose_different_numbers_of_columns(xp, pattern, group):
    """Some rows are so large that their partners lose nearly all columns."""
    W, H, *_ = layer(pattern)
    every = 8 if pattern == "block16-row8" else 1
    W = W * np.where(np.arange(len(W)) // every % 2, 1e3, 1)[:, None]
    target, Hl = oracles.damped(W, H)
    weight, mask, cost = oracles.true_obs(
        target, Hl, oracles.scopes(pattern, *W.shape), group=group, order="gap"
    )
    lost = (~mask).sum(1)
    assert lost.max() > 2 * max(1, lost.min())
    for batch in None, 1, 3:
        result = prune(xp, W, H, pattern=pattern, method="true-obs", group=group, batch_rows=batch)
        np.testing.assert_array_equal(result.mask, mask)
        np.testing.assert_allclose(result.weight, weight, rtol=0, atol=1e-9 * np.abs(W).max())
        np.testing.assert_allclose(result.cost, cost, rtol=1e-7, atol=1e-9 * cost.max())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("group", [1, 1000])
@pytest.mark.parametrize("method", ["obs-ordered", "true-obs"])
def test_textbook_groups(xp, pattern, method, group):
    agree(xp, pattern, method, group=group,
          order="gap" if method == "true-obs" else "largest")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("schedule", ["default", "slow"])
def test_textbook_admm(xp, pattern, schedule):
    agree(xp, pattern, "admm", schedule=schedule)


ALL = [
    ("magnitude", {}), ("wanda", {}), ("obs-local", {}), ("obs-full", {}),
    ("obs-split", {"splits": 3}), ("obs-interleaved", {"splits": 3}), ("sparsegpt", {}),
    ("obs-ordered", {"group": 5, "order": "largest"}), ("true-obs", {"group": 5, "order": "gap"}),
    ("admm", {}),
]


@pytest.mark.parametrize("pattern, M", [("2:4", 1), ("block16-row8", 16), (TILE, 2), (TALL, 4)])
@pytest.mark.parametrize("method, options", ALL)
def test_few_rows(xp, pattern, M, method, options):
    """Arrays of one row are contiguous either way: nothing may be overwritten through a view."""
    agree(xp, pattern, method, M=M, **options)


def test_every_method_is_compared():
    assert [name for name, _ in ALL] == list(cuobs.methods())


@pytest.mark.parametrize("pattern", ["2:4", "block16-row8"])
@pytest.mark.parametrize("method, options", ALL)
def test_target(xp, pattern, method, options):
    agree(xp, pattern, method, moved=True, **options)


@pytest.mark.parametrize("damp", [0.0003, 0.3])
@pytest.mark.parametrize("method, options", ALL)
def test_damping(xp, method, options, damp):
    agree(xp, "2:4", method, damp=damp, **options)


@pytest.mark.parametrize("method, options", ALL)
def test_exact_refinement(xp, method, options):
    W, H, target, Hl, _ = layer("coupled-2:4")
    plain = prune(xp, W, H, pattern="coupled-2:4", method=method, **options)
    result = prune(xp, W, H, pattern="coupled-2:4", method=method, refine="exact", **options)
    assert result.refine == "exact"
    assert plain.refine == ("exact" if method in ("true-obs", "admm") else None)
    np.testing.assert_array_equal(result.mask, plain.mask)
    np.testing.assert_allclose(result.weight, oracles.exact(target, Hl, plain.mask), rtol=0,
                               atol=1e-9)
    before, after = (oracles.damped_costs(target, r.weight, Hl) for r in (plain, result))
    assert (after <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method, options", ALL)
def test_gradient_is_zero_on_kept_weights(xp, pattern, method, options):
    W, H, target, Hl, _ = layer(pattern)
    result = prune(xp, W, H, pattern=pattern, method=method, refine="exact", **options)
    gradient = (result.weight - target) @ Hl
    assert np.abs(gradient[result.mask]).max() <= 1e-9 * np.abs(target @ Hl).max()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["true-obs", "obs-ordered"])
@pytest.mark.parametrize("group", [1, 7, 1000])
def test_costs_add_up_to_the_damped_loss(xp, pattern, method, group):
    W, H, target, Hl, _ = layer(pattern)
    result = prune(xp, W, H, pattern=pattern, method=method, group=group)
    assert result.cost.shape == (len(W),)
    np.testing.assert_allclose(
        result.cost, oracles.damped_costs(target, result.weight, Hl), rtol=1e-9
    )


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "coupled-2:4", "block16-row8"])
@pytest.mark.parametrize("method, options", ALL)
def test_single_precision(xp, pattern, method, options):
    W, H, *_ = layer(pattern)
    double = prune(xp, W, H, pattern=pattern, method=method, **options)
    single = prune(xp, W, H, pattern=pattern, method=method, dtype="float32", **options)
    assert oracles.obeys(single.mask, pattern)
    assert single.loss == pytest.approx(double.loss, rel=0.01)


@pytest.mark.parametrize("method", ["sparsegpt", "obs-interleaved", "obs-full", "true-obs"])
def test_layers_wider_than_a_block(xp, method):
    """The sweeps work in blocks of 128 columns; three of them, the last one shorter."""
    W, H = layers.random_layer(20, 300, seed=3)
    target, Hl = oracles.damped(W, H)
    s = oracles.scopes("2:4", *W.shape)
    options = {"obs-interleaved": {"splits": 2}, "true-obs": {"group": 20}}.get(method, {})
    weight, mask = {
        "sparsegpt": lambda: oracles.sparsegpt(target, Hl, s),
        "obs-full": lambda: oracles.obs_full(target, Hl, s),
        "obs-interleaved": lambda: oracles.obs_split(target, Hl, s, 2, True),
        "true-obs": lambda: oracles.true_obs(target, Hl, s, 20, "gap")[:2],
    }[method]()
    result = prune(xp, W, H, pattern="2:4", method=method, **options)
    np.testing.assert_array_equal(result.mask, mask)
    np.testing.assert_allclose(result.weight, weight, rtol=0, atol=1e-9 * np.abs(W).max())


def test_published_defaults():
    """splits 64, a group of a tenth of the scopes, orders gap and largest."""
    W, H = layers.random_layer(4, 400, seed=5)
    for method, options in [
        ("obs-split", {"splits": 64}), ("obs-interleaved", {"splits": 64}),
        ("obs-ordered", {"group": 10, "order": "largest"}),
        ("true-obs", {"group": 10, "order": "gap"}), ("admm", {"schedule": "default"}),
    ]:
        told = prune(np, W, H, pattern="2:4", method=method, **options)
        untold = prune(np, W, H, pattern="2:4", method=method)
        np.testing.assert_array_equal(told.weight, untold.weight)
