"""What rotating a model takes, by shapes alone; refused and said before any work."""

import numpy as np
import pytest
import torch
from small_models import make_model, make_source, make_tokens

from cuobs.arrays import size_text
from cuobs.models import memory, prune_folder, prune_model, rotate, rotate_folder
from cuobs.models.checkpoints import loading
from cuobs.models.recipe import RotationRecipe
from cuobs.models.rotating import rotation_learning
from cuobs.models.rotating.rotation import patterns_of
from cuobs.models.rotating.rotation_prediction import (
    PIECE,
    check_rotation,
    piece_within,
    predict_rotation,
    predict_rotation_host,
    rotation_work,
    settle_rotation,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """What the process holds besides changes between two looks."""
    monkeypatch.setattr(memory, "resident", lambda: 2**29)


@pytest.fixture
def calibration(tmp_path):
    np.savez(tmp_path / "tokens.npz", calibration=make_tokens())
    return f"{tmp_path / 'tokens.npz'}:calibration"


def work_of(model, windows=(8, 24), device=CPU, pattern="2:4", **options):
    recipe = RotationRecipe(**options)
    return rotation_work(model, windows, patterns_of(model, pattern), recipe, device)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma"])
def test_shapes_tell_what_learning_holds(monkeypatch, family):
    found = []

    class Objective(rotation_learning.Objective):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(rotation_learning, "Objective", Objective)
    model = make_model(family, intermediate_size=72)
    skipped = {name: p for name, p in patterns_of(model, "2:4").items() if "1.mlp" not in name}
    for patterns in ("2:4", "1:16", skipped):
        rotate(model, make_tokens(), patterns, steps=1, device="cpu")
        own, work = found.pop(), work_of(model, pattern=patterns)
        assert sorted(work.stacks) == sorted(tuple(s.weight.shape) for s in own.stacks)
        held = sum(M.nbytes for M in (*own.norms, *(h.moments for h in own.heads)))
        assert work.moments == held
        sizes = [A.numel() for A in own.zeros()]
        assert work.generators == (sizes[0], sum(sizes[1:]))


def test_a_model_without_weights_tells_as_much():
    model = make_model("llama")
    work = work_of(model)
    assert work_of(model.to("meta")) == work
    more = work_of(model, (16, 24))
    assert predict_rotation(more, CPU) > predict_rotation(work, CPU)
    assert rotation_work(
        model, (16, 24), patterns_of(model, "2:4"), RotationRecipe(windows=8), CPU
    ) == work  # fmt: skip
    assert len(work_of(model, score="activations", permute=False).columns) == 2


def test_weights_that_do_not_fit_a_device_stay_on_the_host(monkeypatch):
    work = work_of(make_model("llama"), device=GPU)
    size, found = 2 * work.weights, []
    for free in (3 * size, 3 * size - 1):
        monkeypatch.setattr(memory, "free", lambda _, free=free: free)
        found.append((predict_rotation(work, GPU), predict_rotation_host(work, GPU)))
    assert found[1][1] - found[0][1] == size and found[1][0] < found[0][0]


def test_what_there_is_no_room_for_is_refused(monkeypatch):
    work = work_of(make_model("llama"))
    taken = predict_rotation(work, CPU)
    assert settle_rotation(work, CPU, taken) == taken
    with pytest.raises(ValueError, match=r"host_memory: found .*, expected at least .* to rotate"):
        check_rotation(work, CPU, taken - 1)
    monkeypatch.setattr(memory, "free", lambda _: taken - 2**29 - 1)
    with pytest.warns(UserWarning, match=r"rotate: found .* free on the cpu, expected"):
        assert settle_rotation(work, CPU) == taken
    monkeypatch.setattr(memory, "whole", lambda _: predict_rotation(work, CPU, piece=1) - 1)
    with pytest.raises(ValueError, match=r"rotate: found a model that takes .* of the cpu"):
        settle_rotation(work, CPU)


def test_it_is_refused_before_weights_are_read(tmp_path, calibration, monkeypatch):
    source, out = make_source(tmp_path / "source"), tmp_path / "out"

    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "load_model", read)
    options = {"rotate": True, "device": "cpu"}
    for given in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match=r"host_memory: found 2 MiB, expected at least"):
            prune_folder(source, out, calibration, host_memory=2**21, **options, **given)
    monkeypatch.setattr(memory, "whole", lambda _: 2**21)
    for run in (
        lambda: prune_folder(source, out, calibration, **options),
        lambda: rotate_folder(source, out, calibration, device="cpu"),
        lambda: rotate(make_model("llama"), make_tokens(), device="cpu"),
        lambda: prune_model(make_model("llama"), make_tokens(), **options),
    ):
        with pytest.raises(ValueError, match="rotate: found a model that takes"):
            run()
        assert not out.exists()


def test_the_larger_phase_is_what_is_predicted(tmp_path, calibration):
    source = make_source(tmp_path / "source", vocab_size=20000)
    lines, options = [], {"device": "cpu", "method": "magnitude", "target": "pruned"}
    plain = prune_folder(source, tmp_path / "out", calibration, dry_run=True, **options)
    planned = prune_folder(
        source, tmp_path / "out", calibration, dry_run=True, say=lines.append, rotate=True,
        **options,
    )  # fmt: skip
    assert planned.memory_predicted > plain.memory_predicted + 3 * 8 * 16384 * 32 - 2**20
    assert any(line.startswith("rotating ") for line in lines)
    report = prune_folder(
        source, tmp_path / "out", calibration, rotate=True, rotate_steps=1, **options
    )
    assert report.memory_predicted == report.rotation.memory_predicted
    assert report.memory_predicted == pytest.approx(planned.memory_predicted, rel=0.01)
    assert report.memory_peak >= report.rotation.memory_peak


def test_a_folder_is_told_before_and_after(tmp_path, calibration):
    source, lines = make_source(tmp_path / "source"), []
    options = {"steps": 1, "device": "cpu", "say": lines.append}
    report = rotate_folder(source, tmp_path / "out", calibration, **options)
    told = size_text(report.memory_predicted)
    assert f"memory       about {told} on cpu" in lines
    assert any(f"({told} predicted)" in line for line in report.lines())


def test_smaller_pieces_give_the_same_basis(monkeypatch):
    """As many weights are rotated at once as the memory that is free holds."""
    assert piece_within(2**60, 0, CPU) == piece_within(2**60, 0, GPU) == PIECE
    assert piece_within(26 * 1000 + 5, 5, CPU) == 1000 and piece_within(0, 5, GPU) == 1
    reports, options = [], {"steps": 4, "rate": 1e-2, "device": "cpu"}
    reports.append(rotate(make_model("llama"), make_tokens(), **options))
    monkeypatch.setattr(memory, "free", lambda _: 0)
    with pytest.warns(UserWarning, match="smaller pieces"):
        reports.append(rotate(make_model("llama"), make_tokens(), **options))
    assert reports[0].after == pytest.approx(reports[1].after, rel=1e-4)
    assert reports[0].after < reports[0].before
