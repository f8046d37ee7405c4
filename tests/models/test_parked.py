"""Blocks that are read from files when they are wanted give what a model in memory gives."""

import hashlib
import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from small_models import make_model, make_source, make_tokens

from cuobs.arrays import size_text
from cuobs.models import (
    agreement,
    by_block,
    load_model,
    memory,
    perplexity,
    pipeline,
    prune_folder,
)
from cuobs.models.checkpoints.names import match
from cuobs.models.checkpoints.source import find_source
from cuobs.models.parked import Parked, at_hand, park, parked, state_of
from cuobs.models.pruning import prediction, prune
from cuobs.models.pruning.layers import choose_layers
from cuobs.models.pruning.prediction import (
    check_host,
    place_of_states,
    predict,
    predict_host,
    seconds_a_block,
    states_of,
    work_from_shapes,
)
from cuobs.models.pruning.scratch import OnHost, Scratch, at_home, leave
from cuobs.models.recipe import read_arguments
from cuobs.models.structure import find_blocks
from cuobs.models.tokens.windows import check_windows

CPU = torch.device("cpu")
PAGE = resource.getpagesize()
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def calibration(tmp_path):
    """A file of calibration windows."""
    np.savez(tmp_path / "tokens.npz", windows=make_tokens(16), text=make_tokens(5, seed=1))
    return f"{tmp_path / 'tokens.npz'}:windows"


def written(folder):
    """The bytes of each file of a folder, and its report without what differs from run to run."""
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("cuobs_report.json", "README.md")
    }
    report = json.loads((folder / "cuobs_report.json").read_text())
    for part in (report, *report["blocks"], *(r for b in report["blocks"] for r in b["layers"])):
        part.pop("seconds", None)
    for name in ("memory_peak", "memory_predicted", "whole_peak", "whole_seconds", "protocol"):
        report.pop(name, None)
    return found, report


def open_parked(source):
    """A model of a folder whose blocks are parked."""
    return pipeline.open_parked(find_source(source))[0]


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"method": "sparsegpt", "save_masks": True}),
        ("gemma3", {"method": "magnitude", "tune": 1, "packed": True}),
        ("opt", {"method": "magnitude", "target": "dense"}),
        ("gpt2", {"method": "wanda", "target": "pruned", "save_dtype": "bfloat16",
                  "shard_size": "20KB"}),
    ],
)  # fmt: skip
def test_same_bits_as_in_memory(family, options, tmp_path, calibration, monkeypatch):
    source = make_source(tmp_path / "source", family, blocks=2)
    given = {"device": "cpu", "evaluate": [calibration.replace("windows", "text")], **options}
    prune_folder(source, tmp_path / "parked", calibration, **given)
    monkeypatch.setattr(pipeline, "whole_for", lambda *_: "a test")
    prune_folder(source, tmp_path / "whole", calibration, **given)
    assert written(tmp_path / "parked") == written(tmp_path / "whole")


def test_weights_of_several_dtypes(tmp_path, calibration, monkeypatch):
    """They are held in the one that holds all, block by block; most are read in their own."""
    model, read = make_model("llama").bfloat16(), []
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path / "source")
    load = pipeline.loading.load_model

    def loaded(*args):
        read.append(load(*args))
        return read[-1]

    monkeypatch.setattr(pipeline.loading, "load_model", loaded)
    prune_folder(tmp_path / "source", tmp_path / "parked", calibration, device="cpu")
    assert {t.dtype for m in read for t in m.state_dict().values()} == {torch.float32}
    assert all(m.config.dtype == torch.bfloat16 for m in read)
    monkeypatch.setattr(pipeline, "whole_for", lambda *_: "a test")
    prune_folder(tmp_path / "source", tmp_path / "whole", calibration, device="cpu")
    assert written(tmp_path / "parked") == written(tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"tune": 1}, {"distill": 1}, {"rotate": True}])
