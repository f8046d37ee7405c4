"""Each op against the plain definition of what it computes, on every namespace and dtype."""

import itertools

import layers
import numpy as np
import oracles
import pytest
from layers import FAR, ROWS, TALL, TILE, host

from cuobs.algorithms import admm_ops, true_obs_ops
from cuobs.batches import Workspace
from cuobs.ops import (
    conjugate_gradient,
    factors,
    gram,
    products,
    projection,
    schur,
    selection,
    sweep,
    systems,
)
from cuobs.pattern import parse

PATTERNS = ("2:4", "4:8", "coupled-2:4", "block16-row8", "1:4", "2:3", "4:8x1", "8:16", "1:2",
            "16:20", TILE, FAR, ROWS, TALL)
SINGLE = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def close(dtype):
    """Compare to a share of the largest entry that suits the dtype."""
    tolerance = {"float32": 2e-4, "float64": 1e-11}[dtype]

    def compare(found, expected):
        found, expected = host(found), np.asarray(expected)
        assert found.shape == expected.shape
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max())
        )

    return compare


def definite(rng, *shape):
    """Symmetric positive definite matrices (..., n, n), well conditioned."""
    A = rng.standard_normal((*shape, 2 * shape[-1]))
    return A @ np.swapaxes(A, -1, -2) / shape[-1]


def compiled(text, columns=3):
    """A pattern compiled for a few scopes, with the references' form of it."""
    M = {"block16-row8": 16}.get(text, 8)
    c = parse(text).compile(16, 240).columns
    K = {FAR: 4 * columns, "coupled-2:4": 16 * columns}.get(text, c * columns)
    return parse(text).compile(M, K), oracles.scopes(text, M, K)


def by_scope(array, layout):
    """(c, R, r, G) of an (M, K) array in layout order."""
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    return array.reshape(R, r, G, c).transpose(3, 0, 1, 2)


# Cholesky


@SINGLE
def test_cholesky(xp, rng, dtype, close):
    for A in definite(rng, 12), definite(rng, 1), definite(rng, 700):
        L = factors.cholesky(xp.asarray(A, dtype))
        assert L.dtype == dtype
        close(L, np.linalg.cholesky(A))


def test_not_positive_definite_is_noticed(xp):
    bad = np.diag([1.0, -1.0, 1.0])
    with pytest.raises(np.linalg.LinAlgError):
        factors.cholesky(xp.asarray(bad))
    with pytest.raises(np.linalg.LinAlgError, match="found 2 of 4 .*numbers 1, 2"):
        factors.cholesky_inverse(xp.asarray(np.stack([np.eye(3), bad, -np.eye(3), np.eye(3)])))
    with pytest.raises(np.linalg.LinAlgError, match="hessian: .*damp"):
        factors.reversed_cholesky(xp.asarray(bad))
    for factor in factors.cholesky, factors.reversed_cholesky:
        info = xp.zeros(1, np.int32)
        factor(xp.asarray(bad), info)
        assert int(info[0]) == 2
        factor(xp.asarray(np.eye(3)), info)
        assert int(info[0]) == 0


@SINGLE
@pytest.mark.parametrize("K", [1, 5, 64, 300])
def test_reversed_factor(xp, rng, dtype, close, K):
    """Upper triangular, H = R R^T, and R[a:, a:] is that of what is left after a columns."""
    H = definite(rng, K)
    R = factors.reversed_cholesky(xp.asarray(H, dtype))
    assert np.array_equal(host(R), np.triu(host(R))) and R.dtype == dtype
    close(R @ R.T, H)
    close(factors.upper_inverse(R), np.linalg.inv(host(R).astype(float)))
    close(factors.inverse(xp.asarray(H, dtype)), np.linalg.inv(H))
    a = K // 3
    left = np.linalg.inv(H)
    for j in range(a):
        left = oracles.eliminate(left, [j])
    U = factors.upper_inverse(R[a:, a:])
    close(U.T @ U, left[a:, a:])


