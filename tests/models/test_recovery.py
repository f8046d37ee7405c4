"""Distillation and windows of the model's own, from folder to folder."""

import json

import numpy as np
import pytest
import torch
from small_models import make_model, make_tokens, weights_of

import cuobs
from cuobs.models import (
    agreement,
    evaluate_folder,
    load_masks,
    load_model,
    memory,
    perplexity,
    pipeline,
    prune_folder,
    write_calibration,
    write_windows,
)
from cuobs.models.distilling import distillation
from cuobs.models.report import read_report
from cuobs.models.structure import find_blocks, linears
from cuobs.models.summary import summary
from cuobs.models.tokens import mixture
from cuobs.models.tokens.mixture import gather, read_given

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def calibration(tmp_path):
    np.save(tmp_path / "tokens.npy", make_tokens(40))
    return str(tmp_path / "tokens.npy")


# What leaves distillation most to do.
WORST = {"method": "magnitude", "target": "pruned"}


class WindowReader:
    """In place of texts and of what a model writes: windows that are told apart."""

    def read(self, spec, samples, length):
        mark = {"a": 1, "b": 2}.get(spec, 3)
        lengths = {"bb.npy": 6}
        return np.full((samples or 9, length or lengths.get(spec, 5)), mark)

    def write(self, windows, length):
        return np.full((windows, length), 7000 + windows)

    def default_length(self):
        return 9


@pytest.mark.parametrize(
    ("calibration", "distillation", "distill", "pruning", "others"),
    [
        (["a"], [], 0, {"a": 4}, {}),
        (["a"], [], 2, {"a": 4}, {}),
        (["a", "b"], [], 2, {"a": 4, "b": 4}, {}),
        (["a", "self:6"], [], 0, {"a": 4, "self:6": 6}, {}),
        (["a", "self:6"], [], 2, {"a": 4}, {"self:6": 6}),
        (["a"], ["self:6"], 2, {"a": 4}, {"self:6": 6}),
        (["a"], ["b"], 2, {"a": 4}, {"b": 9}),
        (["self:6"], [], 2, {"self:6": 4}, {"self:6": 2}),
        (["self"], [], 0, {"self": 4}, {}),
        (["self"], [], 2, {"self": 4}, {"self": 1020}),
        (["self:6"], ["self:5"], 2, {"self:6": 4}, {"self:6": 2, "self:5": 5}),
    ],
)
def test_what_prunes_and_what_distils_alone(calibration, distillation, distill, pruning, others):
    sources = calibration, distillation, WindowReader()
    given, length = read_given(*sources, samples=4)
    found = gather(given, *sources, samples=4, length=length, distill=distill)
    counts = {"self": 4 if not distill else 1024}
    marks = {"a": 1, "b": 2, **{s: 7000 + (counts.get(s) or int(s[5:])) for s in
             ("self", "self:6", "self:5")}}  # fmt: skip
    assert found.pruning[:, 0].tolist() == [marks[s] for s, n in pruning.items() for _ in range(n)]
    expected = found.pruning[:, 0].tolist() + [
        marks[s] for s, n in others.items() for _ in range(n)
    ]
    assert found.distilling[:, 0].tolist() == expected
    twice = bool(others) and not set(pruning) <= {"self", "self:6"}
    assert found.times.tolist() == [2 if twice else 1] * len(found.pruning) + [1] * sum(
        others.values()
    )


def test_windows_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="bb.npy: found windows of 6, expected 5 as of the others"):
        read_given(["a.npy", "bb.npy", "self"], [], WindowReader(), samples=3)
    found, length = read_given(["a.npy", "bb.npy"], [], WindowReader(), samples=3, length=4)
    assert {part.shape for part in found.values()} == {(3, 4)} and length == 4
    # A text can be cut to the length of what is there already.
    found, length = read_given(["text", "bb.npy"], [], WindowReader(), samples=3)
    assert {part.shape for part in found.values()} == {(3, 6)} and length == 6
    assert read_given(["self"], ["self:3"], WindowReader(), samples=3) == ({}, 9)


