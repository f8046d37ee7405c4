"""The real layer that perf/ measures on: its forward pass and its layout."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

# perf/ is no part of the package.
spec = spec_from_file_location("layer", Path(__file__).parent.parent / "perf" / "layer.py")
layer = module_from_spec(spec)
spec.loader.exec_module(layer)

WIDTH, HEADS, SHARED, INNER, TOKENS = 16, 4, 2, 12, 6

# The beginning of the supplied pack's text, and what PyTorch computes from it, as float16.
FROZEN_IDS = (7639, 6804, 14, 4441)
FROZEN_X = {
    (0, 0): -0.0211487,
    (100, 1000): -0.00181293,
    (17, 1536): -0.0163727,
    (299, 2000): 0.00654221,
    (250, 4000): -0.158447,
    (299, 5999): 0.0152359,
    (120, 7000): 0.107788,
    (299, 9727): -0.0632324,
}
FROZEN_W = {
    (0, 0): -0.326416015625,
    (575, 1535): -0.1829833984375,
    (576, 0): 0.3359375,
    (1200, 3000): -0.253173828125,
    (2559, 9727): 0.172119140625,
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A random pack of three small layers with windows of 6 tokens and heads of 4 places."""
    monkeypatch.setattr(layer, "WINDOW", TOKENS)
    monkeypatch.setattr(layer, "HEAD", WIDTH // HEADS)
    rng = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH * SHARED // HEADS, WIDTH),
        "self_attn.v_proj": (WIDTH * SHARED // HEADS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    pack = {
        "ids": rng.integers(0, 30, 5 * TOKENS).astype(np.uint16),
        "emb": rng.standard_normal((30, WIDTH)).astype(np.float16),
    }
    for number in range(3):
        for name, shape in shapes.items():
            pack[f"{number}.{name}.weight.q"] = rng.integers(-127, 128, shape, dtype=np.int8)
            scale = rng.uniform(0.002, 0.004, (shape[0], 1)).astype(np.float32)
            pack[f"{number}.{name}.weight.s"] = scale
        for name in layer.NORMS:
            pack[f"{number}.{name}.weight"] = rng.uniform(0.5, 2, WIDTH).astype(np.float32)
    np.savez(tmp_path / "pack.npz", **pack)
    return tmp_path / "pack.npz", pack


def token_by_token(pack, ids, layers):
    """X of one window by loops over tokens and heads, float64, rotations as complex numbers."""
    size = WIDTH // HEADS
    hidden = pack["emb"][ids].astype(float)
    turn = np.exp(1j * np.arange(len(ids))[:, None] * 1e5 ** (-np.arange(0, size, 2) / size))
    pieces = []

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale

    for number in range(layers):

        def linear(name, number=number):
            q, s = (pack[f"{number}.{name}.weight.{part}"].astype(float) for part in "qs")
            return q * s

        h = norm(hidden, pack[f"{number}.input_layernorm.weight"])
        q, k, v = (h @ linear(f"self_attn.{name}_proj").T for name in "qkv")
        mixed = np.zeros_like(hidden)
        for head in range(HEADS):
            mine = slice(head * size, (head + 1) * size)
            other = head * SHARED // HEADS
            theirs = slice(other * size, (other + 1) * size)
            a, b = (x[:, : size // 2] + 1j * x[:, size // 2 :] for x in (q[:, mine], k[:, theirs]))
            a, b = a * turn, b * turn
            for t in range(len(ids)):
                scores = np.exp((a[t] @ b[: t + 1].conj().T).real / np.sqrt(size))
                mixed[t, mine] = scores / scores.sum() @ v[: t + 1, theirs]
        hidden = hidden + mixed @ linear("self_attn.o_proj").T
        h = norm(hidden, pack[f"{number}.post_attention_layernorm.weight"])
        gate = h @ linear("mlp.gate_proj").T
        pieces.append(gate / (1 + np.exp(-gate)) * (h @ linear("mlp.up_proj").T))
        hidden = hidden + pieces[-1] @ linear("mlp.down_proj").T
    return np.concatenate(pieces, 1)


def test_activations_are_those_of_a_pass_token_by_token(tiny):
    path, pack = tiny
    _, X = layer.make(path, rows=16, columns=30, tokens=16)
    windows = pack["ids"].reshape(-1, TOKENS)
    expected = np.concatenate([token_by_token(pack, ids, 3) for ids in windows])[:16, :30]
    assert X.dtype == np.float16 and X.shape == (16, 30)
    np.testing.assert_allclose(X, expected, rtol=2e-3, atol=1e-4)


def test_weight_rotates_the_layers_from_block_row_to_block_row(tiny):
    path, pack = tiny
    W, _ = layer.make(path, rows=40, columns=30, tokens=1)
    for row, column, number in ((0, 0, 0), (0, 12, 1), (16, 0, 1), (16, 24, 0), (39, 12, 0)):
        down = pack[f"{number}.mlp.down_proj.weight.q"] * pack[f"{number}.mlp.down_proj.weight.s"]
        assert W[row, column] == np.float16(down[row % WIDTH, column % INNER])


def test_pieces_fill_a_file_like_an_array(tiny, tmp_path, monkeypatch):
    path, _ = tiny
    monkeypatch.setenv("CUOBS_PERF_PACK", str(path))
    size = dict(rows=20, columns=36, tokens=29)
    files = layer.make_to_files(tmp_path / "out", **size)
    for file, array in zip(files, layer.make(path, **size), strict=True):
        np.testing.assert_array_equal(np.load(file), array)


def test_more_than_the_pack_holds_is_refused(tiny):
    path, _ = tiny
    with pytest.raises(ValueError, match="tokens: found 31, expected 1 to 30"):
        layer.make(path, rows=1, columns=1, tokens=31)


def test_seven_layers_are_those_that_the_figures_were_measured_on(xp):
    path = layer.find_pack()
    if path is None:
        pytest.skip(layer.PACK_HELP)
    with np.load(path) as pack:
        if list(pack["ids"][:4]) != list(FROZEN_IDS):
            pytest.skip("this pack holds another text than the one the values are of")
    W, X = layer.make(path, rows=2560, columns=9728, tokens=300, xp=xp)
    for (row, column), value in FROZEN_X.items():
        assert float(X[row, column]) == pytest.approx(value, rel=2e-3)
    for (row, column), value in FROZEN_W.items():
        assert float(W[row, column]) == value
