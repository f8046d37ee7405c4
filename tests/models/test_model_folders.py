"""From folder to folder: what is kept, what is safe, what goes on."""

import hashlib
import json
import os
import resource
import signal
import time
from functools import partial

import forks
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import make_model, make_source, make_tokens

import cuobs
from cuobs.models import (
    agreement,
    load_masks,
    load_model,
    load_tokens,
    perplexity,
    pipeline,
    prune_folder,
    prune_model,
)
from cuobs.models.checkpoints import loading
from cuobs.models.checkpoints.source import BLOCKS, MARKER
from cuobs.models.structure import linears, oriented


@pytest.fixture
def calibration(tmp_path):
    """A file of calibration windows."""
    np.savez(tmp_path / "tokens.npz", windows=make_tokens(16), text=make_tokens(4, seed=1))
    return f"{tmp_path / 'tokens.npz'}:windows"


def contents(folder):
    """The bytes of each file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_in(folder):
    """All tensors of the safetensors of a folder."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def test_folder_opens_everywhere_and_is_pruned(source, tmp_path, calibration):
    before = contents(source)
    lines = []
    report = prune_folder(
        source, tmp_path / "out", calibration, device="cpu", shard_size="20KB", save_masks=True,
        evaluate=[calibration.replace("windows", "text")], say=lines.append,
    )  # fmt: skip
    out = tmp_path / "out"
    assert contents(source) == before
    assert not (out / MARKER).exists() and not (out / BLOCKS).exists()
    names = {path.name for path in out.iterdir()}
    assert len([n for n in names if n.startswith("model-")]) > 2
    assert "model.safetensors.index.json" in names
    for name in before:
        if not name.startswith("model"):
            assert (out / name).read_bytes() == (source / name).read_bytes(), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and "sparsity_config" not in config
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    dense = transformers.AutoModelForCausalLM.from_pretrained(source)
    masks = load_masks(out)
    assert set(masks) == {row.name for row in report.layers}
    for row in report.layers:
        weight = model.get_submodule(row.name).weight.data
        assert cuobs.verify(weight, "2:4")
        assert not weight[~masks[row.name]].any()
    ids = make_tokens(4, seed=1)
    pair = report.perplexity["tokens.npz:text"]
    assert pair == (pytest.approx(perplexity(dense, ids)), pytest.approx(perplexity(model, ids)))
    assert any("16 windows of 24 tokens" in line for line in lines)
    assert lines.index(f"perplexity, tokens.npz:text, dense: {pair[0]:.2f}") < len(lines) - 1

    stored = json.loads((out / "cuobs_report.json").read_text())
    assert stored["settings"]["method"] == "admm"
    assert stored["protocol"]["windows"] == 16
    assert stored["blocks"][2]["layers"][6]["loss"] == report.layers[-1].loss
    assert stored["perplexity"]["tokens.npz:text"] == list(pair)


def test_same_as_in_memory(source, tmp_path, calibration):
    prune_folder(source, tmp_path / "out", calibration, device="cpu")
    model = load_model(source)
    prune_model(model, make_tokens(16), device="cpu")
    written = weights_in(tmp_path / "out")
    assert written.keys() == weights_in(source).keys()
    for name, tensor in written.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt"])
def test_other_families(family, tmp_path, calibration):
    source = make_source(tmp_path / "source", family)
    report = prune_folder(source, tmp_path / "out", calibration, device="cpu")
    model = load_model(tmp_path / "out")
    for row in report.layers:
        assert cuobs.verify(oriented(model.get_submodule(row.name)).contiguous(), "2:4")


def test_tied_embeddings_are_written_once(tmp_path, calibration):
    source = make_source(tmp_path / "source", tie_word_embeddings=True)
    prune_folder(source, tmp_path / "out", calibration, device="cpu")
    assert "lm_head.weight" not in weights_in(tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, load_model(source).lm_head.weight)


