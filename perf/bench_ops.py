"""The ops under the methods: time, and the rate reached beside what the device can do.

Each is checked first, against its definition or a few lines of NumPy in float64.
"""

import functools
import itertools

import numpy as np
import pytest
from sparsegpt_columns import sparsegpt_columns

from cuobs import arrays, pattern
from cuobs.ops import cholesky, conjugate_gradient, gram, projection, schur, selection, sweep
from cuobs.problem import Problem

pytestmark = pytest.mark.benchmark(group="ops")


@pytest.fixture(scope="module")
def damped(problem):
    """What a method gets for 2:4, in float32."""
    layout = pattern.parse("2:4").compile(*problem.W.shape)
    return Problem.build(problem.W.astype(np.float32), problem.H, layout, 0.01)


@pytest.fixture
def rng(problem):
    return problem.xp.random.default_rng(0)


def _close(found, expected, tolerance):
    """Whether two arrays agree within a share of the expected one's norm."""
    found, expected = (arrays.to_numpy(a).astype(np.float64) for a in (found, expected))
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def _tensor(function, xp):
    """The function with its products on tensor cores, as methods run it by default."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with arrays.tensor_cores(xp, True):
            return function(*args, **kwargs)

    return call


def test_gram(clock, problem):
    """XᵀX; the flop are those of one triangle."""
    N, K = problem.X.shape
    H = problem.xp.zeros((K, K), np.float32)

    def check(_):
        some = problem.X[:, :: K // 16].astype(np.float64)
        assert _close(H[:: K // 16, :: K // 16], some.T @ some, 1e-4)

    limit = "fp16" if problem.X.dtype == np.float16 else "fp32"
    clock(lambda: gram.add_gram(problem.X, H), check, flop=N * K * (K + 1), limit=limit)


def test_reversed_cholesky(clock, damped, rng):
    def check(R):
        v = rng.standard_normal(len(R), dtype=np.float32)
        assert not damped.xp.tril(R, -1).any()
        assert _close(R @ (R.T @ v), damped.H @ v, 1e-4)

    clock(lambda: cholesky.reversed_cholesky(damped.H), check, flop=len(damped.H) ** 3 / 3)


def test_upper_inverse(clock, damped, rng):
    def check(inverse):
        v = rng.standard_normal(len(inverse), dtype=np.float32)
        assert _close(damped.R @ (inverse @ v), v, 1e-2)

    call = _tensor(cholesky.upper_inverse, damped.xp)
    clock(lambda: call(damped.R), check, flop=len(damped.H) ** 3 / 3)


def test_select(clock, damped):
    """The cheapest of six masks in each scope."""
    w, C = damped.by_scope(damped.W), damped.scope_blocks
    sets = list(itertools.combinations(range(4), 2))

    def check(selected):
        blocks = arrays.to_numpy(selected[0])
        values, factors = (arrays.to_numpy(a).astype(np.float64) for a in (w, C))
        for row, scope in zip(range(0, blocks.shape[1], 7), range(blocks.shape[2]), strict=False):
            v, c = values[:, row, 0, scope], factors[:, :, scope]
            costs = [v[list(s)] @ np.linalg.solve(c[np.ix_(s, s)], v[list(s)]) for s in sets]
            chosen = sets.index(tuple(np.flatnonzero(blocks[:, row, scope])))
            assert costs[chosen] <= min(costs) * (1 + 1e-4)

    traffic = damped.W.nbytes + damped.W.size
    clock(lambda: selection.select(w, C, damped.layout), check, traffic=traffic)


def test_sparsegpt_block(clock, damped):
    """128 columns of all rows: read target and compensation, write mask and deviation."""
    W, R = damped.W[:, :128], damped.R[:128, :128]
    S, F, scale = damped.xp.zeros_like(W), R / R.diagonal(), R.diagonal() ** 2

    def check(found):
        mask, E = (arrays.to_numpy(a[:64]) for a in found)
        target, factor = (arrays.to_numpy(a).astype(np.float64) for a in (W[:64], R))
        weight, expected = sparsegpt_columns(target, factor @ factor.T, damp=0)
        same = (mask == expected).all(axis=1)  # a score that ties to rounding decides a whole row
        assert same.mean() > 0.9
        assert _close(((target - E) * mask)[same], weight[same], 1e-4)

    clock(
        lambda: sweep.sparsegpt_block(W, S, F, scale, damped.layout),
        check,
        traffic=3 * W.nbytes + W.size,
    )


def test_scope_solutions(clock, damped):
    """One span of obs-full: 128 columns of all rows; read weight and mask, write multipliers."""
    W, C = damped.W[:, :128], damped.C[:128, :128]
    mask = damped.xp.zeros(W.shape, bool)
    mask[:, 1::2] = True

    def check(solutions):
        scope = np.arange(128) // 4
        before = scope[:, None] <= scope
        target, factor, found = (arrays.to_numpy(a).astype(np.float64) for a in (W, C, solutions))
        left = target - found @ (factor * before)
        assert not found[:, 1::2].any()
        assert np.abs(left[:, ::2]).max() <= 1e-4 * np.abs(target).max()

    clock(
        lambda: sweep.scope_solutions(W, C, mask, damped.layout),
        check,
        traffic=2 * W.nbytes + W.size,
    )


def test_project_update(clock, damped, rng):
    """ADMM's projection: read B, V and mask, write D, V and mask."""
    B, V = damped.W, 0.01 * rng.standard_normal(damped.W.shape, dtype=np.float32)
    D, mask = damped.xp.empty_like(B), damped.xp.zeros(B.shape, bool)
    before = arrays.to_numpy(V[:64]).astype(np.float64)

    def check(_):
        b, d, v, kept = (arrays.to_numpy(a[:64]).astype(np.float64) for a in (B, D, V, mask))
        moved = b + before / 0.5
        smallest = np.sort(np.abs(moved).reshape(64, -1, 4), axis=2)[:, :, 1:2]
        expected = np.where(np.abs(moved).reshape(64, -1, 4) > smallest, 1, 0).reshape(b.shape)
        assert (expected == kept).mean() > 0.9999
        assert _close(d, moved * kept, 1e-5)
        assert _close(v, before + 0.5 * (b - d), 1e-4)

    clock(
        lambda: projection.project_update(B, V, D, mask, 0.5, damped.layout),
        check,
        traffic=4 * B.nbytes + 2 * B.size,
    )


