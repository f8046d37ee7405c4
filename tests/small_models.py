"""Tiny random models of each family, from their configs; nothing is downloaded."""

import numpy as np

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "gpt2")
VOCABULARY = 97
BLOCKS = 3


def make_model(family, seed=0, blocks=BLOCKS, **changes):
    """A random model of a family, float32, in evaluation mode."""
    import torch
    import transformers as t

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": blocks, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    heads = {**common, "head_dim": 8}
    mixed = {"layer_types": (["sliding_attention", "full_attention"] * blocks)[:blocks]}
    own = {
        "hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    gpt2 = {
        "n_embd": 32, "n_layer": blocks, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    classes = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, common),
        "mistral": (t.MistralForCausalLM, t.MistralConfig, {**common, "sliding_window": 8}),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, common),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, heads),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {**heads, "sliding_window": 8}),
        "gemma3": (
            t.Gemma3ForCausalLM, t.Gemma3TextConfig, {**heads, "sliding_window": 8, **mixed}
        ),
        "opt": (t.OPTForCausalLM, t.OPTConfig, {**own, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, gpt2),
        "gemma": (t.GemmaForCausalLM, t.GemmaConfig, heads),
        "granite": (
            t.GraniteForCausalLM, t.GraniteConfig,
            {**common, "residual_multiplier": 0.3, "embedding_multiplier": 2.0},
        ),
        "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config, common),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config, common),
        "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {**common, **experts}),
    }  # fmt: skip
    model_class, config_class, arguments = classes[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**arguments, **changes}))
    # As random models come, attention is nearly uniform and biases are zero: wake them up.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prune_all(model, pattern="2:4"):
    """Prune every linear in the blocks of a model by magnitude, in place."""
    import torch

    import cuobs
    from cuobs.models.structure import find_blocks, linears, oriented

    for module in linears(find_blocks(model)[1]).values():
        weight = oriented(module)
        result = cuobs.prune(weight, hessian=np.eye(weight.shape[1]), method="magnitude",
                             pattern=pattern, device="cpu")  # fmt: skip
        weight.copy_(torch.as_tensor(result.weight, dtype=weight.dtype))
    return model


def make_tokens(windows=8, length=24, seed=0):
    """Random token windows."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, (windows, length))


def weights_of(model):
    """The model's tensors by name, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    """Whether two state dicts are equal to the last bit."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_source(path, family="llama", **changes):
    """Save a random model and a tokenizer whose words are w3, w4, ... into a folder."""
    import tokenizers
    import transformers

    model = make_model(family, **changes)
    model.save_pretrained(path, max_shard_size="20KB")
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(
        path
    )
    (path / "LICENSE.txt").write_text("Do as you like.")
    return path
