"""Rows of a layer shared out over devices: NumPy in threads stands for several GPUs."""

import contextlib
import dataclasses
import os
import signal
import threading

import numpy as np
import pytest
from cuobs_cli import main
from layers import random_layer

import cuobs
from cuobs import Recipe, Settings, problem, sharing
from cuobs.ops import factors
from cuobs.problem import Problem, Pruned

SHARED = [(name, {}) for name in cuobs.methods() if Recipe("2:4", name).by_row] + [
    ("true-obs", {"group": 4})
]


@pytest.fixture
def three(monkeypatch):
    """Three devices that are the CPU."""
    found = [sharing.Place(None)] * 3
    monkeypatch.setattr(sharing, "places", lambda settings: found)
    monkeypatch.setattr(sharing, "WORTH", 0)
    return Settings(device="cpu", dtype="float64", devices="3")


@pytest.mark.parametrize("method, options", SHARED)
@pytest.mark.parametrize("pattern", ["2:4", "block16-row8"])
def test_devices_give_what_one_gives(three, pattern, method, options):
    """And each looks at its own rows."""
    W, H = random_layer(64, 48)
    recipe, seen = Recipe(pattern, method, options, "exact"), []
    one = recipe.run(W, H, Settings(device="cpu", dtype="float64"))
    several = Settings(device="cpu", dtype="float64", devices="3", progress=None)
    solved = sharing.solve_on

    def watched(solve, recipe, settings, layer, H):
        def own(recipe, settings, layer, H):
            seen.append(len(layer.weight))
            return solve(recipe, settings, layer, H)

        return solved(own, recipe, settings, layer, H)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "solve_on", watched)
        found = recipe.run(W, H, several)
    unit = 16 if pattern == "block16-row8" else 1
    assert sorted(seen) == ([16, 16, 32] if unit == 16 else [21, 21, 22])
    assert np.array_equal(found.mask, one.mask)
    np.testing.assert_allclose(found.weight, one.weight, rtol=1e-7, atol=1e-9)
    assert found.loss == pytest.approx(one.loss, rel=1e-9)
    assert (found.cost is None) == (one.cost is None)
    if one.cost is not None:
        np.testing.assert_allclose(found.cost, one.cost, rtol=1e-9)


def test_a_target_is_shared_too(three):
    W, H = random_layer(9, 32)
    target = W + 0.1 * np.roll(W, 1)
    one = Recipe("2:4", "sparsegpt").run(
        W, H, Settings(device="cpu", dtype="float64"), target=target
    )
    found = Recipe("2:4", "sparsegpt").run(W, H, three, target=target)
    np.testing.assert_allclose(found.weight, one.weight, rtol=1e-9)


