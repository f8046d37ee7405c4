"""A real linear layer of any size up to the published one, W (2560, 9728) and X (244449, 9728).

No small model has a layer that wide, so seven are set side by side: X holds the MLP activations of
the first seven layers of SmolLM2-135M-Instruct (1536 columns each) and W their down projections,
with the layers' order rotated by one from one block of 576 rows to the next. Both are cut to the
size that is asked for. The activations come from a forward pass written here on NumPy or CuPy.

The weights and tokens come from a pack, a 40 MB .npz file that is not part of the repository; see
`PACK_HELP`. Without it, and on the CPU, the layer of `examples/smollm2` is measured: W (576, 1536).
"""

import os
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "smollm2"
PUBLISHED = (2560, 9728, 244449)  # rows, columns, tokens

WINDOW = 512  # tokens that attend to each other
HEAD = 64
ROTARY_BASE = 100000.0
EPSILON = 1e-5
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")

PACK_HELP = (
    "perf: no pack of seven layers (set CUOBS_PERF_PACK, or build perf/data/smollm2-135m-7layers"
    ".npz by `python -m perf.published pack TEXT`); using the smaller layer of examples/smollm2"
)


def find_pack():
    """Path of the pack, or None: CUOBS_PERF_PACK, else perf/data/smollm2-135m-7layers.npz."""
    path = Path(os.environ.get("CUOBS_PERF_PACK", HERE / "data" / "smollm2-135m-7layers.npz"))
    return path if path.is_file() else None


def load(xp=np):
    """The layer to measure on: the published size on a GPU, that of the example on the CPU.

    Returns
    -------
    W, X : float16 arrays of xp
    name : str
        "seven layers" or "example".
    """
    pack = find_pack()
    if xp is not np and pack:
        return (*make(pack, xp=xp), "seven layers")
    if xp is not np:
        print(PACK_HELP, file=sys.stderr)
    return (*(xp.asarray(np.load(EXAMPLE / f"{name}.npy")) for name in "WX"), "example")


def make(path, rows=PUBLISHED[0], columns=PUBLISHED[1], tokens=PUBLISHED[2], xp=np, out=None):
    """Make W and X from a pack.

    Parameters
    ----------
    path : path of the pack
    rows, columns, tokens : int
        W is (rows, columns) and X (tokens, columns). Only the model layers and windows that these
        need are computed.
    xp : numpy or cupy
        Where to compute.
    out : array, shape (tokens, columns), float16, optional
        Where X goes, piece by piece: an array of xp or of NumPy, a memory-mapped file for one.

    Returns
    -------
    W : (rows, columns) float16 array of xp
    X : (tokens, columns) float16, `out` if it was given
    """
    with np.load(path) as pack:
        _check_size(pack, rows, columns, tokens)
        W = weight(pack, rows, columns, xp)
        X = xp.empty((tokens, columns), xp.float16) if out is None else out
        first = 0
        for piece in activations(pack, columns, tokens, xp):
            last = first + len(piece)
            X[first:last] = xp.asnumpy(piece) if _leaves_device(xp, X) else piece
            first = last
    return W, X


def make_to_files(folder, rows=PUBLISHED[0], columns=PUBLISHED[1], tokens=PUBLISHED[2], xp=np):
    """Make W.npy and X.npy in a folder, X piece by piece, and return their paths."""
    pack, folder = find_pack(), Path(folder)
    if pack is None:
        raise FileNotFoundError(PACK_HELP)
    folder.mkdir(parents=True, exist_ok=True)
    X = np.lib.format.open_memmap(folder / "X.npy", "w+", np.float16, (tokens, columns))
    W, _ = make(pack, rows, columns, tokens, xp, out=X)
    X.flush()
    np.save(folder / "W.npy", xp.asnumpy(W) if _leaves_device(xp, X) else W)
    return folder / "W.npy", folder / "X.npy"


