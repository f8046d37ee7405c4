"""Does 2:4 pay? Layer shapes timed dense and as PyTorch's semi-structured sparse tensors."""

import os
import re
from typing import NamedTuple

import torch

from cuobs.models.loading import empty_model
from cuobs.models.structure import find_blocks, linears, oriented

__all__ = ["BATCHES", "speedup", "verdict"]

BATCHES = (1, 16, 128, 1024, 4096, 16384)
DTYPES = ("float16", "bfloat16")


class Timing(NamedTuple):
    """A layer shape at a batch size.

    Attributes
    ----------
    rows, columns : int
        Of the weight: outputs and inputs.
    batch : int
        Tokens.
    dense, sparse : float or None
        Seconds of a product; None where the sparse one is refused.
    fault : str
        Why it is.
    """

    rows: int
    columns: int
    batch: int
    dense: float
    sparse: float | None
    fault: str = ""

    @property
    def gain(self):
        """How many times as fast the sparse product is; None where there is none."""
        return None if self.sparse is None else self.dense / self.sparse


def layer_shapes(source):
    """Shapes (outputs, inputs) of the linears of a model, or of a text ``MxK``, each once.

    Parameters
    ----------
    source : str
        A checkpoint's folder, whose weights are not read, or for example ``4096x14336``.
    """
    if match := re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", os.fspath(source)):
        shape = int(match[1]), int(match[2])
        if 0 in shape:
            raise ValueError(f"{source}: found an empty shape, expected MxK")
        return [shape]
    if not os.path.isfile(os.path.join(source, "config.json")):
        raise FileNotFoundError(
            f"{source}: found no config.json, expected a checkpoint's folder or a shape MxK"
        )
    _, blocks = find_blocks(empty_model(source))
    shapes = [tuple(oriented(m).shape) for m in linears(blocks).values()]
    return list(dict.fromkeys(shapes))


def speedup(source, batches=BATCHES, dtype="float16"):
    """Time each layer shape dense and 2:4 on this GPU.

    Parameters
    ----------
    source : str
        See `layer_shapes`.
    batches : sequence of int
        Tokens in a product.
    dtype : {"float16", "bfloat16"}

    Returns
    -------
    list of Timing

    Raises
    ------
    ValueError
        There is no CUDA device, or an argument is wrong.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if any(b < 1 for b in batches):
        raise ValueError(f"batches: found {min(batches)}, expected positive numbers")
    shapes = layer_shapes(source)
    if not torch.cuda.is_available():
        raise ValueError(
            f"device: found that PyTorch {torch.__version__} sees no CUDA device, expected one: "
            "2:4 pays on NVIDIA GPUs from Ampere on, nowhere else"
        )
    dtype = getattr(torch, dtype)
    return [_time(*shape, batch, dtype) for shape in shapes for batch in batches]


@torch.no_grad()
def _time(rows, columns, batch, dtype):
    from torch.sparse import to_sparse_semi_structured

    generator = torch.Generator("cuda").manual_seed(0)
    W = torch.randn(rows, columns, dtype=dtype, device="cuda", generator=generator)
    X = torch.randn(batch, columns, dtype=dtype, device="cuda", generator=generator)
    if columns % 4 == 0:
        groups = W.view(rows, -1, 4)
        groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0)
    expected = torch.nn.functional.linear(X, W)
    dense = _seconds(lambda: torch.nn.functional.linear(X, W))
    try:
        S = to_sparse_semi_structured(W)
        found = torch.nn.functional.linear(X, S)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return Timing(rows, columns, batch, dense, None, str(error).splitlines()[0])
    error = (found - expected).abs().max() / expected.abs().max()
    if not error < 0.02:
        return Timing(rows, columns, batch, dense, None, f"wrong by {float(error):.1%}")
    return Timing(
        rows, columns, batch, dense, _seconds(lambda: torch.nn.functional.linear(X, S))
    )


def _seconds(function, repeats=20, rounds=5):
    """The least mean over a few rounds."""
    for _ in range(3):
        function()
    best = float("inf")
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / repeats)
    return best


def verdict(timings):
    """Lines that say where 2:4 pays and where it does not."""
    lines = []
    for shape in dict.fromkeys((t.rows, t.columns) for t in timings):
        mine = [t for t in timings if (t.rows, t.columns) == shape]
        pays = [t.batch for t in mine if t.gain and t.gain > 1.05]
        name = f"{shape[0]} x {shape[1]}"
        if not any(t.gain for t in mine):
            lines.append(f"{name}: 2:4 does not run ({mine[0].fault})")
        elif not pays:
            lines.append(f"{name}: 2:4 pays at none of these batch sizes")
        else:
            best = max(t.gain for t in mine if t.gain)
            sizes = ", ".join(map(str, pays))
            lines.append(f"{name}: 2:4 pays at {sizes} tokens, up to {best:.2f} times as fast")
    lines.append(
        "The file does not shrink: it holds the zeros too. Memory and time are saved only where a "
        "program packs the weights, as PyTorch's to_sparse_semi_structured does here."
    )
    return lines
