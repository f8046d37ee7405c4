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


@SINGLE
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["tensor", "fp32"])
def test_gram_and_cross_gram_of_any_precision(xp, rng, dtype, kind, precision):
    """Products of half precision are exact; the sums are those of `out`."""
    if kind == "bfloat16":
        kind = pytest.importorskip("ml_dtypes").bfloat16
    X, Y = (rng.standard_normal((300, n)).astype(kind) for n in (40, 24))
    x, y = X.astype(float), Y.astype(float)
    rough = kind == "float32" and precision == "tensor" and xp is not np and dtype == "float32"
    tolerance = 0.3 if rough else {"float32": 3e-3, "float64": 1e-10}[dtype]
    total, cross = xp.eye(40, dtype=dtype), xp.ones((40, 24), dtype)
    wide = xp.asarray(np.pad(X.view(np.uint16 if X.itemsize == 2 else np.uint32), ((0, 0), (3, 5))))
    part = wide.view(X.dtype)[:, 3:43]
    gram.add_gram(part, total, precision)
    gram.add_cross_gram(part, xp.asarray(Y), cross, precision)
    np.testing.assert_allclose(host(total), np.eye(40) + x.T @ x, rtol=0, atol=tolerance)
    np.testing.assert_allclose(host(cross), 1 + x.T @ y, rtol=0, atol=tolerance)


def test_cross_gram_of_two_dtypes(xp, rng):
    X, Y = rng.standard_normal((50, 6)).astype("float16"), rng.standard_normal((50, 4))
    out = xp.zeros((6, 4))
    gram.add_cross_gram(xp.asarray(X), xp.asarray(Y), out)
    np.testing.assert_allclose(host(out), X.astype(float).T @ Y, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="Y: found 49 rows, expected 50"):
        gram.add_cross_gram(xp.asarray(X), xp.asarray(Y[:49]), out)
    with pytest.raises(ValueError, match=r"out: found shape \(6, 4\), expected \(6, 6\)"):
        gram.add_cross_gram(xp.asarray(X), xp.asarray(X), out)
    for wrong in xp.zeros((4, 6)).T, xp.zeros((6, 8))[:, ::2]:
        with pytest.raises(ValueError, match="out: found strides .*, expected contiguous rows"):
            gram.add_cross_gram(xp.asarray(X), xp.asarray(Y), wrong)
    with pytest.raises(ValueError, match="A: found strides"):
        gram.mirror_upper(xp.zeros((4, 4)).T)
    with pytest.raises(TypeError, match="X: found dtype int64"):
        gram.add_gram(xp.ones((3, 4), "int64"), xp.zeros((4, 4)))


@pytest.mark.model
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_tensors_are_seen_where_they_lie(device, kind, request):
    torch = pytest.importorskip("torch")
    from cuobs import arrays, ops

    if device == "cuda":
        request.getfixturevalue("cp")
    tensor = torch.arange(24.0, device=device).reshape(6, 4).to(getattr(torch, kind))
    with arrays.stream_of(tensor):
        view = ops.tensor_view(tensor.T)
        assert view.shape == (4, 6) and str(view.dtype) == kind
        out = arrays.namespace(view).zeros((6, 6), "float32")
        ops.add_gram(view, out)
        tensor[0, 0] = 5
        assert float(host(view).astype("float32")[0, 0]) == 5
    wide = torch.arange(24.0).reshape(6, 4)
    np.testing.assert_array_equal(host(out), (wide @ wide.T).numpy())