@SINGLE
@pytest.mark.parametrize("width", [4, 7, 30, 100])
def test_span_inverses(xp, rng, dtype, close, width):
    R = np.triu(definite(rng, 30))
    spans = sweep.span_inverses(xp.asarray(R, dtype), width)
    assert len(spans) == -(-30 // width)
    for n, (inverse, C) in enumerate(spans):
        part = slice(n * width, (n + 1) * width)
        expected = np.linalg.inv(R[part, part])
        close(inverse, expected)
        close(C, expected.T @ expected)


# Products and Gram matrices


@SINGLE
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 8, 3), (1, 7, 9), (33, 65, 17), (4, 0, 6)])
def test_gemm_adds(xp, rng, dtype, close, m, k, n):
    A, B, C = (rng.standard_normal(shape) for shape in ((m, k), (k, n), (m, n)))
    a, b, c = (xp.array(v, dtype) for v in (A, B, C))
    products.gemm(a, b, c, alpha=-1, beta=1)
    close(c, C - A @ B)
    wide = xp.asarray(np.pad(C, ((0, 0), (2, 3))), dtype)
    at = wide[:, 2 : 2 + n]
    products.gemm(xp.asarray(A.T, dtype).T, xp.asarray(B.T, dtype).T, at, beta=1)
    close(at, C + A @ B)
    assert not host(wide)[:, :2].any() and not host(wide)[:, 2 + n :].any()


@SINGLE
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("N, K", [(1, 1), (40, 8), (300, 67)])
def test_gram(xp, rng, dtype, close, kind, N, K):
    X = rng.standard_normal((N, K)).astype(kind)
    out = xp.eye(K, dtype=dtype)
    gram.add_gram(xp.asarray(X), out)
    wide = X.astype("float64")
    close(out, np.eye(K) + wide.T @ wide)
    assert (host(out) == host(out).T).all()


def test_mirror(xp, rng):
    A = rng.standard_normal((70, 70))
    B = xp.array(A)
    gram.mirror_upper(B)
    np.testing.assert_array_equal(host(B), np.triu(A) + np.triu(A, 1).T)


# Systems on sets of places


@SINGLE
@pytest.mark.parametrize("c", [1, 4, 16, 20])
def test_masked_solve(xp, rng, dtype, close, c):
    """Every set of places, the empty and the full one too; above 16 by another way."""
    C = definite(rng, 5, c).transpose(1, 2, 0)
    w = rng.standard_normal((c, 6, 5))
    mask = rng.random((c, 6, 5)) < 0.5
    mask[:, 0], mask[:, 1] = False, True
    found = systems.masked_solve(
        xp.asarray(C[:, :, None], dtype), xp.asarray(w, dtype), xp.asarray(mask)
    )
    expected = np.zeros_like(w)
    for i, j in np.ndindex(6, 5):
        P = np.flatnonzero(mask[:, i, j])
        expected[P, i, j] = np.linalg.solve(C[np.ix_(P, P)][..., j], w[P, i, j])
    close(found, expected)


@SINGLE
@pytest.mark.parametrize("c, G", [(4, 5), (16, 1), (20, 2), (1, 3)])
def test_scope_compensation(xp, rng, dtype, close, c, G):
    C = definite(rng, G, c).transpose(1, 2, 0)
    W = rng.standard_normal((3, G * c))
    mask = rng.random(W.shape) < 0.5
    found = systems.scope_compensation(
        xp.asarray(W, dtype), xp.asarray(C, dtype), xp.asarray(mask)
    )
    expected = W.copy()
    for i, g in np.ndindex(3, G):
        part = slice(g * c, (g + 1) * c)
        P = np.flatnonzero(~mask[i, part])
        Cg = C[..., g]
        expected[i, part] -= np.linalg.solve(Cg[np.ix_(P, P)], W[i, part][P]) @ Cg[P]
    close(found, expected * mask)
    assert not host(found)[~mask].any()


@SINGLE
def test_masked_factor_solve(rng, dtype, close):
    A, B = definite(rng, 12), rng.standard_normal((5, 12))
    mask = rng.random(B.shape) < 0.5
    mask[0], mask[1] = False, True
    out = np.zeros(B.shape, dtype)
    systems.masked_factor_solve(A.astype(dtype), B.astype(dtype), mask, out)
    expected = np.zeros_like(B)
    for i, m in enumerate(mask):
        expected[i, m] = np.linalg.solve(A[np.ix_(m, m)], B[i, m])
    close(out, expected)
    with pytest.raises(np.linalg.LinAlgError, match="row 1"):
        systems.masked_factor_solve(-A, B, mask, out)


