"""Folders of pruned models, looked at by what their files hold."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cuobs_cli import main
from safetensors.torch import load_file, save_file
from small_models import make_source, make_tokens

from cuobs.models import pack_folder, prune_folder
from cuobs.models.checkpoints.verifying import verify_folder


@pytest.fixture
def pruned(tmp_path):
    """Prune a family into a folder; its weights in one file."""

    def pruned(family, **options):
        source = make_source(tmp_path / "source", family)
        np.savez(tmp_path / "t.npz", t=make_tokens(4))
        settings = {"device": "cpu", "method": "wanda", "save_masks": True, **options}
        prune_folder(source, tmp_path / "out", f"{tmp_path / 't.npz'}:t", **settings)
        return tmp_path / "out"

    return pruned


def change(folder, name, row, column, value):
    """Change one element of a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row, column] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def verify(*args):
    return CliRunner().invoke(main, ["verify", *map(str, args)])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_is_looked_at(pruned, family):
    out = pruned(family)
    layers = verify_folder(out)
    assert len(layers) == (21 if family == "llama" else 12) and all(layers)
    assert all(layer.outside == 0 for layer in layers)
    result = verify(out)
    assert result.exit_code == 0
    assert f"obeys 2:4 (keep 2 of 4), and the masks in {len(layers)} layers" in result.output


def test_transposed_weights(pruned):
    """GPT-2's lie as (inputs, outputs): four inputs of one output are a column there."""
    out = pruned("gpt2")
    name = "transformer.h.1.attn.c_proj.weight"
    weight = load_file(out / "model.safetensors")[name]
    row = int(torch.argwhere(weight[:4, 5] == 0)[0])
    change(out, name, row, 5, 1.0)
    (bad,) = [layer for layer in verify_folder(out) if not layer]
    assert (bad.name, bad.found.broken, bad.found.first) == (name[:-7], 1, (5, 0))
    assert bad.outside == 1
    result = verify(out, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and (found["model"], found["obeys"]) == (str(out), False)
    assert len(found["layers"]) == 12
    assert [layer for layer in found["layers"] if not layer["obeys"]] == [{
        "name": name[:-7], "pattern": "2:4", "obeys": False, "scopes": bad.found.scopes,
        "broken": 1, "first": [5, 0], "outside": 1,
    }]  # fmt: skip


def test_one_element_in_bfloat16_and_several_files(pruned):
    out = pruned("llama", save_dtype="bfloat16", shard_size="30KB", save_masks=False)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert all(verify_folder(out))
    name, file = next(
        (n, p) for p in out.glob("model-*") for n in _names(p) if "layers.2.mlp.up" in n
    )
    tensors = load_file(file)
    zero = torch.argwhere(tensors[name] == 0)[0]
    tensors[name][tuple(zero)] = 2.0
    save_file(tensors, file, metadata={"format": "pt"})
    result = verify(out)
    assert result.exit_code == 1
    assert f"{name[:-7]}: breaks 2:4 in 1 of 512 scopes" in result.output
    assert "in 1 of 21 layers" in result.output


def _names(path):
    return load_file(path) if path.suffix == ".safetensors" else ()


def test_masks_are_held_where_the_pattern_is(pruned):
    """Another choice of two of four obeys the pattern and not the mask."""
    out = pruned("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name].roll(1, dims=1).reshape(64, 8, 4).roll(1, dims=2).reshape(64, 32)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    bad = [layer for layer in verify_folder(out) if not layer]
    assert [layer.name for layer in bad] == [name[:-7]]
    assert bad[0].outside > 0


def test_a_layer_that_is_gone(pruned):
    out = pruned("llama")
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    result = verify(out)
    assert result.exit_code == 1 and "up_proj: no weight of this name" in result.output
    (bad,) = [layer for layer in json.loads(verify(out, "--json").stdout)["layers"]
              if not layer["obeys"]]  # fmt: skip
    assert bad["name"].endswith("up_proj") and bad["scopes"] is bad["first"] is None


def test_patterns_of_single_layers(pruned):
    out = pruned("llama", layers={"*.down_proj": {"pattern": "4:8"}}, skip="*.layers.1.*")
    layers = verify_folder(out)
    assert len(layers) == 14 and all(layers)
    assert {x.pattern.label for x in layers if "down_proj" in x.name} == {"4:8"}
    result = verify(out)
    assert result.exit_code == 0 and result.output.count("obeys") == 2
    result = verify(out, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["obeys"]
    assert verify(out, "--pattern", "1:4").exit_code == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_models(pruned, tmp_path, family):
    layers = {"*down_proj*": {"pattern": "4:8"}} if family == "llama" else {}
    pack_folder(pruned(family, layers=layers, save_dtype="bfloat16"), tmp_path / "packed")
    packed = tmp_path / "packed"
    layers = verify_folder(packed)
    assert len(layers) == (21 if family == "llama" else 12) and all(layers)
    assert all(layer.outside == 0 for layer in layers)
    # An index of another layer: the pattern is obeyed still, the mask is not.
    kind = "mlp.up_proj" if family == "llama" else "mlp.c_fc"
    one, other = (n for n in sorted(_names(packed / "model.safetensors")) if f"{kind}.index" in n
                  and ".2." not in n)  # fmt: skip
    tensors = load_file(packed / "model.safetensors")
    tensors[one] = tensors[other].clone()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    (bad,) = [layer for layer in verify_folder(packed) if not layer]
    assert bad.name == one.removesuffix(".index") and bad.found and bad.outside


def test_folders_without_a_report(source):
    result = verify(source)
    assert result.exit_code == 2 and "found no cuobs_report.json" in result.output
    (source / "cuobs_report.json").write_text(json.dumps({"blocks": []}))
    assert "found no report of pruning" in verify(source).output


def test_without_torch(pruned):
    out = pruned("gpt2")
    code = (
        "import sys; from cuobs_cli import main\n"
        f"try: main(['verify', {str(out)!r}])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and "obeys 2:4" in done.stdout
