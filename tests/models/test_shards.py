"""The files of weights of a model that is pruned block by block are written as blocks finish."""

import os
import shutil
from functools import cache, partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import make_model, make_tokens
from test_model_folders import contents

from cuobs import files
from cuobs.models import pipeline, prune_folder, unpack_folder
from cuobs.models.checkpoints import destination
from cuobs.models.checkpoints.checkpoint import begin
from cuobs.models.checkpoints.destination import entries_of
from cuobs.models.checkpoints.names import TORCH, entry_of
from cuobs.models.checkpoints.shards import are_laid_out, fill, lay_out, places_in, reserve
from cuobs.models.checkpoints.source import BLOCKS, MARKER, SHARDS, STAGING, Stored

OPTIONS = {"device": "cpu", "method": "wanda", "shard_size": "20KB"}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A file of calibration windows."""
    path = tmp_path_factory.mktemp("calibration") / "tokens.npz"
    np.savez(path, windows=make_tokens(8))
    return f"{path}:windows"


@pytest.fixture(scope="module")
def unstopped(made_source, calibration, tmp_path_factory):
    """The folder of a run that nothing stops, made once for the same options."""

    @cache
    def folder(options):
        place = tmp_path_factory.mktemp("unstopped") / "whole"
        prune_folder(made_source, place, calibration, **{**OPTIONS, **dict(options)})
        return place

    return lambda **options: folder(tuple(options.items()))


@pytest.fixture(scope="module")
def stopped(made_source, calibration, tmp_path_factory):
    """Copies of the folder of a run that ended after two blocks, made once likewise."""

    @cache
    def folder(options):
        place = tmp_path_factory.mktemp("stopped") / "out"
        with pytest.raises(KeyboardInterrupt):
            prune_folder(made_source, place, calibration, **{**OPTIONS, **dict(options)},
                         on_block=stop_after(2))  # fmt: skip
        return place

    return lambda place, **options: shutil.copytree(folder(tuple(options.items())), place)


def stop_after(blocks):
    """End a run after so many blocks."""
    def stop(report, _):
        if len(report.blocks) == blocks:
            raise KeyboardInterrupt

    return stop


def same_model(a, b):
    """Whether two folders hold the same files, but for what a report says of time and resuming."""
    a, b = contents(a), contents(b)
    return a.keys() == b.keys() and {n for n in a if a[n] != b[n]} <= {"cuobs_report.json"}


def test_tensors_in_any_order_give_a_file_of_safetensors(tmp_path):
    """Written whole or resumed, with elements of several sizes, of which none is out of line."""
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(3),
        "d": torch.randn(2, 2).half(), "e": torch.tensor(1.5), "f": torch.zeros(0, 4),
    }  # fmt: skip
    parts = lay_out({name: entry_of(tensor) for name, tensor in tensors.items()}, 80)
    assert len(parts) > 1 and [n for part in parts.values() for n in part] == list(tensors)
    sizes = [sum(entry.size for entry in part.values()) for part in parts.values()]
    assert max(sizes) <= 80
    folder = tmp_path / "weights"
    assert are_laid_out(folder, parts)
    reserve(folder, parts)
    places = places_in(folder, parts)
    for name in sorted(tensors, reverse=True):
        fill({name: places[name]}, tensors.get)
        reserve(folder, parts)  # leaves what is there
    assert are_laid_out(folder, parts)
    assert {path.name for path in folder.iterdir()} == parts.keys()
    for title, part in parts.items():
        with safe_open(folder / title, "pt") as stored:
            assert stored.metadata() == {"format": "pt"} and set(stored.keys()) == part.keys()
        for name, tensor in load_file(folder / title).items():
            assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
            assert places[name].start % TORCH[places[name].dtype].itemsize == 0
    assert not are_laid_out(folder, {title: {} for title in parts})
    (folder / title).unlink()
    assert not are_laid_out(folder, parts)


def test_entries_keep_the_order_of_the_source():
    stored = {name: Stored("x", "F32", (2,), 0) for name in "cab"}
    changed = {name: Stored("", "F16", (2,)) for name in "zda"}
    found = entries_of(stored, changed, ("b",))
    assert list(found) == ["c", "a", "d", "z"]
    assert [entry.dtype for entry in found.values()] == ["F32", "F32", "F16", "F16"]
    assert entries_of(stored, {}, (), torch.bfloat16)["a"].dtype == "BF16"


def test_a_finished_block_lies_in_the_files_that_are_to_be(source, tmp_path, calibration):
    """Its weights are nowhere else: the disk holds the model once, from the first block on."""
    out = tmp_path / "out"
    prune_folder(source, tmp_path / "whole", calibration, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, out, calibration, **OPTIONS, on_block=stop_after(2))
    shards = sorted((out / SHARDS).iterdir())
    assert [p.name for p in shards] == sorted(p.name for p in (tmp_path / "whole").glob("model-*"))
    found = {}
    for path in shards:
        assert path.stat().st_size == (tmp_path / "whole" / path.name).stat().st_size
        found |= load_file(path)
    final = {n: t for p in (tmp_path / "whole").glob("model-*") for n, t in load_file(p).items()}
    linears = {n for n in final if "_proj" in n}
    done = {n for n in linears if ".layers.2." not in n}
    assert {n for n in final if torch.equal(found[n], final[n])} == done
    for path in (out / BLOCKS).glob("*.safetensors"):
        assert set(load_file(path)) == {
            n.replace("weight", "mask") for n in linears if f".layers.{int(path.stem)}." in n
        }


@pytest.mark.parametrize(
    "first, then",
    [
        ({}, {"shard_size": "1MB"}), ({}, {"shard_size": "21KB"}), ({}, {"packed": True}),
        ({"packed": True}, {}), ({}, {"save_dtype": "float16"}), ({"save_dtype": "float16"}, {}),
        ({}, {"distill": 1}), ({"distill": 1}, {}), ({"save_dtype": "float32"}, {}),
        ({"packed": True}, {"packed": True}), ({"packed": True}, {"save_dtype": "bfloat16"}),
        ({"save_dtype": "bfloat16"}, {"save_dtype": "float16"}),
        ({"save_dtype": "bfloat16"}, {"save_dtype": "bfloat16"}),
        ({"packed": True, "save_dtype": "bfloat16"}, {"packed": True, "save_dtype": "bfloat16"}),
        ({"packed": True, "save_dtype": "bfloat16"}, {"packed": True, "save_dtype": "float16"}),
    ],
)  # fmt: skip
def test_a_run_goes_on_whatever_the_form_of_what_it_writes(
    first, then, tmp_path, made_source, calibration, stopped, unstopped
):
    out = stopped(tmp_path / "out", **first)
    report = prune_folder(made_source, out, calibration, **{**OPTIONS, **then}, resume=True)
    assert [block.resumed for block in report.blocks] == [True, True, False]
    assert same_model(unstopped(**then), out)
    assert not (out / BLOCKS).exists()


def in_memory(monkeypatch):
    """Runs write all at the end, from a model that is in memory as a whole."""
    monkeypatch.setattr(pipeline, "whole_for", lambda *_: "a test")


FORMS = {
    "wider": {"save_dtype": "float32"}, "narrower": {"save_dtype": "float16"},
    "packed": {"packed": True}, "packed, narrower": {"packed": True, "save_dtype": "float16"},
    "packed, wider": {"packed": True, "save_dtype": "float32"},
    "packed by several": {
        "packed": True, "skip": "*.1.*", "layers": {"*mlp.*": {"pattern": "coupled-2:4"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_files_in_any_form_are_filled_block_by_block(
    form, family, tmp_path, calibration, monkeypatch
):
    """The same bytes as when all is written at the end; what is rounded is kept beside too."""
    model = make_model(family, blocks=2)
    if "narrower" not in form:
        model.bfloat16()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    run = partial(
        prune_folder, tmp_path / "source", calibration=calibration, evaluate=[calibration],
        **OPTIONS | FORMS[form],
    )  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, on_block=stop_after(1))
    begun = {n: t for path in (out / SHARDS).iterdir() for n, t in load_file(path).items()}
    kept = {n for path in (out / BLOCKS).glob("0*") for n in load_file(path)}
    report = run(out, resume=True)
    with monkeypatch.context() as patch:
        in_memory(patch)
        whole = run(tmp_path / "whole")
    assert same_model(tmp_path / "whole", out) and report.perplexity == whole.perplexity
    final = {n: t for path in out.glob("model*.safetensors") for n, t in load_file(path).items()}
    assert begun.keys() == final.keys()
    masks = {n.removesuffix(".mask") for n in kept if n.endswith(".mask")}
    assert masks and all(torch.equal(begun[f"{n}.weight"], final[f"{n}.weight"]) for n in masks)
    if FORMS[form].get("packed"):
        assert all(torch.equal(begun[f"{n}.index"], final[f"{n}.index"]) for n in masks)
    beside = {f"{n}.weight" for n in masks} if "narrower" in form else set()
    assert {n for n in kept if n.endswith(".weight")} == beside


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family, dtype", [("llama", torch.float16), ("gpt2", torch.float32)])
def test_what_lies_packed_is_what_a_run_goes_on_with(
    family, dtype, device, tmp_path, calibration
):
    """Packed and unpacked on the device, into the weights of a run that does neither."""
    make_model(family).to(dtype).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    run = partial(prune_folder, tmp_path / "source", calibration=calibration,
                  evaluate=[calibration], **OPTIONS | {"device": device})  # fmt: skip
    dense = run(tmp_path / "dense")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", packed=True, on_block=stop_after(2))
    packed = run(tmp_path / "out", packed=True, resume=True)
    unpack_folder(tmp_path / "out", tmp_path / "again")
    found, expected = (
        {n: t for path in (tmp_path / name).glob("*.safetensors") for n, t in
         load_file(path).items()}
        for name in ("again", "dense")
    )  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert packed.perplexity == dense.perplexity


def test_a_weight_that_does_not_fit_ends_a_run_with_its_block(tmp_path, calibration, unstopped):
    """What is finished stays, and goes on in another dtype; before the first block nothing does."""
    model = make_model("llama")
    for block, scale in (0, 1.0), (1, 1e6):
        model.model.layers[block].mlp.down_proj.weight.data *= scale
    model.save_pretrained(tmp_path / "source")
    run = partial(prune_folder, tmp_path / "source", calibration=calibration, **OPTIONS)
    seen = []
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj.weight: .* float16 can't hold"):
        run(tmp_path / "out", save_dtype="float16", on_block=lambda *_: seen.append(1))
    assert len(seen) == 1 and (tmp_path / "out" / MARKER).exists()
    run(tmp_path / "out", save_dtype="bfloat16", resume=True)
    run(tmp_path / "whole", save_dtype="bfloat16")
    assert same_model(tmp_path / "whole", tmp_path / "out")
    model.model.layers[0].mlp.down_proj.weight.data *= 1e6
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj.weight: .* float16 can't hold"):
        run(tmp_path / "none", save_dtype="float16")
    assert not (tmp_path / "none").exists()


def test_a_block_that_was_finished_in_another_form_is_packed_at_the_end(
    source, tmp_path, calibration, unstopped
):
    out = tmp_path / "out"
    for blocks, options in (1, {}), (2, {"shard_size": "1MB", "resume": True}):
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, out, calibration, on_block=stop_after(blocks),
                         **{**OPTIONS, "packed": True, **options})  # fmt: skip
    prune_folder(source, out, calibration, **OPTIONS, packed=True, resume=True)
    assert same_model(unstopped(packed=True), out)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_pattern_that_can_not_be_packed_is_refused_before_weights_are_read(
    dry_run, source, tmp_path, calibration, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(pipeline.loading, "load_model", None)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj: pattern: found .* masks of a sc"):
        prune_folder(source, out, calibration, packed=True, dry_run=dry_run,
                     **OPTIONS | {"layers": {"*up_proj": {"pattern": "16:32"}}})  # fmt: skip
    assert not out.exists()


@pytest.mark.parametrize("at", [0, 4, 8, 9, 13, 17])
@pytest.mark.parametrize("then", [{}, {"distill": 1}], ids=str)
def test_stopped_while_files_are_put_in_place(
    at, then, source, tmp_path, calibration, monkeypatch, unstopped
):
    """Nine files: from the blocks to the others of the model, then to where they belong."""
    out = tmp_path / "out"
    replace, moved = os.replace, []

    def failing(a, b):
        if os.path.basename(a).startswith("model-") and len(moved) == at:
            raise KeyboardInterrupt
        moved.extend([b] if os.path.basename(a).startswith("model-") else [])
        return replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, out, calibration, **OPTIONS)
    assert (out / MARKER).exists() and not (out / "config.json").exists()
    report = prune_folder(source, out, calibration, **{**OPTIONS, **then}, resume=True)
    assert all(block.resumed for block in report.blocks)
    assert same_model(unstopped(**then), out) and not (out / STAGING).exists()


def test_files_of_an_earlier_try_are_not_taken_for_those_of_a_run(
    source, tmp_path, calibration, monkeypatch, unstopped
):
    out = tmp_path / "out"

    def failing(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(destination, "_move", failing)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, out, calibration, **OPTIONS)
    for path in (out / STAGING).glob("model-*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-8:] = bytes(8)
        (out / path.name).write_bytes(content)
    prune_folder(source, out, calibration, **OPTIONS, resume=True)
    assert same_model(unstopped(), out)


@pytest.mark.parametrize("fault", ["short", "gone"])
def test_a_file_that_is_damaged_is_said(fault, source, tmp_path, calibration):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, out, calibration, **OPTIONS, on_block=stop_after(1))
    for path in (out / SHARDS).iterdir():
        if fault == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="00000.safetensors is damaged"):
        prune_folder(source, out, calibration, **OPTIONS, resume=True)


def test_a_run_that_is_refused_leaves_nothing(source, tmp_path, calibration, monkeypatch):
    """Though the files are there before the dense model is measured."""
    out = tmp_path / "out"
    monkeypatch.setattr(pipeline, "_perplexity", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="is no number"):
        prune_folder(source, out, calibration, evaluate=[calibration], **OPTIONS)
    assert not out.exists()


def test_another_run_that_has_begun_in_the_folder_keeps_its_files(
    source, tmp_path, calibration, monkeypatch
):
    out, lay_out = tmp_path / "out", pipeline._lay_out

    def meanwhile(*args):
        begin(out, {"another": 1}, resume=False)
        return lay_out(*args)

    monkeypatch.setattr(pipeline, "_lay_out", meanwhile)
    with pytest.raises(FileExistsError, match="unfinished run"):
        prune_folder(source, out, calibration, **OPTIONS)
    assert (out / MARKER).exists() and (out / BLOCKS).exists()


def test_a_disk_without_room_for_all_files_is_left_with_none(tmp_path, monkeypatch):
    parts, asked = lay_out({n: entry_of(torch.zeros(9)) for n in "abc"}, 36), []

    def room(file, size):
        asked.append(size)
        if len(asked) == len(parts) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "reserve", room)
    with pytest.raises(OSError, match="No space left"):
        reserve(tmp_path / "weights", parts)
    assert list(tmp_path.iterdir()) == []
