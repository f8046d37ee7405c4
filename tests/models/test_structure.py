"""Blocks, groups and writers, found by structure."""

import types

import pytest
import torch
from small_models import make_model, make_tokens

from cuobs.models.blocks import capture, windows_of
from cuobs.models.pruning.groups import probe
from cuobs.models.structure import find_blocks, linears, oriented, shared_weights

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
GROUPS = {
    "opt": (QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
}
WRITERS = {
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    # a norm stands between these and the residual stream
    "gemma2": (),
    "gemma3": (),
}


def plan_of(model):
    _, blocks = find_blocks(model)
    entry = capture(model, blocks, [(torch.tensor(make_tokens(2)), None)], "cpu")
    return probe(blocks[0], entry.hidden[0][:1], windows_of(entry.calls[0][0], 0, 1, 2))


def test_groups_and_writers(family):
    plan = plan_of(make_model(family))
    assert tuple(group.names for group in plan.groups) == GROUPS.get(family, GATED)
    assert plan.writers == WRITERS.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    assert plan.idle == ()
    if plan.writers:
        assert plan.groups[1].before == ()
        assert plan.groups[3].before == (plan.writers[0],)


def test_writers_do_not_depend_on_the_dtype():
    assert plan_of(make_model("llama").bfloat16()) == plan_of(make_model("llama"))


def test_norm_after_the_addition_leaves_no_writers():
    assert plan_of(make_model("opt", do_layer_norm_before=False)).writers == ()


def test_linear_that_is_not_run():
    model = make_model("llama")
    model.model.layers[0].spare = torch.nn.Linear(32, 32)
    assert plan_of(model).idle == ("spare",)


def test_find_blocks(family):
    name, blocks = find_blocks(make_model(family))
    assert len(blocks) == 3
    expected = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}
    assert name == expected.get(family, "model.layers")


def test_transposed_weight():
    model = make_model("gpt2")
    module = linears(model)["transformer.h.0.mlp.c_fc"]
    assert tuple(module.weight.shape) == (32, 128)
    assert tuple(oriented(module).shape) == (128, 32)
    x = torch.randn(5, 32)
    torch.testing.assert_close(module(x), x @ oriented(module).T + module.bias)


def test_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match="mixture of experts in model.layers.0"):
        find_blocks(make_model("mixtral"))


def test_list_of_experts_is_refused():
    model = make_model("llama")
    model.model.layers[1].mlp.experts = torch.nn.ModuleList(
        torch.nn.Linear(32, 32) for _ in range(4)
    )
    with pytest.raises(ValueError, match=r"mixture of experts in model.layers.1 \(mlp.experts\)"):
        find_blocks(model)


def test_linear_that_sees_some_tokens_is_refused():
    model = make_model("llama")
    mlp = model.model.layers[0].mlp

    def some(self, x):
        return torch.cat([type(self).forward(self, x[:, :5]), x[:, 5:]], dim=1)

    mlp.forward = types.MethodType(some, mlp)
    with pytest.raises(ValueError, match="mlp.gate_proj sees 5 of 24 tokens"):
        plan_of(model)


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def test_shared_weights():
    model = make_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    assert shared_weights(model, "model.layers", layers) == {
        (1, "mlp.up_proj"): "model.layers.2.mlp.up_proj.weight",
        (2, "mlp.up_proj"): "model.layers.1.mlp.up_proj.weight",
    }
