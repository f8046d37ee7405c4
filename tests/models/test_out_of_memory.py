"""Where the device's memory is too small for a batch, parts of it give the same model."""

import pytest
import torch
from small_models import make_model, make_tokens

from cuobs.models import perplexity, prune_model, targets
from cuobs.models.targets import Moments


def refuse(module, windows):
    """Let a module of a model run out of memory on more windows; how many it was asked for."""
    asked = []

    def look(_, args):
        asked.append(len(args[0]))
        if len(args[0]) > windows:
            raise torch.cuda.OutOfMemoryError("no memory left")

    module.register_forward_pre_hook(look)
    return asked


@pytest.mark.parametrize("tune", [0, 1])
def test_half_the_windows_do_as_well(tune):
    whole, parts = make_model("llama"), make_model("llama")
    asked = [refuse(layer.mlp, 2) for layer in parts.model.layers]
    options = {"method": "sparsegpt", "target": "mixed", "tune": tune, "device": "cpu"}
    expected = prune_model(whole, make_tokens(), **options)
    found = prune_model(parts, make_tokens(), **options)
    assert max(asked[0]) == 8 and set(asked[0]) >= {4, 2}
    for mine, theirs in zip(parts.model.layers, whole.model.layers, strict=True):
        for W, V in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert ((W == 0) == (V == 0)).all()
            torch.testing.assert_close(W, V, rtol=1e-3, atol=1e-4)
    drifts = [[block.drift for block in report.blocks] for report in (found, expected)]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-3)


def test_one_window_that_does_not_fit_is_an_error():
    model = make_model("llama")
    refuse(model.model.layers[1].mlp, 0)
    with pytest.raises(MemoryError, match="memory: a window of 24 tokens"):
        prune_model(model, make_tokens(), method="magnitude", device="cpu")


def test_perplexity():
    model, tokens = make_model("llama"), make_tokens()
    expected = perplexity(model, tokens)
    asked = refuse(model.lm_head, 3)
    assert perplexity(model, tokens) == pytest.approx(expected, rel=1e-6)
    assert asked == [8, 4, 2, 2, 2, 2]
    refuse(model.lm_head, 0)
    with pytest.raises(MemoryError, match="memory: the logits of a window of 24 tokens"):
        perplexity(model, tokens)


def test_no_token_counts_twice(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(11, n, generator=generator) for n in (4, 4, 3, 3)]
    whole, parts = Moments(), Moments()
    whole.update(*rows)
    products, asked = targets._products, []

    def scarce(*rows):
        asked.append(len(rows[0]))
        if len(rows[0]) > 4:
            raise torch.cuda.OutOfMemoryError("no memory left")
        return products(*rows)

    monkeypatch.setattr(targets, "_products", scarce)
    parts.update(*rows)
    assert asked == [11, 5, 2, 3, 6, 3, 3]
    for name in ("hessian", "lost", "residual"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("target, tune", [("pruned", 0), ("mixed", 0), ("mixed", 1)])
def test_predicted_memory_is_about_what_is_used(target, tune):
    """With two heads of keys for eight of queries, attention has no fused kernel in float32."""
    model = make_model(
        "llama", hidden_size=512, intermediate_size=1536, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    report = prune_model(
        model, make_tokens(32, 1024), method="sparsegpt", target=target, tune=tune, device="cuda"
    )
    assert 0.9 * report.memory_peak < report.memory_predicted < 1.5 * report.memory_peak