def test_sums_are_over_all_rows(three):
    """ADMM stops by the share of all rows that have changed, the same step everywhere."""
    W, H = random_layer(12, 48)
    sums, lock = [], threading.Lock()
    total = sharing._Share.total

    def noted(self, number):
        found = total(self, number)
        with lock:
            sums.append((number, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing._Share, "total", noted)
        Recipe("2:4", "admm").run(W, H, three)
    assert len(sums) > 3 * 30
    assert sum(number for number, _ in sums) == pytest.approx(sum(f for _, f in sums) / 3)
    steps = {}
    for _, found in sums:
        steps[found] = steps.get(found, 0) + 1
    assert all(count % 3 == 0 for count in steps.values())


def test_large_hessians_are_factored_together(three, monkeypatch):
    """R by the target's pull and the inverses of ADMM: some rows by each, the same for all."""
    monkeypatch.setattr(problem, "SHARED_FROM", 16)
    monkeypatch.setattr(factors, "LEAF", 20)
    monkeypatch.setattr(factors, "LEAF_OF_ONE", 20)
    W, H = random_layer(12, 96)
    made, by_rows = [], sharing._Share.by_rows

    def noted(self, function, rows):
        return by_rows(self, lambda own: made.append(own.stop - own.start) or function(own), rows)

    monkeypatch.setattr(sharing._Share, "by_rows", noted)
    one = Recipe("2:4", "admm").run(W, H, Settings(device="cpu", dtype="float64"))
    assert not made
    found = Recipe("2:4", "admm").run(W, H, three)
    assert made and max(made) <= 32
    assert np.array_equal(found.mask, one.mask)
    np.testing.assert_allclose(found.weight, one.weight, rtol=1e-7, atol=1e-9)
    monkeypatch.setattr(sharing._Share, "by_rows", lambda *args: 1.1 * by_rows(*args))
    with pytest.raises((RuntimeError, np.linalg.LinAlgError)):
        Recipe("2:4", "admm").run(W, H, three)


class Alone:
    """One of two that share rows, who makes what both would."""

    size = 2

    def by_rows(self, function, rows):
        return function(slice(0, rows))


@pytest.mark.parametrize("shared_from", [16, 8192])
@pytest.mark.parametrize("inverts", [None, lambda problem: problem.H + np.eye(48)])
def test_targets_are_pulled_by_the_inverse_where_rows_are_shared(monkeypatch, shared_from, inverts):
    """And what the method inverts first is made beside the factor, once."""
    monkeypatch.setattr(problem, "SHARED_FROM", shared_from)
    monkeypatch.setattr(factors, "LEAF", 20)
    monkeypatch.setattr(factors, "LEAF_OF_ONE", 20)
    W, H = random_layer(9, 48, dead=(5,))
    right = random_layer(9, 48, seed=1)[0] @ H
    found, layout = [], Recipe("2:4", "admm").pattern.compile(*W.shape)
    for others in None, Alone():
        settings = Settings(device="cpu", dtype="float64", others=others)
        made = Problem.build(W, H, layout, 0.01, settings)
        made.inverts = others and inverts
        made.pull(lambda: right)
        found.append((made.W, made.R))
        for A in made.H + np.eye(48), made.H:
            np.testing.assert_allclose(made.inverse(A) @ A, np.eye(48), atol=1e-9)
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-8, atol=1e-10)
    # A factor that comes after the first inverse brings no other.
    made = Problem.build(W, H, layout, 0.01, settings)
    made.inverts = inverts
    made.inverse(made.H + np.eye(48))
    made.R  # noqa: B018
    np.testing.assert_allclose(made.inverse(made.H) @ made.H, np.eye(48), atol=1e-9)
    made = Problem.build(W, -H, layout, 0.01, settings)
    made.inverts = inverts
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        made.pull(lambda: right)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_factor_of_another_matrix_is_noticed(scale):
    H = random_layer(4, 64)[1] * scale + 1e-3 * scale * np.eye(64)
    R = factors.reversed_cholesky(H)
    problem._check_factor_of(H, R)
    R[3, 40:] *= 1.1
    with pytest.raises(RuntimeError, match="made by several that is none"):
        problem._check_factor_of(H, R)


def test_what_goes_wrong_in_one_ends_all(three):
    """Those that wait for its number as well, and what it says is what is said."""

    def fails(problem):
        if problem.W[0, 0] < 0:
            raise ValueError("W: found this one, expected another")
        problem.settings.over_all_rows(1.0)
        return Pruned(problem.W > 0, problem.W)

    cuobs.register_method(cuobs.Method("fails", "fails", fails, by_row=True))
    try:
        W, H = np.abs(random_layer(6, 8)[0]), np.eye(8)
        W[4:] *= -1
        with pytest.raises(ValueError, match="found this one"):
            Recipe("2:4", "fails").run(W, H, three)
    finally:
        cuobs.recipe._METHODS.pop("fails")


def test_who_is_interrupted_leaves_nobody_waiting(three):
    """Ctrl-C comes to the thread that waits for the others: none of them may go on for ever."""
    calls, begun = [], threading.Event()

    def without_end(problem):
        calls.append(threading.current_thread())
        while True:
            problem.settings.over_all_rows(1.0)
            if len(calls) == 3 and not begun.is_set():
                begun.set()
                os.kill(os.getpid(), signal.SIGINT)  # to the main thread, which waits

    cuobs.register_method(cuobs.Method("without-end", "without end", without_end, by_row=True))
    # A test run in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Recipe("2:4", "without-end").run(np.ones((6, 8)), np.eye(8), three)
    finally:
        signal.signal(signal.SIGINT, before)
        cuobs.recipe._METHODS.pop("without-end")
    for thread in calls:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "recipe, rows",
    [
        (Recipe("2:4", "obs-ordered"), 12),
        (Recipe("2:4", "true-obs", {"order": "shared"}), 12),
        (Recipe("block16-row8", "wanda"), 32),
        (Recipe("2:4", "wanda"), 2),
    ],
)
def test_rows_that_belong_together_are_refused(three, recipe, rows):
    """Before the Hessian is summed."""
    with pytest.raises(ValueError, match="devices: found 3 for "):
        recipe.run(np.ones((rows, 16)), None, three, X=iter(()))


