"""What DST stores is what SRC stores: names, shapes, dtypes, and every bit that was not pruned."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, make_model, make_source, make_tokens

import cuobs
from cuobs.models import load_masks, load_model, prune_folder
from cuobs.models.checkpoints import source as module
from cuobs.models.checkpoints.destination import changed_tensors, finish
from cuobs.models.checkpoints.names import ignored, match
from cuobs.models.checkpoints.source import find_source

FAST = {"device": "cpu", "method": "wanda", "target": "pruned"}


@pytest.fixture
def calibration(tmp_path):
    """A file of calibration windows."""
    np.savez(tmp_path / "tokens.npz", windows=make_tokens(4))
    return f"{tmp_path / 'tokens.npz'}:windows"


def tensors_in(folder):
    """All tensors of the weights of a folder, whatever the form."""
    found = {}
    for path in folder.glob("*.safetensors"):
        if path.name != "cuobs_masks.safetensors":
            found |= load_file(path)
    for path in folder.glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    return found


def edit(folder, change):
    """Change the tensors of a folder that holds them in one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def save(model, folder, name=None):
    """A model in one file of safetensors, with its class as the config's architecture."""
    model.save_pretrained(folder)
    if name:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    return folder


def check(source, out, report):
    """DST holds the tensors of SRC, those of pruned linears with their zeros."""
    before, after = tensors_in(source), tensors_in(out)
    assert after.keys() == before.keys()
    pruned = {f"{row.name}.weight": row for row in report.layers if row.loss is not None}
    assert pruned and pruned.keys() <= after.keys()
    upside_down = json.loads((source / "config.json").read_text())["model_type"] == "gpt2"
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and after[name].dtype == tensor.dtype, name
        if name not in pruned:
            assert torch.equal(after[name], tensor), name
            continue
        assert not torch.equal(after[name], tensor), name
        upright = after[name].T if upside_down else after[name]
        assert tuple(upright.shape) == pruned[name].shape
        assert cuobs.verify(upright.contiguous(), "2:4"), name
    return before, after


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family, tmp_path, calibration):
    source = make_source(tmp_path / "source", family)
    report = prune_folder(source, tmp_path / "out", calibration, **FAST)
    check(source, tmp_path / "out", report)
    assert report.carried == []


def test_tensors_that_the_class_ignores(tmp_path, calibration):
    """Heads for further tokens, buffers of older versions: transformers drops them unsaid."""
    source = save(make_model("llama"), tmp_path / "source")
    extra = {
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(64, 32),  # like a linear that is pruned
        "mtp.norm.weight": torch.ones(32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0).half(),
        "steps": torch.tensor(7),
    }
    edit(source, lambda tensors: tensors.update(extra))
    lines = []
    report = prune_folder(source, tmp_path / "out", calibration, **FAST, say=lines.append)
    check(source, tmp_path / "out", report)
    assert sorted(report.carried) == sorted(extra)
    assert any("carried over 4 tensors that LlamaForCausalLM does not hold" in s for s in lines)
    assert json.loads((tmp_path / "out" / "cuobs_report.json").read_text())["carried"]


@pytest.mark.parametrize("stored", ["both", "head", "embedding"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tied_tensors(tmp_path, calibration, stored, form):
    """As many copies out as in, and none is said to be ignored."""
    source = tmp_path / "source"
    model = make_model("llama", tie_word_embeddings=True)
    save(model, source)
    weight = model.lm_head.weight.data
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.embed_tokens.weight", None)
    if stored != "head":
        tensors["model.embed_tokens.weight"] = weight
    if stored != "embedding":
        tensors["lm_head.weight"] = weight.clone() if form == "safetensors" else weight
    if form == "safetensors":
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    else:
        os.unlink(source / "model.safetensors")
        torch.save(tensors, source / "pytorch_model.bin")
    report = prune_folder(source, tmp_path / "out", calibration, **FAST)
    check(source, tmp_path / "out", report)
    assert report.carried == []
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, weight)


def test_names_without_the_prefix_of_the_class(tmp_path, calibration):
    """As GPT-2 was published: names of the base model, and masks that are no weights."""
    source = save(make_model("gpt2"), tmp_path / "source")

    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.uint8))

    edit(source, older)
    report = prune_folder(source, tmp_path / "out", calibration, save_masks=True, **FAST)
    before, _ = check(source, tmp_path / "out", report)
    assert "h.0.attn.c_attn.weight" in before and report.carried == ["h.0.attn.bias"]
    assert {f"{name}.weight" for name in load_masks(tmp_path / "out")} <= before.keys()