@SINGLE
@pytest.mark.parametrize("M, K", [(1, 1), (6, 30), (3, 700)])
def test_masked_cg(xp, rng, dtype, close, M, K):
    A, B = definite(rng, K), rng.standard_normal((M, K))
    mask = rng.random(B.shape) < 0.5
    mask[0] = True
    mask[-1] = K == 1
    expected = np.zeros_like(B)
    for i, m in enumerate(mask):
        expected[i, m] = np.linalg.solve(A[np.ix_(m, m)], B[i, m])
    start = rng.standard_normal(B.shape)
    limit = {"float32": 1e-6, "float64": 1e-14}[dtype] ** 2 * (B**2 / A.diagonal()).sum(1)
    for X in None, start * mask, expected:
        residual = B if X is None else B - X @ A
        given = [None if a is None else xp.asarray(a, dtype) for a in (A, residual, X)]
        before = [None if a is None else a.copy() for a in given]
        found = conjugate_gradient.masked_cg(
            *given[:2], xp.asarray(mask), given[2], limit=xp.asarray(limit, dtype),
            max_iterations=300,
        )
        close(found, expected)
        assert not host(found)[~mask].any()
        assert all(a is None or (a == b).all() for a, b in zip(given, before, strict=True))


def test_masked_cg_stops(xp, rng):
    A, B = definite(rng, 50), rng.standard_normal((4, 50))
    mask = np.ones(B.shape, bool)
    count = []
    args = xp.asarray(A), xp.asarray(B), xp.asarray(mask)
    limit = 1e-6 * (B**2 / A.diagonal()).sum(1)
    found = conjugate_gradient.masked_cg(
        *args, limit=xp.asarray(limit), max_iterations=300, progress=count.append)
    assert ((((B - host(found) @ A) ** 2) / A.diagonal()).sum(1) <= 1.01 * limit).all()
    assert count == sorted(count) and count[-1] < 50
    few = conjugate_gradient.masked_cg(*args, limit=xp.zeros(4), max_iterations=2)
    assert np.abs(host(few) @ A - B).max() > 1e-6


def test_masked_cg_stops_when_the_energy_has_settled(xp, rng):
    """Long before the residual asks for it, and at an energy that close to the least."""
    A, T = definite(rng, 200), rng.standard_normal((5, 200))
    mask = rng.random(T.shape) < 0.5
    residual, energy = T @ A, float(np.einsum("mk,kl,ml", T, A, T, optimize=True))
    limit = 1e-24 * (residual**2 / A.diagonal()).sum(1)
    count, losses = {}, {}
    for settled in 0.0, 1e-3:
        count[settled] = []
        X = host(conjugate_gradient.masked_cg(
            *map(xp.asarray, (A, residual, mask)), limit=xp.asarray(limit), max_iterations=500,
            settled=settled, energy=energy, progress=count[settled].append))
        losses[settled] = np.einsum("mk,kl,ml", X - T, A, X - T, optimize=True)
    assert len(count[1e-3]) < len(count[0.0]) / 2
    assert losses[0.0] <= losses[1e-3] <= 1.02 * losses[0.0]


# Selection


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_costs_and_masks(xp, rng, dtype, close, text):
    """Costs of candidates, the best of them, the gap, and the masks, shared C and own C."""
    layout, s = compiled(text)
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    W = rng.standard_normal((R * r, G * c))
    own = definite(rng, R, r, G, c)
    for blocks in own, np.broadcast_to(own[:1, :1], own.shape):
        shared = blocks is not own
        costs = np.stack([
            oracles.choice_costs(by_scope(W, layout).transpose(1, 3, 2, 0)[:, g],
                                 blocks[:, :, g], s) for g in range(G)
        ], 1)
        C = blocks.transpose(3, 4, 0, 1, 2)
        C = xp.asarray(C[:, :, 0, 0] if shared else C, dtype)
        w = by_scope(xp.asarray(W, dtype), layout)
        ranked, best = np.sort(costs, -1), costs.argmin(-1)
        chosen, cost, gap = selection.select(w, C, layout)
        expected = np.zeros((layout.n_blocks, R, G), bool)
        for i, g in np.ndindex(R, G):
            expected[list(s.choices[best[i, g]]), i, g] = True
        np.testing.assert_array_equal(host(chosen), expected)
        close(cost, ranked[..., 0])
        np.testing.assert_allclose(host(gap), ranked[..., 1] - ranked[..., 0], rtol=0,
                                   atol={"float32": 1e-3, "float64": 1e-10}[dtype])
        wide = xp.zeros((R * r, G * c + 5), bool)
        selection.select_mask(w, C, layout, wide[:, : G * c])
        mask = ~selection.expand(xp.asarray(expected), layout).reshape(R * r, G * c)
        np.testing.assert_array_equal(host(wide)[:, : G * c], host(mask))
        assert not host(wide)[:, G * c :].any()
        if layout.enumerated:
            found = selection.candidate_costs(w, C, layout)
            close(found, costs.transpose(2, 0, 1))
            for k, lost in enumerate(s.choices):
                assert np.array_equal(layout.candidates[k], np.isin(layout.blocks, lost))


