"""Products into place."""

import numpy as np
import pytest
from layers import host
from op_cases import SINGLE, near, untouched, wider

from cuobs import arrays
from cuobs.ops import products


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
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("options", [{}, {"beta": 1}, {"alpha": -0.5, "beta": 2, "exact": True}])
def test_a_prepared_product_is_of_what_lies_there(xp, rng, dtype, batch, options):
    """Each time of what its operands hold then; what does not fit is refused before."""
    A, B, ours = (
        xp.asarray(rng.standard_normal((*batch, *shape)), dtype)
        for shape in ((5, 8), (3, 8), (5, 3))
    )
    B, theirs = B.swapaxes(-1, -2), ours.copy()
    multiply = products.gemm.prepared(A, B, ours, **options)
    for _ in range(2):
        multiply()
        products.gemm(A, B, theirs, **options)
        assert (ours == theirs).all()
        A += 1
        B *= 2
    with pytest.raises(ValueError, match="A, B, out: found shapes"):
        products.gemm.prepared(A, B, ours[..., :1])


@pytest.mark.gpu
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (1, 64, 1), (5, 1, 3), (33, 17, 65), (128, 7, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gemm_on_a_device(cp, rng, m, k, n, dtype):
    """Slices and transposes in, the rows of a wider array to add to, batches, nothing at all."""
    total = "float64" if dtype == "float64" else "float32"
    for A_turned, B_turned in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        A = rng.standard_normal((k, m) if A_turned else (m, k)).astype(dtype)
        B = rng.standard_normal((n, k) if B_turned else (k, n)).astype(dtype)
        out = rng.standard_normal((m, n)).astype(total)
        a, b = (A.T if A_turned else A), (B.T if B_turned else B)
        expected = 2 * out - 0.5 * (a.astype(total) @ b.astype(total))
        whole, out_gpu = wider(cp, out, 3, 2)
        A_gpu, B_gpu = wider(cp, A, 1, 2)[1], wider(cp, B, 2, 1)[1]
        products.gemm(A_gpu.T if A_turned else A_gpu, B_gpu.T if B_turned else B_gpu, out_gpu,
                  alpha=-0.5, beta=2.0)
        near(out_gpu, expected, total, single=1e-5)
        assert untouched(whole, 3, 2)
    products.gemm(cp.empty((m, 0), dtype), cp.empty((0, n), dtype), out_gpu, beta=1.0)
    products.gemm(cp.empty((0, k), dtype), cp.empty((k, n), dtype), out_gpu[:0], beta=1.0)
    near(out_gpu, expected, total, single=1e-5)
    A, B = (rng.standard_normal((35, *shape)).astype(dtype) for shape in ((m, k), (k, n)))
    out_gpu = cp.empty((35, m, n), total)
    products.gemm(cp.asarray(A), cp.asarray(B), out_gpu)
    near(out_gpu, A.astype(total) @ B.astype(total), total, single=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("exact, low, high", [(False, 1e-4, 0.1), (True, 0, 1e-4)])
def test_gemm_on_tensor_cores(cp, rng, monkeypatch, exact, low, high):
    """Ten bits of each factor, or all of them in three products."""
    monkeypatch.setattr("cuobs.ops.cuda.products.SPLIT_FROM", 0)
    A, B = rng.standard_normal((2, 256, 256)).astype("float32")
    out = cp.zeros((256, 256), "float32")
    products.gemm(cp.asarray(A), cp.asarray(B), out, precision="tensor", exact=exact)
    error = np.abs(arrays.to_numpy(out) - A.astype("float64") @ B).max()
    assert low < error < high


@SINGLE
def test_gemm_of_any_strides(xp, rng, dtype, close):
    """Rows that run backwards, are broadcast or skip columns are what they look like."""
    base = rng.standard_normal((12, 12)).astype(dtype)
    B = rng.standard_normal((6, 5)).astype(dtype)

    def views(A):
        yield A[::-1, ::-1][:4, :6]
        yield A[::-2, :6][:4]
        yield A[:4, ::2]
        yield A[:8:2, ::-2]
        yield A[:4, :6][:, ::-1]
        yield A[::-1].T[:4, :6]
        yield xp.broadcast_to(A[0, :6], (4, 6)) if A is on else np.broadcast_to(A[0, :6], (4, 6))
        yield A[:6, :4].T

    on = xp.asarray(base)
    for A, expected in zip(views(on), views(base), strict=True):
        for exact in False, True:
            out = xp.zeros((4, 5), dtype)
            products.gemm(A, xp.asarray(B), out, exact=exact)
            close(out, expected.astype(float) @ B)
            turned = xp.zeros((5, 4), dtype)
            products.gemm(xp.asarray(B).T, A.T, turned)
            close(turned, (expected.astype(float) @ B).T)


@SINGLE
def test_a_batch_that_is_broadcast(xp, rng, dtype, close):
    A, B = rng.standard_normal((3, 4)), rng.standard_normal((5, 4, 2))
    wide = xp.broadcast_to(xp.asarray(A, dtype), (5, 3, 4))
    out = xp.empty((5, 3, 2), dtype)
    products.gemm(wide, xp.asarray(B, dtype), out)
    close(out, A @ B)
    products.gemm(wide, xp.asarray(B, dtype)[::-1], out)
    close(out, A @ B[::-1])


def test_gemm_refuses_what_is_no_product(xp):
    A, B, out = xp.zeros((2, 3)), xp.zeros((3, 4)), xp.zeros((2, 4))
    for wrong in (B, A, out), (A, B, out[:1]), (A, B, out.T), (A[0], B, out), (A, B[:2], out):
        with pytest.raises(ValueError, match="A, B, out: found shapes"):
            products.gemm(*wrong)
    with pytest.raises(TypeError, match="B: found dtype float32, expected float64"):
        products.gemm(A, B.astype("float32"), out)
    with pytest.raises(ValueError, match="precision: found 'tf32'"):
        products.gemm(A, B, out, precision="tf32")


@pytest.mark.gpu
def test_gemm_refuses_where_it_can_not_write(cp):
    A, B, wide = cp.zeros((2, 3)), cp.zeros((3, 4)), cp.zeros((4, 8))
    for out in wide[:2, ::2], wide[:2, :4][:, ::-1], wide[:2, :4][::-1], wide.T[:2, :4]:
        with pytest.raises(ValueError, match="out: found strides"):
            products.gemm(A, B, out)
    with pytest.raises(TypeError, match="out: found dtype float32"):
        products.gemm(A, B, wide[:2, :4].astype("float32"))
