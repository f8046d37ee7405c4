"""Shapes to time, and what is said about the times."""

import pytest
import torch

from cuobs.models.timing import Timing, layer_shapes, speedup, verdict


def test_shapes_of_a_folder(source):
    assert layer_shapes(source) == [(32, 32), (16, 32), (64, 32), (32, 64)]


def test_shape_from_text():
    assert layer_shapes("4096x14336") == [(4096, 14336)]
    with pytest.raises(ValueError, match="empty shape"):
        layer_shapes("0x4")
    with pytest.raises(FileNotFoundError, match="config.json"):
        layer_shapes("somewhere")


def test_bad_input():
    with pytest.raises(ValueError, match="dtype"):
        speedup("64x64", dtype="float32")
    with pytest.raises(ValueError, match="batches"):
        speedup("64x64", batches=(0,))


def test_verdict():
    lines = verdict(
        [
            Timing(64, 32, 1, 1e-5, 2e-5),
            Timing(64, 32, 4096, 3e-5, 2e-5),
            Timing(128, 32, 1, 1e-5, 1e-5),
            Timing(10, 10, 1, 1e-5, None, "needs multiples of 16"),
        ]
    )
    assert lines[0] == "64 x 32: 2:4 pays at 4096 tokens, up to 1.50 times as fast"
    assert lines[1] == "128 x 32: 2:4 pays at none of these batch sizes"
    assert lines[2] == "10 x 10: 2:4 does not run (needs multiples of 16)"
    assert "does not shrink" in lines[3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_on_a_device():
    found = speedup("1024x2048", batches=(64, 4096))
    assert [t.batch for t in found] == [64, 4096]
    assert all(t.dense > 0 and t.sparse > 0 and not t.fault for t in found)
    refused = speedup("10x12", batches=(4,))[0]
    assert refused.sparse is None and refused.fault
