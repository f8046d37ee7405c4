"""Which blocks of a scope to prune."""

import numpy as np
import oracles
import pytest
from layers import TILE, host
from op_cases import (
    EVERY,
    PATTERNS,
    SHAPE,
    SINGLE,
    by_scope,
    compiled,
    definite,
    layout_of,
    near,
    place_major,
    untouched,
    wider,
)

from cuobs import arrays
from cuobs.ops import selection


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_costs_and_masks(xp, rng, dtype, close, text):
    """Costs of candidates, the best of them, the gap, and the masks, shared C and own C."""
    layout, s = compiled(text)
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    W = rng.standard_normal((m * r, n * c))
    own = definite(rng, m, r, n, c)
    for blocks in own, np.broadcast_to(own[:1, :1], own.shape):
        shared = blocks is not own
        costs = np.stack([
            oracles.choice_costs(by_scope(W, layout).transpose(1, 3, 2, 0)[:, g],
                                 blocks[:, :, g], s) for g in range(n)
        ], 1)
        C = blocks.transpose(3, 4, 0, 1, 2)
        C = xp.asarray(C[:, :, 0, 0] if shared else C, dtype)
        w = by_scope(xp.asarray(W, dtype), layout)
        ranked, best = np.sort(costs, -1), costs.argmin(-1)
        chosen, cost, gap = selection.select(w, C, layout)
        expected = np.zeros((layout.n_blocks, m, n), bool)
        for i, g in np.ndindex(m, n):
            expected[list(s.choices[best[i, g]]), i, g] = True
        np.testing.assert_array_equal(host(chosen), expected)
        close(cost, ranked[..., 0])
        np.testing.assert_allclose(host(gap), ranked[..., 1] - ranked[..., 0], rtol=0,
                                   atol={"float32": 1e-3, "float64": 1e-10}[dtype])
        wide = xp.zeros((m * r, n * c + 5), bool)
        selection.select_mask(w, C, layout, wide[:, : n * c])
        mask = ~selection.expand(xp.asarray(expected), layout).reshape(m * r, n * c)
        np.testing.assert_array_equal(host(wide)[:, : n * c], host(mask))
        assert not host(wide)[:, n * c :].any()
        if layout.enumerated:
            found = selection.candidate_costs(w, C, layout)
            close(found, costs.transpose(2, 0, 1))
            for k, lost in enumerate(s.choices):
                assert np.array_equal(layout.candidates[k], np.isin(layout.blocks, lost))


@pytest.mark.parametrize("text", PATTERNS)
def test_block_sums_and_expand(xp, rng, text):
    layout, s = compiled(text)
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    scores = rng.standard_normal((c, m, r, n))
    sums = selection.block_sums(xp.asarray(scores), layout)
    flags = xp.asarray(rng.random((layout.n_blocks, m, n)) < 0.5)
    elements = host(selection.expand(flags, layout))
    assert elements.shape == (m, r, n, c)
    for b in range(layout.n_blocks):
        where = layout.blocks == b
        np.testing.assert_allclose(
            host(sums)[b], scores.transpose(1, 3, 2, 0)[:, :, where].sum(-1), atol=1e-12)
        assert (elements.transpose(0, 2, 1, 3)[:, :, where] == host(flags)[b][..., None]).all()