def test_names_of_a_class_with_a_prefix_too_many(tmp_path, calibration):
    """A base model whose files were written by the class with a head."""
    source = save(make_model("llama"), tmp_path / "source", "LlamaModel")
    report = prune_folder(source, tmp_path / "out", calibration, **FAST)
    check(source, tmp_path / "out", report)
    assert report.carried == ["lm_head.weight"]
    assert report.layers[0].name.startswith("model.layers.0.")


def vision_language(**changes):
    """A tiny Gemma 3 with a vision tower whose layers are named like the text's."""
    text = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "sliding_window": 8,
        "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, **changes}, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_a_vision_tower_is_kept_and_names_are_those_of_the_files(tmp_path, calibration):
    # More weights in the tower than in the text: what reads the text is what is pruned.
    model = vision_language(num_hidden_layers=4, intermediate_size=256)
    source = save(model, tmp_path / "source")
    report = prune_folder(source, tmp_path / "out", calibration, save_masks=True, **FAST)
    before, after = check(source, tmp_path / "out", report)
    names = {f"{row.name}.weight" for row in report.layers}
    assert names <= before.keys() and not any("vision" in name for name in names)
    assert {f"{name}.weight" for name in load_masks(tmp_path / "out")} == names
    opened = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(opened).__name__ == "Gemma3ForConditionalGeneration"


def test_a_head_that_is_no_language_model(tmp_path, calibration):
    config = make_model("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    source = save(model, tmp_path / "source")
    report = prune_folder(source, tmp_path / "out", calibration, **FAST)
    _, after = check(source, tmp_path / "out", report)
    assert torch.equal(after["score.weight"], model.score.weight.data)


def test_what_is_renamed_while_it_is_loaded(tmp_path, calibration):
    """GPT-NeoX: the files say embed_out where the class says lm_head."""
    config = transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    source = save(transformers.GPTNeoXForCausalLM(config), tmp_path / "source")

    def published(tensors):
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")

    if "lm_head.weight" in tensors_in(source):
        edit(source, published)
    report = prune_folder(source, tmp_path / "out", calibration, **FAST)
    check(source, tmp_path / "out", report)
    assert report.carried == []


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(tmp_path, calibration, shards):
    source = tmp_path / "source"
    save(make_model("qwen2").bfloat16(), source)
    tensors = load_file(source / "model.safetensors")
    os.unlink(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    names = [f"pytorch_model-{i + 1:05}-of-00003.bin" for i in range(shards)]
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    if shards == 1:
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        for name, part in zip(names, parts, strict=True):
            torch.save(part, source / name)
        index = {k: name for name, part in zip(names, parts, strict=True) for k in part}
        content = json.dumps({"metadata": {}, "weight_map": index})
        (source / "pytorch_model.bin.index.json").write_text(content)
    report = prune_folder(source, tmp_path / "out", calibration, shard_size="20KB", **FAST)
    check(source, tmp_path / "out", report)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_index_and_shards(source, tmp_path, calibration):
    prune_folder(source, tmp_path / "out", calibration, shard_size="20KB", **FAST)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in out.glob("model-*.safetensors")}
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}
    sizes = [sum(t.nbytes for t in part.values()) for part in held.values()]
    assert max(sizes) <= 20_000 and index["metadata"]["total_size"] == sum(sizes)
    transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_save_dtype(tmp_path, calibration, dtype):
    source = save(make_model("llama").bfloat16(), tmp_path / "source")
    edit(source, lambda tensors: tensors.update(steps=torch.tensor(7)))
    report = prune_folder(source, tmp_path / "out", calibration, save_dtype=dtype, **FAST)
    after = tensors_in(tmp_path / "out")
    assert {t.dtype for n, t in after.items() if n != "steps"} == {getattr(torch, dtype)}
    assert after["steps"].dtype == torch.int64
    for row in report.layers:
        assert cuobs.verify(after[f"{row.name}.weight"], "2:4")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert opened.dtype == getattr(torch, dtype)


