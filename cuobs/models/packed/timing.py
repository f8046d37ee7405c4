"""What a pattern pays on this GPU: layer shapes timed dense, by PyTorch's 2:4, and packed.

A product is timed in a CUDA graph, so that the host is left out, over four weights in turn, so that
none of them stays in the L2 cache.
"""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import cuobs
from cuobs import plotting, validation
from cuobs.models.checkpoints.loading import empty_model
from cuobs.models.structure import find_blocks, linears, oriented
from cuobs.torch.graphs import record
from cuobs.torch.packed import PackedLinear

__all__ = ["BATCHES", "Timing", "graph_seconds", "layer_shapes", "picture", "speedup", "verdict"]

BATCHES = (1, 8, 16, 32, 64, 128, 512, 2048)
DTYPES = ("float16", "bfloat16")
# Weights of one shape that take turns, and how often in a graph.
WEIGHTS, ROUNDS, REPLAYS = 4, 3, 9
TORCH, SEARCHED = "torch 2:4", "searched"


@dataclass
class Timing:
    """A layer shape at a number of tokens.

    Attributes
    ----------
    rows, columns : int
        Of the weight: outputs and inputs.
    tokens : int
    dense : float
        Seconds of cuBLAS.
    seconds : dict of str to float
        Of the others: "torch 2:4" with PyTorch's default, "searched" with cuSPARSELt's search over
        its algorithms, and packed weights by the name of their pattern.
    faults : dict of str to str
        Why some of them do not run.
    bounds : dict of str to float
        How many times as few bytes a packed weight has.
    """

    rows: int
    columns: int
    tokens: int
    dense: float
    seconds: dict = field(default_factory=dict)
    faults: dict = field(default_factory=dict)
    bounds: dict = field(default_factory=dict)

    def gain(self, name):
        """How many times as fast as the dense product; None where it does not run."""
        return self.dense / self.seconds[name] if name in self.seconds else None


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


def speedup(
    source: str,
    batches: Sequence = BATCHES,
    dtype: str = "float16",
    patterns: Sequence | None = None,
    search: bool = True,
    progress: Callable | None = None,
) -> list:
    """Time each layer shape dense, by PyTorch's 2:4 and packed, on this GPU.

    Parameters
    ----------
    source : str
        See `layer_shapes`.
    batches : sequence of int
        Tokens in a product.
    dtype : {"float16", "bfloat16"}
    patterns : sequence of str or Pattern, optional
        Of the packed weights; the named ones by default.
    search : bool
        Whether cuSPARSELt searches over its algorithms too.
    progress : callable, optional
        Called with (done, total).

    Returns
    -------
    list of Timing

    Raises
    ------
    ValueError
        There is no CUDA device, or an argument is wrong.
    """
    validation.name_of("dtype", dtype, DTYPES)
    for batch in batches:
        validation.integer("batches", batch)
    patterns = [cuobs.pattern.parse(p) for p in patterns or cuobs.patterns()]
    shapes = layer_shapes(source)
    check_device()
    searched = _searched(shapes, batches, dtype) if search else {}
    found = []
    for done, shape in enumerate(shapes, 1):
        found += _time_shape(*shape, batches, getattr(torch, dtype), patterns)
        torch.cuda.empty_cache()
        if progress:
            progress(done, len(shapes))
    for timing in found if search else ():
        key = f"{timing.rows}x{timing.columns}x{timing.tokens}"
        result = searched.get(key, searched[""])
        if isinstance(result, float):
            timing.seconds[SEARCHED] = result
        else:
            timing.faults[SEARCHED] = result
    return found


