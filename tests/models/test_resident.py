"""Blocks taken to a device and back, one at a time."""

import pytest
import torch
from torch import nn

from cuobs.models.pruning.resident import Resident

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture
def blocks():
    """Three blocks of two linears; the first two share a bias, the last two a weight."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3))
    blocks[1][0].bias = blocks[0][1].bias
    blocks[2][1].weight = blocks[1][1].weight
    return blocks.requires_grad_(False)


def values(blocks):
    return [p.detach().clone().cpu() for p in blocks.parameters()]


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_come_back_changed(blocks, device):
    """To the very memory that they came from, as whoever shares it sees too."""
    before, homes = values(blocks), [p.data_ptr() for p in blocks.parameters()]
    seen = {id(p): 0 for p in blocks.parameters()}
    with Resident(blocks, torch.device(device)) as source:
        for index in range(len(blocks)):
            for parameter in source.load(index).parameters():
                assert parameter.device == torch.device(device)
                parameter += 1
                seen[id(parameter)] += 1
            source.store()
            source.settle()
            assert all(p.device.type == "cpu" for p in blocks.parameters())
    times = [seen[id(p)] for p in blocks.parameters()]
    assert sorted(times) == [1] * 8 + [2] * 2
    for parameter, value, count in zip(blocks.parameters(), before, times, strict=True):
        assert torch.equal(parameter, value + 1 + (count == 2))
    assert [p.data_ptr() for p in blocks.parameters()] == homes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_is_left_behind(blocks, device, breaks):
    """A block that nobody waits for is at home with the context, whatever ends it."""
    before = values(blocks)
    with pytest.raises(KeyError) if breaks else torch.no_grad(), \
            Resident(blocks, torch.device(device)) as source:  # fmt: skip
        for index in range(2):
            for parameter in source.load(index).parameters():
                parameter.zero_()
            source.store()
        source.load(2)
        source.store(changed=False)
        source.load(2)[0].weight.zero_()
        if breaks:
            raise KeyError
    assert all(p.device.type == "cpu" for p in blocks.parameters())
    assert not any(p.any() for p in blocks[:2].parameters())
    last = dict(zip(map(id, blocks.parameters()), before, strict=True))
    if device != "cpu":  # where a copy was changed, and not stored
        assert torch.equal(blocks[2][0].weight, last[id(blocks[2][0].weight)])


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_can_be_read_while_it_leaves(blocks, device):
    with Resident(blocks, torch.device(device)) as source:
        source.load(0)[0].weight.fill_(3)
        source.store()
        assert bool((blocks[0][0].weight == 3).all())
        source.load(1)
        assert bool((blocks[0][0].weight == 3).all())
