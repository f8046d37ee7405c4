"""prune-model, eval-model and speedup from the command line."""

import re

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import make_tokens

from cuobs.cli import main
from cuobs.models import load_masks


@pytest.fixture
def cuobs():
    return lambda *args: CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def tokens_file(tmp_path):
    np.savez(tmp_path / "tokens.npz", calibration=make_tokens(16), text=make_tokens(4, seed=1))
    return tmp_path / "tokens.npz"


def test_prune_and_eval(cuobs, source, tokens_file, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    result = cuobs(
        "prune-model", source, out, "--calibration", f"{tokens_file}:calibration", "--samples", 8,
        "--eval", f"{tokens_file}:text", "--masks", "--device", "cpu", "--method", "sparsegpt",
        "--dense-share", "0.25,0.75", "--skip", "layers.1.", "--plot", tmp_path / "loss.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = result.output
    order = ["8 windows of 24 tokens", "text, dense: ", "memory ", "block 1/3", "block 3/3",
             "text, pruned: ", "peak memory"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "layers.1.mlp.up_proj: left as it is: skipped" in text
    assert "mixed, dense share 0.25 to 0.75, residual share 0.5" in text
    assert len(load_masks(out)) == 14
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    dense, pruned = (
        re.search(rf"text, {stage}: ([\d.]+)", text)[1] for stage in ("dense", "pruned")
    )
    for folder, expected in ((source, dense), (out, pruned)):
        result = cuobs("eval-model", folder, "--text", f"{tokens_file}:text", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert f"perplexity  {expected}" in result.output


def test_resume_shows_what_was_read_back(cuobs, source, tokens_file, tmp_path, monkeypatch):
    command = ("prune-model", source, tmp_path / "out", "--calibration",
               f"{tokens_file}:calibration", "--device", "cpu", "--resume")  # fmt: skip
    from cuobs.cli import models

    with monkeypatch.context() as patch:
        whole = models._View.block

        def interrupted(self, report, blocks):
            whole(self, report, blocks)
            raise KeyboardInterrupt

        patch.setattr(models._View, "block", interrupted)
        result = cuobs(*command)
        assert result.exit_code == 130
    result = cuobs(*command)
    assert result.exit_code == 0
    assert result.output.count("read back") == 1


@pytest.mark.parametrize(
    "change,match",
    [
        (["--pattern", "3:2"], "pattern"),
        (["--method", "admn"], "nearest: admm"),
        (["--calibration", "none.txt"], "none.txt: found no such file"),
        (["--dense-share", "a"], "found 'a', expected a number"),
        (["--device", "tpu"], "device: found 'tpu'"),
        (["--plot", "loss.jpg"], "loss.jpg"),
        (["--sequence-length", "25"], "expected at least 25"),
    ],
)
def test_bad_input(cuobs, source, tokens_file, tmp_path, change, match):
    options = {"--calibration": f"{tokens_file}:calibration", "--device": "cpu"}
    options |= dict(zip(change[::2], change[1::2], strict=True))
    flat = [part for pair in options.items() for part in pair]
    result = cuobs("prune-model", source, tmp_path / "out", *flat)
    assert result.exit_code == 2
    assert match in result.output
    assert "Traceback" not in result.output


def test_speedup_without_a_device(cuobs):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    result = cuobs("speedup", "64x128")
    assert result.exit_code == 2
    assert "sees no CUDA device" in result.output
