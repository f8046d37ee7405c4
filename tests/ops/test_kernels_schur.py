"""The kernels of true OBS and of Cholesky factors against their NumPy twins, on the device."""

import zlib

import layers
import numpy as np
import pytest

from cuobs import arrays, batches
from cuobs.algorithms import true_obs_ops
from cuobs.algorithms.true_obs import _bytes_per_row, _prune_rows, true_obs
from cuobs.batches import Workspace
from cuobs.ops import factors
from cuobs.pattern import parse, patterns
from cuobs.problem import Problem
from cuobs.recipe import Settings

pytestmark = pytest.mark.gpu

PATTERNS = (*patterns(), layers.TILE, "2:3", "1:4", "2:4x3", "8:16", "16:32")
# Weights, and the factor that goes with them.
TYPES = [("float32", "float16"), ("float32", "float32"), ("float64", "float64")]
TOLERANCE = {"float16": 5e-3, "float32": 2e-4, "float64": 1e-10}


@pytest.fixture
def cp():
    if fault := arrays.cupy_fault():
        pytest.skip(fault)
    import cupy

    return cupy


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def definite(rng, *shape):
    """Symmetric positive definite matrices (..., n, n)."""
    A = rng.standard_normal((*shape, 2 * shape[-1]))
    return A @ np.swapaxes(A, -1, -2) / (2 * shape[-1])


def shuffled(rng, rows, n):
    """0 to n - 1 in another order for each row."""
    return rng.permuted(np.tile(np.arange(n, dtype=np.int32), (rows, 1)), axis=1)


def same(found, expected, tolerance=0.0):
    """Equal to a share of the largest entry."""
    found = arrays.to_numpy(found).astype(np.float64)
    assert found.shape == expected.shape
    largest = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n, size", [(1, 1), (7, 7), (40, 3), (257, 256), (700, 1), (3000, 411)])