def test_save_dtype_that_can_not_hold_a_weight(tmp_path, calibration):
    model = make_model("llama")
    model.model.norm.weight.data[3] = 1e6
    source = save(model, tmp_path / "source")
    with pytest.raises(ValueError, match=r"model.norm.weight: found weights up to 1e\+06"):
        prune_folder(source, tmp_path / "out", calibration, save_dtype="float16", **FAST)
    # not lost: the blocks are there, and the dtype decides nothing about them
    report = prune_folder(source, tmp_path / "out", calibration, resume=True, **FAST)
    assert all(block.resumed for block in report.blocks)


def test_further_files_with_weights(source, tmp_path, calibration):
    dense = {"linear.weight": torch.randn(4, 4)}
    (source / "1_Dense").mkdir()
    save_file(dense, source / "1_Dense" / "model.safetensors")
    torch.save(dense, source / "1_Dense" / "pytorch_model.bin")
    save_file(tensors_in(source), source / "model.fp32.safetensors")
    save_file(dense, source / "mtp.safetensors")
    for name in ("model.onnx", "tf_model.h5", "consolidated.safetensors", "x.gguf"):
        (source / name).write_bytes(b"dense")
    (source / ".gitattributes").write_text("*.safetensors filter=lfs")
    lines = []
    report = prune_folder(source, tmp_path / "out", calibration, **FAST, say=lines.append)
    out = tmp_path / "out"
    for name in ("1_Dense/model.safetensors", "1_Dense/pytorch_model.bin", "mtp.safetensors"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    left = {"model.onnx", "tf_model.h5", "consolidated.safetensors", "x.gguf", ".gitattributes"}
    assert left | {"model.fp32.safetensors"} == report.left_out.keys()
    assert not any((out / name).exists() for name in report.left_out)
    assert any("left out     model.fp32.safetensors: the same tensors again" in s for s in lines)
    assert "left out     .gitattributes: hidden" in lines
    assert any(s.startswith("carried over mtp.safetensors, 1_Dense/model") for s in lines)


def test_a_folder_behind_a_link_is_carried(source, tmp_path, calibration):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "tool.jinja").write_text("{{ x }}")
    (source / "templates").symlink_to(tmp_path / "templates")
    (source / "again").symlink_to(tmp_path / "templates")
    prune_folder(source, tmp_path / "out", calibration, **FAST)
    for name in ("templates", "again"):
        assert (tmp_path / "out" / name / "tool.jinja").read_text() == "{{ x }}"


def refused(source, tmp_path, calibration, match, error=ValueError, **more):
    """SRC is refused in one sentence before anything is loaded or written."""
    with pytest.raises(error, match=match) as caught:
        prune_folder(source, tmp_path / "out", calibration, **FAST, **more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_copied(source, tmp_path, calibration):
    os.mkfifo(source / "pipe")
    refused(source, tmp_path, calibration, "pipe: found something that is neither")
    os.unlink(source / "pipe")
    (source / "deeper").mkdir()
    (source / "deeper" / "up").symlink_to(source)
    refused(source, tmp_path, calibration, "found .*up inside itself")


@pytest.mark.parametrize(
    "name,tensor",
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 32).to(torch.float8_e4m3fn)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 32, dtype=torch.int8)),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, 4, dtype=torch.int32)),
        ("model.layers.0.self_attn.k_proj.k_scale", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.scale", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.scale_inv", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.scale_weight", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.weight.scales", torch.ones(64)),
        ("model.layers.0.mlp.experts.up_proj_blocks", torch.ones(4, 2, 16, dtype=torch.uint8)),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_quantized_tensors_are_refused(tmp_path, calibration, name, tensor, form):
    source = save(make_model("llama"), tmp_path / "source")
    edit(source, lambda tensors: tensors.update({name: tensor}))
    if form == "bin":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        os.unlink(source / "model.safetensors")
    refused(source, tmp_path, calibration, f"found {name} .*quantised")


