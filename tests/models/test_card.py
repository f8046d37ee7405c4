"""The card of a pruned model."""

import numpy as np
import pytest
import yaml
from small_models import make_source, make_tokens

from cuobs.models import ModelReport, prune_folder
from cuobs.models.checkpoints.card import MARK, model_card, stored_otherwise
from cuobs.models.report import BlockReport, DistillationReport, LayerReport

ORIGINAL = """---
license: apache-2.0
tags:
- chat
model-index:
- name: tiny
  results: []
---

# Tiny

A model that says *w3*.
"""


def report(**changes):
    settings = {
        "pattern": "2:4", "pattern_view": "2:4", "method": "admm", "damp": 0.01, "tune": 2,
        "target": "mixed", "dense_share": (0.5, 0.5), "residual_share": (0.25, 0.75),
    }  # fmt: skip
    rows = [LayerReport("m.0.a", (4, 8), loss=0.25, sparsity=0.5), LayerReport("m.0.b", (4, 8))]
    protocol = {"source": "/home/me/tiny", "calibration": "/home/me/a|b.txt", "windows": 3,
                "length": 24, "evaluated": {"t": [4, 24]}}  # fmt: skip
    return ModelReport(
        settings, protocol, [BlockReport(0, rows)], perplexity={"t": (10.0, 12.345)}, **changes
    )


def parts(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_below_the_original():
    head, body = parts(model_card(report(), ORIGINAL, base_model="me/tiny"))
    assert head["license"] == "apache-2.0" and head["model-index"] == [
        {"name": "tiny", "results": []}
    ]
    assert head["tags"] == ["chat", "cuobs", "pruned", "2:4"]
    assert head["base_model"] == "me/tiny" and head["library_name"] == "transformers"
    assert body.startswith("\n# Tiny\n\nA model that says *w3*.") or body.startswith("# Tiny")
    assert body.index("# Tiny") < body.index(MARK) < body.index("## Pruned by cuobs")
    for text in (
        "| base model | tiny |", "| pattern | 2:4: keep 2 of 4 |", "admm, damping 0.01",
        "dense share 0.5, residual share 0.25 to 0.75", "a\\|b.txt: 3 windows of 24 tokens",
        "1 of 2 linear layers", "25.00% of their weights", "| t | 10.00 | 12.35 | 4 of 24 tokens |",
        "AutoModelForCausalLM.from_pretrained",
    ):  # fmt: skip
        assert text in body, text
    assert "/home/me" not in body


def test_what_a_distilled_model_says():
    done = DistillationReport({"passes": 3}, 9, 1, 4, divergence=[0.5, 0.2, 0.3], kept=1)
    found = report(distillation=done, perplexity_pruned={"t": 15.0})
    found.protocol["calibration"] = {"/home/me/a.txt": 3, "self:7": 7}
    body = model_card(found)
    for text in (
        "| distilled | KL 0.5000 before, 0.2000 after (pass 1 of 3) |",
        "windows of 24 tokens: 3 of a.txt, 7 of self:7, pruned by 3 of them |",
        "| text | dense | pruned | distilled | windows |",
        "| t | 10.00 | 15.00 | 12.35 | 4 of 24 tokens |",
    ):
        assert text in body, text
    done.kept = 0
    assert "| distilled | KL 0.5000 before, 0.5000 after (none of it kept) |" in model_card(found)


def test_once_however_often():
    once = model_card(report(), ORIGINAL)
    assert model_card(report(), once) == once
    assert model_card(report()).count(MARK) == 1


@pytest.mark.parametrize("head", ["a: [", "- list", "\t"])
def test_metadata_that_is_none_is_kept(head):
    card = model_card(report(), f"---\n{head}\n---\nText\n")
    assert "Text\n\n" + MARK in card
    if head.strip():
        assert card.startswith(f"---\n{head}\n---\n")


def test_metadata_that_the_hub_s_own_class_would_lose():
    """If this fails with a later release of it, the card may be made by it."""
    hub = pytest.importorskip("huggingface_hub")
    results = [{"task": {"type": "a"}, "dataset": {"name": "d", "type": "d"},
                "metrics": [{"type": "acc", "value": 1, "of_ours": 3}]}]  # fmt: skip
    head = {"license_name": None, "model-index": [{"name": "t", "results": results}]}
    original = f"---\n{yaml.safe_dump(head)}---\n# Tiny\n"
    assert parts(model_card(report(), original))[0].items() >= head.items()
    assert not yaml.safe_load(hub.ModelCard(original).data.to_yaml()).items() >= head.items()


def test_without_metadata_and_without_perplexity():
    head, body = parts(model_card(report(), "# Only\r\ntext --- here\n---\n"))
    assert head["tags"][0] == "cuobs" and "text --- here" in body
    plain = report()
    plain.perplexity = {}
    assert "Perplexity" not in model_card(plain)


def test_packed():
    card = model_card(report(), packed=True)
    assert "stored dense" not in card and "import cuobs.models" in card


def test_a_card_that_cuobs_did_not_write_stays_when_a_model_is_packed():
    dense = model_card(report(), ORIGINAL, "OPTForCausalLM")
    packed = stored_otherwise(report(), dense, packed=True)
    assert packed == model_card(report(), ORIGINAL, "OPTForCausalLM", packed=True)
    assert stored_otherwise(report(), packed, packed=False) == dense
    assert stored_otherwise(report(), ORIGINAL, packed=True) == ORIGINAL


def test_in_the_folder(tmp_path):
    source = make_source(tmp_path / "source")
    (source / "README.md").write_bytes(ORIGINAL.encode() + b"caf\xe9")  # no UTF-8
    np.savez(tmp_path / "t.npz", t=make_tokens(4))
    tokens = f"{tmp_path / 't.npz'}:t"
    prune_folder(source, tmp_path / "out", tokens, device="cpu", method="wanda", evaluate=[tokens])
    card = (tmp_path / "out" / "README.md").read_bytes()
    assert b"A model that says *w3*.\ncaf\xe9\n\n<!-- cuobs -->" in card
    assert b"| t.npz:t |" in card and b"base_model" not in card
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard(card.decode(errors="replace"))
    assert found.data.tags == ["chat", "cuobs", "pruned", "2:4"]
