"""Shapes to time, and what is said about the times."""

import numpy as np
import pytest
import torch
from small_models import make_model, make_source

import cuobs
from cuobs.models.packed.generation import Decoder, _compiled, generation
from cuobs.models.packed.timing import Timing, keep_largest, layer_shapes, picture, speedup, verdict
from cuobs.models.structure import find_blocks
from cuobs.pattern import parse

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
    with pytest.raises(ValueError, match="pattern"):
        speedup("64x64", patterns=["2;4"])


def timing(rows, columns, tokens, dense, packed=None, fault=""):
    found = Timing(rows, columns, tokens, dense)
    if fault:
        found.faults["2:4"] = fault
    else:
        found.seconds["2:4"], found.bounds["2:4"] = packed, 16 / 9
    return found


def test_verdict():
    lines = verdict([
        timing(64, 32, 1, 1e-5, 2e-5),
        timing(64, 32, 4096, 3e-5, 2e-5),
        timing(128, 32, 1, 1e-5, 1e-5),
        timing(10, 10, 1, 1e-5, fault="needs multiples of 4"),
    ])  # fmt: skip
    assert lines[0] == (
        "64 x 32, 2:4: pays at 4096 tokens, up to 1.50 times as fast (bytes: 1.78)"
    )
    assert lines[1] == "128 x 32, 2:4: pays at none of these numbers of tokens"
    assert lines[2] == "10 x 10, 2:4: does not run (needs multiples of 4)"
    assert "cuobs pack-model" in lines[3]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = str(tmp_path / "gain.png")
    picture([timing(64, 32, n, 3e-5, 2e-5) for n in (1, 8)], path)
    assert (tmp_path / "gain.png").stat().st_size > 1000
    with pytest.raises(FileExistsError):
        picture([timing(64, 32, 1, 3e-5, 2e-5)], path)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "coupled-2:4", "block16-row8", "2:3"])
def test_the_largest_are_kept(pattern):
    """As the method magnitude keeps them."""
    W = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    expected = cuobs.prune(W, hessian=np.eye(96), method="magnitude", pattern=pattern,
                           device="cpu")  # fmt: skip
    assert torch.equal(keep_largest(W, parse(pattern)), torch.as_tensor(expected.weight))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_decoding_gives_what_the_model_gives(family):
    model = make_model(family)
    decoder, written = Decoder(model, 2, 16), []
    for _ in range(6):
        decoder.step()
        written.append(decoder.token.clone())
    ids = torch.full((2, 1), 5)
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(written, 1), ids[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_alike_blocks_are_compiled_once(family, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    model = make_model(family, num_hidden_layers=3)
    blocks = find_blocks(model)[1]
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiler(f, backend=counter, **given))
    plain, compiled = Decoder(model, 2, 16), Decoder(model, 2, 16)
    compiled.step()
    with _compiled(blocks):
        for _ in range(3):
            compiled.step()
    for _ in range(4):
        plain.step()
    assert counter.frame_count == 1
    assert torch.equal(compiled.token, plain.token)
    for a, b in zip(compiled.cache.layers, plain.cache.layers, strict=True):
        assert a.cumulative_length == 4
        torch.testing.assert_close(a.keys, b.keys)
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2]
    assert all(block._compiled_call_impl is None for block in blocks)


@pytest.mark.gpu
@needs_device
def test_times_on_a_device():
    found = speedup("1024x2048", batches=(1, 64))
    assert [t.tokens for t in found] == [1, 64]
    for t in found:
        assert t.dense > 0 and t.bounds["2:4"] == pytest.approx(16 / 9)
        assert all(t.gain(name) > 0 for name in cuobs.patterns())
        assert {"torch 2:4", "searched"} <= t.seconds.keys() | t.faults.keys()
    refused = speedup("10x13", batches=(4,), patterns=["2:4"])[0]
    assert not refused.gain("2:4") and "does not divide" in refused.faults["2:4"]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("compiled", [False, True])
def test_generation_on_a_device(compiled, tmp_path):
    source = make_source(tmp_path / "source", hidden_size=128, intermediate_size=256)
    found = generation(source, sequences=(1, 4), new_tokens=8, compiled=compiled)
    assert [row.sequences for row in found] == [1, 4]
    assert all(row.dense > 0 and row.packed > 0 for row in found)
    assert found[0].packed_bytes < found[0].dense_bytes
