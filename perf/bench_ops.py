"""The ops under the methods: time, and the rate reached beside what the device can do.

Each is checked first, against its definition or a few lines of NumPy in float64.
"""

import functools
import itertools

import numpy as np
import pytest

import cuobs
from cuobs import arrays, pattern
from cuobs.algorithms import admm_ops
from cuobs.ops import conjugate_gradient, factors, products, selection, sweep, systems
from cuobs.problem import Problem
from perf.sparsegpt_columns import sparsegpt_columns

pytestmark = pytest.mark.benchmark(group="ops")


@pytest.fixture(scope="module")
def damped(problem):
    """What a method gets for 2:4, in float32."""
    layout = pattern.parse("2:4").compile(*problem.W.shape)
    return Problem.build(problem.W.astype(np.float32), problem.H, layout, 0.01, cuobs.Settings())


@pytest.fixture
def rng(problem):
    return problem.xp.random.default_rng(0)


@pytest.fixture(scope="module")
def half(damped):
    """A mask that keeps every second column."""
    mask = damped.xp.zeros(damped.W.shape, bool)
    mask[:, 1::2] = True
    return mask


def _close(found, expected, tolerance):
    """Whether two arrays agree within a share of the expected one's norm."""
    found, expected = (arrays.to_numpy(a).astype(np.float64) for a in (found, expected))
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def _tensor(function):
    """The function with its products on tensor cores, as methods run it by default."""
    return functools.partial(function, precision="tensor")


