"""Perplexity."""

import pytest
import torch
from small_models import make_model, make_tokens

from cuobs.models import perplexity


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