def test_folder_is_distilled_and_opens_everywhere(source, tmp_path, calibration):
    lines, dst = [], tmp_path / "out"
    report = prune_folder(
        source, dst, [calibration, "self:24"], distill=2, distill_rate=3e-3, evaluate=[calibration],
        save_masks=True, samples=16, device="cpu", say=lines.append, **WORST,
    )  # fmt: skip
    done = report.distillation
    assert done.windows + done.aside == 40 and done.steps == 2 * 7 and done.kept
    assert any("pass 2/2     KL" in line for line in lines)
    told = next(place for place, line in enumerate(lines) if "1 window kept aside" in line)
    assert lines[told + 1].startswith("memory       about ") and len(lines[told]) <= 80
    assert report.whole_seconds > report.seconds + done.seconds
    assert report.whole_peak >= max(report.memory_peak, done.memory_peak)
    assert report.protocol["calibration"] == {calibration: 16, "self:24": 24}
    name = "tokens.npy"
    model, dense = load_model(dst), load_model(source)
    for layer, mask in load_masks(dst).items():
        weight = model.get_submodule(layer).weight
        assert torch.equal(weight != 0, mask) and report.sparsity == 0.5
    near = agreement(model, dense, make_tokens(40))
    assert report.agreement[name] == pytest.approx(near._asdict(), rel=1e-4)
    assert report.perplexity[name][1] < report.perplexity_pruned[name]
    content = json.loads((dst / "cuobs_report.json").read_text())
    assert content["distillation"]["divergence"] == pytest.approx(done.divergence)
    read = read_report(dst)
    assert read.distillation == done and summary(read) == summary(report)
    assert content["agreement"][name]["same_top"] == pytest.approx(near.same_top)
    assert sorted(p.name for p in dst.iterdir() if p.name.startswith((".", "cuobs"))) == [
        "cuobs_masks.safetensors", "cuobs_recipe.toml", "cuobs_report.json",
    ]  # fmt: skip
    alone = tmp_path / "alone"
    prune_folder(source, alone, calibration, samples=16, device="cpu", **WORST)
    assert agreement(load_model(alone), dense, make_tokens(40)).divergence > near.divergence
    found = evaluate_folder(dst, calibration, against=source, device="cpu")
    assert found.agreement == pytest.approx(near, rel=1e-4)
    assert found.perplexity == pytest.approx(report.perplexity[name][1], rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def test_rotated_tuned_and_distilled_in_one_run(source, tmp_path, calibration, device):
    dst = tmp_path / "out"
    report = prune_folder(
        source, dst, calibration, samples=16, tune=1, rotate=True, rotate_steps=8, distill=2,
        distill_rate=3e-3, distill_calibration=["self:24"], evaluate=[calibration],
        save_masks=True, device=device,
    )  # fmt: skip
    assert report.rotation.after < report.rotation.before and report.rotation.deviation < 1e-2
    assert all(block.tuned[1] <= block.tuned[0] for block in report.blocks)
    done = report.distillation
    assert done.divergence[done.kept] == min(done.divergence) <= done.divergence[0]
    model, dense = load_model(dst), load_model(source)
    for layer, mask in load_masks(dst).items():
        weight = model.get_submodule(layer).weight
        assert torch.equal(weight != 0, mask) and cuobs.verify(weight.detach(), "2:4")
    near = agreement(model, dense, make_tokens(40))
    assert report.agreement["tokens.npy"]["divergence"] == pytest.approx(near.divergence, rel=2e-2)
    assert report.perplexity["tokens.npy"][1] == pytest.approx(
        perplexity(model, make_tokens(40)), rel=2e-2
    )


def test_a_run_that_goes_on_gives_the_same_bits(source, tmp_path, calibration, monkeypatch):
    options = {"distill": 2, "distill_rate": 3e-3, "samples": 16, "device": "cpu", **WORST}
    specs = [calibration, "self:24"]
    prune_folder(source, tmp_path / "whole", specs, **options)

    class Stopped(Exception):
        pass

    def stop(label, done, total):
        if label == "distillation" and done == 9:
            raise Stopped

    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0)
    dst = tmp_path / "parts"
    with pytest.raises(Stopped):
        prune_folder(source, dst, specs, progress=stop, **options)
    assert (dst / "cuobs_blocks" / "distillation.safetensors").exists()
    seen = []
    monkeypatch.setattr(mixture, "write_windows", None)  # what was written is there
    prune_folder(
        source, dst, specs, resume=True,
        progress=lambda label, done, total: seen.append((label, done)), **options,
    )  # fmt: skip
    assert [done for label, done in seen if label == "distillation"] == list(range(10, 15))
    whole, parts = (weights_of(load_model(tmp_path / n)) for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_no_text_at_all(source, tmp_path):
    report = prune_folder(
        source, tmp_path / "out", "self:24", distill=1, samples=8, sequence_length=20, device="cpu"
    )
    assert report.protocol["windows"] == 8 and report.protocol["length"] == 20
    assert report.distillation.windows + report.distillation.aside == 24


def test_nothing_compiles_beside_a_model_that_writes(source, tmp_path, monkeypatch):
    # A step that is recorded on a GPU while another thread launches ended the process.
    events = []

    class Compiling:
        def finish(self):
            events.append("compiled")

    def write(*args, **kwargs):
        events.append("writes")
        return write_windows(*args, **kwargs)

    monkeypatch.setattr(pipeline, "_warm", lambda *args: Compiling())
    monkeypatch.setattr(mixture, "write_windows", write)
    prune_folder(source, tmp_path / "out", ["self:4"], sequence_length=8, device="cpu", **WORST)
    assert events[:2] == ["compiled", "writes"]


def test_texts_are_read_before_a_model_writes(source, tmp_path, calibration, monkeypatch):
    monkeypatch.setattr(mixture, "write_windows", lambda *args, **kwargs: pytest.fail("wrote"))
    with pytest.raises(ValueError, match="tokens.npy: found windows of 24 .* at least 64"):
        prune_folder(
            source, tmp_path / "out", "self:4", evaluate=[calibration], device="cpu", **WORST
        )


def test_windows_in_a_file(source, tmp_path):
    path = tmp_path / "own.npz"
    tokens = write_calibration(source, path, 5, 12, device="cpu")
    assert tokens.shape == (5, 12)
    assert (np.load(path)["tokens"] == tokens).all() and tokens[:, 0].min() > 0
    with pytest.raises(FileExistsError):
        write_calibration(source, path, 5, 12, device="cpu")
    report = prune_folder(source, tmp_path / "out", str(path), device="cpu")
    assert report.protocol["windows"] == 5


def test_what_can_be_known_of_windows_is_checked_before_weights_are_read(
    source, tmp_path, calibration, monkeypatch
):
    monkeypatch.setattr(pipeline.loading, "load_model", None)
    for changes, match in (
        ({"temperature": 0}, "temperature: found 0, expected a positive number"),
        ({"windows": 0}, "windows: found 0|samples: found 0"),
        ({"sequence_length": 65}, "^sequence_length: found windows of 65, expected at most 64"),
        ({"seed": -1}, "seed: found -1"),
    ):
        with pytest.raises(ValueError, match=match):
            write_calibration(source, tmp_path / "own.npz", device="cpu", **changes)
    with pytest.raises(ValueError, match="^self:8: tokens: found windows of 65, expected"):
        prune_folder(source, tmp_path / "out", "self:8", sequence_length=65)
    assert not (tmp_path / "out").exists()


def test_bad_arguments(source, tmp_path, calibration):
    for changes, kind, match in (
        ({"calibration": ()}, ValueError, "calibration: found none"),
        ({"calibration": "nothing.txt"}, FileNotFoundError, "nothing.txt: found no such"),
        ({"calibration": "self:0"}, ValueError, "self:0: found 0"),
        ({"distill": -1}, ValueError, "distill: found -1"),
        ({"distill": 1, "distill_rate": 0}, ValueError, "distill_rate: found 0"),
        ({"distill_calibration": "self"}, ValueError, "distill_calibration: found it without"),
    ):
        with pytest.raises(kind, match=match):
            prune_folder(source, tmp_path / "out", **{"calibration": calibration, **changes})
    assert not (tmp_path / "out").exists()


def test_other_models_are_no_measure(source, tmp_path, calibration):
    other = tmp_path / "other"
    make_model("llama", vocab_size=99).save_pretrained(other)
    with pytest.raises(ValueError, match="against: found a vocabulary of 99, expected 97 as of"):
        evaluate_folder(source, calibration, against=other, device="cpu")
    dense = make_model("llama", vocab_size=99)
    with pytest.raises(ValueError, match="dense: found a vocabulary of 99"):
        agreement(load_model(source), dense, make_tokens())


def test_a_model_that_no_device_holds_is_not_distilled(source, tmp_path, calibration, monkeypatch):
    """Before it is pruned: 8 bytes a weight, and 12 for each that learns."""
    model = load_model(source)
    learning = sum(m.weight.numel() for m in linears(find_blocks(model)[1]).values())
    needed = 8 * sum(p.numel() for p in model.parameters()) + 12 * learning
    monkeypatch.setattr(pipeline, "prune_model", None)
    monkeypatch.setattr(memory, "whole", lambda device: needed - 1)
    with pytest.raises(ValueError, match="distill: found a model that takes"):
        prune_folder(source, tmp_path / "out", calibration, distill=1, device="cpu")
    monkeypatch.setattr(memory, "whole", lambda device: needed)
    with pytest.raises(TypeError, match="NoneType"):  # it goes on
        prune_folder(source, tmp_path / "out", calibration, distill=1, device="cpu")
