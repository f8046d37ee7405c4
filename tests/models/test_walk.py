"""Forwards that stop before a group of linears and go on from there."""

import threading

import pytest
import torch
from small_models import make_model, make_tokens

from cuobs.models.blocks import capture, run, windows_of
from cuobs.models.pruning.groups import probe
from cuobs.models.pruning.walk import Stops
from cuobs.models.structure import find_blocks


@pytest.fixture
def place():
    """A block of Llama, what enters it, its other arguments and its plan."""
    model = make_model("llama")
    _, blocks = find_blocks(model)
    entry = capture(model, blocks, [(torch.tensor(make_tokens(2)), None)], "cpu")
    hidden, call = entry.hidden[0], entry.calls[0][0]
    return blocks[0], hidden, call, probe(blocks[0], hidden[:1], windows_of(call, 0, 1, 2))


def test_a_walk_stops_before_each_group_and_gives_what_a_forward_gives(place):
    block, hidden, call, plan = place
    ran = []
    for group in plan.groups:
        block.get_submodule(group.names[0]).register_forward_hook(lambda *_: ran.append(1))
    with Stops(block, plan, stream=True) as stops, torch.no_grad():
        walk = stops.start(hidden, call)
        for number in range(len(plan.groups)):
            x, stream = walk.until(number)
            assert len(ran) == number
        out = walk.finish()
        walk.close()
        rebuilt = stream + x @ block.mlp.down_proj.weight.T
        assert torch.equal(out, run(block, hidden, call))
    torch.testing.assert_close(rebuilt.reshape(out.shape), out, rtol=1e-5, atol=1e-5)


def test_a_walk_that_waits_sees_the_weights_as_they_are_when_it_goes_on(place):
    block, hidden, call, plan = place
    with Stops(block, plan, stream=False) as stops, torch.no_grad():
        walk = stops.start(hidden, call)
        walk.until(0)
        block.self_attn.v_proj.weight.zero_()
        x, _ = walk.until(1)
        assert not x.any()
        walk.close()


def test_several_walks_wait_side_by_side_and_end_when_closed(place):
    block, hidden, call, plan = place
    before = threading.active_count()
    with Stops(block, plan, stream=False) as stops:
        walks = [stops.start(hidden * scale, call) for scale in (1.0, 3.0)]
        first = [walk.until(1)[0] for walk in walks]
        second = [walk.until(2)[0] for walk in reversed(walks)]
        assert not torch.equal(first[0], first[1]) and not torch.equal(second[0], second[1])
        assert threading.active_count() == before + 2
        for walk in walks:
            walk.close()
    assert threading.active_count() == before
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_what_a_forward_raises_is_raised_where_it_is_waited_for(place):
    block, hidden, call, plan = place
    with Stops(block, plan, stream=False) as stops:
        walk = stops.start(hidden, call)
        walk.until(2)
        block.mlp.act_fn.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            walk.until(3)
        walk.close()