def test_bfloat16_is_kept(tmp_path, calibration):
    source = tmp_path / "source"
    make_model("qwen2").bfloat16().save_pretrained(source)
    prune_folder(source, tmp_path / "out", calibration, device="cpu")
    assert {t.dtype for t in weights_in(tmp_path / "out").values()} == {torch.bfloat16}
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("named, held", [("float16", "float32"), ("float32", "bfloat16")])
def test_the_weights_dtype_is_kept_whatever_the_config_names(tmp_path, calibration, named, held):
    source = tmp_path / "source"
    make_model("qwen2").to(getattr(torch, held)).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = named
    (source / "config.json").write_text(json.dumps(config))
    prune_folder(source, tmp_path / "out", calibration, device="cpu", method="wanda")
    assert {t.dtype for t in weights_in(tmp_path / "out").values()} == {getattr(torch, held)}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_weights_of_several_dtypes_lose_no_digits(tmp_path, calibration):
    source = tmp_path / "source"
    model = make_model("qwen2").bfloat16()
    model.model.norm.float()
    model.model.norm.weight.data += 1e-5
    model.save_pretrained(source)
    prune_folder(source, tmp_path / "out", calibration, device="cpu", method="wanda")
    written = weights_in(tmp_path / "out")["model.norm.weight"]
    assert torch.equal(written, model.model.norm.weight.data)


def test_masks_of_an_earlier_run_are_left_out_and_named(source, calibration, tmp_path):
    options = {"device": "cpu", "method": "magnitude", "target": "pruned"}
    prune_folder(source, tmp_path / "once", calibration, save_masks=True, **options)
    for masks, folder in ((False, tmp_path / "plain"), (True, tmp_path / "masks")):
        lines = []
        prune_folder(tmp_path / "once", folder, calibration, pattern="1:4", save_masks=masks,
                     say=lines.append, **options)  # fmt: skip
        assert "left out     cuobs_masks.safetensors: the masks of an earlier run" in lines
        assert not any("carried over" in line for line in lines)
        assert (folder / "cuobs_masks.safetensors").exists() == masks


