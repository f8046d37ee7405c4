"""Blocks run one by one give what the model gives."""

import pytest
import torch
from small_models import make_model, make_tokens

from cuobs.models.blocks import capture, run, run_until, windows_of
from cuobs.models.structure import find_blocks


def padded(windows=4, length=24):
    tokens, mask = torch.tensor(make_tokens(windows)), torch.ones(windows, length, dtype=torch.long)
    for i in range(windows):
        mask[i, : 2 * i] = 0
    return tokens, mask


@pytest.mark.parametrize("with_padding", [False, True])
def test_blocks_give_what_the_model_gives(family, with_padding):
    model = make_model(family)
    tokens, mask = padded()
    if not with_padding:
        mask = None
    _, blocks = find_blocks(model)
    batches = [
        (tokens[a : a + 3], mask[a : a + 3] if with_padding else None) for a in range(0, 4, 3)
    ]
    entry = capture(model, blocks, batches, "cpu")
    norm = next(m for n, m in model.base_model.named_modules() if n.endswith(("norm", "ln_f")) and
                "layers" not in n and ".h." not in n)
    with torch.no_grad():
        states = []
        for b, hidden in enumerate(entry.hidden):
            for i, block in enumerate(blocks):
                hidden = run(block, hidden, entry.calls[i][b])
            states.append(norm(hidden))
        expected = model.base_model(tokens, attention_mask=mask, use_cache=False)
    real = torch.ones(4, 24, dtype=bool) if mask is None else mask.bool()
    found = torch.cat(states)[real]
    torch.testing.assert_close(found, expected.last_hidden_state[real], rtol=1e-5, atol=1e-5)


def test_capture_leaves_the_model_as_it_was(family):
    model = make_model(family)
    tokens = torch.tensor(make_tokens(2))
    with torch.no_grad():
        before = model(tokens).logits
        _, blocks = find_blocks(model)
        capture(model, blocks, [(tokens, None)], "cpu")
        assert torch.equal(model(tokens).logits, before)
    assert all("forward" not in vars(block) for block in blocks)


def test_equal_arguments_are_kept_once():
    model = make_model("llama")
    tokens = torch.tensor(make_tokens(4))
    _, blocks = find_blocks(model)
    entry = capture(model, blocks, [(t, None) for t in tokens.split(2)], "cpu")
    seen = [call[1]["position_embeddings"][0] for calls in entry.calls for call in calls]
    assert len({id(tensor) for tensor in seen}) == 1


def test_run_until_stops_before_the_module():
    model = make_model("llama")
    tokens = torch.tensor(make_tokens(2))
    _, blocks = find_blocks(model)
    entry = capture(model, blocks, [(tokens, None)], "cpu")
    block, hidden, call = blocks[0], entry.hidden[0], entry.calls[0][0]
    ran = []
    block.mlp.down_proj.register_forward_hook(lambda _, args, out: ran.append(args[0]))
    with torch.no_grad():
        x = run_until(block, block.mlp.down_proj, hidden, call)
        assert not ran
        run(block, hidden, call)
    assert torch.equal(x, ran[0].reshape(x.shape))


def test_windows_of_slices_what_belongs_to_windows():
    mask, rotary = torch.arange(24).reshape(3, 8), torch.zeros(1, 8)
    args, kwargs = windows_of(((mask,), {"rotary": rotary, "flag": None}), 1, 2, 3)
    assert torch.equal(args[0], mask[1:2])
    assert kwargs == {"rotary": rotary, "flag": None}