@pytest.mark.parametrize("ties", [False, True])
def test_first_scopes(cp, rng, dtype, n, size, ties):
    key = rng.integers(-3, 4, (3, n)) if ties else rng.standard_normal((3, n))
    key = key.astype(dtype)
    key[key == 0] *= -1
    for value in np.inf, -np.inf, np.nan:
        key[rng.random(key.shape) < 0.02] = value
    scopes = shuffled(rng, 3, n + 5)
    expected = true_obs_ops.first_scopes(key, scopes[:, :n], size)
    found = true_obs_ops.first_scopes(cp.asarray(key), cp.asarray(scopes)[:, :n], size)
    np.testing.assert_array_equal(arrays.to_numpy(found), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("B, p", [(1, 1), (3, 8), (40, 64), (2, 100), (3, 128), (2, 136), (2, 512)])
def test_cholesky_inverse(cp, rng, dtype, B, p):
    A = definite(rng, B, p)
    lower = np.tril(A) + np.triu(np.full((p, p), np.nan), 1)
    found = factors.cholesky_inverse(cp.asarray(lower, dtype))
    same(found, np.linalg.inv(np.linalg.cholesky(A)), TOLERANCE[dtype])
    assert not np.triu(arrays.to_numpy(found), 1).any()


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
        with pytest.raises(np.linalg.LinAlgError, match="larger damp"):
            factors.reversed_cholesky(cp.asarray(A[3], dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("K", [1, 5, 128, 129, 300, 700, 1536])
def test_inverse(cp, rng, dtype, K):
    A = definite(rng, K)
    R = np.linalg.cholesky(A[::-1, ::-1])[::-1, ::-1]
    found = factors.reversed_cholesky(cp.asarray(A, dtype))
    same(found, R, TOLERANCE[dtype])
    U = factors.upper_inverse(cp.asarray(R, dtype))
    same(U, np.linalg.inv(R), TOLERANCE[dtype])
    assert not np.tril(arrays.to_numpy(U), -1).any()
    same(factors.upper_gram(U), np.linalg.inv(A), TOLERANCE[dtype])
    same(factors.inverse(cp.asarray(A, dtype)), np.linalg.inv(A), TOLERANCE[dtype])


def test_tensor_cores_keep_the_triangular_inverse(cp, rng, monkeypatch):
    """Only the Gram product may lose digits."""
    monkeypatch.setattr("cuobs.ops.cuda.products.SPLIT_FROM", 1)
    A = definite(rng, 1000)
    R = np.linalg.cholesky(A).T
    same(factors.upper_inverse(cp.asarray(R, "float32"), "tensor"), np.linalg.inv(R), 1e-5)
    same(factors.inverse(cp.asarray(A, "float32"), "tensor"), np.linalg.inv(A), 2e-3)


@pytest.mark.parametrize("dtype, factor_dtype", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("R, groups", [(1, 1), (3, 6), (33, 20)])
def test_a_group(cp, rng, pattern, dtype, factor_dtype, R, groups):
    """All passes of one group of scopes, each compared with its twin on the same input."""
    layout = parse(pattern).compile(*shape_of(pattern, R, groups + 1))
    R, r, G, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    B, n, used = R * r, G - 1, 8 * int(rng.integers(0, 4))
    size = int(rng.integers(1, n + 1))
    most, alike = true_obs_ops.pruned_columns(layout)
    room = used + true_obs_ops.aligned(size * most) + 16
    C = definite(rng, G * c) * 0.05 + np.eye(G * c)
    if layout.enumerated:
        masks = layout.candidate_blocks
        blocks = np.ascontiguousarray(masks[:, rng.integers(0, masks.shape[1], (R, n))])
    else:
        blocks = np.tile((np.arange(layout.n_blocks) >= layout.keep)[:, None, None], (1, R, n))
        blocks = rng.permuted(blocks, axis=0)
    host = {
        "blocks": blocks,
        "chosen": np.sort(shuffled(rng, R, n)[:, :size]),
        "scopes": shuffled(rng, R, G),
        "w": rng.standard_normal((c, R, r, G)).astype(dtype),
        "D": rng.standard_normal((c, c, R, r, G)).astype(dtype),
        "Z": (0.03 * rng.standard_normal((B, G * c, room))).astype(factor_dtype),
    }
    # Rows that lose different numbers of columns hold zeros behind their own.
    starts = 8 * rng.integers(0, used // 8 + 1, B).astype(np.int32)
    if not alike:
        for Z, start in zip(host["Z"], starts, strict=True):
            Z[:, start:used] = 0
    results = []
    for xp in np, cp:
        a = {name: xp.array(value) for name, value in host.items()}
        scopes, w, D = a["scopes"][:, :n], a["w"][..., :n], a["D"][..., :n]
        if xp is np:
            a["Z"] = a["Z"].astype(dtype)
        factor = true_obs_ops.Factor(a["Z"][:, : n * c], used)
        mask = xp.zeros((R, r, G, c), bool)
        places, columns, weights, counts = true_obs_ops.take_pruned(
            a["blocks"], a["chosen"], scopes, w, layout, mask
        )
        if not alike:
            factor.starts = xp.asarray(starts)
        Z_P = true_obs_ops.gather_factor(factor.Z, places, used)
        A = true_obs_ops.group_blocks(xp.asarray(C, dtype), columns, Z_P)
        lower = np.tril(arrays.to_numpy(A))
        cost = xp.ones(B, dtype)
        inverse = factors.cholesky_inverse(A)
        y, inverse = true_obs_ops.solve_group(inverse, weights, cost, factor.Z.dtype)
        found = {"places": places, "columns": columns, "weights": weights, "mask": mask,
                 "Z_P": Z_P, "A": lower, "y": y, "cost": cost}
        if size < n:
            scopes, w, D = true_obs_ops.drop_scopes(a["chosen"], scopes, w, D, factor)
            Zn = true_obs_ops.append_factor(
                xp.asarray(C.astype(factor_dtype), factor.Z.dtype), scopes, columns, Z_P, inverse,
                counts, factor, Workspace(),
            )
            true_obs_ops.update_scopes(w, D, Zn, y)
            # Columns of Z may lie in other places.
            Z = arrays.to_numpy(factor.Z)[:, :, : factor.used].astype(np.float64)
            D = arrays.to_numpy(D) * np.tri(c)[:, :, None, None, None]
            found |= {"scopes": scopes, "w": w, "D": D, "Zn": Zn, "ZZ": Z @ Z.swapaxes(1, 2)}
        results.append({name: arrays.to_numpy(value) for name, value in found.items()})
    twin, device = results
    p, tolerance = twin["places"].shape[1], TOLERANCE[factor_dtype]
    # A device fills lists up to a length that it likes.
    assert device["places"].shape[1] % true_obs_ops.ALIGN == 0
    assert (device["places"][:, p:] == -1).all() and (device["columns"][:, p:] == -1).all()
    for name in twin:
        expected, found = twin[name], device[name]
        if name in ("places", "columns", "weights", "y", "Z_P"):
            found = found[:, :p]
        elif name == "A":
            found = found[:, :p, :p]
        elif name == "Zn":
            assert not found[:, :, p:].any()
            found = found[:, :, :p]
        exact = name in ("places", "columns", "weights", "mask", "scopes", "Z_P")
        same(found, expected.astype(np.float64), 0 if exact else tolerance)


def shape_of(pattern, R, G):
    """The shape of a weight with R row groups and about G scopes a row group."""
    if pattern in patterns():
        return (16 * -(-R // 8) if pattern == "block16-row8" else R), 16 * -(-G * 2 // 2)
    return (2 * R if pattern == layers.TILE else R), G * {"2:3": 3, "2:4x3": 12, "8:16": 16,
                                                         "16:32": 32}.get(pattern, 4)


def test_a_wider_factor_keeps_its_columns(cp, rng):
    Z = rng.standard_normal((5, 12, 24)).astype("float16")
    factor, space = true_obs_ops.Factor(cp.asarray(Z)[:, :9], used=16), Workspace()
    true_obs_ops.make_room(factor, 8, 0, space)
    assert factor.Z.shape == (5, 9, 24)
    true_obs_ops.make_room(factor, 9, 400, space)
    assert factor.Z.shape == (5, 9, 48)
    same(factor.Z[:, :, :16], Z[:, :9, :16])
    true_obs_ops.make_room(factor, 40, 400, space)
    assert factor.Z.shape == (5, 9, 56)
    same(factor.Z[:, :, :16], Z[:, :9, :16])


def problem_on(cp, pattern, M, K, **settings):
    W, H = layers.random_layer(M, K, seed=1)
    layout = parse(pattern).compile(M, K)
    return Problem.build(cp.asarray(W, "float32"), cp.asarray(H, "float32"), layout, 0.01,
                         Settings(**settings))


@pytest.mark.parametrize("pattern, M, K", [("2:4", 100, 192), ("block16-row8", 160, 128)])
@pytest.mark.parametrize("precision", ["tensor", "fp32"])
def test_batches_of_any_size_give_the_same_masks(cp, pattern, M, K, precision):
    results = [
        true_obs(problem_on(cp, pattern, M, K, batch_rows=rows, precision=precision), group=4)
        for rows in (None, 1, 32, 40, 64)
    ]
    for other in results[1:]:
        assert (other.mask == results[0].mask).all()
        assert (other.cost == results[0].cost).all()


def test_out_of_memory_halves_the_rows(cp, monkeypatch):
    """The device refuses a batch of 128 rows, and the masks are the same as of 32."""
    asked = []

    def prune_rows(run, W, *args):
        asked.append(len(W))
        return _prune_rows(run, W, *args)

    expected = true_obs(problem_on(cp, "2:4", 128, 512, batch_rows=32), group=16)
    problem = problem_on(cp, "2:4", 128, 512)
    problem.C  # noqa: B018
    monkeypatch.setitem(true_obs.__globals__, "_prune_rows", prune_rows)
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    area = 0.4 * 512 * 256 * 2
    pool.set_limit(size=pool.used_bytes() + int(2 * 100 * area))
    try:
        found = true_obs(problem, group=16)
    finally:
        pool.set_limit(size=0)
    assert asked[0] == 128 and len(asked) > 2 and set(asked[1:]) <= {32, 64}
    assert (found.mask == expected.mask).all()


@pytest.mark.parametrize("pattern, M, K, group", [
    ("2:4", 64, 1024, 32), ("2:4", 64, 512, 1), ("coupled-2:4", 64, 1024, 8),
    ("block16-row8", 64, 1024, 4), ("2:4", 64, 512, 1000),
])
def test_a_batch_fits_what_it_is_said_to_take(cp, monkeypatch, pattern, M, K, group):
    """Its arrays and what the pool keeps between them, beside half a megabyte."""
    said = []
    monkeypatch.setitem(true_obs.__globals__, "_bytes_per_row",
                        lambda run: said.append(_bytes_per_row(run)) or said[-1])
    true_obs(problem_on(cp, pattern, M, K, batch_rows=M), group=group)
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    problem = problem_on(cp, pattern, M, K, batch_rows=M)
    problem.C  # noqa: B018
    pool.free_all_blocks()
    # What is held, with the gaps that it leaves in the pool's pieces; C scaled, and in float16;
    # masks.
    held = pool.total_bytes() + K * K * 6 + 2 * M * K
    pool.set_limit(size=held + said[0] * M + 2**19)
    asked = []

    def prune_rows(run, W, *args):
        asked.append(len(W))
        return _prune_rows(run, W, *args)

    monkeypatch.setitem(true_obs.__globals__, "_prune_rows", prune_rows)
    try:
        true_obs(problem, group=group)
    finally:
        pool.set_limit(size=0)
    assert len(asked) == 1


def test_rows_that_float16_fails_are_done_again(cp, monkeypatch):
    """A pivot that fails in float16 sends its row group, and no other, through float32."""
    exact = true_obs(problem_on(cp, "2:4", 40, 128, precision="fp32"), group=4)
    inverted = true_obs.__globals__["cholesky_inverse"]

    def fails(A, info, precision):
        inverted(A, info, precision)
        if len(A) > 1:
            info[5] = 1
        return A

    monkeypatch.setitem(true_obs.__globals__, "cholesky_inverse", fails)
    found = true_obs(problem_on(cp, "2:4", 40, 128), group=4)
    # tf32 keeps 11 bits of a factor.
    np.testing.assert_allclose(found.cost.get()[5], exact.cost.get()[5], rtol=1e-3)
    assert (found.mask[5] == exact.mask[5]).all()

    def always(A, info, precision):
        inverted(A, info, precision)
        info[0] = 1
        return A

    monkeypatch.setitem(true_obs.__globals__, "cholesky_inverse", always)
    with pytest.raises(np.linalg.LinAlgError, match="larger damp"):
        true_obs(problem_on(cp, "2:4", 40, 128), group=4)


def test_half_precision_does_not_move_the_cost(cp, example):
    W, X = (np.asarray(a[: n], "float32") for a, n in zip(example, (64, 4096), strict=True))
    H = X.T @ X
    costs = {}
    for precision in "fp32", "tensor":
        problem = Problem.build(cp.asarray(W), cp.asarray(H), parse("2:4").compile(*W.shape), 0.01,
                                Settings(precision=precision))
        costs[precision] = float(true_obs(problem, group=40).cost.sum())
    assert costs["tensor"] == pytest.approx(costs["fp32"], rel=5e-3)


def test_the_plan_of_the_published_size():
    """256 rows fit 24 GiB, and 8 GiB hold 32 beside everything else."""
    layout = parse("2:4").compile(2560, 9728)
    C = np.empty((0, 0), np.float32)
    run = true_obs.__globals__["_Run"](
        C, C.astype("float16"), "tensor", layout, 256, "gap", None, None
    )
    assert 256 * _bytes_per_row(run) < batches.GPU_BYTES
    assert 32 * _bytes_per_row(run) < 4 * 2**30