def test_text_is_tokenised_and_drawn(source, tmp_path):
    words = np.random.default_rng(0).integers(3, 97, 1000)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    lines = []
    prune_folder(
        source, tmp_path / "out", tmp_path / "text.txt", samples=10, sequence_length=32, seed=3,
        device="cpu", say=lines.append,
    )  # fmt: skip
    assert any("10 windows of 32 tokens, drawn with seed 3" in line for line in lines)
    lines.clear()
    prune_folder(
        source, tmp_path / "all", tmp_path / "text.txt", sequence_length=32, device="cpu",
        method="wanda", say=lines.append,
    )  # fmt: skip
    assert lines[0].endswith(" all 31 windows of 32 tokens")
    chosen = np.sort(np.random.default_rng(3).choice(1000 // 32, 10, replace=False))
    model = load_model(source)
    prune_model(model, words[: 31 * 32].reshape(31, 32)[chosen], device="cpu")
    written = weights_in(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in written.items())


def test_padded_calibration(source, tmp_path, calibration):
    mask = np.ones((16, 24), bool)
    mask[::2, :5] = False
    np.save(tmp_path / "mask.npy", mask)
    prune_folder(
        source, tmp_path / "out", calibration, attention_mask=str(tmp_path / "mask.npy"),
        device="cpu",
    )  # fmt: skip
    model = load_model(source)
    prune_model(model, make_tokens(16), attention_mask=mask, device="cpu")
    written = weights_in(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in written.items())


def test_what_is_measured_is_what_is_written(source, calibration, tmp_path):
    """In another dtype too: a model that is read has the frequencies of its positions in float32,
    which a cast of the whole model rounds."""
    report = prune_folder(
        source, tmp_path / "out", calibration, save_dtype="bfloat16", evaluate=[calibration],
        method="wanda", device="cpu",
    )  # fmt: skip
    model = load_model(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    found = perplexity(model, load_tokens(calibration))
    assert report.perplexity[os.path.basename(calibration)][1] == found
    cast = model.to(torch.bfloat16)
    assert perplexity(cast, load_tokens(calibration)) != found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_goes_on_and_gives_the_same_bits(tmp_path, calibration, how):
    source = make_source(tmp_path / "source", num_hidden_layers=6)
    arguments = {"device": "cpu", "method": "sparsegpt", "tune": 4, "shard_size": "20KB",
                 "save_masks": True}  # fmt: skip
    prune_folder(source, tmp_path / "whole", calibration, **arguments)
    out = tmp_path / "out"
    ended, end = os.pipe()
    child = forks.start(
        lambda: prune_folder(
            source, out, calibration, resume=True, **arguments,
            on_block=lambda report, blocks: os.write(end, b"."),
        )
    )  # fmt: skip
    os.close(end)
    for _ in range(2):
        assert os.read(ended, 1), "the run ended before its second block"
    time.sleep(0.05)  # into the third block
    os.kill(child.pid, how)
    child.join()
    os.close(ended)
    assert child.exitcode

    assert (out / MARKER).exists() and not (out / "config.json").exists()
    finished = sorted(p.name for p in (out / BLOCKS).iterdir() if p.suffix == ".safetensors")
    assert finished[:2] == ["00000.safetensors", "00001.safetensors"] and len(finished) < 6
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(ValueError, match="not complete"):
        load_model(out)
    with pytest.raises(FileExistsError, match="unfinished run"):
        prune_folder(source, out, calibration, **arguments)
    with pytest.raises(ValueError, match="resume: found damp=0.02, expected 0.01"):
        prune_folder(source, out, calibration, resume=True, damp=0.02, **arguments)

    report = prune_folder(source, out, calibration, resume=True, **arguments)
    assert [b.resumed for b in report.blocks].count(True) == len(finished)
    whole, mine = contents(tmp_path / "whole"), contents(out)
    assert whole.keys() == mine.keys()
    assert {n for n in whole if whole[n] != mine[n]} == {"cuobs_report.json"}


def test_stopped_before_the_last_file_is_in_place(source, tmp_path, calibration, monkeypatch):
    """A run that ends while the model is being written goes on from its blocks."""
    prune_folder(source, tmp_path / "whole", calibration, device="cpu", shard_size="20KB")
    out, moved = tmp_path / "out", []
    replace = os.replace

    def failing(a, b):
        if os.path.dirname(b) == str(out) and len(moved) == 2 and "model-" in str(b):
            raise OSError(28, "No space left on device", b)
        moved.extend([b] if os.path.dirname(b) == str(out) and "model-" in str(b) else [])
        return replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="No space left"):
            prune_folder(source, out, calibration, device="cpu", shard_size="20KB")
    assert (out / MARKER).exists() and not (out / "config.json").exists()
    report = prune_folder(source, out, calibration, device="cpu", shard_size="20KB", resume=True)
    assert all(block.resumed for block in report.blocks)
    whole, mine = contents(tmp_path / "whole"), contents(out)
    assert {n for n in whole if whole[n] != mine.get(n)} == {"cuobs_report.json"}


@pytest.mark.parametrize("when", ["block", "weights"])
def test_full_disk_loses_one_block_at_most(source, tmp_path, calibration, when):
    """A limit on the size of files stands for a disk that has no room for one more."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = {"device": "cpu", "method": "sparsegpt"}
    prune_folder(source, tmp_path / "whole", calibration, **arguments)

    def fill(report, blocks):
        if len(report.blocks) == (1 if when == "block" else blocks):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    out = tmp_path / "out"
    try:
        with pytest.raises(OSError, match="can't be written"):
            prune_folder(source, out, calibration, on_block=fill, **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / MARKER).exists() and not (out / "config.json").exists()
    report = prune_folder(source, out, calibration, resume=True, **arguments)
    resumed = [block.resumed for block in report.blocks]
    assert resumed == ([True, False, False] if when == "block" else [True] * 3)
    whole, mine = contents(tmp_path / "whole"), contents(out)
    assert whole.keys() == mine.keys()
    assert {n for n in whole if whole[n] != mine[n]} == {"cuobs_report.json"}


def test_shards_of_an_earlier_size_are_gone(source, tmp_path, calibration, monkeypatch):
    out, replace = tmp_path / "out", os.replace

    def failing(a, b):
        if str(b) == str(out / "config.json"):
            raise OSError(28, "No space left on device", b)
        return replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="No space left"):
            prune_folder(source, out, calibration, device="cpu", shard_size="20KB")
    (out / ".cuobs_report.json.0123.tmp").write_text("{")
    (out / "notes.txt").write_text("mine")
    prune_folder(source, out, calibration, device="cpu", shard_size="1GB", resume=True)
    names = {path.name for path in out.iterdir()}
    assert {n for n in names if n.startswith(("model", "."))} == {"model.safetensors"}
    assert "notes.txt" in names


def test_what_a_kill_left_of_a_file_is_no_obstacle(source, tmp_path, calibration):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{MARKER}.0123.tmp").write_text("{")
    prune_folder(source, tmp_path / "out", calibration, device="cpu", method="wanda")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_resume_refuses_another_norm(source, tmp_path, calibration):
    """Not only the linears of a block decide its result."""
    def stop(report, blocks):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", on_block=stop)
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)
    model.save_pretrained(source, max_shard_size="20KB")
    with pytest.raises(ValueError, match="resume: found another model than the run began with"):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", resume=True)


def stop(report, blocks):
    """End a run after its first block."""
    raise KeyboardInterrupt


def embed(model):
    model.model.embed_tokens.weight.data[5] += 1


def config(**changes):
    def change(model):
        for name, value in changes.items():
            setattr(model.config, name, value)

    return change


@pytest.mark.parametrize("change", [
    embed,
    lambda model: model.model.norm.weight.data.mul_(2),
    lambda model: model.lm_head.weight.data.mul_(2),
    lambda model: model.model.layers[-1].mlp.up_proj.weight.data.mul_(2),  # not pruned yet
    config(rms_norm_eps=1e-2),
    config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    config(hidden_act="gelu"),
])  # fmt: skip
def test_resume_refuses_another_model(source, tmp_path, calibration, change):
    """All that results depend on is looked at, not the blocks' weights alone."""
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", on_block=stop)
    model = load_model(source)
    change(model)
    other = make_source(tmp_path / "other")
    model.save_pretrained(other, max_shard_size="20KB")
    with pytest.raises(ValueError, match="resume: found another model than the run began with"):
        prune_folder(other, tmp_path / "out", calibration, device="cpu", resume=True)


def test_resume_takes_what_changes_no_result(source, tmp_path, calibration):
    """How much at once and by how many threads: what a full memory makes one change."""
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", on_block=stop)
    report = prune_folder(
        source, tmp_path / "out", calibration, device="cpu", resume=True, workers=1,
        memory_limit="1GiB", batch_tokens=48, shard_size="1MB", save_dtype="float16",
    )  # fmt: skip
    assert [block.resumed for block in report.blocks] == [True, False, False]


def test_resume_of_nothing_is_said(source, tmp_path, calibration):
    lines = []
    prune_folder(
        source, tmp_path / "out", calibration, device="cpu", resume=True, method="wanda",
        say=lines.append,
    )  # fmt: skip
    assert any("found no unfinished run" in line and "a new one begins" in line for line in lines)


@pytest.mark.parametrize("left", [(), ("00000.safetensors",)])
def test_killed_after_all_is_in_place(source, tmp_path, calibration, left):
    """Then only what the run needed is left, and goes when the folder is looked at again."""
    out = tmp_path / "out"
    prune_folder(source, out, calibration, device="cpu", method="wanda")
    whole = contents(out)
    (out / MARKER).write_text("{}")
    (out / BLOCKS).mkdir()
    for name in left:
        (out / BLOCKS / name).write_bytes(b"x")
    for resume in (True, False):
        with pytest.raises(FileExistsError, match="found a finished model"):
            prune_folder(source, out, calibration, device="cpu", resume=resume)
        assert contents(out) == whole


def test_the_marker_goes_after_the_blocks(source, tmp_path, calibration, monkeypatch):
    """A kill at any moment of the end leaves a run that goes on or a model without remains."""
    seen, unlink = [], os.unlink

    def watched(path, *args, **kwargs):
        if str(path).endswith(MARKER):
            seen.append((tmp_path / "out" / BLOCKS).exists())
        return unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", watched)
    prune_folder(source, tmp_path / "out", calibration, device="cpu", method="wanda")
    assert seen == [False]


def test_resume_says_what_is_damaged_or_other(source, tmp_path, calibration):
    def stop(report, blocks):
        raise KeyboardInterrupt

    def refused(match, tokens=calibration):
        with pytest.raises(ValueError, match=match):
            prune_folder(source, out, tokens, device="cpu", resume=True)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, out, calibration, device="cpu", on_block=stop)
    refused("resume: found other tokens", calibration.replace("windows", "text"))
    block = out / BLOCKS / "00000.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    refused("00000.safetensors is damaged")
    block.unlink()
    prune_folder(source, tmp_path / "whole", calibration, device="cpu")
    marker = (out / MARKER).read_text()
    (out / MARKER).write_text("")
    refused(f"{MARKER}: found a damaged file")
    (out / MARKER).write_text(marker)
    prune_folder(source, out, calibration, device="cpu", resume=True)
    whole, mine = contents(tmp_path / "whole"), contents(out)
    assert {n for n in whole if whole[n] != mine[n]} == {"cuobs_report.json"}


def prune_on_a_full_disk(*args, **options):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # a block's file is smaller
    try:
        prune_folder(*args, device="cpu", method="wanda", **options)
    except OSError as error:
        print(error)


def test_a_full_disk_names_the_file(source, tmp_path, calibration):
    # Written behind the last block.
    out, options = tmp_path / "out", {"rotate": True, "rotate_steps": 1}
    forks.start(
        partial(prune_on_a_full_disk, source, out, calibration, **options), said=tmp_path / "said"
    ).join()
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith(f"{out / 'model.safetensors'}: found that it can't be written (")
    assert "File too large" in line
    report = prune_folder(
        source, out, calibration, device="cpu", method="wanda", resume=True, **options
    )
    assert all(block.resumed for block in report.blocks)
    assert not (out / BLOCKS).exists()


def test_a_full_disk_is_known_before_the_first_block(source, tmp_path, calibration):
    out = tmp_path / "out"
    forks.start(
        prune_on_a_full_disk, source, out, calibration, said=tmp_path / "said"
    ).join()
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert "model.safetensors: found that it can't be written (File too large" in line
    assert not out.exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"pattern": "3:11"}, "model: found no linear that could be pruned"),
        ({"skip": "*nothing*"}, "skip: found no linear whose name"),
        ({"distill": 1, "host_memory": "400KB"}, "distill: found a model.* of host_memory"),
        ({"layers": {"*.nothing": {"pattern": "4:8"}}}, "layers: found no linear"),
    ],
)  # fmt: skip
def test_what_shapes_tell_is_refused_before_the_model_is_opened(
    options, sentence, source, tmp_path, calibration, monkeypatch
):  # fmt: skip
    def never(*_):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(loading, "load_model", never)
    with pytest.raises(ValueError, match=sentence):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_other_tokens_are_refused_before_weights_are_read(
    dry_run, source, tmp_path, calibration, monkeypatch
):  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", on_block=stop)

    def never(*_):
        raise AssertionError("blocks were read")

    monkeypatch.setattr("cuobs.models.parked.Parked._fetch", never)
    monkeypatch.setattr("cuobs.models.checkpoints.checkpoint.fingerprint", never)
    other = calibration.replace("windows", "text")
    with pytest.raises(ValueError, match="resume: found other tokens than the run began with"):
        prune_folder(
            source, tmp_path / "out", other, device="cpu", resume=True, dry_run=dry_run
        )


