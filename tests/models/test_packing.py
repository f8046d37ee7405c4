"""Packed models: in memory, folder to folder, and as transformers opens them."""

import json
import logging
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import make_model, make_tokens, prune_all
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import cuobs.models
from cuobs.models.packed import packing
from cuobs.models.packed.packing import check_config, pack_folder, pack_model, unpack_folder
from cuobs.models.structure import find_blocks, linears, oriented
from cuobs.torch import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore:cuobs. packed weights are unpacked")


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(make_tokens()[:2])).logits


@pytest.fixture
def pruned(tmp_path):
    """The folder of a pruned model of a family, and the model."""

    def make(family="llama", pattern="2:4", dtype=torch.float32):
        model = prune_all(make_model(family), pattern).to(dtype)
        folder = tmp_path / "pruned"
        model.save_pretrained(folder, max_shard_size="100KB")
        return str(folder), model

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_model_in_memory(family):
    model = prune_all(make_model(family))
    expected, names = logits(model), list(linears(find_blocks(model)[1]))
    prefix = find_blocks(model)[0]
    found = pack_model(model)
    assert list(found.modules) == [f"{prefix}.{name}" for name in names] and not found.left
    assert set(found.modules.values()) == {"2:4"}
    assert all(isinstance(model.get_submodule(name), PackedLinear) for name in found.modules)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_linears_that_break_the_pattern_stay():
    model = prune_all(make_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :4] = 1
    found = pack_model(model)
    assert found.left == {"model.layers.1.mlp.up_proj": "it breaks 2:4"}
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj: found that it breaks "
                                         "2:4 in .* scopes, the first at row 0"):  # fmt: skip
        pack_model(make_model("llama"))


@pytest.mark.parametrize("family, dtype", [
    ("llama", torch.float32), ("llama", torch.bfloat16), ("llama", torch.float16),
    ("gpt2", torch.float32), ("opt", torch.float16), ("qwen3", torch.bfloat16),
])  # fmt: skip
def test_there_and_back(family, dtype, pruned, tmp_path):
    """Plain `from_pretrained` opens what was packed, and unpacking gives every bit back."""
    folder, model = pruned(family, dtype=dtype)
    packed, plain = str(tmp_path / "packed"), str(tmp_path / "plain")
    found = pack_folder(folder, packed, "2:4")
    assert len(found.modules) == len(linears(find_blocks(model)[1])) and not found.left
    opened = AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    for name in found.modules:
        module = opened.get_submodule(name)
        assert isinstance(module, PackedLinear) and module.weight.dtype == dtype
        assert torch.equal(module.unpack(), oriented(model.get_submodule(name)))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-1
    torch.testing.assert_close(logits(opened), logits(model), rtol=tolerance, atol=tolerance)
    assert opened.generate(torch.tensor([[1, 5]]), max_new_tokens=3).shape[0] == 1
    assert unpack_folder(packed, plain) == list(found.modules)
    assert "quantization_config" not in json.load(open(plain + "/config.json"))
    before, after = tensors_of(folder), tensors_of(plain)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def tensors_of(folder):
    """All tensors in the safetensors of a folder."""
    import glob

    return {k: v for path in glob.glob(f"{folder}/*.safetensors") for k, v in
            load_file(path).items()}  # fmt: skip


def test_patterns_of_the_report(tmp_path, source):
    """`prune_folder` with packed=True, and `pack_folder` of what it writes without, are one."""
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, t=make_tokens())
    options = {"method": "magnitude", "target": "pruned", "layers": {"*.down_proj": {
        "pattern": "4:8"}}, "skip": "*.k_proj", "device": "cpu"}  # fmt: skip
    dense, one, two = (str(tmp_path / name) for name in ("dense", "one", "two"))
    cuobs.models.prune_folder(source, dense, f"{tokens}:t", **options)
    cuobs.models.prune_folder(source, one, f"{tokens}:t", packed=True, **options)
    found = pack_folder(dense, two)
    unpack_folder(two, str(tmp_path / "again"))
    folders = [tmp_path / name for name in ("dense", "one", "two", "again")]
    cards = [(folder / "README.md").read_text() for folder in folders]
    assert cards[1] == cards[2] and cards[0] == cards[3]
    assert "import cuobs.models" in cards[2] and "stored dense" in cards[3]
    assert set(found.modules.values()) == {"2:4", "4:8"}
    assert all(p == "4:8" for n, p in found.modules.items() if "down_proj" in n)
    assert found.left and all("k_proj" in name for name in found.left)
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    configs = [json.load(open(f"{folder}/config.json")) for folder in (one, two)]
    assert configs[0] == configs[1]
    before = cuobs.models.evaluate_folder(dense, f"{tokens}:t", device="cpu").perplexity
    after = cuobs.models.evaluate_folder(two, f"{tokens}:t", device="cpu").perplexity
    assert after == pytest.approx(before, rel=1e-4)


