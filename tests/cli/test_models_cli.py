"""prune-model, eval-model and speedup from the command line."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from cuobs_cli import main, view
from small_models import make_tokens

from cuobs import Recipe, verify
from cuobs.config import load_config
from cuobs.models import Agreement, load_masks, load_model


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
        "--dense-share", "0.25,0.75", "--skip", "*.layers.1.*", "--plot", tmp_path / "loss.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = result.output
    order = ["8 windows of 24 tokens", "memory ", "text, dense: ", "block 1/3", "block 3/3",
             "linears in the blocks", "predicted)", "lost and won", "written "]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "layers.1.mlp.up_proj: left as it is: skipped" in text
    assert "mixed, dense share 0.25 to 0.75, residual share 0.5" in text
    assert len(load_masks(out)) == 14
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    # What was found is said once, at the end; the dense model's alone also before the work.
    (found,) = re.findall(r"tokens.npz:text: perplexity ([\d.]+) dense, ([\d.]+) pruned", text)
    dense, pruned = found
    assert text.count(pruned) == 1 and text.count(dense) == 2
    assert text.count("same likeliest token") == 1
    for folder, expected in ((source, dense), (out, pruned)):
        result = cuobs("eval-model", folder, "--text", f"{tokens_file}:text", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert f"perplexity  {expected}" in result.output
    result = cuobs("eval-model", out, "--text", f"{tokens_file}:text", "--device", "cpu", "--json",
                   "--against", source)  # fmt: skip
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{found['perplexity']:.2f}" == pruned and found["against"]["model"] == str(source)
    near = Agreement(*(found["against"][key] for key in Agreement._fields))
    assert near.text() in text
    tokens = np.load(tokens_file)["text"]
    assert [found["windows"], found["length"]] == list(tokens.shape)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_of_several_processes_says_what_all_find(cuobs, source, rank, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    result = cuobs("prune-model", source, "out", "--calibration", "no.npz:t", "--method", "sparse")
    assert result.exit_code == 2 and bool(result.output) == (rank == 0)


def test_a_dry_run_reads_and_writes_nothing(cuobs, source, tokens_file, tmp_path, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("cuobs.models.checkpoints.loading.load_model", read)
    monkeypatch.setattr("safetensors.safe_open", read)
    command = (
        "prune-model", source, tmp_path / "out", "--calibration", f"{tokens_file}:calibration",
        "--device", "cpu", "--dry-run",
    )  # fmt: skip
    result = cuobs(*command, "--skip", "*.layers.1.*k_proj")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "  self_attn.k_proj  16 x 32  left as it is: skipped" in lines
    assert "  mlp.down_proj     32 x 64  2:4" in lines
    assert "lm_head  left as it is: outside the blocks" in lines
    assert [line for line in lines if line.startswith("model.layers")] == [
        "model.layers.0", "model.layers.1", "model.layers.2",
    ]  # fmt: skip
    assert re.search(
        r"time         (under )?\d+\.\d s a block, (under )?\d+\.\d s for 3, by estimate",
        result.output,
    )
    assert re.search(r"memory       about \d+ MiB on cpu", result.output)
    assert "model.layers.0 to 2" in cuobs(*command).output
    assert not (tmp_path / "out").exists()
    result = cuobs(*command, "--pattern", "3:5", "--skip", "*.k_proj", "--skip", "*.q_proj")
    assert result.exit_code == 2 and result.output.count("does not divide") == 1, result.output
    assert "skipped" in result.output
    result = cuobs(*command, "--skip", "qproj")
    assert result.exit_code == 2 and "skip: found no linear" in result.output


def test_a_config_may_name_single_layers(cuobs, source, tokens_file, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        '[recipe]\nmethod = "wanda"\n[layers]\nskip = ["*.layers.0.*"]\n'
        '"*.down_proj" = {pattern = "4:8", method = "magnitude"}\n'
    )
    command = (
        "prune-model", source, tmp_path / "out", "--calibration", f"{tokens_file}:calibration",
        "--device", "cpu", "--config", tmp_path / "recipe.toml",
    )  # fmt: skip
    result = cuobs(*command)
    assert result.exit_code == 0, result.output
    weights = load_model(tmp_path / "out").state_dict()
    for inner, pattern in (("down_proj", "4:8"), ("up_proj", "2:4")):
        assert verify(weights[f"model.layers.1.mlp.{inner}.weight"], pattern)
        assert not verify(weights[f"model.layers.0.mlp.{inner}.weight"], pattern)
    assert not verify(weights["model.layers.1.mlp.down_proj.weight"], "2:4")
    (tmp_path / "wrong.toml").write_text('[layers]\n"*.w2" = {pattern = "4:8"}\n')
    result = cuobs(*command[:2], tmp_path / "other", *command[3:-1], tmp_path / "wrong.toml")
    assert result.exit_code == 2 and "layers: found no linear whose name '*.w2'" in result.output


def test_resume_shows_what_was_read_back(cuobs, source, tokens_file, tmp_path, monkeypatch):
    command = ("prune-model", source, tmp_path / "out", "--calibration",
               f"{tokens_file}:calibration", "--device", "cpu", "--resume")  # fmt: skip
    with monkeypatch.context() as patch:
        whole = view.View.block

        def interrupted(self, report, blocks):
            whole(self, report, blocks)
            raise KeyboardInterrupt

        patch.setattr(view.View, "block", interrupted)
        result = cuobs(*command)
        assert result.exit_code == 130
        assert "--resume goes on" in result.output
    result = cuobs(*command)
    assert result.exit_code == 0
    assert result.output.count("read back") == 1


@pytest.mark.parametrize(
    "change,match",
    [
        (["--pattern", "3:2"], "pattern: found '3:2'"),
        (["--method", "admn"], "nearest: admm"),
        (["--calibration", "none.txt"], "none.txt: found no such file"),
        (["--dense-share", "a"], "found 'a', expected a number"),
        (["--device", "tpu"], "device: found 'tpu'"),
        (["--plot", "loss.jpg"], "loss.jpg"),
        (["--sequence-length", "25"], "expected at least 25"),
        (["--sequence-length", "0"], "sequence_length: found 0"),
        (["--samples", "0"], "samples: found 0"),
        (["--seed", "-1"], "seed: found -1"),
        (["--shard-size", "big"], "shard_size: found 'big'"),
        (["--host-memory", "much"], "host_memory: found 'much'"),
        (["--host-memory", "1MB"], "host_memory: found"),
        (["--tune", "1", "--tune-rate", "0"], "tune_rate: found 0"),
        (["--batch-tokens", "0"], "batch_tokens: found 0"),
        (["--skip", "*proj"], "no linear that could be pruned (skipped)"),
        (["--eval", "none.txt"], "none.txt: found no such file"),
        (["--attention-mask", "none.npy"], "none.npy: found no such file"),
        (["--skip", "("], "skip: found '('"),
        (["--tune", "-1"], "tune: found -1"),
        (["--dtype", "int8"], "dtype: found 'int8'"),
        (["--splits", "4"], "splits: found 4, but admm takes"),
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
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("change", [
    ["--calibration", "none.txt"], ["--skip", "("], ["--pattern", "3:2"], ["--tune", "-1"],
    ["--schedule", "zz"], ["--samples", "0"], ["--attention-mask", "none.npy"],
])  # fmt: skip
def test_bad_input_is_refused_before_the_model_is_read(
    cuobs, source, tokens_file, tmp_path, monkeypatch, change
):
    def never(src):
        raise AssertionError("the model was read")

    monkeypatch.setattr("cuobs.models.checkpoints.loading.load_model", never)
    options = ["--calibration", f"{tokens_file}:calibration", "--device", "cpu", *change]
    result = cuobs("prune-model", source, tmp_path / "out", *options)
    assert result.exit_code == 2
    for change in (["--text", "none.txt"], ["--text", "a.txt", "--sequence-length", "0"]):
        assert cuobs("eval-model", source, *change).exit_code == 2


def test_bad_input_is_refused_before_the_dense_model_is_evaluated(
    cuobs, source, tokens_file, tmp_path
):
    result = cuobs(
        "prune-model", source, tmp_path / "out", "--calibration", f"{tokens_file}:calibration",
        "--eval", f"{tokens_file}:text", "--damp", "-1", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "damp" in result.output and "perplexity" not in result.output


def test_what_is_said_when_a_run_ends_early(cuobs, source, tokens_file, tmp_path, monkeypatch):
    """Only a run that has begun can go on."""
    command = ("prune-model", source, tmp_path / "out", "--calibration",
               f"{tokens_file}:calibration", "--device", "cpu")  # fmt: skip

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cuobs.models.checkpoints.loading.load_model", interrupt)
        result = cuobs(*command)
        assert result.exit_code == 130 and "--resume" not in result.output

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:  # nothing is left of a run without a finished block
        patch.setattr("cuobs.models.pruning.prune.capture", full)
        result = cuobs(*command)
        assert "No space left" in result.output and "--resume" not in result.output
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(view.View, "block", interrupt)
    result = cuobs(*command)
    assert result.exit_code == 130
    assert f"{tmp_path / 'out'} is not complete; --resume goes on with it." in result.output
    result = cuobs(*command)
    assert result.exit_code == 2
    assert re.fullmatch(r"Error: [^\n]+ found an unfinished run[^\n]+\n", result.output)


def test_an_old_picture_is_not_overwritten(cuobs, source, tokens_file, tmp_path):
    (tmp_path / "loss.png").write_text("mine")
    result = cuobs(
        "prune-model", source, tmp_path / "out", "--calibration", f"{tokens_file}:calibration",
        "--device", "cpu", "--plot", tmp_path / "loss.png",
    )  # fmt: skip
    assert result.exit_code == 2 and "--plot: found" in result.output
    assert "force" not in result.output


def test_nothing_but_the_report_in_a_pipe(source, tokens_file, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from cuobs_cli import main; main()", "prune-model", source,
         tmp_path / "out", "--calibration", f"{tokens_file}:calibration",
         "--eval", f"{tokens_file}:text", "--device", "cpu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    assert done.stdout.endswith(f"written  {tmp_path / 'out'}\n")


def test_quiet_and_json(cuobs, source, tokens_file, tmp_path):
    command = ("prune-model", source, "--calibration", f"{tokens_file}:calibration", "--samples", 4,
               "--method", "wanda", "--device", "cpu")  # fmt: skip
    quiet = cuobs(*command, tmp_path / "quiet", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    shown = cuobs(*command, tmp_path / "json", "--json")
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert found["settings"]["method"] == "wanda" and len(found["blocks"]) == 3


def test_full_device_is_one_sentence(cuobs, source, tokens_file, tmp_path, monkeypatch):
    import torch

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("cuobs.models.pipeline.prune_model", full)
    result = cuobs("prune-model", source, tmp_path / "out", "--calibration",
                   f"{tokens_file}:calibration", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 2
    assert "fewer samples" in result.output and "Traceback" not in result.output


def test_speedup_without_a_device(cuobs):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    result = cuobs("speedup", "64x128")
    assert result.exit_code == 2
    assert "no CUDA device, expected one" in result.output


RECIPE = """
[recipe]
method = "sparsegpt"
pattern = "2:4"
damp = 0.05

