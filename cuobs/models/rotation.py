"""Learn a basis of the residual stream and of the heads' values in which weights prune easily.

The idea is that of DenoiseRotator (arXiv 2505.23049); here only what folds into the weights is
rotated, and the goal is the share of the score that the pattern at hand prunes.
"""

import copy
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import safe_open, save

import cuobs
from cuobs import files, validation
from cuobs.models import folding, memory
from cuobs.models.blocks import capture, evaluating, run, windows_of
from cuobs.models.pruned_share import Scopes, pruned_share
from cuobs.models.structure import linears, oriented

STEPS = 100
RATE = 3e-3
WINDOWS = 64
# What the score of a weight w in column j is: w² H_jj, or w² / C_jj with C the inverse of the
# damped H, what is lost after its column is compensated.
SCORES = ("activations", "compensated")
# Tokens that run through a block at once.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
# Elements of weights that are rotated at once.
PIECE = 2**27


@dataclass
class RotationReport:
    """What rotating a model did.

    Attributes
    ----------
    pattern : str
    steps : int
    score : str
    permuted : bool
        Whether the inner columns were dealt out to the scopes.
    before, after : float or None
        Share of the score that the pattern prunes, by the size of the layers; None where no step
        was asked for.
    heads : int
        Key-value heads whose values were rotated.
    deviation : float
        ‖z' − z‖ / ‖z‖ of the logits on some tokens, in the model's own dtype.
    untied : int
        Bytes that a head of its own adds to the model.
    seconds : float
    """

    pattern: str
    steps: int
    score: str
    permuted: bool
    before: float | None
    after: float | None
    heads: int
    deviation: float
    untied: int
    seconds: float


class Learned(NamedTuple):
    """A rotation and how the objective went, one number a step and one after the last."""

    rotation: folding.Rotation
    history: tuple


def rotate(
    model,
    tokens,
    pattern="2:4",
    *,
    attention_mask=None,
    counted=None,
    steps=STEPS,
    rate=RATE,
    windows=WINDOWS,
    score="activations",
    permute=False,
    damp=0.01,
    device="cpu",
    stored=None,
    progress=None,
):
    """Rotate a model so that it prunes more easily, in place; its outputs stay the same.

    The scales of its RMSNorms go into the linears that read them, the residual stream gets another
    basis R1, and the values of each key-value head another basis R2; all of it is folded into the
    weights, so that the result is a plain model of the same architecture. A head that is tied to
    the embedding is untied for that.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place, on its own device.
    tokens : array of int, shape (windows, length)
        Calibration windows.
    pattern : str or Pattern
        See `cuobs.patterns`.
    attention_mask, counted : tensor, shape (windows, length), optional
        0 where a token is padding; and which tokens enter the sums, by default all that are none,
        without the first of each window.
    steps : int
        Of Adam; 0 folds the norms' scales alone.
    rate : float
        Its step at the start; it falls to 0 by a half cosine.
    windows : int
        At most so many from the front are used.
    score : {"activations", "compensated"}
        The score of a weight: w² H_jj, or w² / C_jj with C the inverse of the damped H.
    permute : bool
        Deal the inner columns of each MLP out to the scopes by Σ w² / C_jj too.
    damp : float
        λ as a share of the mean of H's diagonal, for C.
    device : torch.device or str
        Where the basis is learned and blocks are folded.
    stored : path, optional
        A file that keeps the rotation; where it is there, it is read instead of learned again.
    progress : callable, optional
        Called with (done, total) steps.

    Returns
    -------
    RotationReport

    Raises
    ------
    ValueError
        Another basis would be another function (LayerNorm, a norm behind the linears, a scale that
        does not commute), with the reason; the model is then as it was.

    References
    ----------
    DenoiseRotator, arXiv 2505.23049; SliceGPT, arXiv 2401.15024, for folding.
    """
    began = time.perf_counter()
    pattern, device = cuobs.pattern.parse(pattern), torch.device(device)
    check_arguments(steps, rate, windows, score, damp)
    tokens = torch.as_tensor(np.asarray(tokens)[:windows])
    stream = folding.examine(model, tokens, device)
    dense = folding.logits_of(model, tokens)
    arguments = {"steps": steps, "rate": rate, "score": score, "permute": permute, "damp": damp}
    identity = {"pattern": str(pattern), "windows": len(tokens), **arguments}
    if stored is not None and os.path.exists(stored):
        learned = load(stored, identity)
    else:
        learned = learn(
            model, stream, tokens, pattern, device=device, progress=progress,
            attention_mask=attention_mask, counted=counted, **arguments,
        )  # fmt: skip
        if stored is not None:
            store(stored, learned, identity)
    untied = folding.fold(model, stream, learned.rotation, device)
    return RotationReport(
        pattern.label, steps, score, permute,
        learned.history[0] if learned.history else None,
        min(learned.history) if learned.history else None,
        sum(len(R2) for R2 in learned.rotation.values if R2 is not None),
        folding.check_logits(model, tokens, dense), untied, time.perf_counter() - began,
    )  # fmt: skip


