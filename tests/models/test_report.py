"""The report's forms, and the memory that is predicted."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from small_models import make_model

import cuobs
from cuobs.arrays import size_text
from cuobs.models import BlockReport, ModelReport, RotationReport, prune_model
from cuobs.models.memory import peak, reset, resident, trim
from cuobs.models.pruning.prediction import (
    Work,
    batches_to_hold,
    predict,
    seconds_a_block,
    stages_of,
)
from cuobs.models.summary import outcome, picture, summary, time_text
from cuobs.recipe import _METHODS


@pytest.fixture
def report(tokens):
    return prune_model(make_model("llama"), tokens, skip="*.k_proj", device="cpu")


def test_json_and_back(report):
    content = json.loads(report.to_json())
    for mine, stored in zip(report.blocks, content["blocks"], strict=True):
        assert BlockReport.from_dict(stored) == mine
    assert dataclasses.asdict(report)["settings"]["target"] == content["settings"]["target"]


def test_sparsity_counts_weights(report):
    k, all_weights = 16 * 32, 32 * 32 * 2 + 16 * 32 * 2 + 64 * 32 * 3
    assert report.sparsity == pytest.approx(0.5 * (all_weights - k) / all_weights)


def test_summary(report):
    report.perplexity = {"text": (10.0, 12.5)}
    text = "\n".join([*summary(report), *outcome(report)])
    assert text.count("10.00 dense, 12.50 pruned") == 1
    assert "3 of 21 linears" in text


def test_three_lines_at_the_end(report, tokens):
    report.perplexity, report.perplexity_pruned = {"text": (10.0, 12.5)}, {"text": 20.0}
    report.seconds = 2.04
    lost, cost, following = outcome(report)
    assert "text: perplexity 10.00 dense, 20.00 pruned, 12.50 distilled" in lost
    assert cost.startswith("cost          2.0 s, ")
    assert following.startswith("to try next   --distill")
    report.seconds = 150.0
    assert outcome(report)[1].startswith("cost          2.5 minutes, ")
    report.whole_seconds, report.whole_peak = 190.0, 2**40
    assert outcome(report)[1] == "cost          3.2 minutes, 1024.00 GiB at most"
    options = {"device": "cpu", "method": "sparsegpt", "target": "pruned"}
    lost, _, following = outcome(prune_model(make_model("llama"), tokens, **options))
    assert "not measured" in lost and "--target mixed" in following
    options = {"device": "cpu", "distill": 1, "distill_rate": 100.0}
    harmed = prune_model(make_model("llama"), tokens, **options)
    lost, _, following = outcome(harmed)
    assert "drift" in lost and "lower --distill-rate" in following
    assert "none of it kept" in "\n".join(summary(harmed))


@pytest.mark.parametrize("seconds, text", [
    (0.00279, "under 0.1 s"), (1.04, "1.0 s"), (59.9, "59.9 s"), (150, "2.5 minutes"),
    (9000, "2.5 hours"),
])  # fmt: skip
def test_time(seconds, text):
    assert time_text(seconds) == text


def test_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    picture(report, str(tmp_path / "loss.svg"))
    text = (tmp_path / "loss.svg").read_text()
    assert text.count("PathCollection") == 0 and text.count("<path") > 10
    with pytest.raises(FileExistsError):
        picture(report, str(tmp_path / "loss.svg"))


def test_layers_whose_names_end_alike_are_told_apart(tokens):
    report = prune_model(make_model("gpt2"), tokens, method="wanda", device="cpu")
    assert report.blocks[1].labels() == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_numbers_that_json_does_not_know(report):
    report.perplexity = {"text": (10.0, float("inf"))}
    assert json.loads(report.to_json(), parse_constant=pytest.fail)["perplexity"]["text"] == [
        10.0, None
    ]  # fmt: skip


def test_size():
    assert size_text(3 * 2**20) == "3 MiB"
    assert size_text(1000 * 2**20) == "1000 MiB" and size_text(2**20 - 1) == "1024 KiB"
    assert size_text(5 * 2**29) == "2.50 GiB"


@pytest.fixture
def work():
    """A block of Llama, 64 windows of 1024 tokens, followed in both models."""
    groups = [(32, 64), (32, 32), (32, 128), (64, 32)]
    return Work(
        groups, stages_of(groups, 1024, 32, 4), windows=64, length=1024, width=32, batch=8,
        element=4, block=4 * 10240, model=0, follows=True, mixed=True, method="admm", tune=0,
    )  # fmt: skip


def test_more_windows_need_more_memory(work):
    device = torch.device("cuda", 0)
    few, many = (predict(dataclasses.replace(work, windows=n), device) for n in (64, 128))
    assert many - few == 2 * 64 * 1024 * 32 * 4
    alone = dataclasses.replace(work, follows=False, mixed=False)
    assert predict(alone, device) < few
    assert few < predict(dataclasses.replace(work, tune=8), device)
    assert predict(dataclasses.replace(work, model=10**9), device) - few == 10**9


def test_rows_of_several_processes_need_less_memory(work):
    groups = [(64, 10**5)]
    wide = dataclasses.replace(
        work, groups=groups, stages=stages_of(groups, 1, 32, 4), windows=1, length=1, batch=1
    )
    cpu = torch.device("cpu")
    one, two = (predict(dataclasses.replace(wide, processes=n), cpu) for n in (1, 2))
    assert one - two > 4 * 64 * 10**5


def test_a_method_says_what_a_model_takes(work, monkeypatch):
    admm = cuobs.methods()["admm"]
    monkeypatch.setitem(_METHODS, "own", dataclasses.replace(
        admm, name="own", operations=(7, 180), held=(9, 10)
    ))  # fmt: skip
    own, cpu = dataclasses.replace(work, method="own"), torch.device("cpu")
    groups = [(10**4, 64)]
    work, own = (dataclasses.replace(w, groups=groups, mixed=False) for w in (work, own))
    assert predict(own, cpu) - predict(work, cpu) == 4 * 10**8
    seconds = [seconds_a_block(w, 0, rate=10**12) for w in (work, own)]
    assert seconds[1] - seconds[0] == pytest.approx(1 / 0.4)
    with pytest.raises(ValueError, match="held: found -1, expected a number that is at least 0"):
        dataclasses.replace(admm, held=(1, -1))
    with pytest.raises(TypeError, match="operations: found 3, expected two numbers"):
        dataclasses.replace(admm, operations=3)


def test_what_costs_nothing_leaves_more_to_gain(report):
    report.settings["method"] = "wanda"
    assert outcome(report)[2] == (
        "to try next   --method admm, alternating directions towards mask and weights together"
    )
    report.settings["method"] = "obs-local"
    assert "--method" not in outcome(report)[2]


def test_as_many_batches_wait_as_the_budget_allows(work):
    device = torch.device("cuda", 0)
    all_of_them = predict(work, device, work.batches)
    assert batches_to_hold(work, device, all_of_them) == work.batches == 8
    some = batches_to_hold(work, device, all_of_them - 1)
    assert 0 < some < 8 and predict(work, device, some) < all_of_them
    assert batches_to_hold(work, device, predict(work, device)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figures")
def test_peak_of_one_run_is_not_that_of_the_one_before():
    cpu = torch.device("cpu")
    reset(cpu)
    start = peak(cpu)
    large = torch.ones(50 * 2**20)
    assert peak(cpu) - start > 150 * 2**20
    del large
    trim(cpu)
    reset(cpu)
    assert peak(cpu) - resident() < 50 * 2**20
    assert peak(cpu) - start < 100 * 2**20


def test_there_and_back(report):
    report.rotation = RotationReport(
        "2:4", 1, "activations", False, 0.5, 0.25, 2, 1e-6, 0, 1.0, 2.0, 3
    )
    report.perplexity = {"text": (10.0, float("inf"))}
    found = ModelReport.from_json(report.to_json())
    assert found.blocks == report.blocks and found.rotation == report.rotation
    assert found.perplexity["text"][0] == 10.0 and math.isnan(found.perplexity["text"][1])
    assert summary(found)[:3] == summary(report)[:3]
    more = json.loads(report.to_json()) | {"of_a_later_version": 1}
    assert ModelReport.from_json(json.dumps(more)).settings["method"] == "admm"