[layers]
skip = ["*.layers.0.*"]
"*.down_proj" = {pattern = "4:8", method = "wanda"}

[model]
target = "mixed"
dense_share = [0.25, 0.75]
"""


def test_a_recipe_for_a_model_and_the_one_that_was_used(cuobs, source, tokens_file, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    command = ("--calibration", f"{tokens_file}:calibration", "--device", "cpu")
    first, again = tmp_path / "first", tmp_path / "again"
    result = cuobs("prune-model", source, first, *command, "--config", tmp_path / "recipe.toml",
                   "--residual-share", "0.25", "--damp", "0.1")  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((first / "cuobs_report.json").read_text())
    assert report["settings"]["damp"] == 0.1 and report["settings"]["residual_share"] == [0.25] * 2
    assert report["settings"]["dense_share"] == [0.25, 0.75]
    layers = {row["name"]: row for block in report["blocks"] for row in block["layers"]}
    assert {name for name, row in layers.items() if row["note"]} == {
        name for name in layers if ".layers.0." in name
    }
    model = load_model(first)
    for name in layers:
        weight = model.get_submodule(name).weight.detach().numpy()
        kept = "4:8" if name.endswith("down_proj") else "2:4"
        assert bool(verify(weight, kept)) == (".layers.0." not in name)

    used = first / "cuobs_recipe.toml"
    found = load_config(used)
    assert found.recipe == Recipe("2:4", "sparsegpt", damp=0.1)
    assert found.skip == ("*.layers.0.*",) and found.settings.device == "cpu"
    assert found.layers == {"*.down_proj": {"pattern": "4:8", "method": "wanda"}}
    result = cuobs("prune-model", source, again, *command, "--config", used)
    assert result.exit_code == 0, result.output
    assert (again / "cuobs_recipe.toml").read_bytes() == used.read_bytes()
    for path in first.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("text", "said"), [
    ("[model]\ntargets = 'mixed'", "targets: found an unknown argument, expected one of .*target"),
    ("[model]\ntune = -1", "tune: found -1"),
    ("[model]\nskip = 'q'\n[layers]\nskip = ['*.0.*']", "skip: found q beside the globs"),
    ("[layers]\nskip = ['nothing']", "skip: found no linear whose name 'nothing' fits"),
    ("[layers]\n'*.down' = {damp = 1}", r"layers: found no linear whose name '\*.down' fits"),
])  # fmt: skip
def test_a_recipe_that_does_not_fit_a_model_is_refused(
    cuobs, source, tokens_file, tmp_path, text, said
):
    (tmp_path / "recipe.toml").write_text(text)
    result = cuobs("prune-model", source, tmp_path / "out", "--calibration",
                   f"{tokens_file}:calibration", "--config", tmp_path / "recipe.toml")  # fmt: skip
    assert result.exit_code == 2 and re.search(said, result.stderr), result.output
