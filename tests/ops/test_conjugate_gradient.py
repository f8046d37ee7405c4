"""Conjugate gradients on sets of columns."""

import numpy as np
import pytest
from layers import host
from op_cases import SINGLE, definite, near

from cuobs import arrays
from cuobs.ops import conjugate_gradient


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
        found, converged = conjugate_gradient.masked_cg(
            *given[:2], xp.asarray(mask), given[2], limit=xp.asarray(limit, dtype),
            max_iterations=300,
        )
        close(found, expected)
        assert converged and not host(found)[~mask].any()
        assert all(a is None or (a == b).all() for a, b in zip(given, before, strict=True))


def test_masked_cg_stops(xp, rng):
    A, B = definite(rng, 50), rng.standard_normal((4, 50))
    mask = np.ones(B.shape, bool)
    count = []
    args = xp.asarray(A), xp.asarray(B), xp.asarray(mask)
    limit = 1e-6 * (B**2 / A.diagonal()).sum(1)
    found, converged = conjugate_gradient.masked_cg(
        *args, limit=xp.asarray(limit), max_iterations=300, progress=count.append)
    assert ((((B - host(found) @ A) ** 2) / A.diagonal()).sum(1) <= 1.01 * limit).all()
    assert count == list(range(0, count[-1] + 1, 2)) and count[-1] < 50  # a look every second one
    few, enough = conjugate_gradient.masked_cg(*args, limit=xp.zeros(4), max_iterations=2)
    assert converged and not enough
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
            settled=settled, energy=energy, progress=count[settled].append)[0])
        losses[settled] = np.einsum("mk,kl,ml", X - T, A, X - T, optimize=True)
    assert len(count[1e-3]) < len(count[0.0]) / 2
    assert losses[0.0] <= losses[1e-3] <= 1.02 * losses[0.0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, operand", [("float32", "float16"), ("float32", "float32"),
                                            ("float64", "float64")])
@pytest.mark.parametrize("M, K", [(1, 1), (1, 300), (5, 511), (33, 513), (3, 1700)])
def test_cg_step(cp, rng, M, K, dtype, operand):
    mask = rng.random((M, K)) < 0.5
    Q, X, residual, P = (rng.standard_normal((M, K)).astype(dtype) for _ in range(4))
    residual *= mask
    P = P.astype(operand) * mask
    Q += 2 * P  # a positive curvature
    Q[::4] *= -1  # and a negative one
    rr = (residual**2).sum(1)
    limit = np.where(np.arange(M) % 3 == 2, 1e9, 0).astype(dtype)  # every third has converged
    gained, before = np.ones(M, dtype), P.copy()
    cpu = Q, mask, X, residual, P.astype(dtype), rr, limit, gained
    gpu = [cp.array(a) for a in (*cpu[:4], P, *cpu[5:])]
    conjugate_gradient.cg_step(*cpu)
    conjugate_gradient.cg_step(*gpu)
    for n in (2, 3, 5, 7):
        near(gpu[n], cpu[n], dtype)
    # The twin's P of a row that has converged is never used.
    runs = (limit == 0) & (rr > 0)
    assert gpu[4].dtype == operand
    near(gpu[4][runs].astype(dtype), cpu[4][runs], dtype, single=1e-3)
    np.testing.assert_array_equal(gpu[4][~runs].get(), before[~runs])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, operand", [("float32", "float16"), ("float32", "float32"),
                                            ("float64", "float64")])
@pytest.mark.parametrize("M, K", [(1, 1), (6, 511), (33, 513), (6, 1700)])
def test_cg_start(cp, rng, M, K, dtype, operand):
    mask = rng.random((M, K)) < 0.5
    B, X = (rng.standard_normal((M, K)).astype(dtype) for _ in range(2))
    B[1::3] = 0
    scale = rng.uniform(0.5, 2, K).astype(dtype)
    limit = np.where(np.arange(M) % 3 == 2, 1e9, 0).astype(dtype)  # above what every third has
    for start in None, X:
        for order in "C", "F":
            expected = conjugate_gradient.cg_start(B, mask, start, scale, limit, operand)
            given = [None if a is None else cp.array(a, order=order) for a in (B, start)]
            found = conjugate_gradient.cg_start(
                given[0], cp.asarray(mask), given[1], cp.asarray(scale),
                cp.asarray(np.repeat(limit, 2))[::2], operand,
            )
            assert found[2].dtype == operand
            for one, other in zip(found, expected, strict=True):
                near(one.astype(dtype), other.astype(dtype), dtype, single=1e-3)
            assert (host(found[4]) > 0).all() and not host(found[0])[~mask].any()


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("M, K", [(1, 5), (40, 130), (7, 600)])
def test_masked_cg_on_a_device(cp, rng, M, K, dtype):
    A = definite(rng, K).astype(dtype)
    B = rng.standard_normal((M, K)).astype(dtype)
    mask = rng.random((M, K)) < 0.5
    mask[0] = False
    limit = ({"float32": 1e-5, "float64": 1e-13}[dtype] ** 2 * (B * B).sum(1)).astype(dtype)
    expected, _ = conjugate_gradient.masked_cg(A, B, mask, limit=limit, max_iterations=500)
    given = map(cp.asarray, (A, B, mask))
    found, converged = conjugate_gradient.masked_cg(
        *given, limit=cp.asarray(limit), max_iterations=500
    )
    assert converged
    near(found, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("M, K", [(1, 40), (40, 130), (7, 600)])
def test_masked_cg_on_tensor_cores(cp, rng, M, K):
    """In float16 it comes to the least energy, whatever the scale of a row or a column."""
    scale, size = 10.0 ** rng.uniform(-4, 4, K), 10.0 ** rng.integers(-6, 6, (M, 1))
    A, T = definite(rng, K), rng.standard_normal((M, K))
    mask = rng.random((M, K)) < 0.5
    least = np.array([
        t[~kept] @ np.linalg.solve(np.linalg.inv(A)[np.ix_(~kept, ~kept)], t[~kept])
        for t, kept in zip(T, mask, strict=True)
    ])
    found, _ = conjugate_gradient.masked_cg(
        cp.asarray(A * scale * scale[:, None], "float32"),
        cp.asarray(size * (T @ A) * scale, "float32"), cp.asarray(mask),
        limit=cp.zeros(M, "float32"), max_iterations=60, precision="tensor",
    )
    away = arrays.to_numpy(found).astype("float64") / size * scale - T
    energy = np.einsum("mk,kl,ml->m", away, A, away, optimize=True)
    assert (energy >= 0.999 * least).all() and (energy <= 1.002 * least).all()
