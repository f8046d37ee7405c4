"""Cholesky factors and triangular inverses."""

import warnings
from functools import partial

import numpy as np
import oracles
import pytest
from layers import host
from op_cases import SINGLE, TOLERANCE, definite, near_largest

from cuobs import arrays
from cuobs.ops import factors


@SINGLE
def test_cholesky(xp, rng, dtype, close):
    for A in definite(rng, 12), definite(rng, 1), definite(rng, 700):
        L = factors.cholesky(xp.asarray(A, dtype))
        assert L.dtype == dtype
        close(L, np.linalg.cholesky(A))


def test_not_positive_definite_is_noticed(xp):
    bad = np.diag([1.0, -1.0, 1.0])
    for factor in factors.cholesky, factors.reversed_cholesky:
        with pytest.raises(np.linalg.LinAlgError, match="A: found a matrix whose pivot 1"):
            factor(xp.asarray(bad))
    with pytest.raises(np.linalg.LinAlgError, match="found 2 of 4 .*numbers 1, 2"):
        factors.cholesky_inverse(xp.asarray(np.stack([np.eye(3), bad, -np.eye(3), np.eye(3)])))
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


@pytest.mark.gpu
def test_factors_by_rows_on_tensor_cores(cp, monkeypatch, rng):
    """Products so large that they are split into those of tf32."""
    monkeypatch.setattr(factors, "LEAF", 512)
    monkeypatch.setattr(factors, "LEAF_OF_ONE", 512)
    monkeypatch.setattr(factors, "STRIP", 256)
    H = definite(rng, 2000)
    given = cp.asarray(H, "float32")

    def by_rows(function, rows):
        return cp.concatenate([function(slice(0, rows // 3)), function(slice(rows // 3, rows))])

    R, U = factors.factor_by_rows(given, by_rows, "tensor", inverted=True)
    R, U = (host(A).astype(float) for A in (R, U))
    assert np.abs(R @ R.T - H).max() < 1e-4 * np.abs(H).max()
    assert np.abs(U @ R - np.eye(2000)).max() < 1e-2
    found = host(factors.inverse_by_rows(given, by_rows, "tensor"))
    expected = host(factors.inverse(given, "tensor"))
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


@SINGLE
@pytest.mark.parametrize("K", [5, 8, 9, 37])
@pytest.mark.parametrize("precision", ["tensor", "fp32"])
def test_factors_by_rows(xp, rng, dtype, close, monkeypatch, K, precision):
    """In pieces of any size, whoever makes the rows."""
    monkeypatch.setattr(factors, "LEAF", 8)
    monkeypatch.setattr(factors, "LEAF_OF_ONE", 8)
    monkeypatch.setattr(factors, "STRIP", 3)
    A = rng.standard_normal((K, 2 * K))
    H, asked = A @ A.T / K + np.eye(K), []

    def by_rows(function, rows):
        asked.append(rows)
        edges = [0, rows // 3, rows // 2, rows]
        parts = zip(edges[:-1], edges[1:], strict=True)
        return xp.concatenate([function(slice(*pair)) for pair in parts])

    given = xp.asarray(H, dtype)
    R, _ = factors.factor_by_rows(given, by_rows, precision)
    assert bool(asked) == (K > 8)
    close(R @ R.T, H)
    assert not host(R)[np.tril_indices(K, -1)].any()
    R, U = factors.factor_by_rows(given, by_rows, precision, inverted=True)
    close(U @ R, np.eye(K))
    close(factors.inverse_by_rows(given, by_rows, "fp32"), np.linalg.inv(H))
    close(given, H)
    given[K - 1, K - 1] = -1
    given[0, 0] = np.finfo(dtype).tiny
    warnings.simplefilter("error")  # what is looked at when all is made may overflow
    for function in (
        partial(factors.factor_by_rows, by_rows=by_rows, inverted=True),
        partial(factors.inverse_by_rows, by_rows=by_rows), factors.inverse,
    ):  # fmt: skip
        with pytest.raises(np.linalg.LinAlgError, match="A: found a matrix whose pivot"):
            function(given, precision=precision)


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("B, p", [(1, 1), (3, 8), (40, 64), (2, 100), (3, 128), (2, 136), (2, 512)])
def test_cholesky_inverse_by_tiles(cp, rng, dtype, B, p):
    A = definite(rng, B, p)
    lower = np.tril(A) + np.triu(np.full((p, p), np.nan), 1)
    found = factors.cholesky_inverse(cp.asarray(lower, dtype))
    near_largest(found, np.linalg.inv(np.linalg.cholesky(A)), TOLERANCE[dtype])
    assert not np.triu(arrays.to_numpy(found), 1).any()


@pytest.mark.gpu
@pytest.mark.parametrize("p", [20, 300])
def test_failures_are_named(cp, rng, p):
    A = definite(rng, 40, p)
    A[[3, 35], -1, -1] = -1
    with pytest.raises(np.linalg.LinAlgError, match=r"2 of 40 .*\(numbers 3, 35\)"):
        factors.cholesky_inverse(cp.asarray(A, "float32"))
    info = cp.zeros(40, np.int32)
    factors.cholesky_inverse(cp.asarray(A, "float32"), info)
    assert info.get()[[3, 35]].tolist() == [p, p] and np.count_nonzero(info.get()) == 2
    for dtype in "float32", "float64":
        with pytest.raises(np.linalg.LinAlgError, match="A: found a matrix whose pivot 0 is not"):
            factors.reversed_cholesky(cp.asarray(A[3], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("K", [1, 5, 128, 129, 300, 700, 1536])
def test_inverse(cp, rng, dtype, K):
    A = definite(rng, K)
    R = np.linalg.cholesky(A[::-1, ::-1])[::-1, ::-1]
    found = factors.reversed_cholesky(cp.asarray(A, dtype))
    near_largest(found, R, TOLERANCE[dtype])
    U = factors.upper_inverse(cp.asarray(R, dtype))
    near_largest(U, np.linalg.inv(R), TOLERANCE[dtype])
    assert not np.tril(arrays.to_numpy(U), -1).any()
    near_largest(factors.upper_gram(U), np.linalg.inv(A), TOLERANCE[dtype])
    near_largest(factors.inverse(cp.asarray(A, dtype)), np.linalg.inv(A), TOLERANCE[dtype])


@pytest.mark.gpu
def test_tensor_cores_keep_the_triangular_inverse(cp, rng, monkeypatch):
    """Only the Gram product may lose digits."""
    monkeypatch.setattr("cuobs.ops.cuda.products.SPLIT_FROM", 1)
    A = definite(rng, 1000)
    R = np.linalg.cholesky(A).T
    near_largest(factors.upper_inverse(cp.asarray(R, "float32"), "tensor"), np.linalg.inv(R), 1e-5)
    near_largest(factors.inverse(cp.asarray(A, "float32"), "tensor"), np.linalg.inv(A), 2e-3)


@SINGLE
@pytest.mark.parametrize("K, n", [(1, 1), (40, 7), (300, 33)])
def test_upper_solve(xp, rng, dtype, close, K, n):
    U = np.linalg.cholesky(definite(rng, K)).T
    B = rng.standard_normal((n, K)).T
    found = factors.upper_solve(xp.asarray(U, dtype), xp.asarray(B, dtype))
    close(found, np.linalg.solve(U, B))
    with pytest.raises(ValueError, match="B: found shape"):
        factors.upper_solve(xp.asarray(U, dtype), xp.zeros((K + 1, n), dtype))


def test_factors_refuse_other_arrays(xp):
    with pytest.raises(ValueError, match=r"H: found shape \(2, 3\), expected a square matrix"):
        factors.reversed_cholesky(xp.zeros((2, 3)))
    with pytest.raises(TypeError, match="A: found dtype float16, expected float32 or float64"):
        factors.cholesky(xp.eye(3, dtype="float16"))
    with pytest.raises(ValueError, match="A: found shape"):
        factors.cholesky_inverse(xp.eye(3))
    with pytest.raises(ValueError, match="info: found int64"):
        factors.cholesky_inverse(xp.eye(3)[None], xp.zeros(1, "int64"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("M, K", [(3, 5), (40, 200)])
@pytest.mark.parametrize("precision", ["tensor", "fp32"])
def test_factor_solve(xp, rng, monkeypatch, dtype, M, K, precision):
    """By the factor and by its inverse, all digits of float32 on tensor cores too."""
    if xp is not np:
        monkeypatch.setattr("cuobs.ops.cuda.products.SPLIT_FROM", 1)
    monkeypatch.setattr(factors, "STRIP", 64)
    X = rng.standard_normal((2 * K, K))
    H, B = X.T @ X / K + np.eye(K), rng.standard_normal((M, K))
    R = factors.reversed_cholesky(xp.asarray(H, dtype))
    given = xp.asarray(B, dtype)
    expected = np.linalg.solve(H, B.T).T
    tolerance = 1e-12 if dtype == "float64" else 1e-4
    inverse = factors.upper_inverse(R, precision)
    for found in (
        factors.factor_solve(R, given), factors.inverse_factor_solve(inverse, given, precision)
    ):  # fmt: skip
        np.testing.assert_allclose(arrays.to_numpy(found), expected, rtol=tolerance, atol=tolerance)
    assert (arrays.to_numpy(given) == B.astype(dtype)).all()


def test_factor_solve_checks_shapes(xp):
    with pytest.raises(ValueError, match="B: found shape"):
        factors.factor_solve(xp.eye(4), xp.ones((2, 3)))
