"""ADMM's passes."""

import layers
import numpy as np
import pytest
from layers import host
from op_cases import (
    EVERY,
    PATTERNS,
    SHAPE,
    SINGLE,
    TOLERANCE,
    by_scope,
    compiled,
    layout_of,
    near,
    near_largest,
)

import cuobs
from cuobs import arrays
from cuobs.algorithms import admm_ops
from cuobs.algorithms.admm_ops import project_update, ridge_right_side
from cuobs.ops import projection


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_projection(xp, rng, dtype, close, text):
    layout, s = compiled(text)
    m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    B, V, old = (rng.standard_normal((m * r, n * c)).astype(dtype) for _ in range(3))

    def mask_of(A):
        squares = by_scope(A.astype(float), layout) ** 2
        sums = np.stack([squares.transpose(1, 3, 2, 0)[:, :, layout.blocks == b].sum(-1)
                         for b in range(layout.n_blocks)])
        lost = np.argsort(sums, axis=0, kind="stable")[: layout.n_blocks - layout.keep]
        gone = np.zeros(sums.shape, bool)
        np.put_along_axis(gone, lost, True, axis=0)
        return ~gone[layout.blocks].transpose(2, 0, 3, 1).reshape(B.shape)

    mask, before = xp.zeros(B.shape, bool), mask_of(old)
    assert projection.project_mask(xp.asarray(old), mask, layout) == before.sum()
    np.testing.assert_array_equal(host(mask), before)
    rho = 0.3
    b, v, d = xp.array(B), xp.array(V), xp.empty(B.shape, dtype)
    half = xp.empty(B.shape, "float16") if dtype == "float32" else None
    changed = project_update(b, v, d, mask, half, layout, rho)
    after = mask_of(B + V / rho)
    D = (B + V / rho) * after
    np.testing.assert_array_equal(host(mask), after)
    assert int(changed) == (before != after).sum()
    close(d, D)
    np.testing.assert_allclose(host(v), V + rho * (B - D), rtol=0,
                               atol={"float32": 1e-5, "float64": 1e-13}[dtype])
    np.testing.assert_array_equal(host(b), B)
    if half is not None:
        np.testing.assert_array_equal(host(half), B.astype("float16"))


@SINGLE
def test_ridge_right_side(xp, rng, dtype, close):
    """Into an array of its own, into float16, and in place of the product."""
    D, V, G, B, P = (rng.standard_normal((7, 33)) for _ in range(5))
    expected = 0.7 * (D - B) - V + G - P
    v, g, b, p = (xp.asarray(a, dtype) for a in (V, G, B, P))
    out, half = xp.empty(D.shape, dtype), xp.empty(D.shape, "float16")
    ridge_right_side(xp.array(D, dtype), v, g, b, p, out, 0.7)
    close(out, expected)
    close(p, P)
    ridge_right_side(xp.array(D, dtype), v, g, b, p, half, 0.7)
    assert (half == out.astype("float16")).all()
    ridge_right_side(xp.array(D, dtype), v, g, b, p, p, 0.7)
    assert (p == out).all()
    for array, given in ((v, V), (g, G), (b, B)):
        assert (array == xp.asarray(given, dtype)).all()


@pytest.mark.gpu
@EVERY
@SHAPE
@SINGLE
def test_project_update(cp, rng, pattern, m, n, dtype):
    """Three steps, each from the arrays that the one before has left on its own side."""
    layout = layout_of(pattern, m, n)
    M, K = layout.shape
    V, D = (rng.standard_normal((M, K)).astype(dtype) for _ in range(2))
    mask = rng.random((M, K)) < 0.5
    V_gpu, D_gpu, mask_gpu = map(cp.asarray, (V, D, mask))
    for rho in (0.1, 0.25, 0.7):
        B = rng.standard_normal((M, K)).astype(dtype)
        B[:, : layout.columns] = V[:, : layout.columns] = 0  # ties
        V_gpu[:, : layout.columns] = 0
        changed = project_update(B, V, D, mask, None, layout, rho)
        found = project_update(cp.asarray(B), V_gpu, D_gpu, mask_gpu, None, layout, rho)
        differ = (arrays.to_numpy(mask_gpu) != mask).sum()
        assert differ == 0 if dtype == "float64" else differ <= 1e-3 * mask.size
        assert abs(int(found) - changed) <= differ
        if differ:
            return
        near(V_gpu, V, dtype)
        near(D_gpu, D, dtype)
    other, other_gpu = mask.copy(), cp.asarray(mask)
    assert projection.project_mask(B, other, layout) == admm_ops.project_mask(
        cp.asarray(B), other_gpu, layout
    )
    np.testing.assert_array_equal(arrays.to_numpy(other_gpu), other)


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("out", ["own", "half", "product"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 131), (300, 257)])
def test_ridge_right_side_by_a_kernel(cp, rng, shape, out, dtype):
    given = [rng.standard_normal(shape).astype(dtype) for _ in range(5)]
    expected = np.empty(shape, dtype)
    on_gpu = [cp.asarray(A) for A in given]
    ridge_right_side(*given, expected, 0.3)
    kind = "float16" if out == "half" else dtype
    found = on_gpu[4] if out == "product" else cp.empty(shape, kind)
    ridge_right_side(*on_gpu, found, 0.3)
    if out == "half":
        near_largest(found, expected, TOLERANCE["float16"])
    else:
        near(found, expected, dtype, single=1e-6, double=1e-14)