def test_what_is_measured_is_what_is_written(options, tmp_path, calibration, monkeypatch):
    """Where weights are held in more digits than they are written in; resumed too."""
    model = make_model("llama", blocks=2).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path / "source")
    text = calibration.replace("windows", "text")
    given = {"device": "cpu", "evaluate": [text], "method": "sparsegpt", **options}
    if "rotate" in options:
        given["rotate_steps"] = 2
    one = prune_folder(tmp_path / "source", tmp_path / "one", calibration, **given)
    ((_, measured),) = one.perplexity.values()
    found = load_model(tmp_path / "one")
    assert found.dtype == torch.float32
    tokens = make_tokens(5, seed=1)
    assert perplexity(found, tokens, "cpu") == pytest.approx(measured, rel=1e-6)
    step = pipeline._on_block

    def stop(job, report, blocks):
        step(job, report, blocks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_on_block", stop)
        prune_folder(tmp_path / "source", tmp_path / "two", calibration, **given)
    prune_folder(tmp_path / "source", tmp_path / "two", calibration, **given, resume=True)
    assert written(tmp_path / "one")[0] == written(tmp_path / "two")[0]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_parked_model_gives_what_it_gave(form, tmp_path):
    source = make_source(tmp_path / "source", "qwen3", tie_word_embeddings=True)
    if form == "bin":
        torch.save(load_model(source).state_dict(), source / "pytorch_model.bin")
        for path in source.glob("model*"):
            path.unlink()
    whole, model = load_model(source), open_parked(source)
    tokens = torch.tensor(make_tokens(3))
    with torch.no_grad():
        expected = whole(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
        for block in find_blocks(model)[1]:
            assert parked(block) and all(t.is_meta for t in block.parameters())
            with at_hand(block):
                assert parked(block) is None and not any(t.is_meta for t in block.parameters())
            assert parked(block)
        assert torch.equal(model(tokens).logits, expected)
    for mine, theirs in zip(find_blocks(model)[1], find_blocks(whole)[1], strict=True):
        found = dict(state_of(mine))
        assert found.keys() == theirs.state_dict().keys()
        assert all(torch.equal(found[n], t) for n, t in theirs.state_dict().items())
    assert perplexity(model, tokens.numpy()) == perplexity(whole, tokens.numpy())


@pytest.mark.gpu
@GPU
def test_tensors_reach_a_gpu_on_the_stream_of_who_wants_them(tmp_path, monkeypatch):
    model, streams, take = open_parked(make_source(tmp_path / "source")), [], Parked.take
    side = torch.cuda.Stream()

    def noting(self, slot, device):
        streams.append(torch.cuda.current_stream())
        return take(self, slot, device)

    monkeypatch.setattr(Parked, "take", noting)
    with torch.cuda.stream(side), at_hand(find_blocks(model)[1][0], torch.device("cuda")):
        pass
    assert streams and all(stream == side for stream in streams)


def test_what_was_changed_is_lost_unless_it_is_kept(tmp_path):
    model = open_parked(make_source(tmp_path / "source"))
    block = find_blocks(model)[1][1]
    with at_hand(block):
        before = block.mlp.up_proj.weight.detach().clone()
        block.mlp.up_proj.weight.data.zero_()
    with at_hand(block):
        assert torch.equal(block.mlp.up_proj.weight, before)


def test_shared_weights_and_what_is_in_no_file_stay_in_memory(tmp_path):
    source = make_source(tmp_path / "source")
    model = load_model(source)
    prefix, blocks = find_blocks(model)
    blocks[2].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    stored = {n: t for n, t in find_source(source).stored.items() if "k_proj" not in n}
    park(model, prefix, blocks, find_source(source), stored)
    for block in blocks:
        assert not block.self_attn.k_proj.weight.is_meta and block.mlp.down_proj.weight.is_meta
    assert not blocks[0].mlp.up_proj.weight.is_meta and blocks[1].mlp.up_proj.weight.is_meta


def test_one_block_at_a_time_is_in_memory(tmp_path, calibration, monkeypatch):
    source, seen, most = make_source(tmp_path / "source"), {}, []
    fetch = Parked._fetch

    def look(self, device, copies=()):
        fetch(self, device, copies)
        seen[id(self)] = self
        most.append(sum(any(s.tensor.numel() for s in own.slots) for own in seen.values()))

    monkeypatch.setattr(Parked, "_fetch", look)
    text = calibration.replace("windows", "text")

    def stop(report, blocks):
        if len(report.blocks) == 2:
            raise KeyboardInterrupt

    options = {"device": "cpu", "evaluate": [text]}
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", calibration, on_block=stop, **options)
    assert len(seen) == 3 and set(most) == {1}
    seen.clear()
    report = prune_folder(source, tmp_path / "out", calibration, resume=True, **options)
    assert [block.resumed for block in report.blocks] == [True, True, False]
    assert len(seen) == 6  # of the dense model again, for the agreement
    assert set(most) == {1}


def test_a_model_that_is_cut_short_is_said(tmp_path):
    source = make_source(tmp_path / "source")
    model = open_parked(source)
    path = next(source.glob("model-00003*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="found it truncated"):
        model(torch.tensor(make_tokens(1)))


def test_dtypes_of_files_are_those_of_the_model(tmp_path):
    make_model("llama").half().save_pretrained(tmp_path / "source")
    model = open_parked(tmp_path / "source").bfloat16()
    block = find_blocks(model)[1][0]
    with at_hand(block):
        assert block.mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_a_list_of_tensors(tmp_path, dtype):
    expected = [torch.randn(3, 5, 7).to(dtype), torch.randn(2, 5, 7).to(dtype)]
    scratch = Scratch(tmp_path)
    for tensor in expected:
        scratch.append(tensor)
    assert not list(tmp_path.iterdir())  # nothing is left behind, whatever happens
    other = scratch.copy()
    assert len(scratch) == 2
    assert all(map(torch.equal, scratch, expected)) and all(map(torch.equal, other, expected))
    taken = scratch[0]
    scratch[0] = expected[0] + 1
    assert torch.equal(scratch[0], expected[0] + 1) and torch.equal(taken, scratch[0])
    assert torch.equal(scratch[1], expected[1]) and torch.equal(other[0], expected[0])
    scratch[1] = expected[0]
    assert torch.equal(scratch[1], expected[0])


def held(name="cuobs_states_"):
    """Bytes in memory of the files of a scratch, or others, that this process has mapped."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            inside = name in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages as Linux does")
@pytest.mark.parametrize("prefix", ["", "body."])
def test_weights_that_were_looked_at_leave_memory(prefix, tmp_path):
    """And are what they were. How much comes with a row that is looked at, the kernel decides."""
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 1}
    model = make_model("llama", **wide)
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source, loaded = find_source(tmp_path), make_model("llama", 1, **wide)
    mapped = torch.from_file(
        str(tmp_path / "model.safetensors"), size=os.path.getsize(tmp_path / "model.safetensors"),
        dtype=torch.uint8,
    )  # fmt: skip
    for name, parameter in loaded.named_parameters():
        place = source.stored[prefix + name]
        content = mapped[place.start : place.start + place.nbytes]
        parameter.data = content.view(torch.float32).view(place.shape)
    assert float(mapped.sum()) and held("model.safetensors") >= mapped.nbytes
    names = match(loaded, source, source.stored)
    assert names == {name: prefix + name for name in model.state_dict()}
    assert held("model.safetensors") < mapped.nbytes // 2
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages as Linux does")
def test_scratch_leaves_memory(tmp_path):
    scratch = Scratch(tmp_path)
    for _ in range(4):
        scratch.append(torch.ones(1, 2**8, 2**12))
    assert held() == 0
    for i, tensor in enumerate(scratch):
        assert float(tensor.sum()) == 2**20
        scratch[i] = tensor + i
        assert 0 < held() <= tensor.nbytes
    leave(scratch[3])
    assert held() == 0
    parts = [tensor[:, 64:192] for tensor in scratch]
    for i, part in enumerate(parts):
        assert float(part.mean()) == i + 1
        leave(part)
    assert held() <= len(parts) * 2 * PAGE


@pytest.mark.parametrize("tune", [0, 1])
@pytest.mark.parametrize(
    "device, place",
    [
        ("cpu", "scratch"),
        *(pytest.param("cuda", p, marks=[pytest.mark.gpu, GPU]) for p in ("scratch", "host")),
    ],
)  # fmt: skip
def test_where_hidden_states_lie_changes_nothing(
    device, place, tune, tmp_path, calibration, monkeypatch
):  # fmt: skip
    source, made = make_source(tmp_path / "source", blocks=2), []
    options = {"device": device, "method": "sparsegpt", "tune": tune, "batch_tokens": 96}
    prune_folder(source, tmp_path / "in", calibration, **options)
    monkeypatch.setattr(prediction, "place_of_states", lambda *_: made.append(1) or place)
    prune_folder(source, tmp_path / "out", calibration, **options)
    assert made and written(tmp_path / "out") == written(tmp_path / "in")


@pytest.mark.parametrize("home", [lambda _: [], Scratch])
def test_states_on_the_host_are_taken_out_as_copies(home, tmp_path, calibration, monkeypatch):
    """The host stands for the device here, too: what may be done with them is the same."""
    states = OnHost(home(tmp_path), CPU)
    for i in range(3):
        states.append(torch.full((2, 3), float(i)))
    other = states.copy()
    states[1] = torch.zeros(2, 3)
    assert len(states) == 3 and isinstance(at_home(states), type(home(tmp_path)))
    assert [float(t.sum()) for t in states] == [0, 0, 12]
    assert [float(t.sum()) for t in other] == [0, 6, 12]
    source = make_source(tmp_path / "source", blocks=2)
    options = {"device": "cpu", "method": "sparsegpt", "tune": 1, "batch_tokens": 96}
    prune_folder(source, tmp_path / "in", calibration, **options)
    monkeypatch.setattr(prune, "states_at", lambda *_: OnHost(home(tmp_path), CPU))
    prune_folder(source, tmp_path / "out", calibration, **options)
    assert written(tmp_path / "out") == written(tmp_path / "in")


def shaped(model, windows, recipe, device):
    """What pruning a model takes by its shapes, four windows at once."""
    prefix, blocks = find_blocks(model)
    layers = choose_layers(model, prefix, blocks, recipe)
    return work_from_shapes(model, blocks, windows, 4, recipe, device, layers, True)


def test_what_is_skipped_in_all_blocks_takes_no_memory_to_prune(tmp_path, monkeypatch):
    # What the process holds besides changes between two looks.
    monkeypatch.setattr(memory, "resident", lambda: 2**29)
    model = load_model(make_source(tmp_path / "source"))
    windows = check_windows(model, make_tokens(64), None, True)
    works = [
        shaped(model, windows, read_arguments({"skip": skip}), CPU)
        for skip in ([], ["*mlp*"], ["*.layers.[12].mlp.*"], ["*.up_proj"])
    ]
    assert [work.pruned for work in works] == [
        [32, 64, 128, 32], [32, 64, 0, 0], [32, 64, 128, 32], [32, 64, 64, 32]
    ]  # fmt: skip
    whole, *others = works
    assert all(work.groups == whole.groups and work.stages == whole.stages for work in others)
    least = [predict(work, CPU) for work in works]
    assert least[1] < least[3] <= least[0] == least[2]
    seconds = [seconds_a_block(work, 0, 1e9) for work in works]
    assert seconds[1] < seconds[3] < seconds[0] == seconds[2]


def test_hidden_states_go_to_a_scratch_file_beyond_a_limit(tmp_path):
    source = make_source(tmp_path / "source")
    model = load_model(source)
    windows = check_windows(model, make_tokens(64), None, True)
    recipe = read_arguments({"method": "sparsegpt"})
    work = shaped(model, windows, recipe, CPU)
    whole = predict(work, CPU)
    assert whole - predict(work, CPU, states=False) == 2 * 64 * 24 * 32 * 4
    assert {place_of_states(work, CPU, limit) for limit in (None, whole)} == {"device"}
    assert place_of_states(work, CPU, whole - 1) == "scratch"
    assert check_host(work, CPU, whole - 1) is None
    with pytest.raises(ValueError, match=r"host_memory: found 1 MiB, expected at least \d+"):
        check_host(work, CPU, 2**20)


def test_hidden_states_that_do_not_fit_a_gpu_go_to_the_host(tmp_path, monkeypatch):
    model = load_model(make_source(tmp_path / "source"))
    windows = check_windows(model, make_tokens(64), None, True)
    recipe, gpu = read_arguments({"method": "sparsegpt"}), torch.device("cuda")
    work = shaped(model, windows, recipe, gpu)
    whole, on_host = predict(work, gpu), predict_host(work, gpu)
    assert on_host - predict_host(work, gpu, states=False) == states_of(work)
    assert whole - predict(work, gpu, states=False) == states_of(work) * 60 // 64
    for free, limit, place in (
        (whole, None, "device"), (whole, 0, "device"), (whole - 1, None, "host"),
        (whole - 1, on_host, "host"), (whole - 1, on_host - 1, "scratch"),
    ):  # fmt: skip
        monkeypatch.setattr(memory, "free", lambda _, free=free: free)
        assert place_of_states(work, gpu, limit) == place


def test_a_limit_of_the_hosts_memory_that_can_not_be_kept(tmp_path, calibration, monkeypatch):
    source = make_source(tmp_path / "source")

    def never(*_):
        raise AssertionError("the model was read")

    monkeypatch.setattr("cuobs.models.checkpoints.loading.load_model", never)
    for option, why in (
        ({"rotate": True}, "rotate needs"), ({"distill": 1}, "distill needs"),
        ({"calibration": "self"}, "windows of the model's own needs"),
    ):  # fmt: skip
        arguments = {"calibration": calibration, "host_memory": "1KB", **option}
        for dry_run in (False, True):
            with pytest.raises(ValueError, match=f"host_memory: found 1000 bytes.*{why} the whole"):
                prune_folder(source, tmp_path / "out", device="cpu", dry_run=dry_run, **arguments)
    with pytest.raises(ValueError, match="host_memory: found 'much', expected bytes"):
        prune_folder(source, tmp_path / "out", calibration, host_memory="much")
    with pytest.raises(ValueError, match="host_memory: found 1000 bytes, expected at least"):
        prune_folder(
            source, tmp_path / "out", calibration, host_memory="1KB", dry_run=True, device="cpu"
        )
    assert not (tmp_path / "out").exists()


def test_what_needs_the_whole_model_says_how_much_that_is(tmp_path, calibration):
    """By the headers: weights in the dtype that holds all, and for distillation by the model."""
    half = make_model("llama").half()
    half.lm_head = half.lm_head.bfloat16()
    source, out = tmp_path / "source", tmp_path / "out"
    half.save_pretrained(source)
    numbers = sum(parameter.numel() for parameter in half.parameters())
    learning = sum(p.numel() for n, p in half.named_parameters() if "_proj" in n)
    for options, least, beside in (
        ({"rotate": True}, 4 * numbers, ""), ({"distill": 1}, 8 * numbers, ", and the dense one"),
    ):  # fmt: skip
        lines = []
        arguments = {"device": "cpu", "dry_run": True, **options}
        prune_folder(source, out, calibration, say=lines.append, **arguments)
        (name,) = options
        (line,) = (line for line in lines if line.startswith("host "))
        assert line.split(None, 1)[1].startswith(
            f"{size_text(least)} at least: {name} needs the whole model in memory{beside}"
        )
        with pytest.raises(ValueError, match=f"expected at least .*since {name} needs"):
            prune_folder(source, out, calibration, host_memory=least - 1, **arguments)
    both = 8 * numbers + 12 * learning
    assert any(line.startswith(f"distilling   {size_text(both)} on cpu") for line in lines)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="distill: found a model that takes .* of host_memory"):
            prune_folder(
                source, out, calibration, host_memory=both - 1,
                **{**arguments, "dry_run": dry_run},
            )  # fmt: skip
    assert not out.exists()


def test_a_model_that_passes_what_is_by_head_is_measured(tmp_path):
    """As many heads as windows, which can't be told from windows."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokens = make_tokens(4)
    assert perplexity(open_parked(tmp_path), tokens, CPU) == perplexity(model, tokens, CPU)


def test_windows_in_groups_give_the_same(tmp_path, monkeypatch):
    """Whatever of them goes through the blocks together; each is told of once, in order."""
    source = make_source(tmp_path / "source", "gemma3")
    model, whole = open_parked(source), load_model(source)
    tokens, seen = make_tokens(50), []
    expected = perplexity(whole, tokens), agreement(whole, whole, tokens)
    monkeypatch.setitem(by_block.TOGETHER, "cpu", 1)
    assert perplexity(model, tokens, progress=lambda *place: seen.append(place)) == expected[0]
    assert agreement(model, whole, tokens) == expected[1]
    assert seen == sorted(seen) and seen[-1] == (50, 50)
