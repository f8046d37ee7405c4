"""Gram and cross-Gram matrices."""

import numpy as np
import pytest
from layers import host
from op_cases import SINGLE, definite, near, untouched, wider

from cuobs import arrays
from cuobs.hessian import Hessian
from cuobs.ops import gram


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


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("K", [1, 7, 31, 33, 100, 515])
def test_mirror_by_tiles(cp, rng, K, dtype):
    A = rng.standard_normal((K, K)).astype(dtype)
    whole, A_gpu = wider(cp, A, 2, 3)
    gram.mirror_upper(A_gpu)
    gram.mirror_upper(A)
    np.testing.assert_array_equal(arrays.to_numpy(A_gpu), A)
    assert untouched(whole, 2, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("N, K", [(1, 1), (3, 7), (200, 33), (1000, 100), (70, 515)])
@pytest.mark.parametrize("dtype, total", [("float16", "float32"), ("float16", "float64"),
                                          ("float32", "float32"), ("float64", "float64")])
@pytest.mark.parametrize("precision", ["tensor", "fp32"])
def test_gram_on_a_device(cp, rng, N, K, dtype, total, precision):
    X = rng.standard_normal((N, K)).astype(dtype)
    out = definite(rng, K).astype(total)
    out_gpu = cp.asarray(out)
    gram.add_gram(X, out)
    gram.add_gram(cp.asarray(X), out_gpu, precision)
    # tf32 keeps ten bits of what is no half precision.
    rough = dtype == total == "float32" and precision == "tensor"
    near(out_gpu, out, total, single=1e-3 if rough else 1e-5)
    np.testing.assert_array_equal(arrays.to_numpy(out_gpu), arrays.to_numpy(out_gpu).T)


@pytest.mark.gpu
def test_float16_products_do_not_overflow(cp):
    X = cp.full((64, 16), 60000, "float16")
    out = cp.zeros((16, 16), "float32")
    gram.add_gram(X, out)
    np.testing.assert_allclose(arrays.to_numpy(out), 64 * 60000.0**2, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_hessian_from_the_host(cp, rng, monkeypatch, dtype, rows):
    """X comes through pinned buffers, read-only as a mapped file is."""
    from cuobs import hessian

    X = rng.standard_normal((333, 24)).astype(dtype)
    X.flags.writeable = False
    monkeypatch.setattr(hessian, "COPIED_PIECE", rows * 24 * X.itemsize)
    h = Hessian(24, dtype="float64", device="cuda")
    h.update(X)
    h.update(X[:5])
    expected = X.astype("float64").T @ X + X[:5].astype("float64").T @ X[:5]
    np.testing.assert_allclose(arrays.to_numpy(h.matrix), expected, rtol=1e-11, atol=1e-11)
    assert h.tokens == 338