@pytest.mark.gpu
def test_a_count_is_not_waited_for_by_what_follows(cp):
    """`int` gives what was counted, whatever is launched behind it."""
    layout = layout_of("2:4", 512, 256)
    B = cp.random.standard_normal(layout.shape, "float32")
    V, D, mask = cp.zeros_like(B), cp.empty_like(B), cp.zeros(B.shape, bool)
    first = project_update(B, V, D, mask, None, layout, 0.5)
    kept = mask.copy()
    again = project_update(cp.roll(B, 1), V, D, mask, None, layout, 0.5)
    assert int(again) == int((mask != kept).sum()) > 0
    assert int(first) == B.size // 2


@SINGLE
@pytest.mark.parametrize("text", PATTERNS)
def test_prepared_passes_do_the_same_each_time(xp, rng, dtype, text):
    """Two steps with other numbers in the same arrays; each count is that of the last step."""
    layout = compiled(text)[0]
    M, K = layout.row_groups * layout.rows, layout.column_groups * layout.columns
    given = [xp.asarray(rng.standard_normal((M, K)), dtype) for _ in range(5)]
    ours, theirs = ([a.copy() for a in given] for _ in range(2))
    masks, halves = xp.zeros((2, M, K), bool), [None, None]
    if dtype == "float32":
        halves = xp.zeros((2, M, K), "float16")

    def passes(B, V, D, G, product, mask, half):
        return (
            ridge_right_side.prepared(D, V, G, B, product, product),
            project_update.prepared(B, V, D, mask, half, layout),
        )

    turn, update = passes(*ours, masks[0], halves[0])
    for rho in (0.3, 0.9):
        turn(rho)
        count = update(rho)
        B, V, D, G, product = theirs
        ridge_right_side(D, V, G, B, product, product, rho)
        expected = project_update(B, V, D, masks[1], halves[1], layout, rho)
        assert int(count) == int(expected)
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
        assert (masks[0] == masks[1]).all()
        assert halves[0] is None or (halves[0] == halves[1]).all()
        for B in (ours[0], theirs[0]):
            B += ours[4]


def test_passes_refuse_what_is_not_row_after_row(xp):
    layout = compiled("2:4")[0]
    M, K = layout.shape
    whole, mask = xp.zeros((M, K)), xp.zeros((M, K), bool)
    turned = xp.zeros((K, M)).T
    for B, V, D, kept in (
        (turned, whole, whole, mask),
        (whole, turned, whole, mask),
        (whole, whole, turned, mask),
        (whole, whole, whole, xp.zeros((K, M), bool).T),
    ):
        with pytest.raises(ValueError, match="found strides .*, expected row after row"):
            project_update(B, V, D, kept, None, layout, 0.5)
    with pytest.raises(TypeError, match="V: found dtype float32, expected float64"):
        project_update(whole, whole.astype("float32"), whole, mask, None, layout, 0.5)
    with pytest.raises(TypeError, match="operand: found float16 for float64"):
        project_update(whole, whole, whole, mask, whole.astype("float16"), layout, 0.5)
    with pytest.raises(ValueError, match="G: found shape"):
        ridge_right_side(whole, whole, whole[:1], whole, whole, whole, 0.5)
    with pytest.raises(TypeError, match="out: found dtype float32, expected float64"):
        ridge_right_side(*[whole] * 5, whole.astype("float32"), 0.5)


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "true-obs", "obs-local"])
def test_weights_that_lie_column_after_column(xp, method):
    W, H = layers.random_layer(8, 32)
    W = xp.asarray(W)
    device = "cpu" if xp is np else "cuda"
    found, expected = (
        cuobs.prune(weight, hessian=H, method=method, dtype="float64", device=device)
        for weight in (xp.asfortranarray(W), W)
    )
    assert (found.mask == expected.mask).all() and (found.weight == expected.weight).all()