def test_scales_that_are_weights(tmp_path, calibration):
    """A temperature, a scale of a layer: no sign of codes."""
    source = save(make_model("llama"), tmp_path / "source")
    extra = {
        "logit_scale": torch.ones(1), "model.layers.0.layer_scale": torch.ones(32),
        "model.layers.0.input_layernorm.scale": torch.ones(32),
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),  # a causal mask
    }  # fmt: skip
    edit(source, lambda tensors: tensors.update(extra))
    report = prune_folder(source, tmp_path / "out", calibration, **FAST)
    assert sorted(report.carried) == sorted(extra)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "adapter_config.json"])
def test_files_that_say_it_is_no_plain_model(source, tmp_path, calibration, name):
    (source / name).write_text("{}")
    refused(source, tmp_path, calibration, name)


def test_scales_of_codes_that_stand_in_another_file(tmp_path, calibration):
    """As the codes of 4 bits lie that only their names tell from other integers."""
    source = save(make_model("llama"), tmp_path / "source")
    name = "model.layers.0.mlp.experts.up_proj"
    extra = {f"{name}_scales": torch.ones(4, 2, dtype=torch.uint8), name: torch.ones(4, 8)}
    edit(source, lambda tensors: tensors.update(extra))
    refused(source, tmp_path, calibration, f"found {name}_scales .*quantised")


def test_an_adapter_alone_says_how_it_becomes_a_model(tmp_path, calibration):
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    (source / "adapter_model.safetensors").write_bytes(b"")
    refused(source, tmp_path, calibration, r"an adapter for me/base .*merge_and_unload\(\)")


def test_hidden_files_are_told(source, tmp_path, calibration):
    (source / ".gitattributes").write_text("*.bin filter=lfs")
    (source / ".cache").mkdir()
    said = []
    report = prune_folder(source, tmp_path / "out", calibration, **FAST, say=said.append)
    assert "left out     .cache, .gitattributes: hidden" in said
    assert report.left_out == {".cache": "hidden", ".gitattributes": "hidden"}


def test_nested_quantization_is_refused(source, tmp_path, calibration):
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path, calibration, "quantization_config")


