"""Tuning a pruned block on its kept weights."""

import copy

import numpy as np
import pytest
import torch
from small_models import make_model, make_tokens

from cuobs.models import prune_model
from cuobs.models.blocks import capture, run
from cuobs.models.pruning import tuning
from cuobs.models.pruning.tuning import tune_block
from cuobs.models.structure import find_blocks, linears


@pytest.fixture
def halves():
    """A block with half of each linear's weights gone, its masks, and what goes in and out."""
    model = make_model("llama")
    ids = torch.tensor(make_tokens(16))
    _, blocks = find_blocks(model)
    entry = capture(model, blocks, [(part, None) for part in ids.split(8)], "cpu")
    with torch.no_grad():
        goals = [
            run(blocks[0], h, c) for h, c in zip(entry.hidden, entry.calls[0], strict=True)
        ]
    block = copy.deepcopy(blocks[0])
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, module in linears(block).items():
        masks[name] = torch.rand(module.weight.shape, generator=generator) < 0.5
        module.weight.data.mul_(masks[name])
    return block, masks, entry.hidden, goals, entry.calls[0]


def error_of(block, hidden, goals, calls, chosen):
    with torch.no_grad():
        outs = torch.cat([run(block, h, c) for h, c in zip(hidden, calls, strict=True)])
    goals = torch.cat(goals)
    lost = (outs - goals)[chosen].norm() / goals[chosen].norm()
    return float(lost)


def test_error_falls_and_masks_hold(halves):
    block, masks, hidden, goals, calls = halves
    chosen = torch.ones(16, 24, dtype=bool)
    chosen[:, 0] = False
    start = error_of(block, hidden, goals, calls, chosen)
    others = {n: p.clone() for n, p in block.named_parameters() if "proj" not in n}
    before, after = tune_block(
        block, masks, hidden, goals, calls, [chosen[:8], chosen[8:]], passes=10, rate=1e-3
    )
    assert before == pytest.approx(start, rel=1e-5)
    assert after == pytest.approx(error_of(block, hidden, goals, calls, chosen), rel=1e-5)
    assert after < 0.9 * before
    for name, module in linears(block).items():
        assert not module.weight[~masks[name]].any()
    assert all(torch.equal(dict(block.named_parameters())[n], p) for n, p in others.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_trains_next_finds_what_learns_as_it_was(halves, dtype):
    block, masks, hidden, goals, calls = halves
    block.to(dtype)
    block.input_layernorm.weight.requires_grad_(False)
    hidden, goals = ([x.to(dtype) for x in xs] for xs in (hidden, goals))
    tune_block(block, masks, hidden, goals, calls, [None, None], passes=1, rate=1e-3)
    frozen = [name for name, p in block.named_parameters() if not p.requires_grad]
    assert frozen == ["input_layernorm.weight"]
    assert all(p.grad is None for p in block.parameters())


def test_what_learns_is_as_it_was_where_tuning_is_interrupted(halves, monkeypatch):
    block, masks, hidden, goals, calls = halves
    before = [parameter.requires_grad for parameter in block.parameters()]
    lost = tuning._lost

    def interrupted(*args):
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return lost(*args)

    monkeypatch.setattr(tuning, "_lost", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_block(block, masks, hidden, goals, calls, [None, None], passes=1, rate=1e-3)
    assert [parameter.requires_grad for parameter in block.parameters()] == before


def test_tokens_that_do_not_count_change_nothing(halves):
    block, masks, hidden, goals, calls = halves
    # Later tokens can't reach earlier ones, so the last one may be anything.
    counts = torch.ones(8, 24, dtype=bool)
    counts[:, -1] = False
    found = []
    for noise in (0, 100):
        mine = copy.deepcopy(block)
        changed = [goal.clone() for goal in goals]
        for goal in changed:
            goal[:, -1] += noise
        tune_block(mine, masks, hidden, changed, calls, [counts, counts], passes=2, rate=1e-3)
        found.append([m.weight.clone() for m in linears(mine).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16_learns_in_float32_and_stays_bfloat16(halves):
    block, masks, hidden, goals, calls = halves
    block = block.bfloat16()
    before, after = tune_block(
        block, masks, hidden, goals, calls, [None, None], passes=5, rate=1e-3
    )
    assert after < before
    assert all(p.dtype == torch.bfloat16 for p in block.parameters())


def test_padding_is_finite_and_takes_no_part(family):
    tokens, mask = make_tokens(), np.ones((8, 24), int)
    mask[::2, :5] = 0
    other = np.where(mask == 0, 3, tokens)
    found = []
    for ids in (tokens, other):
        model = make_model(family, blocks=2)
        report = prune_model(model, ids, attention_mask=mask, tune=2, device="cpu")
        assert all(after <= before for before, after in (b.tuned for b in report.blocks))
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-4)


def test_windows_of_padding_alone_are_left_out():
    """They would give a step of nothing over nothing."""
    tokens, mask = make_tokens(16), np.ones((16, 24), int)
    mask[8:] = 0
    options = {"tune": 1, "drop_first_token": False, "device": "cpu", "batch_tokens": 16 * 24}
    padded = prune_model(make_model("llama", blocks=2), tokens, attention_mask=mask, **options)
    alone = prune_model(make_model("llama", blocks=2), tokens[:8], **options)
    for mine, theirs in zip(padded.blocks, alone.blocks, strict=True):
        assert mine.tuned == pytest.approx(theirs.tuned, rel=1e-3)
        assert mine.tuned[1] < mine.tuned[0]


def test_steps_that_do_harm_are_taken_back(halves):
    block, masks, hidden, goals, calls = halves
    start = {name: p.clone() for name, p in block.named_parameters()}
    before, after = tune_block(
        block, masks, hidden, goals, calls, [None, None], passes=1, rate=100.0
    )
    assert after == before
    assert all(torch.equal(start[name], p) for name, p in block.named_parameters())


def test_tuned_model_is_nearer_to_the_dense_one():
    tokens = make_tokens(32)
    drifts = []
    for tune in (0, 10):
        report = prune_model(make_model("llama", blocks=2), tokens, tune=tune, tune_rate=1e-3,
                             device="cpu")  # fmt: skip
        drifts.append(report.blocks[-1].drift)
        assert report.sparsity == 0.5
    assert drifts[1] < drifts[0]