def check_device():
    """Refuse to time anything without a CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"device: found that PyTorch {torch.__version__} sees no CUDA device, expected one: "
            "packed weights pay on NVIDIA GPUs from Ampere on, nowhere else"
        )


@torch.no_grad()
def _time_shape(rows, columns, batches, dtype, patterns):
    generator = torch.Generator("cuda").manual_seed(0)
    make = dict(dtype=dtype, device="cuda", generator=generator)
    W = torch.randn(rows, columns, **make)
    inputs = {n: torch.randn(n, columns, **make) for n in batches}
    linear = torch.nn.functional.linear
    weights = [W, *(W.clone() for _ in range(WEIGHTS - 1))]
    found = [
        Timing(rows, columns, n, graph_seconds([lambda w=w, x=x: linear(x, w) for w in weights]))
        for n, x in inputs.items()
    ]
    del weights
    for name, products in _others(W, patterns, found):
        for timing in found:
            x = inputs[timing.tokens]
            try:
                products[0](x)
                timing.seconds[name] = graph_seconds([lambda p=p, x=x: p(x) for p in products])
            except (RuntimeError, ValueError, NotImplementedError) as error:
                timing.faults[name] = _reason(error)
    return found


def _others(W, patterns, found):
    """Names and lists of products with weights that obey a pattern, each of a memory of its own."""
    try:
        sparse = keep_largest(W, cuobs.pattern.parse("2:4"))
        yield TORCH, _semi_structured(sparse)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        for timing in found:
            timing.faults[TORCH] = _reason(error)
    for pattern in patterns:
        try:
            packed = PackedLinear.from_weight(keep_largest(W, pattern), pattern)
        except ValueError as error:
            for timing in found:
                timing.faults[pattern.label] = _reason(error)
            continue
        for timing in found:
            timing.bounds[pattern.label] = W.nbytes / (packed.weight.nbytes + packed.index.nbytes)
        yield pattern.label, [packed, *(copy.deepcopy(packed) for _ in range(WEIGHTS - 1))]


def _semi_structured(W):
    from torch.sparse import to_sparse_semi_structured

    weights = [to_sparse_semi_structured(W.clone()) for _ in range(WEIGHTS)]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]


def keep_largest(W, pattern):
    """A copy of a weight that keeps the blocks of the largest norms in each scope."""
    layout = pattern.compile(*W.shape)
    rows = torch.tensor(layout.row_order.ravel(), device=W.device)
    columns = torch.tensor(layout.column_order.ravel(), device=W.device)
    shape = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    scopes = W[rows][:, columns].reshape(shape).permute(0, 2, 1, 3).flatten(2)
    blocks = torch.tensor(layout.blocks.ravel(), device=W.device)
    member = torch.nn.functional.one_hot(blocks, layout.n_blocks).to(W.dtype)
    kept = (scopes.square() @ member).topk(layout.keep, dim=2).indices
    mask = torch.zeros(*kept.shape[:2], layout.n_blocks, dtype=torch.bool, device=W.device)
    mask.scatter_(2, kept, True)
    scopes = torch.where(mask[:, :, blocks], scopes, 0)
    scopes = scopes.unflatten(2, (shape[1], shape[3])).permute(0, 2, 1, 3)
    result = torch.empty_like(W)
    part = torch.empty_like(W)
    part[:, columns] = scopes.reshape(W.shape)
    result[rows] = part
    return result


def graph_seconds(functions):
    """The median time of one of some functions that take turns in a CUDA graph."""

    def enqueue():
        for _ in range(ROUNDS):
            for function in functions:
                function()

    replay = record(enqueue)
    replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[REPLAYS // 2] / (ROUNDS * len(functions))


def _searched(shapes, batches, dtype):
    """What another process finds with cuSPARSELt's search: its faults may end that process.

    Returns
    -------
    dict
        Seconds by ``MxKxtokens``, and under "" what to say of those that are missing.
    """
    plan = json.dumps({"shapes": shapes, "batches": list(batches), "dtype": dtype})
    try:
        run = subprocess.run(
            [sys.executable, "-m", "cuobs.models.packed.searched", plan],
            capture_output=True, text=True, timeout=60 + 2 * len(shapes) * len(batches),
        )  # fmt: skip
        output, errors = run.stdout, run.stderr
    except subprocess.TimeoutExpired as error:
        output, errors = (error.stdout or b"").decode(), "it took too long"
    found = {"": f"cuSPARSELt's search fails ({_last(errors)})"}
    for line in output.splitlines():
        key, _, value = line.partition(" ")
        if re.fullmatch(r"\d+x\d+x\d+", key):
            found[key] = float(value)
    return found


def _last(text):
    lines = [line.strip() for line in text.splitlines() if "Error" in line]
    return lines[-1][:160] if lines else text.strip()[-160:] or "no reason given"


def _reason(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def verdict(timings):
    """Lines that say where packed weights pay and where they do not."""
    lines = []
    for shape in dict.fromkeys((t.rows, t.columns) for t in timings):
        mine = [t for t in timings if (t.rows, t.columns) == shape]
        for name in dict.fromkeys(n for t in mine for n in (*t.bounds, *t.faults)):
            if name in (TORCH, SEARCHED):
                continue
            gains = {t.tokens: t.gain(name) for t in mine if t.gain(name)}
            title = f"{shape[0]} x {shape[1]}, {name}"
            pays = [n for n, gain in gains.items() if gain > 1.05]
            if not gains:
                lines.append(f"{title}: does not run ({mine[0].faults.get(name, 'no reason')})")
            elif not pays:
                lines.append(f"{title}: pays at none of these numbers of tokens")
            else:
                lines.append(
                    f"{title}: pays at {', '.join(map(str, pays))} tokens, up to "
                    f"{max(gains.values()):.2f} times as fast (bytes: {mine[0].bounds[name]:.2f})"
                )
    lines.append(
        "Packed weights take this memory and time; a pruned model that is stored dense is as large "
        "and as slow as before: cuobs pack-model packs it."
    )
    return lines


def picture(timings, path, name="2:4", force=False):
    """Draw the gain of packed weights against the number of tokens, a line for each shape.

    Parameters
    ----------
    timings : list of Timing
    path : str
        .png, .svg or .pdf.
    name : str
        Of the pattern.
    force : bool
        Overwrite an existing file.
    """
    plotting.check_picture(path)
    figure = plotting.new_figure(7, 4)
    axes = figure.add_subplot()
    for shape in dict.fromkeys((t.rows, t.columns) for t in timings):
        points = [(t.tokens, t.gain(name)) for t in timings
                  if (t.rows, t.columns) == shape and t.gain(name)]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{shape[0]} x {shape[1]}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"times as fast as dense, {name} packed")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    plotting.save(figure, path, force)
