"""Several processes that prune one model, as torchrun starts them; over gloo, on the CPU."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import learn_together
import numpy as np
import pytest
import torch
from cuobs_cli import main
from safetensors.torch import load_file
from small_models import make_model, make_source, make_tokens, prune_all
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cuobs import problem, verify
from cuobs.models import distill, load_model, memory, prune_folder, prune_model, rotate_folder
from cuobs.models import ranks as processes
from cuobs.models.ranks import Ranks, joined
from cuobs.models.structure import linears
from cuobs.ops import factors
from cuobs.recipe import Recipe
from cuobs.sharing import row_counts

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a source and tokens."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "source").mkdir()
    make_source(folder / "source")
    np.savez(folder / "tokens.npz", t=make_tokens(9), text=make_tokens(3, seed=1))
    return folder


def command(place, dst, *options, device="cpu"):
    """Words of `cuobs`."""
    words = ("prune-model", place / "source", dst, "--calibration", f"{place}/tokens.npz:t",
             "--device", device, *options)  # fmt: skip
    return [str(word) for word in words]


def together(folder, function, *args, processes=2):
    """Call a function in forked processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(rank):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        function(*args)

    files = [folder / f"rank{rank}" for rank in range(processes)]
    started = [forks.start(call, rank, said=said) for rank, said in enumerate(files)]
    for process in started:
        process.join(240)
        process.kill()
        process.join()
    out, err = ("".join(Path(f"{said}{end}").read_text() for said in files) for end in ("", ".err"))
    code = max(abs(process.exitcode) for process in started)
    return subprocess.CompletedProcess(args, code, out, err)


def start(processes, *what):
    """A process of torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", *what,
    ]  # fmt: skip
    folders = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": folders,
    }  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def under_torchrun(function):
    """Call a function in two processes that torchrun's agent forks and watches."""
    elastic_launch(
        LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", run_id="tests",
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        ),
        function,
    )()  # fmt: skip


def finished(process):
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def losses(folder):
    report = json.loads((folder / "cuobs_report.json").read_text())
    return [row["loss"] for block in report["blocks"] for row in block["layers"]], report


