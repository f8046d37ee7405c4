"""True-obs's passes."""

import layers
import numpy as np
import pytest
from layers import TALL, TILE, host
from op_cases import SINGLE, TOLERANCE, compiled, definite, near_largest

from cuobs import arrays, batches
from cuobs.algorithms import true_obs_ops
from cuobs.algorithms.true_obs import _bytes_per_row, _prune_rows, true_obs
from cuobs.batches import Workspace
from cuobs.ops import factors, selection
from cuobs.pattern import parse, patterns
from cuobs.problem import Problem
from cuobs.recipe import Settings


@SINGLE
def test_first_scopes(xp, rng, dtype):
    """Smallest keys; where they tie, the lowest scope, wherever it lies; positions ascend."""
    key = rng.integers(0, 4, (6, 37)).astype(dtype)
    scopes = np.argsort(rng.random((6, 90)), axis=1)[:, :37].astype(np.int32)
    for size in 1, 5, 36, 37:
        found = host(true_obs_ops.first_scopes(xp.asarray(key), xp.asarray(scopes), size))
        for m in range(6):
            order = sorted(range(37), key=lambda k: (key[m, k], scopes[m, k]))
            assert found[m].tolist() == sorted(order[:size])


@pytest.fixture(params=["2:4", "4:8", "block16-row8", TILE, TALL])
def state(request, rng):
    """Row groups in the middle of true-obs: n open scopes of each, in any order, and a Z."""
    layout = compiled(request.param, columns=9)[0]
    m, r, N, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    n, used = 6, 8
    return {
        "layout": layout, "m": m, "r": r, "N": N, "c": c, "n": n, "used": used,
        "scopes": np.argsort(rng.random((m, N)), axis=1)[:, :n].astype(np.int32),
        "w": rng.standard_normal((c, m, r, n)), "D": rng.standard_normal((c, c, m, r, n)),
        "Z": rng.standard_normal((m * r, n * c, used + 56)) / 10,
        "chosen": np.sort(np.argsort(rng.random((m, n)), axis=1)[:, :2]).astype(np.int32),
        "C": definite(rng, N * c),
    }


@SINGLE
def test_take_pruned(xp, rng, state, dtype):
    layout, c, r = state["layout"], state["c"], state["r"]
    blocks = selection.prune_lowest(
        rng.random((layout.n_blocks, state["m"], state["n"])), layout.n_blocks - layout.keep)
    mask = xp.zeros((state["m"], r, state["N"], c), bool)
    places, columns, weights, counts = true_obs_ops.take_pruned(
        xp.asarray(blocks), xp.asarray(state["chosen"]), xp.asarray(state["scopes"]),
        xp.asarray(state["w"], dtype), layout, mask)
    places, columns, weights, mask = map(host, (places, columns, weights, mask))
    for m, i in np.ndindex(state["m"], r):
        expected = []
        for k in state["chosen"][m]:
            scope = state["scopes"][m, k]
            gone = blocks[layout.blocks[i], m, k]
            assert np.array_equal(mask[m, i, scope], ~gone)
            expected += [(k * c + j, scope * c + j, state["w"].astype(dtype)[j, m, i, k])
                         for j in np.flatnonzero(gone)]
        b = m * r + i
        found = zip(places[b], columns[b], weights[b], strict=True)
        assert sorted(f for f in found if f[0] >= 0) == sorted(expected)
        assert (columns[b][places[b] < 0] == -1).all() and not weights[b][places[b] < 0].any()
        if counts is not None:
            assert host(counts)[b] >= len(expected)
    assert mask.sum() == sum(mask[m, :, state["scopes"][m, k]].sum()
                             for m in range(state["m"]) for k in state["chosen"][m])


