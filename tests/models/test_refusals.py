"""Models that cannot be pruned block by block are refused before any work, with the reason."""

import pytest
import torch
import torch.nn.utils.prune
import transformers
from small_models import make_model, make_tokens

from cuobs.models import prune_model
from cuobs.models.structure import find_blocks, refuse_mixture
from cuobs.models.tokens.calibration import longest_window


def refused(model, match, tokens=None, **options):
    before = {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}
    with pytest.raises(ValueError, match=match):
        prune_model(model, make_tokens() if tokens is None else tokens, device="cpu", **options)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_limit_in_which_a_linear_does_not_fit_is_refused_before_any_work():
    limit = {"memory_limit": "70KiB", "method": "true-obs"}
    model = make_model("llama")
    model.model.layers[0].register_forward_pre_hook(pytest.fail)
    refused(model, r"layers.0.*: memory_limit: found 70 KiB, expected at least .* true", **limit)
    plenty = prune_model(make_model("llama"), make_tokens(), device="cpu", memory_limit="64MiB")
    assert plenty.layers


def test_masks_of_torch_are_to_be_made_permanent_first():
    model = make_model("llama")
    module = model.model.layers[1].mlp.up_proj
    torch.nn.utils.prune.l1_unstructured(module, "weight", 0.3)
    refused(model, r"layers.1.mlp.up_proj under a mask of torch.nn.utils.prune.*prune.remove")
    torch.nn.utils.prune.remove(module, "weight")
    prune_model(model, make_tokens(), method="magnitude", device="cpu")


def test_parametrizations_are_to_be_taken_off_first():
    model = make_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    refused(model, r"layers.0.mlp.down_proj under a parametrization.*remove_parametrizations")


def test_weights_that_are_computed_by_hooks():
    model = make_model("llama")
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.model.layers[0].mlp.down_proj)
    refused(model, r"layers.0.mlp.down_proj with a weight that is computed.*remove_weight_norm")


def test_weights_that_are_elsewhere():
    model = make_model("llama")
    model.model.layers[2].to("meta")
    refused(model, r"layers.2.self_attn.q_proj on the meta device.*without offloading")


def test_tensor_subclasses():
    class Codes(torch.Tensor):
        pass

    model = make_model("llama")
    module = model.model.layers[0].mlp.gate_proj
    module.weight = torch.nn.Parameter(module.weight.data.as_subclass(Codes))
    refused(model, r"layers.0.mlp.gate_proj with a weight of type Codes.*neither quantized")


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    base = make_model("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    refused(model, r"found an adapter in .*layers.0 \(self_attn.q_proj\).*merge_and_unload")


class Keeps(torch.nn.Module):
    """A block that leaves something for later ones in a place that all of them know."""

    def __init__(self, block, place, takes):
        super().__init__()
        self.block, self.place, self.takes = block, place, takes

    def forward(self, hidden_states, **kwargs):
        out = self.block(hidden_states, **kwargs)
        if self.takes:
            return out + self.place["kept"]
        self.place["kept"] = out.mean(dim=1, keepdim=True) * torch.arange(out.shape[1])[:, None]
        return out


def test_blocks_that_share_state():
    """What later blocks use again is another window's where blocks run one by one."""
    model, place = make_model("llama"), {}
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(
        Keeps(layer, place, index == 2) for index, layer in enumerate(layers)
    )
    refused(model, r"blocks, run one by one, give hidden states that differ by \d")


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="an older transformers")
def test_shared_keys_and_values():
    config = transformers.Gemma4TextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=32, intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        global_head_dim=8, max_position_embeddings=64, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, sliding_window=8, enable_moe_block=False, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    refused(model, "blocks, run one by one, give hidden states that differ")
    refused(model, "blocks, run one by one, give hidden states that differ", make_tokens(1))


def test_weights_of_inference_mode():
    with torch.inference_mode():
        model = make_model("llama")
    refused(model, "made inside torch.inference_mode")


def test_what_is_no_mixture():
    """Small tables of more dimensions, convolutions and lists of linears are left alone."""
    block = torch.nn.Module()
    block.time_mix = torch.nn.Parameter(torch.zeros(1, 1, 32))
    block.conv = torch.nn.Conv1d(32, 32, 4)
    block.adapters = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    refuse_mixture("blocks.0", block)


def test_what_may_be_one_is_named():
    block = torch.nn.Module()
    block.mixer = torch.nn.Module()
    block.mixer.table = torch.nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match=r"a weight of three dimensions in blocks.0 \(mixer.table"):
        refuse_mixture("blocks.0", block)


@pytest.mark.skipif(not hasattr(transformers, "JambaConfig"), reason="no such family")
def test_a_hybrid_with_one_expert_is_pruned():
    config = transformers.JambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, num_experts=1, num_experts_per_tok=1,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.JambaForCausalLM(config).eval()
    find_blocks(model)
    report = prune_model(model, make_tokens(), method="wanda", device="cpu")
    assert {row.sparsity for row in report.layers if row.loss is not None} == {0.5}


def test_positions_that_a_model_has():
    roberta = transformers.RobertaForCausalLM(
        transformers.RobertaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=34, is_decoder=True,
        )  # fmt: skip
    ).eval()
    assert longest_window(roberta) == 32
    refused(roberta, "windows of 34, expected at most 32", make_tokens(length=34))
    prune_model(roberta, make_tokens(length=32), method="wanda", device="cpu")
    mpt = transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=32)
    )
    assert longest_window(mpt) == 32
    llama = make_model("llama")
    llama.config.max_position_embeddings = -1
    assert longest_window(llama) is None
    assert longest_window(make_model("gpt2")) == longest_window(make_model("opt")) == 64


def test_windows_that_the_model_does_not_run_for():
    """Nothing says how long they may be: the model's own error is given, and not batch_tokens."""
    mpt = transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=32)
    ).eval()
    mpt.config.__dict__.pop("max_seq_len")
    mpt.transformer.config = mpt.config

    def build(heads, sequence_length=None, *_, **__):
        return torch.zeros(heads, 1, 32)

    mpt.transformer.build_mpt_alibi_tensor = build
    with pytest.raises(ValueError, match="tokens: found windows that the model itself does not"):
        prune_model(mpt, make_tokens(length=40), device="cpu")


def test_activations_that_overflow_say_what_may_help():
    model = make_model("llama").half()
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *args: args[-1] * 6e4)
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *args: args[-1] * 6e4)
    with pytest.raises(ValueError, match="bfloat16 may hold them"):
        prune_model(model, make_tokens(), method="wanda", device="cpu")