def test_a_method_says_whether_its_rows_are_shared():
    """Of its own, whatever it is called; obs-ordered alone of the package never does."""
    assert set(cuobs.methods()) - {name for name, _ in SHARED} == {"obs-ordered"}
    assert not Recipe("2:4", "true-obs", {"order": "shared"}).by_row
    assert not cuobs.Method("silent", "says nothing", print).by_row
    with pytest.raises(TypeError, match="by_row: found 'yes', expected True, False or a function"):
        cuobs.Method("odd", "odd", print, by_row="yes")


def test_all_methods_are_compared_but_those_that_share_no_rows(three):
    W, H = random_layer(8, 16)
    with pytest.warns(UserWarning, match="devices: found obs-ordered among all methods, left out"):
        table = cuobs.compare(W, hessian=H, devices="3", device="cpu", dtype="float64")
    assert [row.method for row in table] == [n for n in cuobs.methods() if n != "obs-ordered"]
    one = cuobs.compare(W, hessian=H, device="cpu", dtype="float64")
    assert [row.method for row in one] == list(cuobs.methods())
    for row in table:
        assert row.loss == pytest.approx(one[row.method].loss, rel=1e-9)
    with pytest.raises(ValueError, match="devices: found 3 for obs-ordered"):
        cuobs.compare(W, hessian=H, methods="obs-ordered", devices="3", device="cpu")