def test_masks_survive_a_resume(source, tmp_path, calibration):
    def stop(report, blocks):
        raise KeyboardInterrupt

    prune_folder(source, tmp_path / "whole", calibration, device="cpu", save_masks=True)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", on_block=stop)
    prune_folder(
        source, tmp_path / "out", calibration, device="cpu", save_masks=True, resume=True
    )
    a, b = load_masks(tmp_path / "whole"), load_masks(tmp_path / "out")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_destinations_that_are_refused(source, tmp_path, calibration):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="found files"):
        prune_folder(source, tmp_path / "full", calibration, device="cpu")
    with pytest.raises(ValueError, match="the source itself"):
        prune_folder(source, source, calibration, device="cpu")
    with pytest.raises(ValueError, match="a folder inside the source"):
        prune_folder(source, source / "out", calibration, device="cpu")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        prune_folder(tmp_path / "none", tmp_path / "out", calibration, device="cpu")
    prune_folder(source, tmp_path / "out", calibration, device="cpu")
    with pytest.raises(FileExistsError, match="found a finished model"):
        prune_folder(source, tmp_path / "out", calibration, device="cpu", resume=True)


def test_destination_inside_the_source_is_refused(source, calibration):
    before = contents(source)
    with pytest.raises(ValueError, match="outside it"):
        prune_folder(source, source / "out", calibration, device="cpu")
    assert contents(source) == before and not (source / "out").exists()


