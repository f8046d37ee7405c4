"""Each kernel against its NumPy twin: the same op on the same arrays, on the device and off it."""

import zlib

import numpy as np
import pytest
from layers import FAR, ROWS, TALL, TILE

from cuobs import arrays
from cuobs.algorithms import admm_ops
from cuobs.hessian import Hessian
from cuobs.ops import conjugate_gradient, gram, products, projection, selection, sweep, systems
from cuobs.ops.cuda import loader
from cuobs.pattern import Layout, parse, patterns

pytestmark = pytest.mark.gpu

PAIRS = "view=(M/2,2,K/2,2):(2K,K,2,1) block=(1,1,1,2) scope=(1,2,2,1) keep=1"
PATTERNS = (*patterns(), "1:2", "1:4", "3:4", "2:3", "5:6", "4:8x1", "2:4x3", "8:16", TILE, FAR,
            ROWS, TALL, PAIRS)
# Row groups and scopes: one of each, fewer and more than a warp, a warp and one, several blocks.
SHAPES = [(1, 1), (1, 40), (33, 1), (5, 7), (37, 33), (9, 130)]
REAL = pytest.mark.parametrize("dtype", ["float32", "float64"])
EVERY = pytest.mark.parametrize("pattern", PATTERNS)
SHAPE = pytest.mark.parametrize("R, G", SHAPES)


@pytest.fixture
def cp():
    if fault := arrays.cupy_fault():
        pytest.skip(fault)
    import cupy

    return cupy


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def layout_of(pattern, R, G):
    """A pattern compiled, for any number of row groups and of scopes."""
    blocks, keep = _scope(pattern)
    r, c = blocks.shape
    return Layout(np.arange(R * r).reshape(R, r), np.arange(G * c).reshape(G, c), blocks, keep)


def _scope(pattern):
    for K in (240, 252, 256):
        try:
            layout = parse(pattern).compile(32, K)
        except ValueError:
            continue
        return layout.blocks, layout.keep
    raise AssertionError(pattern)


def definite(rng, *shape):
    """Symmetric positive definite matrices (..., n, n)."""
    A = rng.standard_normal((*shape, 2 * shape[-1]))
    return A @ np.swapaxes(A, -1, -2) / shape[-1]


def place_major(blocks):
    """(..., c, c) to (c, c, ...)."""
    return np.ascontiguousarray(np.moveaxis(blocks, (-2, -1), (0, 1)))


def close(found, expected, dtype, single=2e-4, double=1e-10):
    """Equal to a share of the largest entry."""
    found = arrays.to_numpy(found)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    tolerance = {"float32": single, "float64": double}[str(dtype)]
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


def wider(xp, array, left, right):
    """The array as columns of a wider one, whose other elements are NaN (or True)."""
    M, n = array.shape
    whole = xp.full((M, left + n + right), np.nan if array.dtype.kind == "f" else True, array.dtype)
    whole[:, left : left + n] = xp.asarray(array)
    return whole, whole[:, left : left + n]


def untouched(whole, left, right):
    whole = arrays.to_numpy(whole)
    beside = np.concatenate([whole[:, :left], whole[:, whole.shape[1] - right :]], axis=1)
    return (np.isnan(beside) if beside.dtype.kind == "f" else beside).all()