@pytest.mark.parametrize("text", PATTERNS)
def test_block_sums_and_expand(xp, rng, text):
    layout, s = compiled(text)
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    scores = rng.standard_normal((c, R, r, G))
    sums = selection.block_sums(xp.asarray(scores), layout)
    flags = xp.asarray(rng.random((layout.n_blocks, R, G)) < 0.5)
    elements = host(selection.expand(flags, layout))
    assert elements.shape == (R, r, G, c)
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
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    w = xp.zeros((c, R, r, G))
    C = xp.asarray(np.broadcast_to(np.eye(c)[:, :, None], (c, c, G)))
    blocks, best, gap = (host(a) for a in selection.select(w, C, layout))
    n_pruned = layout.n_blocks - layout.keep
    assert blocks[:n_pruned].all() and not blocks[n_pruned:].any()
    assert not best.any() and not gap.any()


# Projection


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_projection(xp, rng, dtype, close, text):
    layout, s = compiled(text)
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    B, V, old = (rng.standard_normal((R * r, G * c)).astype(dtype) for _ in range(3))

    def mask_of(A):
        squares = by_scope(A.astype(float), layout) ** 2
        sums = np.stack([squares.transpose(1, 3, 2, 0)[:, :, layout.blocks == b].sum(-1)
                         for b in range(layout.n_blocks)])
        lost = np.argsort(sums, axis=0, kind="stable")[: layout.n_blocks - layout.keep]
        gone = np.zeros(sums.shape, bool)
        np.put_along_axis(gone, lost, True, axis=0)
        return ~gone[layout.blocks].transpose(2, 0, 3, 1).reshape(B.shape)

    mask, before = xp.zeros(B.shape, bool), mask_of(old)
    assert projection.project_mask(xp.asarray(old), mask, layout) == before.sum()
    np.testing.assert_array_equal(host(mask), before)
    rho = 0.3
    b, v, d = xp.array(B), xp.array(V), xp.empty(B.shape, dtype)
    changed = admm_ops.project_update(b, v, d, mask, rho, layout)
    after = mask_of(B + V / rho)
    D = (B + V / rho) * after
    np.testing.assert_array_equal(host(mask), after)
    assert changed == (before != after).sum()
    close(d, D)
    np.testing.assert_allclose(host(v), V + rho * (B - D), rtol=0,
                               atol={"float32": 1e-5, "float64": 1e-13}[dtype])
    np.testing.assert_array_equal(host(b), B)


@SINGLE
def test_ridge_right_side(xp, rng, dtype, close):
    D, V, G, B = (rng.standard_normal((7, 33)) for _ in range(4))
    d, v, g, b = (xp.asarray(a, dtype) for a in (D, V, G, B))
    out = xp.empty(D.shape, dtype)
    admm_ops.ridge_right_side(d, v, g, 0.7, out)
    close(out, 0.7 * D - V + G)
    admm_ops.ridge_right_side(d, v, g, 0.7, out, b)
    close(out, 0.7 * D - V + G - 0.7 * B)


# Sweeps