def test_files_and_folders_beside_the_weights_are_kept(source, tmp_path, calibration):
    # A contradiction that transformers reads but may refuse to write.
    generation = json.dumps({"temperature": 0.9, "top_p": 0.6, "do_sample": False})
    (source / "generation_config.json").write_text(generation)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"many weights")
    (source / "nowhere").symlink_to(source / "gone")
    os.chmod(source, 0o555)
    prune_folder(source, tmp_path / "out", calibration, device="cpu", method="wanda")
    out = tmp_path / "out"
    assert (out / "generation_config.json").read_text() == generation
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"
    assert not (out / "original").exists()


def test_texts_of_the_same_name_are_both_evaluated(source, tmp_path, calibration):
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "text.npy", make_tokens(4, seed=seed))
    texts = [str(tmp_path / folder / "text.npy") for folder in "ab"]
    report = prune_folder(
        source, tmp_path / "out", calibration, device="cpu", method="wanda", evaluate=texts
    )
    assert list(report.perplexity) == texts
    assert report.perplexity[texts[0]] != report.perplexity[texts[1]]


def test_damaged_sources_are_refused(source, tmp_path, calibration):
    shards = sorted(source.glob("model-*.safetensors"))
    whole = shards[0].read_bytes()

    def refused(match):
        with pytest.raises(ValueError, match=match):
            prune_folder(source, tmp_path / "out", calibration, device="cpu")
        assert not (tmp_path / "out").exists()

    shards[0].write_bytes(whole[:-100])
    refused("found a model that does not open")
    shards[0].unlink()
    refused("found a model that does not open")
    shards[0].write_bytes(whole)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in [n for n, shard in content["weight_map"].items() if shard == shards[0].name]:
        del content["weight_map"][name]
    index.write_text(json.dumps(content))
    shards[0].unlink()
    refused("tensors are missing")
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: found no JSON"):
        prune_folder(source, tmp_path / "out", calibration, device="cpu")


