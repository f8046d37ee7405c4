"""Systems on sets of places."""

import numpy as np
import pytest
from layers import host
from op_cases import SINGLE, definite, near, place_major

from cuobs import arrays
from cuobs.ops import systems


@SINGLE
@pytest.mark.parametrize("c", [1, 4, 16, 20])
def test_masked_solve(xp, rng, dtype, close, c):
    """Every set of places, the empty and the full one too; above 16 by another way."""
    C = definite(rng, 5, c).transpose(1, 2, 0)
    w = rng.standard_normal((c, 6, 5))
    mask = rng.random((c, 6, 5)) < 0.5
    mask[:, 0], mask[:, 1] = False, True
    found = systems.masked_solve(
        xp.asarray(C[:, :, None], dtype), xp.asarray(w, dtype), xp.asarray(mask)
    )
    expected = np.zeros_like(w)
    for i, j in np.ndindex(6, 5):
        P = np.flatnonzero(mask[:, i, j])
        expected[P, i, j] = np.linalg.solve(C[np.ix_(P, P)][..., j], w[P, i, j])
    close(found, expected)


@SINGLE
@pytest.mark.parametrize("c, n", [(4, 5), (16, 1), (20, 2), (1, 3)])
def test_scope_compensation(xp, rng, dtype, close, c, n):
    C = definite(rng, n, c).transpose(1, 2, 0)
    W = rng.standard_normal((3, n * c))
    mask = rng.random(W.shape) < 0.5
    found = systems.scope_compensation(
        xp.asarray(W, dtype), xp.asarray(C, dtype), xp.asarray(mask)
    )
    expected = W.copy()
    for i, g in np.ndindex(3, n):
        part = slice(g * c, (g + 1) * c)
        P = np.flatnonzero(~mask[i, part])
        Cg = C[..., g]
        expected[i, part] -= np.linalg.solve(Cg[np.ix_(P, P)], W[i, part][P]) @ Cg[P]
    close(found, expected * mask)
    assert not host(found)[~mask].any()


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("c", [1, 2, 3, 4, 6, 8, 12, 16, 20])
@pytest.mark.parametrize("M, n", [(1, 1), (3, 33), (70, 5)])
def test_scope_compensation_by_a_kernel(cp, rng, c, M, n, dtype):
    W = rng.standard_normal((M, n * c)).astype(dtype)
    C = place_major(definite(rng, n, c)).astype(dtype)
    mask = rng.random((M, n * c)) < 0.5
    mask[0] = True
    mask[-1] = False
    expected = systems.scope_compensation(W, C, mask)
    found = systems.scope_compensation(*map(cp.asarray, (W, C, mask)))
    near(found, expected, dtype, single=2e-3)
    assert (arrays.to_numpy(found)[~mask] == 0).all()


@SINGLE
def test_masked_factor_solve(rng, dtype, close):
    A, B = definite(rng, 12), rng.standard_normal((5, 12))
    mask = rng.random(B.shape) < 0.5
    mask[0], mask[1] = False, True
    out = np.zeros(B.shape, dtype)
    systems.masked_factor_solve(A.astype(dtype), B.astype(dtype), mask, out)
    expected = np.zeros_like(B)
    for i, m in enumerate(mask):
        expected[i, m] = np.linalg.solve(A[np.ix_(m, m)], B[i, m])
    close(out, expected)
    with pytest.raises(np.linalg.LinAlgError, match="row 1"):
        systems.masked_factor_solve(-A, B, mask, out)