@SINGLE
@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("c, n", [(4, 12), (8, 200), (20, 300), (4, 132), (1, 130)])
def test_scope_solutions(xp, rng, dtype, close, M, c, n):
    layout = parse(f"1:{c}" if c > 1 else TALL).compile(8, n)
    C = definite(rng, n)
    W, mask = rng.standard_normal((M, n)), rng.random((M, n)) < 0.5
    w = xp.asarray(W, dtype)
    found = sweep.scope_solutions(w, xp.asarray(C, dtype), xp.asarray(mask), layout)
    expected, now = np.zeros_like(W), W.copy()
    for i, a in itertools.product(range(M), range(0, n, c)):
        P = a + np.flatnonzero(~mask[i, a : a + c])
        expected[i, P] = np.linalg.solve(C[np.ix_(P, P)], now[i, P])
        now[i] -= expected[i, P] @ C[P]
    close(found, expected)
    assert not host(found)[mask].any()
    np.testing.assert_array_equal(host(w), W.astype(dtype))


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_block(xp, rng, dtype, close, text):
    """One block, in slices of wider arrays, against the textbook form column by column."""
    layout, s = compiled(text)
    M, n = layout.shape
    rows, columns = layout.row_order.ravel(), layout.column_order.ravel()
    W, H = layers.random_layer(M, n)
    target, Hl = oracles.damped(W, H)
    weight, mask = oracles.sparsegpt(target, Hl, s)
    ordered = Hl[np.ix_(columns, columns)]
    R = host(factors.reversed_cholesky(ordered))
    F = R / R.diagonal()
    w = xp.asarray(target[np.ix_(rows, columns)], dtype)
    S, kept = xp.zeros((M, n + 3), dtype), xp.zeros((M, n + 3), bool)
    sweep.sparsegpt_block(w, S[:, :n], xp.asarray(F, dtype), xp.asarray(R.diagonal() ** 2, dtype),
                          layout, kept[:, :n])
    found = np.zeros((M, n))
    np.testing.assert_array_equal(host(kept)[:, :n], mask[np.ix_(rows, columns)])
    found[np.ix_(rows, columns)] = host((w - S[:, :n]) * kept[:, :n])
    close(found, weight)
    assert not host(S)[:, n:].any() and not host(kept)[:, n:].any()


# Schur complements


@SINGLE
def test_eliminate(xp, rng, dtype, close):
    C = definite(rng, 20)
    columns = rng.permutation(20)[:7]
    others = np.setdiff1d(np.arange(20), columns)
    left, group, cross = (
        xp.array(C[np.ix_(*at)], dtype)
        for at in ((others, others), (columns, columns), (columns, others))
    )
    schur.eliminate(left, group, cross)
    close(left, oracles.eliminate(C, columns)[np.ix_(others, others)])


@SINGLE
@pytest.mark.parametrize("B, p", [(1, 1), (3, 10), (2, 130)])
def test_cholesky_inverse(xp, rng, dtype, close, B, p):
    """Only the lower triangle is read."""
    A = definite(rng, B, p)
    lower = xp.array(np.tril(A) + np.triu(np.full((p, p), 7.0), 1), dtype)
    found = factors.cholesky_inverse(lower)
    close(found, np.linalg.inv(np.linalg.cholesky(A)))
    assert np.array_equal(host(found), np.tril(host(found)))
    if p > 1:
        A[-1] *= -1
        info = xp.zeros(B, np.int32)
        factors.cholesky_inverse(xp.array(A, dtype), info)
        assert np.flatnonzero(host(info)).tolist() == [B - 1]


@SINGLE
def test_first_scopes(xp, rng, dtype):
    """Smallest keys; where they tie, the lowest scope, wherever it lies; positions ascend."""
    key = rng.integers(0, 4, (6, 37)).astype(dtype)
    scopes = np.argsort(rng.random((6, 90)), axis=1)[:, :37].astype(np.int32)
    for size in 1, 5, 36, 37:
        found = host(true_obs_ops.first_scopes(xp.asarray(key), xp.asarray(scopes), size))
        for R in range(6):
            order = sorted(range(37), key=lambda k: (key[R, k], scopes[R, k]))  # noqa: B023
            assert found[R].tolist() == sorted(order[:size])


@pytest.fixture(params=["2:4", "4:8", "block16-row8", TILE, TALL])
def state(request, rng):
    """Row groups in the middle of true-obs: n open scopes of each, in any order, and a Z."""
    layout = compiled(request.param, columns=9)[0]
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    n, used = 6, 8
    return {
        "layout": layout, "R": R, "r": r, "G": G, "c": c, "n": n, "used": used,
        "scopes": np.argsort(rng.random((R, G)), axis=1)[:, :n].astype(np.int32),
        "w": rng.standard_normal((c, R, r, n)), "D": rng.standard_normal((c, c, R, r, n)),
        "Z": rng.standard_normal((R * r, n * c, used + 56)) / 10,
        "chosen": np.sort(np.argsort(rng.random((R, n)), axis=1)[:, :2]).astype(np.int32),
        "C": definite(rng, G * c),
    }


