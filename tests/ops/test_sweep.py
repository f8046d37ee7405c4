"""Sweeps from left to right."""

import itertools

import layers
import numpy as np
import oracles
import pytest
from layers import TALL, host
from op_cases import (
    EVERY,
    PATTERNS,
    SINGLE,
    compiled,
    definite,
    layout_of,
    near,
    scope_of,
    untouched,
    wider,
)

from cuobs import arrays
from cuobs.ops import factors, sweep
from cuobs.ops.cuda import loader
from cuobs.pattern import parse


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
def test_sparsegpt_block(xp, dtype, close, text):
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


@pytest.mark.gpu
@EVERY
@SINGLE
@pytest.mark.parametrize("m, width", [(1, 1), (1, 128), (19, 60), (37, 128)])
def test_sparsegpt_block_by_a_kernel(cp, rng, pattern, m, width, dtype):
    """One block of whole scopes, all arrays slices of wider ones."""
    c = scope_of(pattern)[0].shape[1]
    layout = layout_of(pattern, m, max(1, width // c))
    M, n = layout.shape
    W, S = (rng.standard_normal((M, n)).astype(dtype) for _ in range(2))
    R = np.linalg.cholesky(definite(rng, n)).T
    F = (R / R.diagonal()[:, None]).astype(dtype)
    scale = (R.diagonal() ** 2).astype(dtype)
    E, mask = S.copy(), np.empty((M, n), bool)
    sweep.sparsegpt_block(W, E, F, scale, layout, mask)

    _, W_gpu = wider(cp, W, c, c)
    whole_S, S_gpu = wider(cp, S, 2 * c, c)
    whole_mask, mask_gpu = wider(cp, np.zeros((M, n), bool), c, c)
    _, F_gpu = wider(cp, F, 3, 2)
    sweep.sparsegpt_block(W_gpu, S_gpu, F_gpu, cp.asarray(scale), layout, mask_gpu)
    assert untouched(whole_S, 2 * c, c) and untouched(whole_mask, c, c)
    found = arrays.to_numpy(mask_gpu)
    if dtype == "float64":
        np.testing.assert_array_equal(found, mask)
        near(S_gpu, E, dtype, double=1e-9)
    else:
        # A score that ties to rounding decides the rest of a row group.
        r = layout.blocks.shape[0]
        same = np.repeat((found == mask).reshape(m, -1).all(1), r)
        assert same.mean() >= 0.75 or m == 1
        near(S_gpu[cp.asarray(same)], E[same], dtype, single=2e-3)


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("pattern, n", [("2:4", 4), ("2:4", 64), ("2:4", 152), ("2:4", 300),
                                        ("4:8", 152), ("2:3", 129), ("2:4x3", 156), ("8:16", 144),
                                        ("1:2", 210), ("1:2x20", 160)])
@pytest.mark.parametrize("M", [1, 8, 37])
def test_scope_solutions_by_a_kernel(cp, rng, pattern, n, M, dtype):
    c = parse(pattern).compile(1, 720).columns
    layout = layout_of(pattern, M, n // c)
    W = rng.standard_normal((M, n)).astype(dtype)
    C = definite(rng, n).astype(dtype)
    mask = rng.random((M, n)) < 0.5
    expected = sweep.scope_solutions(W, C, mask, layout)
    _, mask_gpu = wider(cp, mask, 2 * c, c)
    _, W_gpu = wider(cp, W, c, 0)
    found = sweep.scope_solutions(W_gpu, cp.asarray(C), mask_gpu, layout)
    near(found, expected, dtype, single=2e-3, double=1e-9)
    assert (arrays.to_numpy(found)[mask] == 0).all()
    np.testing.assert_array_equal(arrays.to_numpy(W_gpu), W)


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("K, width", [(12, 4), (152, 152), (300, 48), (300, 400), (1100, 528)])
def test_span_inverses_on_a_device(cp, rng, K, width, dtype):
    R = np.linalg.cholesky(definite(rng, K)).T.astype(dtype)
    expected = sweep.span_inverses(R, width)
    found = sweep.span_inverses(cp.asarray(R), width)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        near(a[0], b[0], dtype, single=1e-3)
        near(a[1], b[1], dtype, single=1e-3)


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("pattern", ["2:4", TALL, "coupled-2:4"])
def test_a_sweep_that_fits_no_shared_memory(cp, rng, monkeypatch, dtype, pattern):
    """The kernel declines where the device has too little, and the array form gives the same."""
    r, c = scope_of(pattern)[0].shape
    layout = layout_of(pattern, 9, 128 // c)
    M, n = layout.shape
    W = rng.standard_normal((M, n)).astype(dtype)
    R = np.linalg.cholesky(definite(rng, n)).T
    C, mask = definite(rng, n).astype(dtype), rng.random((M, n)) < 0.5
    given = [cp.asarray(a, dtype) for a in (W, R / R.diagonal(), R.diagonal() ** 2)]

    def run():
        S, kept = cp.zeros((M, n), dtype), cp.empty((M, n), bool)
        sweep.sparsegpt_block(given[0], S, *given[1:], layout, kept)
        solved = sweep.scope_solutions(given[0], cp.asarray(C), cp.asarray(mask), layout)
        return S.get(), kept.get(), solved.get()

    launched = []
    launch = loader.launch
    monkeypatch.setattr(loader, "launch", lambda *args: launched.append(launch(*args)))
    by_kernel = run()
    assert len(launched) == 2
    monkeypatch.setattr(loader, "largest_shared", lambda: 1024)
    by_arrays = run()
    assert len(launched) == 2
    same = (by_kernel[1] == by_arrays[1]).reshape(-1, r * n).all(1).repeat(r)
    assert same.all() if dtype == "float64" else same.mean() >= 0.7
    near(by_arrays[0][same], by_kernel[0][same], dtype, single=2e-3, double=1e-9)
    near(by_arrays[2], by_kernel[2], dtype, single=2e-3, double=1e-9)


def test_sweeps_refuse_what_is_no_scope(xp):
    layout, _ = compiled("2:4")
    W, F, mask = xp.zeros((8, 12)), xp.eye(12), xp.zeros((8, 12), bool)
    with pytest.raises(ValueError, match="W: found shape"):
        sweep.sparsegpt_block(W[:, :10], W[:, :10], F[:10, :10], F[0, :10], layout, mask[:, :10])
    with pytest.raises(TypeError, match="S: found dtype float32"):
        sweep.sparsegpt_block(W, W.astype("float32"), F, F[0], layout, mask)
    with pytest.raises(ValueError, match="S: found strides .*, expected contiguous rows"):
        sweep.sparsegpt_block(W, xp.zeros((12, 8)).T, F, F[0], layout, mask)
    with pytest.raises(ValueError, match="W: found strides"):
        sweep.solve_scopes(xp.zeros((12, 8)).T, F, mask, 4)
    with pytest.raises(TypeError, match="mask: found dtype float64"):
        sweep.scope_solutions(W, F, W, layout)
    with pytest.raises(ValueError, match="mask: found shape"):
        sweep.scope_solutions(W, F, mask[:4], layout)