def test_two_processes_give_what_one_gives(place):
    one = prune_folder(
        place / "source", place / "one", f"{place}/tokens.npz:t", device="cpu",
        evaluate=[f"{place}/tokens.npz:text"],
    )  # fmt: skip
    words = command(place, place / "two", "--eval", f"{place}/tokens.npz:text")
    found = together(place, main, words)
    assert found.returncode == 0, found.stderr
    for said in "block 3/3", "written":  # one speaks for both
        assert found.stdout.count(said) == 1
    mine, report = losses(place / "two")
    assert mine == pytest.approx([row.loss for row in one.layers], rel=1e-3)
    assert report["protocol"]["windows"] == 9
    for name, pair in report["perplexity"].items():
        assert pair == pytest.approx(one.perplexity[name], rel=1e-3)
    dense, pruned = (load_model(place / name).state_dict() for name in ("source", "two"))
    for name, tensor in pruned.items():
        if "proj" in name:
            assert verify(tensor, "2:4")
        else:
            assert torch.equal(tensor, dense[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("counts", [(4, 4), (5, 3), (0, 8)])
def test_rows_are_gathered(tmp_path, dtype, counts):
    whole = (torch.arange(24).reshape(8, 3) % 5).to(dtype)

    def both():
        with joined("cpu") as ranks:
            start = ranks.rank * counts[0]
            found = ranks.gather(whole[start : start + counts[ranks.rank]], counts)
            assert found.dtype == dtype and torch.equal(found, whole)
            square = np.arange(64.0).reshape(8, 8)
            made = ranks.by_rows(lambda rows: square[rows] * 2, 8)
            assert isinstance(made, np.ndarray) and np.array_equal(made, 2 * square)
            assert ranks.least(7 - ranks.rank) == 6

    found = together(tmp_path, both)
    assert found.returncode == 0, found.stderr


def test_large_hessians_are_factored_together(tmp_path, monkeypatch):
    """As one process factors them, in a model whose Hessians are all large."""
    monkeypatch.setattr(problem, "SHARED_FROM", 16)
    monkeypatch.setattr(factors, "LEAF", 16)
    monkeypatch.setattr(factors, "LEAF_OF_ONE", 16)
    made = []

    def prune():
        with joined("cpu") as ranks:
            if ranks.size > 1:
                by_rows = Ranks.by_rows
                monkeypatch.setattr(Ranks, "by_rows", lambda *a: made.append(1) or by_rows(*a))
            report = prune_model(make_model("llama"), make_tokens(9), device="cpu")
            if ranks.size > 1:
                assert made
                np.save(tmp_path / f"{ranks.rank}.npy", [row.loss for row in report.layers])
        return [row.loss for row in report.layers]

    one = prune()
    found = together(tmp_path, prune)
    assert found.returncode == 0, found.stderr
    for rank in "01":
        assert np.load(tmp_path / f"{rank}.npy") == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_two_processes_prune_exactly_as_one(place, method, device):
    """Without the roundings of tensor cores, which decide between masks in so small a model."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    one, two = place / f"{device}-{method}", place / f"{device}s-{method}"
    words = command(place, two, "--method", method, "--dtype", "float64", "--precision", "fp32",
                    device=device)  # fmt: skip
    # CUDA does not outlive a fork, and what has to be imported anew begins at once.
    begun = start(2, "-m", "cuobs", *words) if device == "cuda" else None
    report = prune_folder(
        place / "source", one, f"{place}/tokens.npz:t", device=device, method=method,
        dtype="float64", precision="fp32",
    )  # fmt: skip
    found = finished(begun) if begun else together(place, main, words)
    assert found.returncode == 0, found.stderr
    assert losses(two)[0] == pytest.approx([row.loss for row in report.layers], rel=1e-3)
    models = [load_model(folder).state_dict() for folder in (one, two)]
    for name in (n for n in models[0] if "proj" in n):
        kept = [model[name] != 0 for model in models]
        assert verify(models[1][name], "2:4")
        assert (kept[0] == kept[1]).float().mean() > 0.99, name


def begin_learning(folder, processes, function, path, device):
    """Begin a function of `learn_together` in several processes; gives what ends it."""
    if device == "cpu":
        return lambda: together(folder, function, path, device, processes=processes)
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices")
    # CUDA does not outlive a fork, and what has to be imported anew begins at once.
    begun = start(processes, learn_together.__file__, function.__name__, path, device)
    return lambda: finished(begun)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_processes_learn_what_one_learns(tmp_path, device):
    """Tuning, distillation and rotation: the same steps, gradients added up."""
    begun = begin_learning(tmp_path, 2, learn_together.steps, tmp_path / "two.npz", device)
    learn_together.steps(tmp_path / "one.npz", device)
    found = begun()
    assert found.returncode == 0, found.stderr
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert set(one) == set(two)
        for name in one:
            assert apart(two[name], one[name]) < (1e-4 if device == "cpu" else 1e-2), name
        assert one["errors"][1] < 0.95 * one["errors"][0]
        assert one["divergence"].min() < 0.95 * one["divergence"][0]
        assert one["share"][1] < one["share"][0]


def test_two_processes_rotate_as_one_does(place):
    words = ["rotate", f"{place}/source", f"{place}/rotated", "--steps", "4", "--device", "cpu",
             "--calibration", f"{place}/tokens.npz:t"]  # fmt: skip
    one = rotate_folder(
        place / "source", place / "turned", f"{place}/tokens.npz:t", steps=4, device="cpu"
    )
    found = together(place, main, words)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("written") == 1
    report = json.loads((place / "rotated" / "cuobs_rotation.json").read_text())
    assert report["after"] == pytest.approx(one.after, rel=1e-4) and one.after < one.before
    models = [load_model(place / name).state_dict() for name in ("turned", "rotated")]
    for name, tensor in models[0].items():
        assert (models[1][name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_all_steps_by_two_processes(place):
    """A rotation that is the same but for rounding decides between masks, in a model this small."""
    steps = {"rotate": True, "rotate_steps": 4, "tune": 1, "distill": 1}
    one = prune_folder(
        place / "source", place / "whole", f"{place}/tokens.npz:t", device="cpu", **steps,
        evaluate=[f"{place}/tokens.npz:text"],
    )  # fmt: skip
    words = command(
        place, place / "wholes", "--rotate", "--rotate-steps", 4, "--tune", 1, "--distill", 1,
        "--eval", f"{place}/tokens.npz:text",
    )  # fmt: skip
    found = together(place, main, words)
    assert found.returncode == 0, found.stderr
    mine, report = losses(place / "wholes")
    assert report["rotation"]["after"] == pytest.approx(one.rotation.after, rel=1e-5)
    assert mine == pytest.approx([row.loss for row in one.layers], rel=0.05)
    ((name, (dense, pruned)),) = report["perplexity"].items()
    assert dense == pytest.approx(one.perplexity[name][0], rel=1e-6)
    assert pruned == pytest.approx(one.perplexity[name][1], rel=0.02)
    assert len(report["distillation"]["divergence"]) == 2


def test_what_is_wrong_is_said_once(place):
    found = together(place, main, command(place, place / "bad", "--samples", 1))
    assert found.returncode and found.stderr.count("found 1 windows for 2 processes") == 1


def test_who_is_left_alone_says_so_in_one_sentence(place):
    def run():
        if os.environ["RANK"] == "1":
            Ranks.begin_gather = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        main(command(place, place / "alone"))

    found = together(place, run)
    assert found.stderr.count("found that its 2 processes end, as they do where one has") == 1
    assert "gloo" not in found.stderr and "Traceback" not in found.stderr


def test_who_waits_without_end_is_ended_too(place, monkeypatch):
    """By torchrun's SIGTERM, where it waits for NCCL: in a call that no signal interrupts."""
    monkeypatch.setattr(processes, "GRACE", 0.3)

    def wait_for_ever(ranks, *_):
        waiting = int(ranks.total(os.getpid() if ranks.leads else 0))
        if ranks.leads:
            lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
            lock(mutex)
            lock(mutex)
        time.sleep(0.5)
        os.kill(waiting, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGKILL)

    def run():
        Ranks.begin_gather = wait_for_ever
        main(command(place, place / "waiting"))

    found = together(place, run)
    assert found.returncode == 128 + signal.SIGTERM
    assert found.stderr.count("found that its 2 processes end, as they do where one has") == 1


def test_who_ends_by_itself_when_told_is_let_be(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.3)

    def run():
        handled = []
        signal.signal(signal.SIGTERM, lambda *_: handled.append(True))
        with joined("cpu") as ranks:
            os.kill(os.getpid(), signal.SIGTERM)
            assert ranks.total(1) == 2  # both are there
        time.sleep(0.6)
        assert handled == [True]

    found = together(tmp_path, run)
    assert found.returncode == 0, found.stderr


def test_what_torchrun_ends_says_so_in_one_sentence(place):
    """Not that it was stopped, and not every process."""

    def run():
        Ranks.begin_gather = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5)
        main(command(place, place / "ended"))

    found = together(place, run)
    assert found.stderr.count("found that its 2 processes end, as they do where one has") == 1
    assert "Stopped" not in found.stderr and "Traceback" not in found.stderr


def learn(state=None, on=False, **options):
    """What distilling a small model comes to, and its weights."""
    model = prune_all(make_model("llama"))
    masks = {n: m.weight != 0 for n, m in linears(model).items() if "layers" in n}
    report = distill(
        model, make_model("llama"), masks, make_tokens(18), passes=2, rate=1e-3, resume=on,
        state=state, save_seconds=0.0, **options,
    )  # fmt: skip
    return report, torch.cat([m.weight.detach().flatten() for m in linears(model).values()])


def share_weights_out(monkeypatch):
    """Let a device have no room for all weights of a small model, but for slices of them."""
    size = sum(p.numel() for p in make_model("llama").parameters())
    monkeypatch.setattr(memory, "whole", lambda device: 12 * learning() + 8 * size - 1)


def learning():
    """Weights that learn in a small model."""
    modules = linears(make_model("llama")).items()
    return sum(module.weight.numel() for name, module in modules if "layers" in name)


@pytest.mark.parametrize("sliced", [False, True])
def test_distillation_goes_on_with_another_number_of_processes(tmp_path, monkeypatch, sliced):
    state = tmp_path / "state"

    def two():
        def stop(done, _):
            if done == 3:
                os._exit(0)

        if sliced:
            share_weights_out(monkeypatch)
        with joined("cpu"):
            learn(state, progress=stop)

    whole, weights = learn(state)
    state.unlink()
    assert together(tmp_path, two).returncode == 0
    steps = []
    report, again = learn(state, on=True, progress=lambda done, _: steps.append(done))
    assert steps[0] == 4
    assert report.divergence == pytest.approx(whole.divergence, rel=1e-4)
    assert (again - weights).norm() < 1e-4 * weights.norm()


@pytest.mark.parametrize(
    ("device", "processes"), [("cpu", 3), pytest.param("cuda", 2, marks=pytest.mark.gpu)]
)
def test_processes_learn_in_slices_where_weights_do_not_fit(tmp_path, device, processes):
    """Of three some slices are filled up; of the last step's single window not all have a part."""
    # Gradients of tensor cores are rounded for as many windows as run at once.
    near, nearly = (1e-4, 1e-4) if device == "cpu" else (1e-2, 5e-2)
    begun = begin_learning(tmp_path, processes, learn_together.slices, tmp_path, device)
    learn_together.slices(tmp_path, device)
    found = begun()
    assert found.returncode == 0, found.stderr
    one, *several = (
        dict(np.load(tmp_path / f"{rank}-{size}.npz"))
        for size in (1, processes) for rank in range(size)
    )  # fmt: skip
    assert one["held"] == learning() and one["divergence"].min() < 0.95 * one["divergence"][0]
    for own in several:
        assert 0 <= own["held"] - learning() / processes < 100
        assert own["divergence"] == pytest.approx(one["divergence"], rel=nearly)
        assert own["kept"] == one["kept"] > 0 and own["predicted"] > 0
        assert apart(own["weights"], one["weights"]) < near
        assert np.array_equal(own["weights"], several[0]["weights"])
    whole, gathered = (load_file(tmp_path / f"state-{size}") for size in (1, processes))
    assert set(whole) == set(gathered)
    for name, tensor in whole.items():
        assert apart(gathered[name].numpy(), tensor.numpy()) < nearly, name


def apart(found, expected):
    """‖found − expected‖ / ‖expected‖."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_a_model_that_slices_do_not_fit_either_is_refused(tmp_path, monkeypatch):
    def two():
        monkeypatch.setattr(memory, "whole", lambda device: 1000)
        with joined("cpu"), pytest.raises(ValueError, match="in each of 2 processes, expected "):
            learn()

    assert together(tmp_path, two).returncode == 0
    monkeypatch.setattr(memory, "whole", lambda device: 1000)
    with pytest.raises(ValueError, match="and moments, expected one for the 1000 .*; processes"):
        learn()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_process_ends_all_and_one_goes_on(place):
    dst = place / "killed"

    def prune():
        main(command(place, dst))

    process = forks.start(under_torchrun, prune)
    blocks = dst / "cuobs_blocks"
    until = time.monotonic() + 120
    while not (blocks / "00000.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.01)
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.join(120)
    assert process.exitcode
    report = prune_folder(
        place / "source", dst, f"{place}/tokens.npz:t", device="cpu", resume=True
    )
    assert report.blocks[0].resumed
    if (place / "two").exists():
        assert [r.loss for r in report.layers] == pytest.approx(losses(place / "two")[0], rel=1e-3)


@pytest.mark.parametrize(
    "pattern, rows, size, counts",
    [
        ("2:4", 10, 3, (3, 3, 4)),
        ("block16-row8", 64, 2, (32, 32)),
        ("block16-row8", 48, 2, (16, 32)),
        ("block16-row8", 16, 2, None),
        ("2:4", 1, 2, None),
    ],
)
def test_rows_are_shared_by_whole_scopes(pattern, rows, size, counts):
    assert row_counts(Recipe(pattern, "wanda"), rows, 64, size) == counts


def test_one_process_talks_to_nobody():
    ranks, tensor = Ranks(), torch.ones(3)
    ranks.add_up(tensor)
    assert ranks.leads and ranks.total(2) == 2 and ranks.agree("a") == "a"
    assert list(range(5)[ranks.share]) == [0, 1, 2, 3, 4] and tensor.sum() == 3
    shares = [list(range(8)[Ranks(rank, 3).share]) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 2]
    assert sorted(sum(shares, [])) == list(range(8))
    for rank, share in enumerate(shares):
        assert [Ranks(rank, 3).before(n) for n in share] == list(range(len(share)))
