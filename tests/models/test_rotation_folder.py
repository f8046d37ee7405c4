"""A folder in another basis: plain, of the same function, opened by transformers alone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_model, make_source, make_tokens, same

import cuobs
from cuobs.models import load_model, perplexity, prune_folder, rotate_folder
from cuobs.models.report import ModelReport
from cuobs.models.summary import summary


@pytest.fixture
def calibration(tmp_path):
    np.savez(tmp_path / "tokens.npz", calibration=make_tokens())
    return f"{tmp_path / 'tokens.npz'}:calibration"


def open_plainly(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(make_tokens(3, seed=5))).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_the_folder_opens_in_plain_transformers(tmp_path, calibration, family, tied):
    src = make_source(tmp_path / "src", family, tie_word_embeddings=tied)
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    report = rotate_folder(src, tmp_path / "dst", calibration, steps=8, rate=1e-2, permute=True)
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before
    dense, rotated = open_plainly(src), open_plainly(tmp_path / "dst")
    assert torch.allclose(logits(rotated), logits(dense), atol=1e-4 * float(logits(dense).max()))
    head, embedding = rotated.get_output_embeddings(), rotated.get_input_embeddings()
    assert head.weight.data_ptr() != embedding.weight.data_ptr()
    assert report.untied == (head.weight.nbytes if tied else 0)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    written = json.loads((tmp_path / "dst" / "cuobs_rotation.json").read_text())
    assert written["after"] == report.after < report.before
    assert (tmp_path / "dst" / "LICENSE.txt").exists()
    assert (tmp_path / "dst" / "tokenizer.json").exists()


def test_what_is_compared_is_what_is_written(tmp_path, calibration):
    """Written in half precision, the folder differs by more than the model in memory did."""
    src = make_source(tmp_path / "src", "llama")
    report = rotate_folder(src, tmp_path / "dst", calibration, steps=2, save_dtype="bfloat16")
    rotated, dense = open_plainly(tmp_path / "dst"), open_plainly(src)
    assert rotated.dtype == torch.bfloat16
    tokens = torch.from_numpy(make_tokens())[:1]
    with torch.no_grad():
        found, expected = (m(input_ids=tokens).logits.float() for m in (rotated, dense))
    assert report.deviation == pytest.approx(
        float((found - expected).norm() / expected.norm()), rel=1e-3
    )
    assert 1e-3 < report.deviation < 0.1


def test_what_is_compared_has_the_dtypes_of_what_is_written(tmp_path, calibration):
    """Where some weights are held in more digits than they are written in."""
    model = make_model("llama").bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path / "src")
    report = rotate_folder(tmp_path / "src", tmp_path / "dst", calibration, steps=2)
    rotated, dense = load_model(tmp_path / "dst"), load_model(tmp_path / "src")
    assert rotated.dtype == dense.dtype == torch.float32
    tokens = torch.from_numpy(make_tokens())[:1]
    with torch.no_grad():
        found, expected = (m(input_ids=tokens).logits for m in (rotated, dense))
    assert report.deviation == pytest.approx(
        float((found - expected).norm() / expected.norm()), rel=1e-3
    )
    assert 1e-3 < report.deviation < 0.1


def test_a_folder_that_does_not_fold_leaves_nothing(tmp_path, calibration):
    src = make_source(tmp_path / "src", "gpt2")
    with pytest.raises(ValueError, match="LayerNorm"):
        rotate_folder(src, tmp_path / "dst", calibration)
    assert not (tmp_path / "dst").exists()


def test_tensors_that_would_stay_in_the_old_basis_are_refused(tmp_path, calibration):
    src = make_source(tmp_path / "src", "llama")
    path = min(src.glob("*.safetensors"))
    tensors = load_file(path)
    index = json.loads((src / "model.safetensors.index.json").read_text())

    def add(name):
        save_file({**tensors, name: torch.ones(32)}, path, {"format": "pt"})
        weight_map = {**index["weight_map"], name: path.name}
        content = {**index, "weight_map": weight_map}
        (src / "model.safetensors.index.json").write_text(json.dumps(content))

    add("model.rotary_emb.inv_freq")
    rotate_folder(src, tmp_path / "old", calibration, steps=0)
    add("model.mtp.norm.weight")
    with pytest.raises(ValueError, match=r"1 tensors of .* model.mtp.norm.weight among them"):
        rotate_folder(src, tmp_path / "dst", calibration, steps=0)


def test_command_line(tmp_path, calibration):
    from click.testing import CliRunner
    from cuobs_cli import main

    src = make_source(tmp_path / "src", "llama", tie_word_embeddings=True)
    arguments = ["rotate", str(src), str(tmp_path / "dst"), "--calibration", calibration]
    result = CliRunner().invoke(main, [*arguments, "--steps", "3", "--pattern", "4:8"])
    assert result.exit_code == 0, result.output
    for text in ("the values of 6 heads, for 4:8", "of the score before", "head of its own  adds"):
        assert text in result.output
    assert logits(open_plainly(tmp_path / "dst")).shape == (3, 24, 97)
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2 and "expected a new or empty folder" in again.output
    pruned = ["prune-model", str(src), str(tmp_path / "pruned"), *arguments[3:], "--rotate"]
    pruned += ["--rotate-steps", "2", "--rotate-score", "activations", "--no-rotate-permute"]
    result = CliRunner().invoke(main, [*pruned, "--method", "wanda"])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "pruned" / "cuobs_report.json").read_text())["rotation"]
    assert not written["permuted"] and written["score"] == "activations"
    written = json.loads((tmp_path / "dst" / "cuobs_rotation.json").read_text())
    assert written["permuted"] and written["score"] == "compensated"
    lines = ("rotation     2 steps; a tied head is untied", "rotated      0.", "head of its own  ")
    assert all(line in result.output for line in lines)
    make_source(tmp_path / "other", "opt")
    arguments[1:3] = [str(tmp_path / "other"), str(tmp_path / "third")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and "takes the mean away (LayerNorm)" in refused.output


def test_pruning_begins_with_it(tmp_path, calibration):
    src = make_source(tmp_path / "src", "llama", tie_word_embeddings=True)
    found = {}
    for name, options in {"plain": {}, "rotated": {"rotate": True, "rotate_steps": 10}}.items():
        report = prune_folder(
            src, tmp_path / name, calibration, method="magnitude", target="pruned", device="cpu",
            evaluate=[calibration], **options,
        )  # fmt: skip
        found[name] = report
    assert found["plain"].rotation is None
    rotation = found["rotated"].rotation
    assert rotation.after < rotation.before and rotation.heads == 6
    assert rotation.untied == 97 * 32 * 4
    assert found["rotated"].sparsity == 0.5
    before, after = found["rotated"].perplexity.popitem()[1]
    assert before == found["plain"].perplexity.popitem()[1][0]  # that of the source, as it is
    written = json.loads((tmp_path / "rotated" / "cuobs_report.json").read_text())
    assert written["rotation"]["untied"] == rotation.untied
    again = ModelReport.from_json((tmp_path / "rotated" / "cuobs_report.json").read_text())
    assert again.rotation == rotation
    assert written["settings"]["rotate"] and written["settings"]["rotate_steps"] == 10
    card = (tmp_path / "rotated" / "README.md").read_text()
    assert "| rotated | before it was pruned; a head of its own adds 12.1 KiB |" in card
    lines = "\n".join(summary(found["rotated"]))
    assert "pruned share" in lines and "head of its own" in lines
    model = open_plainly(tmp_path / "rotated")
    assert perplexity(model, make_tokens()) == pytest.approx(after, rel=1e-6)
    assert cuobs.verify(model.model.layers[1].mlp.down_proj.weight.detach(), "2:4")


@pytest.mark.parametrize("stop", [0, 2])
def test_an_unfinished_run_goes_on_with_its_rotation(tmp_path, calibration, stop):
    src = make_source(tmp_path / "src", "qwen2")
    learned = []

    def run(name, **options):
        return prune_folder(
            src, tmp_path / name, calibration, device="cpu", rotate=True, rotate_steps=4,
            progress=lambda label, *step: label == "rotation" and learned.append(step), **options,
        )  # fmt: skip

    def stopping(report, blocks):
        if len(report.blocks) == max(1, stop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("stopped", on_block=stopping)
    kept = tmp_path / "stopped" / "cuobs_blocks" / "rotation.safetensors"
    assert kept.exists() and len(learned) == 4
    if stop == 0:
        for path in kept.parent.glob("0*"):
            path.unlink()
    first = run("whole")
    learned.clear()
    again = run("stopped", resume=True)
    assert not learned and not kept.exists()
    assert again.rotation.after == first.rotation.after
    names = {path.name for path in (tmp_path / "whole").glob("*.safetensors")}
    assert names == {path.name for path in (tmp_path / "stopped").glob("*.safetensors")}
    for name in names:
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "stopped"))
        assert same(whole, resumed)
    with pytest.raises(FileExistsError):
        run("whole")


def test_other_settings_of_the_rotation_are_another_run(tmp_path, calibration):
    src = make_source(tmp_path / "src", "llama")

    def stopping(report, blocks):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_folder(src, tmp_path / "dst", calibration, device="cpu", rotate=True, rotate_steps=2,
                     on_block=stopping)  # fmt: skip
    for changes in ({"rotate": False}, {"rotate_steps": 3}, {"rotate_permute": False}):
        with pytest.raises(ValueError, match=rf"resume: found {min(changes)}="):
            prune_folder(src, tmp_path / "dst", calibration, device="cpu", resume=True,
                         **{"rotate": True, "rotate_steps": 2, **changes})  # fmt: skip


def test_pruning_refuses_before_any_work(tmp_path, calibration):
    src = make_source(tmp_path / "src", "gemma2")
    with pytest.raises(ValueError, match="between self_attn.o_proj and the residual stream"):
        prune_folder(src, tmp_path / "dst", calibration, device="cpu", rotate=True,
                     starting=lambda report: pytest.fail("it has begun"))  # fmt: skip
    assert not (tmp_path / "dst").exists()
    for arguments in ({"rotate_steps": -1}, {"rotate_score": "size"}):
        with pytest.raises(ValueError, match=f"{min(arguments)}: found"):
            prune_folder(src, tmp_path / "dst", calibration, rotate=True, **arguments)
    with pytest.raises(TypeError, match="rotate: found 'yes', expected true or false"):
        prune_folder(src, tmp_path / "dst", calibration, rotate="yes")