def weight(pack, rows, columns, xp=np):
    """The down projections side by side, block row s beginning with that of layer s."""
    downs = [_linear(pack, layer, "mlp.down_proj", np) for layer in range(_layers(pack))]
    height, width = downs[0].shape
    beside, below = -(-columns // width), -(-rows // height)
    W = np.block([[downs[(j + s) % len(downs)] for j in range(beside)] for s in range(below)])
    return xp.asarray(W[:rows, :columns].astype(np.float16))


def activations(pack, columns, tokens, xp=np, batch=16):
    """Yield the rows of X in order, float16, for `batch` windows at a time."""
    embedding = xp.asarray(pack["emb"])
    width = pack["0.mlp.down_proj.weight.q"].shape[1]
    layers = [_weights(pack, layer, xp) for layer in range(-(-columns // width))]
    rotary = _rotary(xp)
    windows = pack["ids"][: len(pack["ids"]) // WINDOW * WINDOW].reshape(-1, WINDOW)
    windows = windows[: -(-tokens // WINDOW)]
    for first in range(0, len(windows), batch):
        ids = xp.asarray(windows[first : first + batch].astype(np.int64))
        hidden = embedding[ids].astype(xp.float32)
        piece = xp.empty((hidden.shape[0] * WINDOW, len(layers) * width), xp.float16)
        for number, w in enumerate(layers):
            h = _rms_norm(hidden, w["input_layernorm"], xp)
            hidden += _attention(h, w, rotary, xp)
            h = _rms_norm(hidden, w["post_attention_layernorm"], xp)
            inner = _silu(h @ w["mlp.gate_proj"].T, xp) * (h @ w["mlp.up_proj"].T)
            piece[:, number * width : (number + 1) * width] = inner.reshape(-1, width)
            hidden += inner @ w["mlp.down_proj"].T
        yield piece[: tokens - first * WINDOW, :columns]


def _attention(h, w, rotary, xp):
    """Causal grouped-query attention of (windows, WINDOW, width), output projection included."""
    q, k, v = (_heads(h @ w[f"self_attn.{name}_proj"].T) for name in "qkv")
    q, k = _rotate(q, rotary, xp), _rotate(k, rotary, xp)
    windows, heads, length, _ = q.shape
    shared = k.shape[1]
    # The query heads that share a key head are consecutive: stack them along the tokens.
    scores = q.reshape(windows, shared, -1, HEAD) @ k.transpose(0, 1, 3, 2)
    scores = scores.reshape(windows, heads, length, length)
    scores *= HEAD**-0.5
    scores += xp.where(xp.tri(length, dtype=bool), xp.float32(0), xp.float32(-xp.inf))
    scores -= scores.max(-1, keepdims=True)
    xp.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    mixed = scores.reshape(windows, shared, -1, length) @ v
    mixed = mixed.reshape(windows, heads, length, HEAD).transpose(0, 2, 1, 3)
    return mixed.reshape(windows, length, -1) @ w["self_attn.o_proj"].T


def _heads(x):
    """(windows, tokens, heads * HEAD) as (windows, heads, tokens, HEAD)."""
    return x.reshape(*x.shape[:2], -1, HEAD).transpose(0, 2, 1, 3)


def _rotary(xp):
    """Cosines and sines of the rotary embedding, both (WINDOW, HEAD)."""
    frequencies = ROTARY_BASE ** -(xp.arange(0, HEAD, 2, dtype=xp.float32) / HEAD)
    angles = xp.outer(xp.arange(WINDOW, dtype=xp.float32), frequencies)
    angles = xp.concatenate([angles, angles], 1)
    return xp.cos(angles), xp.sin(angles)


def _rotate(x, rotary, xp):
    cosines, sines = rotary
    turned = xp.concatenate([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1)
    return x * cosines + turned * sines


def _rms_norm(x, scale, xp):
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


def _silu(x, xp):
    with np.errstate(over="ignore"):  # exp(-x) is infinite where the result is 0 anyway
        return x / (1 + xp.exp(-x))


def _weights(pack, layer, xp):
    """All weights of one layer, float32, by their names."""
    weights = {name: _linear(pack, layer, name, xp) for name in LINEARS}
    return weights | {name: xp.asarray(pack[f"{layer}.{name}.weight"]) for name in NORMS}


def _linear(pack, layer, name, xp):
    """One weight (outputs, inputs) float32: int8 times one scale a row."""
    q, s = (xp.asarray(pack[f"{layer}.{name}.weight.{part}"]) for part in "qs")
    return q.astype(xp.float32) * s


def _layers(pack):
    return sum(name.endswith(".mlp.down_proj.weight.q") for name in pack.files)


def _check_size(pack, rows, columns, tokens):
    height, width = pack["0.mlp.down_proj.weight.q"].shape
    most = (
        _layers(pack) * height,
        _layers(pack) * width,
        len(pack["ids"]) // WINDOW * WINDOW,
    )
    for name, asked, limit in zip(
        ("rows", "columns", "tokens"), (rows, columns, tokens), most, strict=True
    ):
        if not 0 < asked <= limit:
            raise ValueError(f"{name}: found {asked}, expected 1 to {limit} as the pack holds")


def _leaves_device(xp, out):
    return xp is not np and isinstance(out, np.ndarray)
