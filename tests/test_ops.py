"""Each op against the plain definition of what it computes, on every namespace and dtype."""

import itertools

import layers
import numpy as np
import oracles
import pytest
from layers import FAR, ROWS, TALL, TILE, host

from cuobs.ops import (
    cholesky,
    conjugate_gradient,
    gemm,
    gram,
    masked_solve,
    projection,
    schur,
    selection,
    sweep,
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
    c = parse(text).compile(16, 240).columns.shape[1]
    K = {FAR: 4 * columns, "coupled-2:4": 16 * columns}.get(text, c * columns)
    return parse(text).compile(M, K), oracles.scopes(text, M, K)


def by_scope(array, layout):
    """(c, R, r, G) of an (M, K) array in layout order."""
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
    return array.reshape(R, r, G, c).transpose(3, 0, 1, 2)


# Cholesky


@SINGLE
def test_cholesky(xp, rng, dtype, close):
    for A in definite(rng, 12), definite(rng, 3, 7), definite(rng, 1, 1):
        L = cholesky.cholesky(xp.asarray(A, dtype))
        assert L.dtype == dtype
        close(L, np.linalg.cholesky(A))


def test_not_positive_definite_is_noticed(xp):
    bad = np.diag([1.0, -1.0, 1.0])
    with pytest.raises(np.linalg.LinAlgError):
        cholesky.cholesky(xp.asarray(bad))
    with pytest.raises(np.linalg.LinAlgError):
        cholesky.cholesky(xp.asarray(np.stack([np.eye(3), bad])))
    with pytest.raises(np.linalg.LinAlgError, match="hessian: .*damp"):
        cholesky.reversed_cholesky(xp.asarray(bad))


@SINGLE
@pytest.mark.parametrize("K", [1, 5, 64, 300])
def test_reversed_factor(xp, rng, dtype, close, K):
    """Upper triangular, H = R R^T, and R[a:, a:] is that of what is left after a columns."""
    H = definite(rng, K)
    R = cholesky.reversed_cholesky(xp.asarray(H, dtype))
    assert np.array_equal(host(R), np.triu(host(R))) and R.dtype == dtype
    close(R @ R.T, H)
    close(cholesky.upper_inverse(R), np.linalg.inv(host(R).astype(float)))
    close(cholesky.inverse(xp.asarray(H, dtype)), np.linalg.inv(H))
    a = K // 3
    left = np.linalg.inv(H)
    for j in range(a):
        left = oracles.eliminate(left, [j])
    U = cholesky.upper_inverse(R[a:, a:])
    close(U.T @ U, left[a:, a:])


@SINGLE
@pytest.mark.parametrize("width", [4, 7, 30, 100])
def test_span_inverses(xp, rng, dtype, close, width):
    R = np.triu(definite(rng, 30))
    spans = sweep.span_inverses(xp.asarray(R, dtype), width)
    assert len(spans) == -(-30 // width)
    for n, inverse in enumerate(spans):
        part = slice(n * width, (n + 1) * width)
        close(inverse, np.linalg.inv(R[part, part]))


# Products and Gram matrices


@SINGLE
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 8, 3), (1, 7, 9), (33, 65, 17), (4, 0, 6)])
def test_gemm_adds(xp, rng, dtype, close, m, k, n):
    A, B, C = (rng.standard_normal(shape) for shape in ((m, k), (k, n), (m, n)))
    a, b, c = (xp.array(v, dtype) for v in (A, B, C))
    gemm.gemm(a, b, c, alpha=-1, beta=1)
    close(c, C - A @ B)
    wide = xp.asarray(np.pad(C, ((0, 0), (2, 3))), dtype)
    at = wide[:, 2 : 2 + n]
    gemm.gemm(xp.asarray(A.T, dtype).T, xp.asarray(B.T, dtype).T, at, beta=1)
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
    found = masked_solve.masked_solve(
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
    found = masked_solve.scope_compensation(
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
    masked_solve.masked_factor_solve(A.astype(dtype), B.astype(dtype), mask, out)
    expected = np.zeros_like(B)
    for i, m in enumerate(mask):
        expected[i, m] = np.linalg.solve(A[np.ix_(m, m)], B[i, m])
    close(out, expected)
    with pytest.raises(np.linalg.LinAlgError, match="row 1"):
        masked_solve.masked_factor_solve(-A, B, mask, out)


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
    tolerance = {"float32": 1e-6, "float64": 1e-14}[dtype]
    for X in None, start, expected:
        seen = []
        given = None if X is None else xp.asarray(X, dtype)
        found = conjugate_gradient.masked_cg(
            xp.asarray(A, dtype), xp.asarray(B, dtype), xp.asarray(mask), given,
            tolerance=tolerance, max_iterations=300, callback=lambda *at: seen.append(at),  # noqa: B023
        )
        close(found, expected)
        assert not host(found)[~mask].any()
        assert all(0 <= share <= 1 for _, share in seen) and seen[-1][1] == 1
        if X is start:
            np.testing.assert_array_equal(host(given), start.astype(dtype))


def test_masked_cg_stops(xp, rng):
    A, B = definite(rng, 50), rng.standard_normal((4, 50))
    mask = np.ones(B.shape, bool)
    count = []
    args = xp.asarray(A), xp.asarray(B), xp.asarray(mask)
    found = conjugate_gradient.masked_cg(
        *args, tolerance=1e-3, max_iterations=300, callback=lambda *at: count.append(at))
    residual = np.sqrt((((B - host(found) @ A) ** 2) / A.diagonal()).sum(1))
    assert (residual <= 1.01e-3 * np.sqrt((B**2 / A.diagonal()).sum(1))).all()
    assert count[-1][0] < 50
    few = conjugate_gradient.masked_cg(*args, tolerance=0, max_iterations=2)
    assert np.abs(host(few) @ A - B).max() > 1e-6


# Selection


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_costs_and_masks(xp, rng, dtype, close, text):
    """Costs of candidates, the best of them, the gap, and the masks, shared C and own C."""
    layout, s = compiled(text)
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
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
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
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
    out = xp.zeros((R, r, G, c), bool)
    assert selection.expand(flags, layout, out=out) is out
    np.testing.assert_array_equal(host(out), elements)


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
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
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
    (R, r), (G, c) = layout.rows.shape, layout.columns.shape
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
    changed = projection.project_update(b, v, d, mask, rho, layout)
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
    projection.ridge_right_side(d, v, g, 0.7, out)
    close(out, 0.7 * D - V + G)
    projection.ridge_right_side(d, v, g, 0.7, out, b)
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
    rows, columns = layout.rows.ravel(), layout.columns.ravel()
    W, H = layers.random_layer(M, n)
    target, Hl = oracles.damped(W, H)
    weight, mask = oracles.sparsegpt(target, Hl, s)
    ordered = Hl[np.ix_(columns, columns)]
    R = host(cholesky.reversed_cholesky(ordered))
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
    found = schur.eliminate(xp.asarray(C, dtype), xp.asarray(columns), xp.asarray(others))
    close(found, oracles.eliminate(C, columns)[np.ix_(others, others)])


@SINGLE
@pytest.mark.parametrize("B, p", [(1, 1), (3, 10), (2, 130)])
def test_cholesky_inverse(xp, rng, dtype, close, B, p):
    A = definite(rng, B, p)
    found = schur.cholesky_inverse(xp.asarray(A, dtype))
    close(found, np.linalg.inv(np.linalg.cholesky(A)))
    assert np.array_equal(host(found), np.tril(host(found)))


@SINGLE
def test_gathers(xp, rng, dtype):
    C, Z = rng.standard_normal((9, 9)).astype(dtype), rng.standard_normal((3, 8, 5)).astype(dtype)
    rows, columns = rng.integers(0, 9, (3, 4)), rng.integers(0, 9, (3, 6))
    found = schur.gather_blocks(*map(xp.asarray, (C, rows, columns)))
    places = rng.integers(0, 8, (3, 4))
    taken = schur.gather_rows(xp.asarray(Z), xp.asarray(places))
    for b in range(3):
        np.testing.assert_array_equal(host(found)[b], C[np.ix_(rows[b], columns[b])])
        np.testing.assert_array_equal(host(taken)[b], Z[b][places[b]])


@SINGLE
def test_update_scopes(xp, rng, dtype, close):
    c, B, n, p = 4, 3, 6, 5
    w, D = rng.standard_normal((c, B, n)), rng.standard_normal((c, c, B, n))
    Zn, y = rng.standard_normal((B, p, c, n)), rng.standard_normal((B, p))
    ours = [xp.array(a, dtype) for a in (w, D, Zn, y)]
    schur.update_scopes(*ours)
    close(ours[0], w - np.einsum("bp,bpcn->cbn", y, Zn))
    close(ours[1], D - np.einsum("bpin,bpjn->ijbn", Zn, Zn))