@SINGLE
def test_groups_of_rows(xp, rng, state, dtype, close):
    """Z_P, A = C_PP - Z_P Z_P^T and y = L^-1 w, with rows that lose fewer columns filled up."""
    B, c, n, used = state["m"] * state["r"], state["c"], state["n"], state["used"]
    places = np.argsort(rng.random((B, n * c)), axis=1)[:, :min(5, n * c)].astype(np.int32)
    places[::2, -1] = -1
    scope = np.repeat(state["scopes"], state["r"], axis=0)
    columns = np.take_along_axis(scope, places // c, 1) * c + places % c
    columns = np.where(places < 0, -1, columns).astype(np.int32)
    Z = xp.asarray(state["Z"], dtype)
    Z_P = true_obs_ops.gather_factor(Z, xp.asarray(places), used)
    rows = np.where(places[..., None] < 0, 0,
                    np.take_along_axis(state["Z"][:, :, :used], places[..., None], 1))
    close(Z_P, rows)
    close(true_obs_ops.gather_factor(Z, None, used), state["Z"][:, :, :used])
    A = host(true_obs_ops.group_blocks(xp.asarray(state["C"], dtype), xp.asarray(columns), Z_P))
    expected = state["C"][columns[:, :, None], columns[:, None]] - rows @ rows.swapaxes(1, 2)
    filled = (columns < 0)[:, :, None] | (columns < 0)[:, None]
    expected = np.where(filled, np.eye(places.shape[1]), expected)
    close(np.tril(A), np.tril(expected))
    inverse = np.linalg.inv(np.linalg.cholesky(expected + 5 * np.eye(places.shape[1])))
    weights, cost = rng.standard_normal(places.shape), rng.standard_normal(B)
    total = xp.array(cost, dtype)
    y, same = true_obs_ops.solve_group(
        xp.asarray(inverse, dtype), xp.asarray(weights, dtype), total, np.dtype(dtype))
    solved = (inverse @ weights[..., None])[..., 0]
    close(y, solved)
    close(total, cost + (solved**2).sum(1))
    close(same, inverse)


@SINGLE
def test_drop_scopes(xp, state, dtype, close):
    """What is left are the other scopes, each with its own weights, blocks and rows of Z."""
    m, r, c, n, used = (state[name] for name in ("m", "r", "c", "n", "used"))
    arrays = {name: xp.array(state[name], dtype) for name in ("w", "D", "Z")}
    factor = true_obs_ops.Factor(arrays["Z"], used=used)
    scopes, w, D = true_obs_ops.drop_scopes(
        xp.asarray(state["chosen"]), xp.array(state["scopes"]), arrays["w"], arrays["D"], factor)
    scopes, w, D, Z = map(host, (scopes, w, D, factor.Z))
    assert scopes.shape == (m, n - 2) and w.shape[3] == n - 2 and Z.shape[1] == (n - 2) * c
    below = np.tril(np.ones((c, c)))[..., None]
    for g in range(m):
        kept = {int(state["scopes"][g, k]): k for k in range(n) if k not in state["chosen"][g]}
        assert sorted(scopes[g]) == sorted(kept)
        old = [kept[int(s)] for s in scopes[g]]
        for i in range(r):
            close(w[:, g, i], state["w"][:, g, i][:, old])
            close(D[:, :, g, i] * below, state["D"][:, :, g, i][..., old] * below)
            by_scope = state["Z"][g * r + i, :, :used].reshape(n, c, used)[old]
            close(Z[g * r + i, :, :used], by_scope.reshape(-1, used))


@SINGLE
@pytest.mark.parametrize("differ", [False, True])
def test_append_factor(xp, rng, state, dtype, close, differ):
    """Zn = L^-1 (C_P: - Z_P Z^T), transposed, behind what each row has in Z so far."""
    m, r, c, n, used = (state[name] for name in ("m", "r", "c", "n", "used"))
    B, p = m * r, 8
    columns = np.argsort(rng.random((B, state["N"] * c)), axis=1)[:, :p].astype(np.int32)
    p = columns.shape[1]
    counts = np.full(B, p, np.int32)
    Z = state["Z"].copy()
    starts = np.full(B, used, np.int32)
    if differ:
        counts[::2] = p - 8 if p > 8 else 0
        starts[1::3] = 0
        Z[1::3, :, :used] = 0
        columns[np.arange(p) >= counts[:, None]] = -1
    C, Z_P = state["C"], rng.standard_normal((B, p, used)) / 10
    Z_P[columns < 0] = 0
    inverse = np.tril(rng.standard_normal((B, p, p)))
    # Filled places stand alone, with a unit diagonal.
    filled = columns < 0
    inverse[filled[:, :, None] | filled[:, None]] = 0
    inverse[filled[:, :, None] & np.eye(p, dtype=bool)] = 1
    factor = true_obs_ops.Factor(xp.array(Z, dtype), used, xp.asarray(starts) if differ else None)
    Zn = true_obs_ops.append_factor(
        xp.asarray(C, dtype), xp.asarray(state["scopes"]), xp.asarray(columns),
        xp.asarray(Z_P, dtype), xp.asarray(inverse, dtype),
        xp.asarray(counts) if differ else None, factor, Workspace())
    open_columns = (state["scopes"][:, :, None] * c + np.arange(c)).reshape(m, -1)
    open_columns = np.repeat(open_columns, r, axis=0)
    for b in range(B):
        P = columns[b, : counts[b]]
        Y = C[np.ix_(P, open_columns[b])] - Z_P[b, : len(P)] @ Z[b, :, :used].T
        expected = (inverse[b, : len(P), : len(P)] @ Y).T
        # The smallest may be all rounding.
        scale = max(1.0, np.abs(expected).max(initial=0))
        tolerance = {"float32": 2e-4, "float64": 1e-11}[dtype] * scale
        np.testing.assert_allclose(host(Zn)[b, :, : len(P)], expected, rtol=0, atol=tolerance)
        assert not host(Zn)[b, :, len(P) :].any()
        end = starts[b] + len(P)
        stored = host(factor.Z)[b]
        np.testing.assert_allclose(stored[:, starts[b] : end], expected, rtol=0, atol=tolerance)
        assert not stored[:, end : factor.used].any()
    assert factor.used == (starts + counts).max()


@SINGLE
def test_update_scopes(xp, rng, state, dtype, close):
    m, r, c, n = (state[name] for name in ("m", "r", "c", "n"))
    B, p = m * r, 8
    Zn, y = rng.standard_normal((B, n * c, p)), rng.standard_normal((B, p))
    w, D = (xp.array(state[name], dtype) for name in "wD")
    true_obs_ops.update_scopes(w, D, xp.asarray(Zn, dtype), xp.asarray(y, dtype))
    by_scope = Zn.reshape(m, r, n, c, p)
    close(w, state["w"] - np.einsum("Rrncp,Rrp->cRrn", by_scope, y.reshape(m, r, p)))
    below = np.tril(np.ones((c, c)))[..., None, None, None]
    expected = state["D"] - np.einsum("Rrnip,Rrnjp->ijRrn", by_scope, by_scope)
    close(host(D) * below, expected * below)


# Weights, and the factor that goes with them.
TYPES = [("float32", "float16"), ("float32", "float32"), ("float64", "float64")]


PATTERNS = (*patterns(), layers.TILE, "2:3", "1:4", "2:4x3", "8:16", "16:32")


def shuffled(rng, rows, n):
    """0 to n - 1 in another order for each row."""
    return rng.permuted(np.tile(np.arange(n, dtype=np.int32), (rows, 1)), axis=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n, size", [(1, 1), (7, 7), (40, 3), (257, 256), (700, 1), (3000, 411)])
@pytest.mark.parametrize("ties", [False, True])
def test_first_scopes_by_a_kernel(cp, rng, dtype, n, size, ties):
    key = rng.integers(-3, 4, (3, n)) if ties else rng.standard_normal((3, n))
    key = key.astype(dtype)
    key[key == 0] *= -1
    for value in np.inf, -np.inf, np.nan:
        key[rng.random(key.shape) < 0.02] = value
    scopes = shuffled(rng, 3, n + 5)
    expected = true_obs_ops.first_scopes(key, scopes[:, :n], size)
    found = true_obs_ops.first_scopes(cp.asarray(key), cp.asarray(scopes)[:, :n], size)
    np.testing.assert_array_equal(arrays.to_numpy(found), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, factor_dtype", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("m, groups", [(1, 1), (3, 6), (33, 20)])
def test_a_group(cp, rng, pattern, dtype, factor_dtype, m, groups):
    """All passes of one group of scopes, each compared with its twin on the same input."""
    layout = parse(pattern).compile(*shape_of(pattern, m, groups + 1))
    m, r, N, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    B, n, used = m * r, N - 1, 8 * int(rng.integers(0, 4))
    size = int(rng.integers(1, n + 1))
    alike = true_obs_ops.alike(layout)
    room = used + true_obs_ops.aligned(size * layout.pruned_columns[1]) + 16
    C = definite(rng, N * c) * 0.05 + np.eye(N * c)
    if layout.enumerated:
        masks = layout.candidate_blocks
        blocks = np.ascontiguousarray(masks[:, rng.integers(0, masks.shape[1], (m, n))])
    else:
        blocks = np.tile((np.arange(layout.n_blocks) >= layout.keep)[:, None, None], (1, m, n))
        blocks = rng.permuted(blocks, axis=0)
    host = {
        "blocks": blocks,
        "chosen": np.sort(shuffled(rng, m, n)[:, :size]),
        "scopes": shuffled(rng, m, N),
        "w": rng.standard_normal((c, m, r, N)).astype(dtype),
        "D": rng.standard_normal((c, c, m, r, N)).astype(dtype),
        "Z": (0.03 * rng.standard_normal((B, N * c, room))).astype(factor_dtype),
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
        mask = xp.zeros((m, r, N, c), bool)
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
        near_largest(found, expected.astype(np.float64), 0 if exact else tolerance)


def shape_of(pattern, m, N):
    """The shape of a weight with m row groups and about N scopes a row group."""
    if pattern in patterns():
        return (16 * -(-m // 8) if pattern == "block16-row8" else m), 16 * -(-N * 2 // 2)
    return (2 * m if pattern == layers.TILE else m), N * {"2:3": 3, "2:4x3": 12, "8:16": 16,
                                                         "16:32": 32}.get(pattern, 4)


@pytest.mark.gpu
def test_a_wider_factor_keeps_its_columns(cp, rng):
    Z = rng.standard_normal((5, 12, 24)).astype("float16")
    factor, space = true_obs_ops.Factor(cp.asarray(Z)[:, :9], used=16), Workspace()
    true_obs_ops.make_room(factor, 8, 0, space)
    assert factor.Z.shape == (5, 9, 24)
    true_obs_ops.make_room(factor, 9, 400, space)
    assert factor.Z.shape == (5, 9, 48)
    near_largest(factor.Z[:, :, :16], Z[:, :9, :16])
    true_obs_ops.make_room(factor, 40, 400, space)
    assert factor.Z.shape == (5, 9, 56)
    near_largest(factor.Z[:, :, :16], Z[:, :9, :16])


def problem_on(cp, pattern, M, K, **settings):
    W, H = layers.random_layer(M, K, seed=1)
    layout = parse(pattern).compile(M, K)
    return Problem.build(cp.asarray(W, "float32"), cp.asarray(H, "float32"), layout, 0.01,
                         Settings(**settings))


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("pattern, M, K, group", [
    ("2:4", 64, 1024, 32), ("2:4", 64, 512, 1), ("coupled-2:4", 64, 1024, 8),
    ("block16-row8", 64, 1024, 4), ("2:4", 64, 512, 1000),
])
def test_a_batch_fits_what_it_is_said_to_take(cp, monkeypatch, pattern, M, K, group):
    """Its arrays and what the pool keeps between them, beside half a megabyte."""
    said = []
    monkeypatch.setitem(true_obs.__globals__, "_bytes_per_row",
                        lambda *given: said.append(_bytes_per_row(*given)) or said[-1])
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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
    row = _bytes_per_row(layout, group=256, itemsize=4, short=2, device="cuda")
    assert 256 * row < batches.GPU_BYTES
    assert 32 * row < 4 * 2**30


@pytest.mark.gpu
def test_more_blocks_than_a_scope_loses_stay_in_their_row(cp):
    """A row's list takes what it has room for; the next row's is its own."""
    layout = compiled("2:4")[0]
    m, n = layout.row_groups, layout.column_groups
    blocks = cp.ones((4, m, n), bool)
    blocks[2:, 1::2] = False
    scopes = cp.tile(cp.arange(n, dtype=np.int32), (m, 1))
    w = cp.arange(4.0 * m * n).reshape(4, m, 1, n)
    places, columns, weights, _ = true_obs_ops.take_pruned(
        blocks, scopes, scopes, w, layout, cp.zeros((m, 1, n, 4), bool)
    )
    p = places.shape[1]
    assert p == true_obs_ops.aligned(2 * n)
    expected = [4 * k + i for k in range(n) for i in range(2)]
    for row in places.get()[1::2]:
        assert row.tolist() == expected + [-1] * (p - 2 * n)
    for row in places.get()[::2]:
        assert row.tolist() == list(range(p))
    assert (columns == places).all()


@pytest.mark.gpu
def test_more_rows_than_a_grid_has_blocks(cp):
    W, H = layers.random_layer(66000, 8)
    layout = parse("2:4").compile(*W.shape)
    masks = [
        true_obs(Problem.build(cp.asarray(W, "float32"), cp.asarray(H, "float32"), layout, 0.01,
                               Settings(device="cuda", batch_rows=rows)), group=1).mask
        for rows in (4096, 66000)
    ]
    assert (masks[0] == masks[1]).all()