def check_arguments(steps=STEPS, rate=RATE, windows=WINDOWS, score="activations", damp=0.01):
    """Refuse what `rotate` can't be told."""
    validation.integer("steps", steps, low=0)
    validation.integer("windows", windows)
    validation.name_of("score", score, SCORES)
    validation.damping(damp)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"rate: found {rate!r}, expected a positive number")


def learn(
    model, stream, tokens, pattern, *, attention_mask=None, counted=None, steps=STEPS, rate=RATE,
    score="activations", permute=False, damp=0.01, device="cpu", progress=None,
):  # fmt: skip
    """Learn R1 and R2 for a pattern by gradient descent; the model stays as it is.

    ``R = exp(A − Aᵀ)``, A = 0 at the start. What falls is the share of the score that the pattern
    prunes in each layer, weighted by the layers' sizes. Nothing is drawn at random.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    stream : cuobs.models.folding.Stream
        Of `cuobs.models.folding.examine`.
    tokens : tensor of int, shape (windows, length)
    pattern : Pattern
    attention_mask, counted, steps, rate, score, permute, damp, device, progress
        See `rotate`.

    Returns
    -------
    Learned
        The best basis that was seen.

    Raises
    ------
    ValueError
        The pattern divides no layer.
    """
    device = torch.device(device)
    if counted is None:
        counted = torch.ones_like(tokens) if attention_mask is None else attention_mask[: len(tokens)]
        counted = counted.bool()
        counted[torch.arange(len(counted)), counted.int().argmax(1)] = False
    if steps == 0 and not permute:
        none = (None,) * len(stream.blocks)
        return Learned(folding.Rotation(_eye(stream.width), none, ((),) * len(none)), ())
    gathered = _gather(
        model, stream, tokens, attention_mask, counted[: len(tokens)], pattern, device,
        compensated=score == "compensated", permute=permute, damp=damp,
    )  # fmt: skip
    objective = _Objective(stream, gathered, pattern, device)
    best, history = _descend(objective, steps, rate, progress)
    orders = tuple(block.orders for block in gathered)
    return Learned(objective.rotation(best, orders), tuple(history))


def _descend(objective, steps, rate, progress):
    """Adam on the generators of the rotations; the best ones and all objectives."""
    generators = [A.requires_grad_() for A in objective.zeros()]
    optimizer = torch.optim.Adam(generators, lr=rate)
    best, history = None, []
    for step in range(steps + 1):
        bases = [_exponential(A) for A in generators]
        leaves = [R.detach().requires_grad_() for R in bases]
        value = objective.backward(leaves, wanted=step < steps)
        history.append(value)
        if value <= min(history):
            best = [A.detach().clone() for A in generators]
        if step == steps:
            break
        optimizer.zero_grad()
        torch.autograd.backward(bases, [R.grad for R in leaves])
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        if progress:
            progress(step + 1, steps)
    return best, history