@pytest.mark.parametrize(
    "key", ["quantization_config", "sparsity_config", "compression_config"]
)
def test_compressed_source_is_refused(source, tmp_path, calibration, key):
    config = json.loads((source / "config.json").read_text())
    config[key] = {"quant_method": "gptq"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=key):
        prune_folder(source, tmp_path / "out", calibration, device="cpu")


def test_what_is_evaluated_is_checked_before_anything_is_written(source, tmp_path, calibration):
    np.save(tmp_path / "big.npy", np.full((2, 24), 97))
    np.save(tmp_path / "mask.npy", np.ones((2, 24), bool))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="big.npy: tokens: found 97"):
        prune_folder(source, out, calibration, device="cpu", evaluate=[str(tmp_path / "big.npy")])
    with pytest.raises(TypeError, match="mask.npy: found dtype bool"):
        prune_folder(source, out, calibration, device="cpu", evaluate=[str(tmp_path / "mask.npy")])
    assert not out.exists()


def test_a_model_whose_outputs_are_no_numbers_is_refused(source, tmp_path, calibration):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    model.save_pretrained(source, max_shard_size="20KB")
    assert np.isnan(perplexity(load_model(source), make_tokens(4)))
    out = tmp_path / "out"
    for existed in (False, True):
        with pytest.raises(ValueError, match="perplexity on tokens.npz:text is no number"):
            prune_folder(
                source, out, calibration, device="cpu",
                evaluate=[calibration.replace("windows", "text")],
            )  # fmt: skip
        # A start that fails leaves nothing of its own.
        assert out.exists() == existed and not (existed and list(out.iterdir()))
        out.mkdir(exist_ok=True)


