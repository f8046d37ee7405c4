"""Windows that a model writes itself."""

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, make_model, same, weights_of

from cuobs.models import write_windows
from cuobs.models.tokens import writing
from cuobs.models.tokens.calibration import self_written

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def greedy(model, first, length):
    """What a model says is likeliest, by whole forwards."""
    tokens = torch.tensor(first)[:, None]
    with torch.no_grad():
        while tokens.shape[1] < length:
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(2)], 1)
    return tokens.numpy()


@pytest.mark.parametrize("length", [8, 30])
def test_a_cold_model_says_what_is_likeliest(family, length, monkeypatch):
    """Beyond a stride, and beyond the sliding window of those models that have one."""
    monkeypatch.setattr(writing, "STRIDE", 7)
    model = make_model(family)
    before, mode = weights_of(model), model.config._attn_implementation
    found = write_windows(model, 5, length, temperature=1e-4, batch=2)
    assert found.shape == (5, length) and found.dtype == np.int64
    assert (found == greedy(model, found[:, 0], length)).all()
    assert same(before, weights_of(model)) and model.config._attn_implementation == mode


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_steps_with_keys_and_values_in_one_place_are_taken(family):
    model = make_model(family)
    first = np.arange(3, 8)
    assert writing._Steps.of(model, 8, first, torch.device("cpu"))
    sliding = make_model("mistral")
    assert writing._Steps.of(sliding, 8, first, torch.device("cpu"))
    assert writing._Steps.of(sliding, 9, first, torch.device("cpu")) is None


def test_tokens_are_drawn_from_what_the_model_gives():
    model = make_model("llama")
    found = write_windows(model, 6000, 3, batch=1000)
    with torch.no_grad():
        shares = model(input_ids=torch.tensor(found)).logits.softmax(-1).numpy()
    for place in (0, 1):  # the expected and the found number of each token, one place later
        expected = shares[:, place].sum(0)
        counts = np.bincount(found[:, place + 1], minlength=VOCABULARY)
        spread = np.sqrt((shares[:, place] * (1 - shares[:, place])).sum(0)) + 1
        assert np.abs((counts - expected) / spread).max() < 5
    # and each window its own: a token is as likely as the model says of that window
    own = np.take_along_axis(shares[:, 0], found[:, 1:2], 1).mean()
    assert own == pytest.approx((shares[:, 0] ** 2).sum(1).mean(), rel=0.1)


def test_first_tokens_are_drawn_without_special_ones():
    model = make_model("llama")
    found = set(write_windows(model, 3000, 2, special=[5, 7], batch=1500)[:, 0].tolist())
    assert found == set(range(VOCABULARY)) - {0, 1, 2, 5, 7}


def test_a_seed_gives_its_windows_again():
    model = make_model("llama")
    one, again, other = (write_windows(model, 6, 12, seed=seed, batch=4) for seed in (1, 1, 2))
    assert (one == again).all() and (one != other).any(axis=1).all()


def test_progress():
    seen = []
    write_windows(make_model("llama"), 5, 4, batch=3, progress=lambda *place: seen.append(place))
    assert seen == [(3, 15), (6, 15), (9, 15), (11, 15), (13, 15), (15, 15)]


def test_a_calibration_that_the_model_writes():
    assert [self_written(s) for s in ("self", "self:7", "text.txt", "self.txt")] == [
        1024, 7, None, None,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="self:0: found 0"):
        self_written("self:0")
    for spec in ("self:", "self:x", "self:-1", "self:1.5"):
        with pytest.raises(ValueError, match=f"{spec}: found '{spec[5:]}', expected a number of"):
            self_written(spec)


def test_bad_arguments():
    model = make_model("llama")
    for changes, match in (
        ({"windows": 0}, "windows: found 0"),
        ({"length": 1}, "length: found 1"),
        ({"length": 65}, "length: found 65, expected at most 64, the model's longest"),
        ({"temperature": 0}, "temperature: found 0, expected a positive number"),
        ({"seed": -1}, "seed: found -1"),
        ({"special": range(97)}, "special: found the whole vocabulary"),
    ):
        with pytest.raises(ValueError, match=match):
            write_windows(model, **{"windows": 2, "length": 4, **changes})


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("length", [8, 30])
def test_on_a_gpu_a_cold_model_says_what_is_likeliest(family, length, monkeypatch):
    """In half precision: nearly always, and where it does not it is nearly as likely."""
    monkeypatch.setattr(writing, "STRIDE", 7)
    model = make_model(family)
    before = weights_of(model)
    found = write_windows(model, 40, length, temperature=1e-4, batch=20, device="cuda")
    assert same(before, weights_of(model)) and next(model.parameters()).device.type == "cpu"
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(found)).logits[:, :-1]
    taken = logits.gather(2, torch.tensor(found)[:, 1:, None])[..., 0]
    short = logits.max(2).values - taken
    assert short.max() < 0.1 * logits.std() and (short == 0).double().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one_writes_the_same():
    model, options = make_model("llama").to("cuda:1"), {"batch": 4, "device": "cuda:1"}
    with torch.cuda.device(1):
        expected = write_windows(model, 8, 20, **options)
    assert np.array_equal(write_windows(model, 8, 20, **options), expected)


@pytest.mark.gpu
@GPU
def test_steps_are_recorded_on_a_gpu():
    model = make_model("llama").cuda()
    first, device = np.arange(3, 11), torch.device("cuda")
    with torch.no_grad():
        steps = writing._Steps.of(model, 8, first, device)
        logits = steps.begin(8)
        tokens = torch.from_numpy(first).cuda()[:, None]
        found = logits(tokens, 0).clone()
        expected = model(input_ids=tokens).logits[:, -1]
    assert steps._recorded[8].__name__ == "replay"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