def test_gram(clock, problem):
    """XᵀX in the pieces that a Hessian takes; the flop are those of one triangle."""
    N, K = problem.X.shape
    h = cuobs.Hessian(K, device=arrays.device_name(problem.xp))

    def check(_):
        some = problem.X[:, :: K // 16].astype(np.float64)
        # Tensor cores cut sums off instead of rounding them.
        assert _close(h.matrix[:: K // 16, :: K // 16], some.T @ some, 1e-3)

    limit = "fp16" if problem.X.dtype == np.float16 else "fp32"
    clock(lambda: h.update(problem.X), check, flop=N * K * (K + 1), limit=limit)


def test_reversed_cholesky(clock, damped, rng):
    def check(R):
        v = rng.standard_normal(len(R), dtype=np.float32)
        assert not damped.xp.tril(R, -1).any()
        assert _close(R @ (R.T @ v), damped.H @ v, 1e-3)

    clock(lambda: factors.reversed_cholesky(damped.H), check, flop=len(damped.H) ** 3 / 3)


def test_upper_inverse(clock, damped, rng):
    def check(inverse):
        v = rng.standard_normal(len(inverse), dtype=np.float32)
        assert _close(damped.R @ (inverse @ v), v, 1e-3 if damped.xp is np else 5e-2)  # tf32

    call = _tensor(factors.upper_inverse)
    clock(lambda: call(damped.R), check, flop=len(damped.H) ** 3 / 3)


def test_select_mask(clock, damped):
    """The cheapest of six masks in each scope: read the weight, write the mask."""
    w, C = damped.by_scope(damped.W), damped.scope_blocks
    mask = damped.xp.empty(damped.W.shape, bool)
    sets = list(itertools.combinations(range(4), 2))

    def check(_):
        values, factors, pruned = (arrays.to_numpy(a) for a in (damped.W, C, ~mask))
        for row, scope in zip(range(0, len(values), 7), range(factors.shape[2]), strict=False):
            place = slice(4 * scope, 4 * scope + 4)
            v, c = values[row, place].astype(np.float64), factors[:, :, scope].astype(np.float64)
            costs = [v[list(s)] @ np.linalg.solve(c[np.ix_(s, s)], v[list(s)]) for s in sets]
            chosen = sets.index(tuple(np.flatnonzero(pruned[row, place])))
            assert costs[chosen] <= min(costs) * (1 + 1e-4)

    clock(
        lambda: selection.select_mask(w, C, damped.layout, mask),
        check,
        traffic=damped.W.nbytes + damped.W.size,
    )


def test_scope_compensation(clock, damped, half):
    """obs-local's update: read weight and mask, write the weight."""

    def check(new):
        w, kept, found, C = (
            arrays.to_numpy(a).astype(np.float64)
            for a in (damped.W[:64, :64], half[:64, :64], new[:64, :64], damped.scope_blocks)
        )
        for scope in range(16):
            place, c, pruned = slice(4 * scope, 4 * scope + 4), C[:, :, scope], [0, 2]
            multipliers = np.linalg.solve(c[np.ix_(pruned, pruned)], w[:, place][:, pruned].T)
            expected = (w[:, place] - multipliers.T @ c[pruned]) * kept[:, place]
            assert _close(found[:, place], expected, 1e-4)

    clock(
        lambda: systems.scope_compensation(damped.W, damped.scope_blocks, half),
        check,
        traffic=2 * damped.W.nbytes + damped.W.size,
    )


def test_sparsegpt_block(clock, damped):
    """128 columns of all rows: clear S, read it and the target, write S and the mask."""
    W, R = damped.W[:, :128], damped.R[:128, :128]
    F = damped.xp.ascontiguousarray(R / R.diagonal())
    scale, S, mask = R.diagonal() ** 2, damped.xp.empty_like(W), damped.xp.empty(W.shape, bool)

    def call():
        S.fill(0)
        sweep.sparsegpt_block(W, S, F, scale, damped.layout, mask)

    def check(_):
        target, factor, E, kept = (
            arrays.to_numpy(a).astype(np.float64) for a in (W[:64], R, S[:64], mask[:64])
        )
        weight, expected = sparsegpt_columns(target, factor @ factor.T, damp=0)
        same = (kept == expected).all(axis=1)  # a score that ties to rounding decides a whole row
        assert same.mean() > 0.9
        assert _close(((target - E) * kept)[same], weight[same], 1e-4)

    clock(call, check, traffic=4 * W.nbytes + W.size)


def test_gemm_adds(clock, damped):
    """What a sweep passes on: 128 columns times the factor, added to all columns on the right."""
    E, F = damped.W[:, :128], damped.R[:128, 128:]
    out = damped.xp.zeros((len(E), F.shape[1]), np.float32)
    call = _tensor(functools.partial(products.gemm, beta=1))

    def check(_):
        e, f = (arrays.to_numpy(a).astype(np.float64) for a in (E[:64], F))
        assert _close(out[:64], e @ f, 1e-3)

    clock(lambda: call(E, F, out), check, flop=2 * E.size * F.shape[1], limit="tf32")


def test_scope_solutions(clock, damped, half):
    """One span of obs-full: 128 columns of all rows; read weight and mask, write multipliers."""
    W, C, mask = damped.W[:, :128], damped.C[:128, :128], half[:, :128]

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
        lambda: admm_ops.project_update(B, V, D, mask, None, damped.layout, 0.5),
        check,
        traffic=4 * B.nbytes + 2 * B.size,
    )


def test_masked_cg(clock, damped, half):
    """Ten iterations of the exact re-solve."""
    xp, H, mask = damped.xp, damped.H, half
    M, K = damped.W.shape
    B = damped.W @ H
    solve = _tensor(conjugate_gradient.masked_cg)

    few = slice(4)
    target, A, b, kept = (arrays.to_numpy(a) for a in (damped.W[few], H, B[few], mask[few]))

    def energy(X):
        away = target.astype(np.float64) - X
        return ((away @ A) * away).sum(1)

    textbook = energy(_conjugate_gradients(A, b, kept, 10))

    def check(X):
        assert not X[~mask].any()
        # float16 takes a few iterations more to come as far.
        tolerance = 1e-2 if xp is np else 0.1
        assert _close(energy(arrays.to_numpy(X[few])), textbook, tolerance)

    clock(
        lambda: solve(H, B, mask, limit=xp.zeros(M, np.float32), max_iterations=10)[0],
        check,
        flop=10 * 2 * M * K**2,
        limit="fp16",
    )


def _conjugate_gradients(A, B, mask, iterations):
    """The same row by row, in float64."""
    X = np.zeros(B.shape)
    for x, b, kept in zip(X, B, mask, strict=True):
        own = A[np.ix_(kept, kept)].astype(np.float64)
        scale = np.sqrt(own.diagonal())
        own /= scale[:, None] * scale
        r = p = b[kept] / scale
        for _ in range(iterations):
            q = own @ p
            step = (r @ r) / (p @ q)
            x[kept] += step * p / scale
            before, r = r, r - step * q
            p = r + (r @ r) / (before @ before) * p
    return X


def test_cg_step(clock, damped, half):
    """The rest of an iteration: read Q and mask, update X, residual and P."""
    xp, (M, K) = damped.xp, damped.W.shape
    residual = damped.W * half
    rr, limit, gained = (residual * residual).sum(1), *xp.zeros((2, M), np.float32)
    P = residual / xp.sqrt(rr / K)[:, None]
    Q, X = P @ damped.H, xp.zeros_like(residual)
    P = _tensor(products.tensor_operand)(P)
    start = P.copy(), rr.copy()
    first = [arrays.to_numpy(a[:64]).astype(np.float64) for a in (P, Q, residual, rr, half)]

    def check(_):
        p, q, r, squares, kept = first
        step = (np.sqrt(K * squares) / (p * q).sum(1))[:, None]
        assert _close(X[:64], step * p, 1e-4)
        assert _close(residual[:64], (r - step * q) * kept, 1e-4)

    def call():
        # A second step along the same Q would find no curvature.
        P[...], rr[...] = start
        conjugate_gradient.cg_step(Q, half, X, residual, P, rr, limit, gained)

    clock(call, check, traffic=5 * Q.nbytes + Q.size + 4 * P.nbytes)


def test_cholesky_inverse_batch(clock, damped):
    """64 small factors with their inverses, as true-obs needs them for 64 rows."""
    p = 128
    A = damped.xp.stack([damped.C[a : a + p, a : a + p] for a in range(64)])

    def check(inverse):
        L = np.linalg.cholesky(arrays.to_numpy(A).astype(np.float64))
        assert _close(inverse, np.linalg.inv(L), 1e-3)

    # The copy is a part of what is timed: the factor replaces its matrix.
    clock(lambda: factors.cholesky_inverse(A.copy()), check, flop=64 * 2 * p**3 / 3)
