"""cuobs pack, unpack, pack-model and unpack-model."""

import numpy as np
import pytest
from click.testing import CliRunner
from cuobs_cli import main
from extras import MODEL

import cuobs


def run(*args, code=0):
    found = CliRunner().invoke(main, [str(a) for a in args])
    assert found.exit_code == code, found.output
    return found.output


@pytest.fixture
def pruned(tmp_path):
    W = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float16)
    W.reshape(16, -1, 4)[:, :, 1::2] = 0
    np.save(tmp_path / "W.npy", W)
    return tmp_path / "W.npy", W


@pytest.mark.parametrize("name", ["P.npz", "P.safetensors"])
def test_pack_and_unpack(pruned, tmp_path, name):
    path, W = pruned
    out, back = tmp_path / name, tmp_path / "back.npy"
    text = run("pack", path, "--pattern", "2:4", "-o", out)
    assert "2048 bytes are 1152 (0.5625)" in text and f"written  {out}" in text
    assert np.array_equal(cuobs.Packed.load(str(out)).unpack(), W)
    run("unpack", out, "-o", back)
    assert np.array_equal(np.load(back), W)


def test_refusals(pruned, tmp_path):
    path, W = pruned
    out = tmp_path / "P.npz"
    assert "breaks 4:8 in" in run("pack", path, "--pattern", "4:8", "-o", out, code=2)
    assert "expected .npz or .safetensors" in run("pack", path, "-o", tmp_path / "P.npy", code=2)
    run("pack", path, "-o", out)
    assert "found an existing file" in run("pack", path, "-o", out, code=2)
    text = run("unpack", _other(tmp_path), "-o", tmp_path / "b.npy", code=2)
    assert "expected a packed weight of cuobs" in text


def _other(folder):
    np.savez(folder / "other.npz", a=np.zeros(3))
    return folder / "other.npz"


@pytest.mark.model
@pytest.mark.skipif(not MODEL, reason="needs the extra model")
def test_models(tmp_path):
    from small_models import make_model, make_tokens, prune_all

    prune_all(make_model("llama")).half().save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned" / ".gitattributes").write_text("*.bin filter=lfs")
    text = run("pack-model", tmp_path / "pruned", tmp_path / "packed")
    assert "packed       21 linears by 2:4" in text and "MiB dense" in text
    assert "left out     .gitattributes: hidden\n" in text
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, t=make_tokens())
    assert "perplexity" in run("eval-model", tmp_path / "packed", "--text", f"{tokens}:t")
    assert "unpacked     21 linears" in run("unpack-model", tmp_path / "packed", tmp_path / "plain")
    assert "found no packed model" in run("unpack-model", tmp_path / "plain", tmp_path / "x",
                                          code=2)  # fmt: skip


@pytest.mark.model
@pytest.mark.skipif(not MODEL, reason="needs the extra model")
def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    from small_models import make_model, prune_all

    from cuobs.models.packed import packing

    prune_all(make_model("llama")).half().save_pretrained(tmp_path / "pruned")
    own, packed = packing.pack_tensor, []

    def stop(weight, pattern, name):
        if "layers.1." in name:
            raise KeyboardInterrupt
        packed.append(name)
        return own(weight, pattern, name)

    monkeypatch.setattr(packing, "pack_tensor", stop)
    command = ("pack-model", tmp_path / "pruned", tmp_path / "packed")
    text = run(*command, code=130)
    assert "packed is not complete; --resume goes on with it" in text
    monkeypatch.setattr(packing, "pack_tensor", own)
    assert "expected --resume to go on with it" in run(*command, code=2)
    assert "packed       21 linears" in run(*command, "--resume")
    assert not list((tmp_path / "packed").glob("cuobs_*")) and len(packed) == 7