def _exponential(A):
    return torch.linalg.matrix_exp(A - A.mT)


def _orthogonal(A):
    """exp(A − Aᵀ) in float64, with what rounding left of RᵀR − I halved away."""
    R = _exponential(A.double())
    return 1.5 * R - 0.5 * R @ (R.mT @ R)


def _eye(size):
    return torch.eye(size, dtype=torch.float64)


class _Block(NamedTuple):
    """What learning needs of a block, norm scales folded.

    ``weights`` by linear; ``moments`` (D, D) by norm; ``heads`` (heads, queries, d, d) of what
    attention gives; ``scales`` (K,) of other writers' inputs; ``orders`` of inner columns.
    """

    weights: dict
    moments: dict
    heads: torch.Tensor | None
    scales: dict
    orders: tuple


@torch.no_grad()
def _gather(model, stream, tokens, mask, counted, pattern, device, **how):
    """Folded weights and second moments, block by block."""
    blocks = model.get_submodule(stream.prefix)
    batch = max(1, BATCH_TOKENS.get(device.type, 4096) // tokens.shape[1])
    masks = [None] * len(tokens) if mask is None else mask[: len(tokens)].split(batch)
    batches = list(zip(tokens.split(batch), masks, strict=False))
    counts = [c.to(device).flatten().nonzero().flatten() for c in counted.split(batch)]
    found = []
    with evaluating(model):
        hidden, calls = capture(model, blocks, batches, device)
        for block, part, own in zip(blocks, stream.blocks, calls, strict=True):
            block = copy.deepcopy(block).to(device)
            folding.fold_block(block, part)
            sums = _sums(block, part, hidden, own, counts, whole=how["compensated"] or how["permute"])
            found.append(_finish_block(block, part, sums, pattern, device, **how))
            own.clear()
            memory.trim(device)
    return found


def _sums(block, part, hidden, calls, counts, whole):
    """Second moments of what linears read, while the hidden states pass through a block."""
    modules = linears(block)
    heads = part.values
    readers = [norm.readers[0] for norm in part.norms]
    sums, chosen = defaultdict(float), None

    def add(name):
        def look(_, args):
            x = args[0].reshape(-1, args[0].shape[-1])[chosen].float()
            if whole or name in readers:
                sums[name] += x.T @ x
            elif heads is not None and name == heads.target:
                y = x[:, heads.columns.to(x.device)]
                sums[name] += torch.einsum("thqd,thqe->hqde", y, y)
            else:
                sums[name] += x.square().sum(0)

        return look

    handles = [
        modules[name].register_forward_pre_hook(add(name)) for name in (*readers, *part.writers)
    ]
    room = memory.Room(max(len(h) for h in hidden))
    for i, call in enumerate(calls):
        outs, tokens = [], counts[i]
        length = hidden[i].shape[1]
        for start in range(0, len(hidden[i]), room.windows):
            stop = min(start + room.windows, len(hidden[i]))
            inside = (tokens >= start * length) & (tokens < stop * length)
            chosen = tokens[inside] - start * length
            outs.append(run(block, hidden[i][start:stop], windows_of(call, start, stop, len(hidden[i]))))
        hidden[i] = torch.cat(outs)
    for handle in handles:
        handle.remove()
    return {name: total / sum(map(len, counts)) for name, total in sums.items()}


def _finish_block(block, part, sums, pattern, device, *, compensated, permute, damp):
    """A `_Block` of the sums: the form that the score takes, and orders of inner columns."""
    modules = linears(block)
    names = dict.fromkeys([*(n for norm in part.norms for n in norm.readers), *part.writers])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {name: oriented(modules[name]).float() for name in names}
    inverse = {}
    if compensated or permute:
        needed = sums if compensated else [inner.target for inner in part.inner]
        inverse = {name: _damped_inverse(sums[name], damp) for name in needed}
    forms = inverse if compensated else sums
    orders = ()
    if permute:
        orders = tuple(
            deal(weights[i.target].square().sum(0) / inverse[i.target].diagonal(),
                 weights[i.target].shape, pattern)
            for i in part.inner
        )  # fmt: skip
    heads, scales = None, {}
    for name in part.writers:
        form = forms[name]
        if part.values is not None and name == part.values.target:
            columns = part.values.columns.to(form.device)
            heads = form if form.ndim == 4 else form[columns[..., None], columns[..., None, :]]
        else:
            diagonal = form.diagonal() if form.ndim == 2 else form
            scales[name] = 1 / diagonal if compensated else diagonal
    for inner, order in zip(part.inner, orders, strict=False):
        order = order.to(device)
        for name in inner.sources:
            weights[name] = weights[name][order]
        weights[inner.target] = weights[inner.target][:, order]
        scales[inner.target] = scales[inner.target][order]
    return _Block(
        {name: W.to(dtype).contiguous() for name, W in weights.items()},
        {norm.name: forms[norm.readers[0]] for norm in part.norms},
        heads, scales, orders,
    )  # fmt: skip


def _damped_inverse(H, damp):
    H = H.double()
    H.diagonal().add_(damp * H.diagonal().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(H)).float()


def deal(worth, shape, pattern):
    """An order of columns that deals them out to the scopes by what they are worth.

    The first blocks of all scopes get the cheapest columns, the last ones the dearest, so that in
    each scope there are columns of all kinds.

    Parameters
    ----------
    worth : tensor, shape (K,)
    shape : tuple of int
        (M, K) of the weight.
    pattern : Pattern

    Returns
    -------
    tensor of int, shape (K,)
        On the CPU; as it is where scopes are no choice between columns.
    """
    worth = worth.cpu()
    try:
        layout = pattern.compile(*shape)
    except ValueError:
        return torch.arange(len(worth))
    kinds = np.unique(layout.blocks, axis=1, return_inverse=True)[1].ravel()
    n, scopes = int(kinds.max()) + 1, len(layout.columns)
    width = len(kinds) // n
    if n == 1:
        return torch.arange(len(worth))
    # Ranks by (block of the scope, scope, column of the block).
    ranks = torch.argsort(worth, stable=True).reshape(n, scopes, width)
    order = torch.empty(len(worth), dtype=torch.long)
    for block in range(n):
        places = layout.columns[:, np.flatnonzero(kinds == block)]
        order[torch.from_numpy(places.copy()).flatten()] = ranks[block].flatten()
    return order


class _Stack(NamedTuple):
    """Weights of one name and shape in several blocks, and where their partners lie."""

    weight: torch.Tensor
    scopes: Scopes
    norm: str | None
    values: tuple | None
    reads: bool
    h: torch.Tensor | None
    blocks: torch.Tensor
    heads: torch.Tensor | None


class _Objective:
    """The share of the score that a pattern prunes, as a function of the bases."""

    def __init__(self, stream, gathered, pattern, device):
        self.stream, self.device = stream, device
        self.shapes, self.places = _head_shapes(stream)
        norms = {norm.name for part in stream.blocks for norm in part.norms}
        eye = torch.zeros(stream.width, stream.width, device=device)
        self.moments = {
            name: torch.stack([block.moments.get(name, eye) for block in gathered])
            for name in sorted(norms)
        }
        self.stacks = _stacks(stream, gathered, pattern, self.places, device)
        self.whole = sum(stack.weight.numel() for stack in self.stacks)
        if not self.stacks:
            raise ValueError(
                f"pattern: found that {pattern.label} divides no linear of the model, expected one"
            )
        self.inverted = False

    def zeros(self):
        """Generators of no rotation: of the stream, then of values by shape."""
        D = self.stream.width
        sizes = [(D, D), *((n, *shape, shape[-1]) for shape, n in self.shapes.items())]
        return [torch.zeros(size, device=self.device) for size in sizes]