@EVERY
@SHAPE
@REAL
@pytest.mark.parametrize("own", [False, True])
def test_select(cp, rng, pattern, R, G, dtype, own):
    layout = layout_of(pattern, R, G)
    r, c = layout.blocks.shape
    w = rng.standard_normal((R, r, G, c)).astype(dtype)
    w[:, :, G // 2] = 0  # every candidate ties
    w = w.transpose(3, 0, 1, 2)
    C = place_major(definite(rng, *((R, r, G) if own else (G,)), c)).astype(dtype)
    blocks, best, gap = selection.select(w, C, layout)
    found, found_best, found_gap = selection.select(cp.asarray(w), cp.asarray(C), layout)
    close(found_best, best, dtype)
    close(found_gap, gap, dtype)
    # Rounding decides where two masks cost the same.
    sure = (gap > {"float32": 1e-5, "float64": 1e-12}[dtype] * np.abs(best).max()) | (best == 0)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(arrays.to_numpy(found)[:, sure], blocks[:, sure])

    whole, mask = wider(cp, np.zeros((R * r, G * c), bool), c, 3 * c)
    selection.select_mask(cp.asarray(w), cp.asarray(C), layout, mask)
    expected = ~selection.expand(arrays.to_numpy(found), layout).reshape(R * r, G * c)
    np.testing.assert_array_equal(arrays.to_numpy(mask), expected)
    assert untouched(whole, c, 3 * c)


@pytest.mark.parametrize("text", ["33:64", "2:3x8", "1:2x64"])
def test_scopes_too_large_for_a_kernel(cp, rng, text):
    """They take array operations, on the device too."""
    layout = layout_of(text, 4, 1) if text != "2:3x8" else layout_of(text, 4, 5)
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    w = rng.standard_normal((R, r, G, c)).transpose(3, 0, 1, 2)
    C = place_major(definite(rng, G, c))
    for found, expected in zip(selection.select(cp.asarray(w), cp.asarray(C), layout),
                               selection.select(w, C, layout), strict=True):
        np.testing.assert_allclose(arrays.to_numpy(found), expected, rtol=1e-9)


@REAL
@pytest.mark.parametrize("c, G", [(1, 5), (2, 33), (3, 7), (4, 1), (4, 70), (8, 9), (12, 5),
                                  (16, 6), (20, 3)])
def test_factor_scope_blocks(cp, rng, c, G, dtype):
    U = np.triu(rng.standard_normal((G * c, G * c))).astype(dtype)
    expected = selection.factor_scope_blocks(U, c)
    close(selection.factor_scope_blocks(cp.asarray(U), c), expected, dtype)


@REAL
@pytest.mark.parametrize("c", [1, 2, 3, 4, 6, 8, 12, 16, 20])
@pytest.mark.parametrize("M, G", [(1, 1), (3, 33), (70, 5)])
def test_scope_compensation(cp, rng, c, M, G, dtype):
    W = rng.standard_normal((M, G * c)).astype(dtype)
    C = place_major(definite(rng, G, c)).astype(dtype)
    mask = rng.random((M, G * c)) < 0.5
    mask[0] = True
    mask[-1] = False
    expected = systems.scope_compensation(W, C, mask)
    found = systems.scope_compensation(*map(cp.asarray, (W, C, mask)))
    close(found, expected, dtype, single=2e-3)
    assert (arrays.to_numpy(found)[~mask] == 0).all()


@EVERY
@REAL
@pytest.mark.parametrize("R, width", [(1, 1), (1, 128), (19, 60), (37, 128)])
def test_sparsegpt_block(cp, rng, pattern, R, width, dtype):
    """One block of whole scopes, all arrays slices of wider ones."""
    c = _scope(pattern)[0].shape[1]
    G = max(1, width // c)
    layout = layout_of(pattern, R, G)
    M, n = layout.shape
    W, S = (rng.standard_normal((M, n)).astype(dtype) for _ in range(2))
    R_factor = np.linalg.cholesky(definite(rng, n)).T
    F = (R_factor / R_factor.diagonal()[:, None]).astype(dtype)
    scale = (R_factor.diagonal() ** 2).astype(dtype)
    E, mask = S.copy(), np.empty((M, n), bool)
    sweep.sparsegpt_block(W, E, F, scale, layout, mask)

    _, W_gpu = wider(cp, W, c, c)
    whole_S, S_gpu = wider(cp, S, 2 * c, c)
    whole_mask, mask_gpu = wider(cp, np.zeros((M, n), bool), c, c)
    _, F_gpu = wider(cp, F, 3, 2)
    sweep.sparsegpt_block(W_gpu, S_gpu, F_gpu, cp.asarray(scale), layout, mask_gpu)
    assert untouched(whole_S, 2 * c, c) and untouched(whole_mask, c, c)
    found = arrays.to_numpy(mask_gpu)
    if dtype == "float64":
        np.testing.assert_array_equal(found, mask)
        close(S_gpu, E, dtype, double=1e-9)
    else:
        # A score that ties to rounding decides the rest of a row group.
        r = layout.blocks.shape[0]
        same = np.repeat((found == mask).reshape(R, -1).all(1), r)
        assert same.mean() >= 0.75 or R == 1
        close(S_gpu[cp.asarray(same)], E[same], dtype, single=2e-3)


@REAL
@pytest.mark.parametrize("pattern, n", [("2:4", 4), ("2:4", 64), ("2:4", 152), ("2:4", 300),
                                        ("4:8", 152), ("2:3", 129), ("2:4x3", 156), ("8:16", 144),
                                        ("1:2", 210), ("1:2x20", 160)])
@pytest.mark.parametrize("M", [1, 8, 37])
def test_scope_solutions(cp, rng, pattern, n, M, dtype):
    c = parse(pattern).compile(1, 720).columns
    layout = layout_of(pattern, M, n // c)
    W = rng.standard_normal((M, n)).astype(dtype)
    C = definite(rng, n).astype(dtype)
    mask = rng.random((M, n)) < 0.5
    expected = sweep.scope_solutions(W, C, mask, layout)
    _, mask_gpu = wider(cp, mask, 2 * c, c)
    _, W_gpu = wider(cp, W, c, 0)
    found = sweep.scope_solutions(W_gpu, cp.asarray(C), mask_gpu, layout)
    close(found, expected, dtype, single=2e-3, double=1e-9)
    assert (arrays.to_numpy(found)[mask] == 0).all()
    np.testing.assert_array_equal(arrays.to_numpy(W_gpu), W)


@REAL
@pytest.mark.parametrize("K, width", [(12, 4), (152, 152), (300, 48), (300, 400), (1100, 528)])
def test_span_inverses(cp, rng, K, width, dtype):
    R = np.linalg.cholesky(definite(rng, K)).T.astype(dtype)
    expected = sweep.span_inverses(R, width)
    found = sweep.span_inverses(cp.asarray(R), width)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        close(a[0], b[0], dtype, single=1e-3)
        close(a[1], b[1], dtype, single=1e-3)


@EVERY
@SHAPE
@REAL
def test_project_update(cp, rng, pattern, R, G, dtype):
    """Three steps, each from the arrays that the one before has left on its own side."""
    layout = layout_of(pattern, R, G)
    M, K = layout.shape
    V, D = (rng.standard_normal((M, K)).astype(dtype) for _ in range(2))
    mask = rng.random((M, K)) < 0.5
    V_gpu, D_gpu, mask_gpu = map(cp.asarray, (V, D, mask))
    for rho in (0.1, 0.25, 0.7):
        B = rng.standard_normal((M, K)).astype(dtype)
        B[:, : layout.columns] = V[:, : layout.columns] = 0  # ties
        V_gpu[:, : layout.columns] = 0
        changed = admm_ops.project_update(B, V, D, mask, rho, layout)
        found = admm_ops.project_update(cp.asarray(B), V_gpu, D_gpu, mask_gpu, rho, layout)
        differ = (arrays.to_numpy(mask_gpu) != mask).sum()
        assert differ == 0 if dtype == "float64" else differ <= 1e-3 * mask.size
        assert abs(found - changed) <= differ
        if differ:
            return
        close(V_gpu, V, dtype)
        close(D_gpu, D, dtype)
    other, other_gpu = mask.copy(), cp.asarray(mask)
    assert projection.project_mask(B, other, layout) == admm_ops.project_mask(
        cp.asarray(B), other_gpu, layout
    )
    np.testing.assert_array_equal(arrays.to_numpy(other_gpu), other)


@REAL
@pytest.mark.parametrize("with_B", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 131), (300, 257)])
def test_ridge_right_side(cp, rng, shape, with_B, dtype):
    D, V, G, B = (rng.standard_normal(shape).astype(dtype) for _ in range(4))
    B = B if with_B else None
    expected, found = np.empty_like(D), cp.empty(shape, dtype)
    admm_ops.ridge_right_side(D, V, G, 0.3, expected, B)
    admm_ops.ridge_right_side(*map(cp.asarray, (D, V, G)), 0.3, found,
                                None if B is None else cp.asarray(B))
    close(found, expected, dtype, single=1e-6, double=1e-14)


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
        close(gpu[n], cpu[n], dtype)
    # The twin's P of a row that has converged is never used.
    runs = (limit == 0) & (rr > 0)
    assert gpu[4].dtype == operand
    close(gpu[4][runs].astype(dtype), cpu[4][runs], dtype, single=1e-3)
    np.testing.assert_array_equal(gpu[4][~runs].get(), before[~runs])


@REAL
@pytest.mark.parametrize("M, K", [(1, 5), (40, 130), (7, 600)])
def test_masked_cg(cp, rng, M, K, dtype):
    A = definite(rng, K).astype(dtype)
    B = rng.standard_normal((M, K)).astype(dtype)
    mask = rng.random((M, K)) < 0.5
    mask[0] = False
    limit = ({"float32": 1e-5, "float64": 1e-13}[dtype] ** 2 * (B * B).sum(1)).astype(dtype)
    expected = conjugate_gradient.masked_cg(A, B, mask, limit=limit, max_iterations=500)
    given = map(cp.asarray, (A, B, mask))
    found = conjugate_gradient.masked_cg(*given, limit=cp.asarray(limit), max_iterations=500)
    close(found, expected, dtype)


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
    found = conjugate_gradient.masked_cg(
        cp.asarray(A * scale * scale[:, None], "float32"),
        cp.asarray(size * (T @ A) * scale, "float32"), cp.asarray(mask),
        limit=cp.zeros(M, "float32"), max_iterations=60, precision="tensor",
    )
    away = arrays.to_numpy(found).astype("float64") / size * scale - T
    energy = np.einsum("mk,kl,ml->m", away, A, away, optimize=True)
    assert (energy >= 0.999 * least).all() and (energy <= 1.002 * least).all()


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (1, 64, 1), (5, 1, 3), (33, 17, 65), (128, 7, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gemm(cp, rng, m, k, n, dtype):
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
        close(out_gpu, expected, total, single=1e-5)
        assert untouched(whole, 3, 2)
    products.gemm(cp.empty((m, 0), dtype), cp.empty((0, n), dtype), out_gpu, beta=1.0)
    products.gemm(A_gpu[:0], cp.ascontiguousarray(B_gpu), out_gpu[:0], beta=1.0)
    close(out_gpu, expected, total, single=1e-5)
    A, B = (rng.standard_normal((35, *shape)).astype(dtype) for shape in ((m, k), (k, n)))
    out_gpu = cp.empty((35, m, n), total)
    products.gemm(cp.asarray(A), cp.asarray(B), out_gpu)
    close(out_gpu, A.astype(total) @ B.astype(total), total, single=1e-5)


@pytest.mark.parametrize("exact, low, high", [(False, 1e-4, 0.1), (True, 0, 1e-4)])
def test_gemm_on_tensor_cores(cp, rng, monkeypatch, exact, low, high):
    """Ten bits of each factor, or all of them in three products."""
    monkeypatch.setattr("cuobs.ops.cuda.products.SPLIT_FROM", 0)
    A, B = rng.standard_normal((2, 256, 256)).astype("float32")
    out = cp.zeros((256, 256), "float32")
    products.gemm(cp.asarray(A), cp.asarray(B), out, precision="tensor", exact=exact)
    error = np.abs(arrays.to_numpy(out) - A.astype("float64") @ B).max()
    assert low < error < high


@REAL
@pytest.mark.parametrize("K", [1, 7, 31, 33, 100, 515])
def test_mirror_upper(cp, rng, K, dtype):
    A = rng.standard_normal((K, K)).astype(dtype)
    whole, A_gpu = wider(cp, A, 2, 3)
    gram.mirror_upper(A_gpu)
    gram.mirror_upper(A)
    np.testing.assert_array_equal(arrays.to_numpy(A_gpu), A)
    assert untouched(whole, 2, 3)


@pytest.mark.parametrize("N, K", [(1, 1), (3, 7), (200, 33), (1000, 100), (70, 515)])
@pytest.mark.parametrize("dtype, total", [("float16", "float32"), ("float16", "float64"),
                                          ("float32", "float32"), ("float64", "float64")])
@pytest.mark.parametrize("precision", ["tensor", "fp32"])
def test_add_gram(cp, rng, N, K, dtype, total, precision):
    X = rng.standard_normal((N, K)).astype(dtype)
    out = definite(rng, K).astype(total)
    out_gpu = cp.asarray(out)
    gram.add_gram(X, out)
    gram.add_gram(cp.asarray(X), out_gpu, precision)
    # tf32 keeps ten bits of what is no half precision.
    rough = dtype == total == "float32" and precision == "tensor"
    close(out_gpu, out, total, single=1e-3 if rough else 1e-5)
    np.testing.assert_array_equal(arrays.to_numpy(out_gpu), arrays.to_numpy(out_gpu).T)


def test_float16_products_do_not_overflow(cp):
    X = cp.full((64, 16), 60000, "float16")
    out = cp.zeros((16, 16), "float32")
    gram.add_gram(X, out)
    np.testing.assert_allclose(arrays.to_numpy(out), 64 * 60000.0**2, rtol=1e-5)


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


def test_every_variant_compiles_and_loads(cp):
    """What CI compiles without a device is what the device gets."""
    seen = set()
    for source, defines in loader.variants():
        seen.add(source)
        cp.RawModule(code=loader.text(source), options=loader.options(defines)).compile()
    assert seen == set(loader.sources())