def change_config(source, **changes):
    """Change entries of a folder's config."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def test_architectures_that_are_refused(source, tmp_path, calibration):
    change_config(source, architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    refused(source, tmp_path, calibration, "an encoder with a decoder")
    change_config(source, architectures=["NeverHeardOfForCausalLM"], is_encoder_decoder=False)
    refused(source, tmp_path, calibration, "the architecture NeverHeardOfForCausalLM")


CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

open(os.environ["CUOBS_TEST_RAN"], "w").write("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


AUTO = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that such code writes where it is run."""
    monkeypatch.setenv("CUOBS_TEST_RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    return tmp_path / "ran"


def bring_code(source, auto_map=AUTO, **changes):
    """Have a folder bring code of its own for its model."""
    (source / "own.py").write_text(CODE)
    change_config(source, auto_map=auto_map, **changes)


def test_code_of_a_folder_is_not_run(source, tmp_path, calibration, ran):
    bring_code(source, architectures=["OwnForCausalLM"], model_type="own")
    refused(source, tmp_path, calibration, "runs code of its own .*--trust-remote-code")
    assert not ran.exists()
    report = prune_folder(source, tmp_path / "out", calibration, trust_remote_code=True, **FAST)
    assert ran.exists() and (tmp_path / "out" / "own.py").read_text() == CODE
    check(source, tmp_path / "out", report)


def test_code_of_a_folder_may_name_its_class_as_transformers_does(
    source, tmp_path, calibration, ran
):
    bring_code(source, architectures=["LlamaForCausalLM"], model_type="own")
    refused(source, tmp_path, calibration, "runs code of its own .*--trust-remote-code")
    refused(source, tmp_path, calibration, "runs code of its own", dry_run=True)
    assert not ran.exists()
    report = prune_folder(source, tmp_path / "out", calibration, trust_remote_code=True, **FAST)
    assert ran.exists()
    check(source, tmp_path / "out", report)
    # transformers has this kind of model itself, and takes that where code is not trusted.
    ran.unlink()
    change_config(source, model_type="llama")
    prune_folder(source, tmp_path / "plain", calibration, **FAST)
    assert not ran.exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_code_of_a_folder_without_an_architecture_is_not_run(
    source, tmp_path, calibration, monkeypatch, ran, dry_run
):
    """transformers knows the config, and asks for the model alone."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    auto = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    bring_code(source, architectures=None, model_type="clip_text_model", auto_map=auto)
    said = "runs code of its own .*--trust-remote-code"
    refused(source, tmp_path, calibration, said, dry_run=dry_run)
    assert not ran.exists()


def test_code_of_a_tokenizer_is_not_run(source, tmp_path, monkeypatch, ran):
    (source / "tok.py").write_text(CODE)
    path = source / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tok.Own", None]}}
    path.write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("w3 w4 " * 200)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refused(source, tmp_path, str(tmp_path / "text.txt"), "no tokenizer that opens .*trust")
    assert not ran.exists()


def test_linears_that_lie_in_the_files_in_another_form(tmp_path, calibration, monkeypatch):
    """Where loading computes a weight, it could not be written back."""
    source = save(make_model("llama"), tmp_path / "source")
    whole = load_model(source)
    whole.model.layers[1].mlp.up_proj.weight.data *= 2
    monkeypatch.setattr("cuobs.models.checkpoints.loading.load_model", lambda *_: whole)
    refused(source, tmp_path, calibration, "layers.1.mlp.up_proj is put together")
    monkeypatch.undo()
    prune_folder(source, tmp_path / "out", calibration, skip="*.layers.1.mlp.up_proj", **FAST)


def test_finish_with_an_untied_head_and_other_names(tmp_path):
    """What rotations and packing need: a tensor more, others by new names, another config."""
    source = find_source(save(make_model("llama", tie_word_embeddings=True), tmp_path / "source"))
    model = load_model(source)
    names = match(model, source, source.stored)
    assert ignored(source.stored, names, model) == []
    assert changed_tensors(model, source, names) == {}
    head = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    model.lm_head.weight = head
    model.model.norm.weight.data.fill_(1)
    changed = changed_tensors(model, source, names)
    assert changed.keys() == {"lm_head.weight", "model.norm.weight"}
    key = "model.layers.0.mlp.up_proj"
    changed |= {f"{key}.values": torch.ones(64, 16), f"{key}.indices": torch.ones(64, 8).byte()}
    finish(
        source, tmp_path / "out", changed, dropped=[f"{key}.weight"],
        config={**source.config, "tie_word_embeddings": False}, extra={"note.txt": "x"},
    )  # fmt: skip
    before, after = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "out")
    assert before.keys() ^ after.keys() == {
        "lm_head.weight", f"{key}.weight", f"{key}.values", f"{key}.indices"
    }  # fmt: skip
    assert torch.equal(after["lm_head.weight"], head.data)
    assert bool((after["model.norm.weight"] == 1).all())
    assert after[f"{key}.indices"].dtype == torch.uint8
    assert (tmp_path / "out" / "note.txt").read_text() == "x"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**source.config, "tie_word_embeddings": False}


def test_hub_cache(source, tmp_path, calibration, monkeypatch):
    """A name of the Hub is looked up in its cache, which is not asked for more."""
    pytest.importorskip("huggingface_hub")
    cache = tmp_path / "hub"
    snapshot = cache / "models--me--tiny" / "snapshots" / "abc"
    shutil.copytree(source, snapshot)
    (cache / "models--me--tiny" / "refs").mkdir()
    (cache / "models--me--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    report = prune_folder("me/tiny", tmp_path / "out", calibration, **FAST)
    check(source, tmp_path / "out", report)
    assert report.protocol["source"] == "me/tiny"
    assert "base_model: me/tiny\n" in (tmp_path / "out" / "README.md").read_text()
    refused("me/none", tmp_path / "none", calibration, "in the Hub's cache", FileNotFoundError)


def test_headers_are_read_once(source, tmp_path, calibration, monkeypatch):
    read, header = [], module.safetensors_header

    def reading(folder, name):
        read.append(name)
        return header(folder, name)

    monkeypatch.setattr(module, "safetensors_header", reading)
    prune_folder(source, tmp_path / "out", calibration, evaluate=[calibration], **FAST)
    assert sorted(read) == sorted(path.name for path in source.glob("model*.safetensors"))