def test_an_unfinished_run_goes_on(pruned, tmp_path, monkeypatch):
    """With the blocks that it packed, into the same files; not with those of another model."""
    folder, _ = pruned()
    whole, dst = str(tmp_path / "whole"), str(tmp_path / "packed")
    pack_folder(folder, whole)
    count = len(pack_folder(folder, str(tmp_path / "again")).modules)

    def stop(done, total):
        assert total == count
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(folder, dst, progress=stop)
    assert not os.path.exists(os.path.join(dst, "config.json"))
    with pytest.raises(FileExistsError, match="an unfinished run, expected --resume"):
        pack_folder(folder, dst)
    with pytest.raises(ValueError, match="resume: found pattern='2:4', expected None"):
        pack_folder(folder, dst, "2:4", resume=True)
    times = os.stat(os.path.join(folder, "config.json"))
    os.utime(os.path.join(folder, "config.json"), (1, 1))
    with pytest.raises(ValueError, match="resume: found another model than the run began with"):
        pack_folder(folder, dst, resume=True)
    os.utime(os.path.join(folder, "config.json"), ns=(times.st_atime_ns, times.st_mtime_ns))
    packed, own = [], packing.pack_tensor
    monkeypatch.setattr(packing, "pack_tensor", lambda w, p, n: packed.append(n) or own(w, p, n))
    found = pack_folder(folder, dst, resume=True)
    assert 0 < len(packed) < count and not any("layers.0." in name for name in packed)
    assert list(found.modules) == list(check_config(dst, found.config()))
    assert sorted(os.listdir(dst)) == sorted(os.listdir(whole))
    for name in os.listdir(whole):
        with open(os.path.join(whole, name), "rb") as a, open(os.path.join(dst, name), "rb") as b:
            assert a.read() == b.read(), name


def test_nothing_is_left_of_a_run_that_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="found no linear that can be packed"):
        pack_folder(source, tmp_path / "packed")
    assert not os.path.exists(tmp_path / "packed")


def test_bytes(pruned, tmp_path):
    folder, model = pruned("llama", dtype=torch.bfloat16)
    found = pack_folder(folder, str(tmp_path / "packed"), "2:4")
    dense = sum(2 * m.weight.numel() for m in linears(find_blocks(model)[1]).values())
    assert found.before == dense
    stored = tensors_of(str(tmp_path / "packed"))
    assert found.after == sum(
        stored[f"{name}.{part}"].nbytes for name in found.modules for part in ("weight", "index")
    )


def test_pruned_zeros_with_a_sign(pruned, tmp_path):
    folder, model = pruned("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    row, column = (weight[0] == 0).nonzero()[0].new_tensor(0), (weight[0] == 0).nonzero()[0, 0]
    with torch.no_grad():
        weight[row, column] = -0.0
    model.save_pretrained(folder)
    found = pack_folder(folder, str(tmp_path / "packed"), "2:4")
    assert found.zeros == 1 and "1 pruned weights were -0.0" in " ".join(found.lines())


def test_refusals(pruned, tmp_path, source):
    folder, _ = pruned()
    packed = str(tmp_path / "packed")
    pack_folder(folder, packed)
    with pytest.raises(ValueError, match="found a packed model, expected plain weights"):
        pack_folder(packed, str(tmp_path / "again"))
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        pack_folder(folder, packed)
    with pytest.raises(ValueError, match="found no packed model, expected one of cuobs pack"):
        unpack_folder(folder, str(tmp_path / "again"))
    with pytest.raises(ValueError, match="found no linear that can be packed .*it breaks 2:4"):
        pack_folder(source, str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="packed weights of version 2, expected 1"):
        check_config("x", {"quant_method": "cuobs", "version": 2, "modules": {}})


def test_another_version_is_refused_by_transformers_too(pruned, tmp_path):
    folder, _ = pruned()
    packed = tmp_path / "packed"
    pack_folder(folder, str(packed))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed weights of version 2"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_without_cuobs_it_does_not_open(pruned, tmp_path, monkeypatch, caplog):
    """Values lie in another shape under the weight's name, so that nothing opens by mistake."""
    folder, _ = pruned()
    packed = tmp_path / "packed"
    pack_folder(folder, str(packed))
    # What importing cuobs has added.
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "cuobs")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "cuobs")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", "transformers"):
        with pytest.raises(RuntimeError, match="ismatch"):
            AutoModelForCausalLM.from_pretrained(packed)
    assert "Unknown quantization type, got cuobs" in caplog.text


def test_a_packed_model_is_saved_and_opened_again(pruned, tmp_path):
    folder, model = pruned()
    pack_folder(folder, str(tmp_path / "packed"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    opened.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "coupled-2:4", "block16-row8"])
def test_on_a_device(pattern):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    model = prune_all(make_model("llama"), pattern).to("cuda", torch.bfloat16)
    expected = logits_on(model)
    pack_model(model, pattern)
    torch.testing.assert_close(logits_on(model), expected, rtol=5e-2, atol=2e-1)
    tokens = torch.tensor([[1, 5, 7]], device="cuda")
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape[1] > 3


def logits_on(model):
    with torch.no_grad():
        return model(torch.from_numpy(make_tokens()[:2]).cuda()).logits

