"""Perplexity, and the agreement of two models."""

import copy

import pytest
import torch
from small_models import make_model, make_tokens

from cuobs.models import agreement, perplexity
from cuobs.models.distilling import logits


def test_is_that_of_the_models_own_loss(family):
    model, tokens = make_model(family), make_tokens(5)
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor(row)[None], labels=torch.tensor(row)[None]).loss
            for row in tokens
        ]
    expected = float(torch.stack(losses).double().mean().exp())
    assert perplexity(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_batches_do_not_matter():
    model, tokens = make_model("llama"), make_tokens(60, 40)
    one = [torch.tensor(perplexity(model, row[None])).log() for row in tokens]
    expected = float(torch.stack(one).mean().exp())
    assert perplexity(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_progress_and_mode():
    model, seen = make_model("llama").train(), []
    perplexity(model, make_tokens(60, 40), progress=lambda *place: seen.append(place))
    assert seen[-1] == (60, 60) and len(seen) > 1
    assert model.training


def test_bad_tokens():
    model = make_model("llama")
    for tokens, match in (
        (make_tokens(3, 1), "tokens: found windows of 1"),
        (make_tokens(3, 65), "found windows of 65, expected at most 64"),
        (make_tokens()[0], "tokens: found shape"),
        (make_tokens() + 90, "expected 0 to 96, the model's vocabulary"),
    ):
        with pytest.raises(ValueError, match=match):
            perplexity(model, tokens)


def test_agreement_is_that_of_the_whole_logits(family, monkeypatch):
    monkeypatch.setitem(logits.CHUNK, "cpu", 7 * 97)
    dense, tokens, seen = make_model(family), make_tokens(5), []
    model = copy.deepcopy(dense)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        p, q = (
            m(input_ids=torch.tensor(tokens)).logits.double().softmax(-1) for m in (dense, model)
        )
    found = agreement(model, dense, tokens, progress=lambda *place: seen.append(place))
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < found.same_top < 1 and seen == [(5, 10), (10, 10)]


def test_a_model_agrees_with_itself():
    model = make_model("llama").train()
    divergence, same_top = agreement(model, copy.deepcopy(model), make_tokens(60, 40))
    assert abs(divergence) < 1e-6 and same_top == 1 and model.training