@SINGLE
def test_take_pruned(xp, rng, state, dtype):
    layout, c, r = state["layout"], state["c"], state["r"]
    blocks = selection.prune_lowest(
        rng.random((layout.n_blocks, state["R"], state["n"])), layout.n_blocks - layout.keep)
    mask = xp.zeros((state["R"], r, state["G"], c), bool)
    places, columns, weights, counts = true_obs_ops.take_pruned(
        xp.asarray(blocks), xp.asarray(state["chosen"]), xp.asarray(state["scopes"]),
        xp.asarray(state["w"], dtype), layout, mask)
    places, columns, weights, mask = map(host, (places, columns, weights, mask))
    for R, i in np.ndindex(state["R"], r):
        expected = []
        for k in state["chosen"][R]:
            scope = state["scopes"][R, k]
            gone = blocks[layout.blocks[i], R, k]
            assert np.array_equal(mask[R, i, scope], ~gone)
            expected += [(k * c + j, scope * c + j, state["w"].astype(dtype)[j, R, i, k])
                         for j in np.flatnonzero(gone)]
        b = R * r + i
        found = zip(places[b], columns[b], weights[b], strict=True)
        assert sorted(f for f in found if f[0] >= 0) == sorted(expected)
        assert (columns[b][places[b] < 0] == -1).all() and not weights[b][places[b] < 0].any()
        if counts is not None:
            assert host(counts)[b] >= len(expected)
    assert mask.sum() == sum(mask[R, :, state["scopes"][R, k]].sum()
                             for R in range(state["R"]) for k in state["chosen"][R])


