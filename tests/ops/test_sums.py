"""Sums over whole arrays."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from layers import host
from op_cases import SINGLE

from cuobs.ops import sums

SHAPES = pytest.mark.parametrize("M, K", [(1, 1), (3, 700), (70, 5), (300, 257)])
# Prunes by every method, re-solves, and measures, on one small layer.
EVERY_METHOD = """
import warnings
import cupy as cp
import cuobs
warnings.simplefilter("ignore")
rng = cp.random.RandomState(0)
# CuPy takes other reductions for fewer than 128 elements.
W, X = rng.standard_normal((256, 576)), rng.standard_normal((700, 576))
hessian = cuobs.Hessian(576, device="cuda")
hessian.update(iter([X, X]))
for dtype in "float16", "float32":
    for pattern in "2:4", "block16-row8", "16:32":
        for method in cuobs.methods():
            found = cuobs.prune(W.astype(dtype), X.astype(dtype), pattern=pattern, method=method,
                                refine="exact")
    cuobs.prune(W.astype(dtype), hessian=hessian, method="obs-ordered", group=143)
    cuobs.reconstruct(W.astype(dtype), found.mask, hessian)
"""


@SINGLE
@SHAPES
def test_inner(xp, rng, dtype, M, K):
    A, B = (rng.standard_normal((M, 2 * K)).astype(dtype) for _ in range(2))
    a, b = A[:, :K].astype("float64"), B[:, K:].astype("float64")
    A_xp, B_xp = xp.asarray(A)[:, :K], xp.asarray(B)[:, K:]
    # Products of float32 are rounded, their sums are not.
    tolerance = {"float32": 1e-7, "float64": 1e-15}[dtype] * np.abs(a * b).sum()
    assert sums.inner(A_xp, B_xp) == pytest.approx((a * b).sum(), abs=tolerance)
    by_columns = xp.asfortranarray(A_xp)
    assert sums.inner(by_columns, B_xp) == pytest.approx((a * b).sum(), abs=tolerance)
    out, rows = xp.full((), 2.5), xp.arange(M, dtype="float64")
    sums.add_inner(A_xp, B_xp, out)
    sums.add_row_inner(A_xp, B_xp, rows)
    assert float(out) == pytest.approx(2.5 + (a * b).sum(), abs=tolerance)
    np.testing.assert_allclose(host(rows), np.arange(M) + (a * b).sum(1), rtol=0, atol=tolerance)


def test_inner_adds_in_float64(xp):
    """One is lost in a float32 sum from 2²⁴ on."""
    A = xp.ones((4100, 4100), "float32")
    A[0, 0] = 4096
    assert sums.inner(A, A) == 4100**2 - 1 + 4096**2


def test_inner_refuses(xp):
    A = xp.ones((2, 3))
    with pytest.raises(ValueError, match=r"^B: found shape \(3, 2\), expected \(2, 3\)$"):
        sums.inner(A, A.T)
    with pytest.raises(TypeError, match="^A: found dtype float16, expected float32 or float64$"):
        sums.inner(A.astype("float16"), A.astype("float16"))
    with pytest.raises(TypeError, match="^out: found dtype float32, expected float64$"):
        sums.add_inner(A, A, xp.zeros((), "float32"))
    with pytest.raises(ValueError, match=r"^out: found shape \(3,\), expected \(2,\)$"):
        sums.add_row_inner(A, A, xp.zeros(3))
    with pytest.raises(ValueError, match="^out: found strides .*, expected row after row$"):
        sums.add_row_inner(A, A, xp.zeros(4)[::2])


@SHAPES
def test_count_true(xp, rng, M, K):
    mask = rng.random((M, 2 * K)) < 0.3
    for part in mask, mask[:, :K], mask.T, mask & False, mask | True:
        assert sums.count_true(xp.asarray(part)) == part.sum()
    assert sums.count_true(xp.ones((3000, 3001), bool)) == 3000 * 3001


@pytest.mark.gpu
def test_sums_are_the_same_from_run_to_run(cp, rng):
    A = cp.asarray(rng.standard_normal((3000, 1111)))
    assert len({sums.inner(A, A) for _ in range(20)}) == 1


@pytest.mark.gpu
def test_no_method_compiles_what_takes_seconds(cp, tmp_path):
    """CuPy's block reductions, by CUB, take the compiler two seconds each."""
    own = {"CUPY_CACHE_DIR": str(tmp_path), "CUPY_CACHE_SAVE_CUDA_SOURCE": "1"}
    subprocess.run([sys.executable, "-c", EVERY_METHOD], check=True, env=os.environ | own)
    texts = [path.read_text() for path in tmp_path.glob("*.cu")]
    assert sum("project_mask" in text for text in texts)
    names = (re.findall(r"cupy_cub_\w+", text)[:1] for text in texts if "cub/block" in text)
    assert sorted(names) == []