def test_the_command_compares_those_that_share_rows(three, tmp_path):
    from click.testing import CliRunner

    np.savez(tmp_path / "layer.npz", W=random_layer(8, 16)[0], H=np.eye(16))
    file = tmp_path / "layer.npz"
    found = CliRunner().invoke(
        main, ["compare", f"{file}:W", "--hessian", f"{file}:H", "--devices", "3",
               "--device", "cpu"]
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    said = [line for line in found.output.splitlines() if "left out" in line]
    assert len(said) == 1 and "obs-ordered" in said[0] and "true-obs  " in found.output


def test_a_single_device_is_moved_to(monkeypatch):
    """What lies elsewhere is taken to it, inside its context."""
    taken, inside = [], []

    class There(sharing.Place):
        @contextlib.contextmanager
        def here(self):
            inside.append(True)
            yield
            inside.pop()

        def take(self, array):
            taken.append((array.shape, bool(inside)))
            return array.copy()

    W, H = random_layer(8, 16)
    keys = {"hessian": H, "target": W + 0.1, "device": "cpu", "method": "obs-ordered"}
    one = cuobs.prune(W, **keys)
    monkeypatch.setattr(sharing, "places", lambda settings: [There(None)])
    found = cuobs.prune(W, devices="1,", **keys)
    assert taken == [((8, 16), True)] * 2 + [((16, 16), True)]
    assert np.array_equal(found.weight, one.weight)


def test_no_more_devices_than_pay():
    """By what a method says of its operations; all where it says nothing."""
    admm, sweep = Recipe("2:4", "admm"), Recipe("2:4", "sparsegpt")
    assert sharing.paying(sweep, (4096, 8192), 8) == 1
    assert sharing.paying(admm, (4096, 8192), 8) == 2
    assert sharing.paying(admm, (4096, 1024), 8) == 1
    assert sharing.paying(dataclasses.replace(sweep, refine="exact"), (4096, 8192), 8) == 2
    assert sharing.paying(Recipe("2:4", "true-obs"), (12, 16), 8) == 8
    assert sharing.paying(admm, (2**20, 8192), 8) == 8
    # Scopes of three rows: 9207 are shared out over three devices, and not over two.
    thirds = Recipe(cuobs.Pattern(scope=(3, 4), keep=6), "admm")
    assert [sharing.paying(thirds, (9207, K), 3) for K in (4096, 8192)] == [1, 3]
    assert sharing.paying(admm, (9207, 4096), 3) == 2


def test_a_device_that_does_not_pay_has_no_rows(three, monkeypatch):
    W, H = random_layer(9, 32)
    monkeypatch.setattr(sharing, "WORTH", 2 * 9 * 32**2 / 2)  # what sparsegpt is worth on two
    sizes, solve = [], sharing._solve_part
    monkeypatch.setattr(sharing, "_solve_part", lambda *a: sizes.append(a[-1]) or solve(*a))
    Recipe("2:4", "sparsegpt").run(W, H, three)
    assert sorted(rows.stop - rows.start for rows in sizes) == [4, 5]


@pytest.mark.parametrize(
    "devices, numbers",
    [("all", [0, 1, 2, 3]), ("2", [0, 1]), (3, [0, 1, 2]), ("0,2", [0, 2]), ("3,", [3])],
)
def test_devices_by_number(devices, numbers):
    assert sharing.numbers_of(devices, 4) == numbers
    assert Settings(devices=devices).devices == str(devices)


@pytest.mark.parametrize("devices", ["", "none", "0", "-1", "1,1", "0,-1", "1.5", "all,1", ","])
def test_devices_that_are_none(devices):
    with pytest.raises(ValueError, match="devices: found .*, expected 'all', how many"):
        Settings(devices=devices)


def test_the_cpu_is_no_device():
    """On the command line before anything is read."""
    with pytest.raises(ValueError, match="devices: found '2' on the CPU"):
        cuobs.prune(np.ones((4, 8)), hessian=np.eye(8), device="cpu", devices=2)
    from click.testing import CliRunner

    found = CliRunner().invoke(main, ["prune", "no.npy", "x.npy", "--device", "cpu",
                                      "--devices", "all"])  # fmt: skip
    assert found.exit_code == 2 and "devices: found 'all' on the CPU" in found.output


@pytest.mark.gpu
@pytest.mark.parametrize("method, options", SHARED)
def test_two_gpus_give_what_one_gives(cp, monkeypatch, method, options):
    monkeypatch.setattr(sharing, "WORTH", 0)
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    W, H = random_layer(300, 256)
    keys = {"hessian": H, "method": method, "device": "cuda", **options}
    one, two = cuobs.prune(W, **keys), cuobs.prune(W, devices="2", **keys)
    assert cuobs.verify(two.weight, "2:4") and type(two.weight) is type(one.weight)
    assert (two.mask == one.mask).mean() > 0.99
    assert two.loss == pytest.approx(one.loss, rel=1e-3)
    with cp.cuda.Device(1):
        there = cuobs.prune(cp.asarray(W), devices="all", **{**keys, "hessian": cp.asarray(H)})
    assert there.weight.device.id == 1 and there.loss == pytest.approx(one.loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "true-obs"])
def test_two_threads_on_one_gpu(cp, monkeypatch, method):
    """All but the copies from device to device."""
    W, H = random_layer(96, 256)
    keys = {"hessian": H, "method": method, "device": "cuda"}
    one = cuobs.prune(W, **keys)
    monkeypatch.setattr(sharing, "places", lambda settings: [sharing.Place(0)] * 2)
    monkeypatch.setattr(sharing, "WORTH", 0)
    monkeypatch.setattr(problem, "SHARED_FROM", 64)
    monkeypatch.setattr(factors, "LEAF", 70)
    monkeypatch.setattr(factors, "LEAF_OF_ONE", 70)
    two = cuobs.prune(W, devices="2", **keys)
    assert cuobs.verify(two.weight, "2:4") and (two.mask == one.mask).mean() > 0.97
    assert two.loss == pytest.approx(one.loss, rel=5e-3)


@pytest.mark.gpu
def test_devices_that_are_not_there(cp):
    with pytest.raises(ValueError, match="devices: found '99', expected no more than the"):
        cuobs.prune(np.ones((4, 8)), hessian=np.eye(8), device="cuda", devices=99)