def test_masked_cg(clock, damped):
    """Ten iterations of the exact re-solve, and the first residual."""
    xp, H = damped.xp, damped.H
    M, K = damped.W.shape
    mask = xp.zeros((M, K), bool)
    mask[:, 1::2] = True
    B = damped.W @ H
    solve = _tensor(conjugate_gradient.masked_cg, xp)
    converged = solve(H, B, mask, tolerance=1e-3, max_iterations=300)
    gradient = (converged @ H - B) * mask
    assert float(xp.linalg.norm(gradient)) <= 1e-2 * float(xp.linalg.norm(B))

    def check(X):
        assert not X[~mask].any()
        assert _close(X, converged, 0.5)

    clock(
        lambda: solve(H, B, mask, tolerance=0, max_iterations=10),
        check,
        flop=11 * 2 * M * K**2,
        limit="tf32",
    )


def test_cholesky_inverse_batch(clock, damped):
    """64 small factors with their inverses, as true-obs needs them for 64 rows."""
    p = 128
    A = damped.xp.stack([damped.C[a : a + p, a : a + p] for a in range(64)])

    def check(inverse):
        L = np.linalg.cholesky(arrays.to_numpy(A).astype(np.float64))
        assert _close(inverse, np.linalg.inv(L), 1e-3)

    clock(lambda: schur.cholesky_inverse(A), check, flop=64 * 2 * p**3 / 3)