@pytest.mark.parametrize("n", [2, 4, 16, 17, 40])
def test_prune_lowest(xp, rng, n):
    """The lowest index first where scores tie."""
    scores = rng.integers(0, 4, (n, 5, 6)).astype(float)
    for n_pruned in {1, n // 2, n - 1}:
        found = host(selection.prune_lowest(xp.asarray(scores), n_pruned))
        expected = np.zeros_like(found)
        lowest = np.argsort(scores, axis=0, kind="stable")[:n_pruned]
        np.put_along_axis(expected, lowest, True, axis=0)
        np.testing.assert_array_equal(found, expected)


def test_scope_blocks(xp, rng):
    C = rng.standard_normal((12, 12))
    found = host(selection.scope_blocks(xp.asarray(C), 4))
    for g in range(3):
        np.testing.assert_array_equal(found[..., g], C[4 * g : 4 * g + 4, 4 * g : 4 * g + 4])


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16", TILE])
def test_ties_take_the_first_mask(xp, text):
    layout, _ = compiled(text)
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    w = xp.zeros((c, m, r, n))
    C = xp.asarray(np.broadcast_to(np.eye(c)[:, :, None], (c, c, n)))
    blocks, best, gap = (host(a) for a in selection.select(w, C, layout))
    n_pruned = layout.n_blocks - layout.keep
    assert blocks[:n_pruned].all() and not blocks[n_pruned:].any()
    assert not best.any() and not gap.any()


@pytest.mark.gpu
@EVERY
@SHAPE
@SINGLE
@pytest.mark.parametrize("own", [False, True])
def test_select_by_a_kernel(cp, rng, pattern, m, n, dtype, own):
    layout = layout_of(pattern, m, n)
    r, c = layout.blocks.shape
    w = rng.standard_normal((m, r, n, c)).astype(dtype)
    w[:, :, n // 2] = 0  # every candidate ties
    w = w.transpose(3, 0, 1, 2)
    C = place_major(definite(rng, *((m, r, n) if own else (n,)), c)).astype(dtype)
    blocks, best, gap = selection.select(w, C, layout)
    found, found_best, found_gap = selection.select(cp.asarray(w), cp.asarray(C), layout)
    near(found_best, best, dtype)
    near(found_gap, gap, dtype)
    # Rounding decides where two masks cost the same.
    sure = (gap > {"float32": 1e-5, "float64": 1e-12}[dtype] * np.abs(best).max()) | (best == 0)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(arrays.to_numpy(found)[:, sure], blocks[:, sure])

    whole, mask = wider(cp, np.zeros((m * r, n * c), bool), c, 3 * c)
    selection.select_mask(cp.asarray(w), cp.asarray(C), layout, mask)
    expected = ~selection.expand(arrays.to_numpy(found), layout).reshape(m * r, n * c)
    np.testing.assert_array_equal(arrays.to_numpy(mask), expected)
    assert untouched(whole, c, 3 * c)


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["33:64", "2:3x8", "1:2x64"])
def test_scopes_too_large_for_a_kernel(cp, rng, text):
    """They take array operations, on the device too."""
    layout = layout_of(text, 4, 1) if text != "2:3x8" else layout_of(text, 4, 5)
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    w = rng.standard_normal((m, r, n, c)).transpose(3, 0, 1, 2)
    C = place_major(definite(rng, n, c))
    for found, expected in zip(selection.select(cp.asarray(w), cp.asarray(C), layout),
                               selection.select(w, C, layout), strict=True):
        np.testing.assert_allclose(arrays.to_numpy(found), expected, rtol=1e-9)


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("c, n", [(1, 5), (2, 33), (3, 7), (4, 1), (4, 70), (8, 9), (12, 5),
                                  (16, 6), (20, 3)])
def test_factor_scope_blocks(cp, rng, c, n, dtype):
    U = np.triu(rng.standard_normal((n * c, n * c))).astype(dtype)
    expected = selection.factor_scope_blocks(U, c)
    near(selection.factor_scope_blocks(cp.asarray(U), c), expected, dtype)


@pytest.mark.parametrize("n", [4, 16, 17])
def test_nan_counts_as_infinite(xp, rng, n):
    """As many blocks are marked as a scope loses, whatever their scores are."""
    scores = rng.standard_normal((n, 40, 30))
    scores[rng.random(scores.shape) < 0.3] = np.nan
    scores[:, :3] = np.nan
    for n_pruned in {1, n // 2, n - 1}:
        found = host(selection.prune_lowest(xp.asarray(scores), n_pruned))
        assert (found.sum(0) == n_pruned).all()
        ranked = np.argsort(np.where(np.isnan(scores), np.inf, scores), axis=0, kind="stable")
        expected = np.zeros_like(found)
        np.put_along_axis(expected, ranked[:n_pruned], True, axis=0)
        np.testing.assert_array_equal(found, expected)


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_nan_breaks_no_pattern(xp, rng, dtype, text):
    layout, _ = compiled(text)
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    w = rng.standard_normal((c, m, r, n)).astype(dtype)
    w[rng.random(w.shape) < 0.3] = np.nan
    w[:, 0] = np.nan
    C = np.ascontiguousarray(np.broadcast_to(np.eye(c, dtype=dtype)[:, :, None], (c, c, n)))
    with np.errstate(invalid="ignore"):
        blocks, _, _ = selection.select(xp.asarray(w), xp.asarray(C), layout)
    assert (host(blocks).sum(0) == layout.n_blocks - layout.keep).all()


def test_selection_refuses_other_shapes(xp):
    layout, _ = compiled("2:4")
    w, C = xp.zeros((4, 8, 1, 3)), xp.zeros((4, 4, 3))
    with pytest.raises(ValueError, match=r"w: found shape \(3, 8, 1, 3\), expected \(4, row"):
        selection.select(w[:3], C, layout)
    with pytest.raises(ValueError, match="C: found shape"):
        selection.select(w, C[..., :2], layout)
    with pytest.raises(TypeError, match="C: found dtype float32, expected float64"):
        selection.select(w, C.astype("float32"), layout)
    with pytest.raises(ValueError, match="out: found shape"):
        selection.select_mask(w, C, layout, xp.zeros((8, 11), bool))


def test_few_scopes_are_no_more_pieces_than_they_fill(rng, monkeypatch):
    """The pieces of a span hold as much as those of a whole weight."""
    layout = layout_of("2:4", 600, 400)
    sizes, first = [], {}
    costs = selection.candidate_costs
    monkeypatch.setattr(selection, "candidate_costs",
                        lambda w, *rest: sizes.append(w.nbytes) or costs(w, *rest))
    C = definite(rng, 400, 4).transpose(1, 2, 0)
    for n in 400, 6:
        sizes.clear()
        w = rng.standard_normal((4, 600, 1, n))
        selection.select(w, np.ascontiguousarray(C[..., :n]), layout)
        assert sum(sizes) == w.nbytes
        first[n] = sizes[0]
    assert first[6] >= first[400]