@SINGLE
def test_groups_of_rows(xp, rng, state, dtype, close):
    """Z_P, A = C_PP - Z_P Z_P^T and y = L^-1 w, with rows that lose fewer columns filled up."""
    B, c, n, used = state["R"] * state["r"], state["c"], state["n"], state["used"]
    places = np.argsort(rng.random((B, n * c)), axis=1)[:, :min(5, n * c)].astype(np.int32)
    places[::2, -1] = -1
    scope = np.repeat(state["scopes"], state["r"], axis=0)
    columns = np.take_along_axis(scope, places // c, 1) * c + places % c
    columns = np.where(places < 0, -1, columns).astype(np.int32)
    Z = xp.asarray(state["Z"], dtype)
    Z_P = true_obs_ops.gather_factor(Z, xp.asarray(places), used)
    rows = np.where(places[..., None] < 0, 0,
                    np.take_along_axis(state["Z"][:, :, :used], places[..., None], 1))
    close(Z_P, rows)
    close(true_obs_ops.gather_factor(Z, None, used), state["Z"][:, :, :used])
    A = host(true_obs_ops.group_blocks(xp.asarray(state["C"], dtype), xp.asarray(columns), Z_P))
    expected = state["C"][columns[:, :, None], columns[:, None]] - rows @ rows.swapaxes(1, 2)
    filled = (columns < 0)[:, :, None] | (columns < 0)[:, None]
    expected = np.where(filled, np.eye(places.shape[1]), expected)
    close(np.tril(A), np.tril(expected))
    inverse = np.linalg.inv(np.linalg.cholesky(expected + 5 * np.eye(places.shape[1])))
    weights, cost = rng.standard_normal(places.shape), rng.standard_normal(B)
    total = xp.array(cost, dtype)
    y, same = true_obs_ops.solve_group(
        xp.asarray(inverse, dtype), xp.asarray(weights, dtype), total, np.dtype(dtype))
    solved = (inverse @ weights[..., None])[..., 0]
    close(y, solved)
    close(total, cost + (solved**2).sum(1))
    close(same, inverse)


@SINGLE
def test_drop_scopes(xp, state, dtype, close):
    """What is left are the other scopes, each with its own weights, blocks and rows of Z."""
    R, r, c, n, used = (state[name] for name in ("R", "r", "c", "n", "used"))
    arrays = {name: xp.array(state[name], dtype) for name in ("w", "D", "Z")}
    factor = true_obs_ops.Factor(arrays["Z"], used=used)
    scopes, w, D = true_obs_ops.drop_scopes(
        xp.asarray(state["chosen"]), xp.array(state["scopes"]), arrays["w"], arrays["D"], factor)
    scopes, w, D, Z = map(host, (scopes, w, D, factor.Z))
    assert scopes.shape == (R, n - 2) and w.shape[3] == n - 2 and Z.shape[1] == (n - 2) * c
    below = np.tril(np.ones((c, c)))[..., None]
    for g in range(R):
        kept = {int(state["scopes"][g, k]): k for k in range(n) if k not in state["chosen"][g]}
        assert sorted(scopes[g]) == sorted(kept)
        old = [kept[int(s)] for s in scopes[g]]
        for i in range(r):
            close(w[:, g, i], state["w"][:, g, i][:, old])
            close(D[:, :, g, i] * below, state["D"][:, :, g, i][..., old] * below)
            by_scope = state["Z"][g * r + i, :, :used].reshape(n, c, used)[old]
            close(Z[g * r + i, :, :used], by_scope.reshape(-1, used))


@SINGLE
@pytest.mark.parametrize("differ", [False, True])
def test_append_factor(xp, rng, state, dtype, close, differ):
    """Zn = L^-1 (C_P: - Z_P Z^T), transposed, behind what each row has in Z so far."""
    R, r, c, n, used = (state[name] for name in ("R", "r", "c", "n", "used"))
    B, p = R * r, 8
    columns = np.argsort(rng.random((B, state["G"] * c)), axis=1)[:, :p].astype(np.int32)
    p = columns.shape[1]
    counts = np.full(B, p, np.int32)
    Z = state["Z"].copy()
    starts = np.full(B, used, np.int32)
    if differ:
        counts[::2] = p - 8 if p > 8 else 0
        starts[1::3] = 0
        Z[1::3, :, :used] = 0
        columns[np.arange(p) >= counts[:, None]] = -1
    C, Z_P = state["C"], rng.standard_normal((B, p, used)) / 10
    Z_P[columns < 0] = 0
    inverse = np.tril(rng.standard_normal((B, p, p)))
    # Filled places stand alone, with a unit diagonal.
    filled = columns < 0
    inverse[filled[:, :, None] | filled[:, None]] = 0
    inverse[filled[:, :, None] & np.eye(p, dtype=bool)] = 1
    factor = true_obs_ops.Factor(xp.array(Z, dtype), used, xp.asarray(starts) if differ else None)
    Zn = true_obs_ops.append_factor(
        xp.asarray(C, dtype), xp.asarray(state["scopes"]), xp.asarray(columns),
        xp.asarray(Z_P, dtype), xp.asarray(inverse, dtype),
        xp.asarray(counts) if differ else None, factor, Workspace())
    open_columns = (state["scopes"][:, :, None] * c + np.arange(c)).reshape(R, -1)
    open_columns = np.repeat(open_columns, r, axis=0)
    for b in range(B):
        P = columns[b, : counts[b]]
        Y = C[np.ix_(P, open_columns[b])] - Z_P[b, : len(P)] @ Z[b, :, :used].T
        expected = (inverse[b, : len(P), : len(P)] @ Y).T
        # The smallest may be all rounding.
        scale = max(1.0, np.abs(expected).max(initial=0))
        tolerance = {"float32": 2e-4, "float64": 1e-11}[dtype] * scale
        np.testing.assert_allclose(host(Zn)[b, :, : len(P)], expected, rtol=0, atol=tolerance)
        assert not host(Zn)[b, :, len(P) :].any()
        end = starts[b] + len(P)
        stored = host(factor.Z)[b]
        np.testing.assert_allclose(stored[:, starts[b] : end], expected, rtol=0, atol=tolerance)
        assert not stored[:, end : factor.used].any()
    assert factor.used == (starts + counts).max()


@SINGLE
def test_update_scopes(xp, rng, state, dtype, close):
    R, r, c, n = (state[name] for name in ("R", "r", "c", "n"))
    B, p = R * r, 8
    Zn, y = rng.standard_normal((B, n * c, p)), rng.standard_normal((B, p))
    w, D = (xp.array(state[name], dtype) for name in "wD")
    true_obs_ops.update_scopes(w, D, xp.asarray(Zn, dtype), xp.asarray(y, dtype))
    by_scope = Zn.reshape(R, r, n, c, p)
    close(w, state["w"] - np.einsum("Rrncp,Rrp->cRrn", by_scope, y.reshape(R, r, p)))
    below = np.tril(np.ones((c, c)))[..., None, None, None]
    expected = state["D"] - np.einsum("Rrnip,Rrnjp->ijRrn", by_scope, by_scope)
    close(host(D) * below, expected * below)