def test_a_mask_belongs_to_windows_of_tokens(source, tmp_path):
    (tmp_path / "text.txt").write_text("w3 " * 200)
    np.save(tmp_path / "mask.npy", np.ones((4, 24), bool))
    with pytest.raises(ValueError, match="attention_mask: found it with .*text"):
        prune_folder(
            source, tmp_path / "out", str(tmp_path / "text.txt"), device="cpu",
            attention_mask=str(tmp_path / "mask.npy"),
        )  # fmt: skip


def test_a_source_without_a_tokenizer_reads_no_text(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("w3 " * 200)
    with pytest.raises(ValueError, match="source: found no tokenizer"):
        prune_folder(
            tmp_path / "source", tmp_path / "out", str(tmp_path / "text.txt"), device="cpu"
        )


def write_gguf(path, kinds=("F32",), more=None):
    """A tiny Llama, its matrices in one kind after the other; the tensors that it was made of."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(97)
    tokens = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 97)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 97)
    writer.add_token_types([2, 3, 3] + [1] * 94)
    shapes = {"token_embd": (97, 32), "output_norm": (32,), "output": (97, 32)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
                "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32),
                "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
            }.items()
        }  # fmt: skip
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    tensors |= more or {}
    for i, (name, tensor) in enumerate(tensors.items()):
        kind = gguf.GGMLQuantizationType[kinds[i % len(kinds)] if tensor.ndim > 1 else "F32"]
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf(tmp_path, calibration):
    path = tmp_path / "tiny.gguf"
    tensors = write_gguf(path)
    alone = tmp_path / "alone"
    alone.mkdir()
    os.link(path, alone / "tiny.gguf")
    with pytest.raises(ValueError, match="outside it"):
        prune_folder(alone, alone / "out", calibration, device="cpu")
    report = prune_folder(path, tmp_path / "out", calibration, device="cpu")
    assert len(report.layers) == 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(embedding, tensors["token_embd"])
    down = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    kept = down != 0
    assert cuobs.verify(down, "2:4")
    # re-solved, but still much like what it was
    assert np.corrcoef(down[kept], tensors["blk.0.ffn_down"][kept])[0, 1] > 0.8
    assert len(linears(model)) == 15


@pytest.mark.parametrize("kinds, expected", [
    (["F32"], "float32"), (["F16"], "float16"), (["BF16"], "bfloat16"), (["Q8_0"], "bfloat16"),
    (["Q8_0", "F16"], "float16"), (["F32", "BF16"], "float32"), (["Q4_0", "F32"], "bfloat16"),
])  # fmt: skip
def test_gguf_is_not_written_in_more_bytes_than_it_needs(tmp_path, calibration, kinds, expected):
    path, out, lines = tmp_path / "tiny.gguf", tmp_path / "out", []
    write_gguf(path, kinds)
    prune_folder(path, out, calibration, device="cpu", method="wanda", say=lines.append)
    assert {t.dtype for t in weights_in(out).values()} == {getattr(torch, expected)}
    assert any(f"{', '.join(sorted(kinds))} in tiny.gguf, written in {expected}" in line
               for line in lines)  # fmt: skip
    opened = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert opened.dtype == getattr(torch, expected)


def test_gguf_is_read_once(tmp_path, calibration, monkeypatch):
    """And what it will be compared with is what it was; kernels are compiled for its shapes."""
    path, out, read, warmed = tmp_path / "tiny.gguf", tmp_path / "out", [], []
    write_gguf(path)
    load, warm = loading.load_model, pipeline.Warming
    monkeypatch.setattr(loading, "load_model", lambda *a: read.append(a) or load(*a))
    monkeypatch.setattr(
        pipeline, "Warming", lambda *a: warmed.append((set(a[2]), a[3])) or warm(*a)
    )
    report = prune_folder(path, out, calibration, device="cpu", evaluate=[calibration])
    assert len(read) == 1
    dense = load(path)
    shapes = {tuple(m.weight.shape) for n, m in linears(dense).items() if "layers" in n}
    assert warmed == [(shapes, dense.dtype)]
    near = agreement(load(out), dense, load_tokens(calibration))
    assert report.agreement.popitem()[1] == pytest.approx(near._asdict(), rel=1e-3)


def test_gguf_in_another_dtype(tmp_path, calibration):
    path, out = tmp_path / "tiny.gguf", tmp_path / "out"
    write_gguf(path, ["Q8_0"])
    prune_folder(path, out, calibration, device="cpu", method="wanda", save_dtype="float32")
    assert {t.dtype for t in weights_in(out).values()} == {torch.float32}


def test_gguf_that_can_not_be_packed_is_not_pruned(tmp_path, calibration):
    path, out, done = tmp_path / "tiny.gguf", tmp_path / "out", []
    write_gguf(path)
    with pytest.raises(ValueError, match="proj: pattern: found 12870 masks of a scope"):
        prune_folder(
            path, out, calibration, pattern="8:16", method="magnitude", packed=True, device="cpu",
            on_block=lambda report, blocks: done.append(blocks),
        )  # fmt: skip
    assert not done and not out.exists()


def test_gguf_with_tensors_that_are_not_read(tmp_path, calibration):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, more={"nextn.eh_proj": np.zeros((32, 48), np.float32)})
    with pytest.raises(ValueError, match="1 tensors that transformers does not read, nextn.eh_pro"):
        prune_folder(path, tmp_path / "out", calibration, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_gguf_reads_its_header(tmp_path, calibration, monkeypatch):
    path, lines, seen = tmp_path / "tiny.gguf", [], []
    write_gguf(path)

    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("cuobs.models.checkpoints.loading.load_model", read)
    monkeypatch.setattr("gguf.dequantize", read)
    prune_folder(
        path, tmp_path / "out", calibration, device="cpu", dry_run=True, say=lines.append,
        starting=seen.append,
    )  # fmt: skip
    assert any("mlp.down_proj" in line and line.endswith("2:4") for line in lines)
    assert seen[0].memory_predicted > 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("distill, windows", [(0, 5), (2, 3)])
def test_a_dry_run_counts_windows_that_the_model_is_to_write(source, tmp_path, distill, windows):
    seen = []
    report = prune_folder(
        source, tmp_path / "out", "self:5", samples=3, sequence_length=16, device="cpu",
        dry_run=True, distill=distill, starting=seen.append,
    )  # fmt: skip
    assert report.protocol["windows"] == windows and report.protocol["length"] == 16
    assert seen and not (tmp_path / "out").exists()
