"""Learn a basis of the residual stream and of the heads' values in which weights prune easily.

The idea is that of DenoiseRotator (arXiv 2505.23049); here only what folds into the weights is
rotated, and the goal is the share of the score that the pattern at hand prunes.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save

import cuobs
from cuobs import files
from cuobs.models import memory
from cuobs.models.blocks import plain_torch
from cuobs.models.digests import digest
from cuobs.models.pruning.checks import check_alone
from cuobs.models.ranks import current
from cuobs.models.recipe import RotationRecipe
from cuobs.models.report import RotationReport
from cuobs.models.rotating import folding
from cuobs.models.rotating.rotation_learning import Learned, learn
from cuobs.models.rotating.rotation_prediction import (
    predict_rotation,
    rotation_work,
    settle_rotation,
)
from cuobs.models.structure import find_blocks, linears
from cuobs.models.tokens.windows import check_windows


@plain_torch()
def rotate(
    model: Any,
    tokens: Any,
    pattern: Any = "2:4",
    *,
    attention_mask: Any = None,
    drop_first_token: bool = True,
    steps: int = RotationRecipe.steps,
    rate: float = RotationRecipe.rate,
    windows: int = RotationRecipe.windows,
    score: str = RotationRecipe.score,
    permute: bool = RotationRecipe.permute,
    damp: float = RotationRecipe.damp,
    device: Any = "auto",
    stream: Any = None,
    stored: str | PathLike | None = None,
    progress: Callable | None = None,
) -> RotationReport:
    """Rotate a model so that it prunes more easily, in place; its outputs stay the same.

    The scales of its RMSNorms go into the linears that read them, the residual stream gets another
    basis R1, and the values of each key-value head another basis R2; all of it is folded into the
    weights, so that the result is a plain model of the same architecture. A head that is tied to
    the embedding is untied for that.

    Processes that torchrun started share the windows and the weights that the basis is learned
    from.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place, on its own device.
    tokens : array of int, shape (windows, length)
        Calibration windows.
    pattern : str, Pattern or dict
        See `cuobs.patterns`; a dict has one for each linear that counts, by its name.
    attention_mask : array of bool or int, shape (windows, length), optional
        0 where a token is padding; those tokens enter no sum.
    drop_first_token : bool
        Leave the first token of each window out of the sums.
    steps : int
        Of Adam; 0 folds the scales of the norms alone.
    rate : float
        Its step at the start; it falls to 0 by a half cosine.
    windows : int
        At most so many from the front are used.
    score : {"compensated", "activations"}
        The score of a weight: w² / C_jj with C the inverse of the damped H, what is lost where all
        others make up for it; or w² H_jj, for methods that move no other weight.
    permute : bool
        Deal the inner columns of each MLP out to the scopes by Σ w² / C_jj too, and put the scopes
        of the stream that hold the most of the score first, for methods that go from left to right.
    damp : float
        λ as a share of the mean of H's diagonal, for C.
    device : torch.device or str
        Where the basis is learned and blocks are folded; "auto" takes the GPU where PyTorch finds
        one.
    stream : cuobs.models.rotating.folding.Stream, optional
        Of `cuobs.models.rotating.folding.examine`, if that is known already.
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
        There is no room for it, or another basis would be another function (LayerNorm, a norm
        behind the linears, a scale that does not commute), with the reason, or its activations are
        not finite; the model is then as it was. Or the folded weights are more than its dtype
        holds, so that its logits are others, with the deviation; then they are folded already.

    References
    ----------
    DenoiseRotator, arXiv 2505.23049; SliceGPT, arXiv 2401.15024, for folding.
    """
    began = time.perf_counter()
    recipe = RotationRecipe(steps, rate, windows, score, permute, damp)
    patterns = patterns_of(model, pattern)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    memory.reset(device)
    found = check_windows(model, tokens, attention_mask, drop_first_token)
    tokens, counted = found.tokens[:windows], found.keep[:windows]
    mask = None if found.mask is None else found.mask[:windows]
    work = rotation_work(model, found.tokens.shape, patterns, recipe, device)
    if stream is None:
        predicted = settle_rotation(work, device)
        check_alone(model, find_blocks(model)[1], tokens, mask)
        stream = folding.examine(model, tokens, device)
    else:
        predicted = predict_rotation(work, device)
    identity = {
        "patterns": {name: str(p) for name, p in patterns.items()},
        "tokens": digest(tokens, counted),
        "model": digest(*model.get_submodule(stream.prefix)[0].parameters()),
        **{key: value for key, value in asdict(recipe).items() if key != "windows"},
    }
    learning, ranks = time.perf_counter(), current()
    if ranks.agree(stored is not None and os.path.exists(stored)):
        learned = load(stored, identity)
    else:
        learned = ranks.agree(learn(
            model, stream, tokens, counted, patterns, recipe, mask, device, progress
        ))  # fmt: skip
        if stored is not None and ranks.leads:
            store(stored, learned, identity)
    learning = time.perf_counter() - learning
    memory.trim(device)
    dense = folding.logits_of(model, tokens)
    untied = folding.fold(model, stream, learned.rotation, device)
    return RotationReport(
        pattern=", ".join(dict.fromkeys(p.label for p in patterns.values())),
        steps=steps,
        score=score,
        permuted=permute,
        before=learned.history[0],
        after=min(learned.history),
        heads=sum(len(R2) for R2 in learned.rotation.values if R2 is not None),
        deviation=folding.check_logits(model, tokens, dense),
        untied=untied,
        learning=learning,
        seconds=time.perf_counter() - began,
        memory_predicted=predicted,
        memory_peak=memory.peak(device),
    )


def patterns_of(model, pattern):
    """A pattern for each linear of the blocks that counts, by its name."""
    if isinstance(pattern, dict):
        return {name: cuobs.pattern.parse(own) for name, own in pattern.items()}
    pattern = cuobs.pattern.parse(pattern)
    prefix, blocks = find_blocks(model)
    return {f"{prefix}.{name}": pattern for name in linears(blocks)}


def store(path, learned, identity):
    """Keep a rotation in a file, whole or not at all."""
    tensors = {"stream": learned.rotation.stream.contiguous()}
    for index, R2 in enumerate(learned.rotation.values):
        if R2 is not None:
            tensors[f"values.{index}"] = R2.contiguous()
    for index, orders in enumerate(learned.rotation.orders):
        tensors |= {f"orders.{index}.{i}": order for i, order in enumerate(orders)}
    content = {"blocks": len(learned.rotation.values), "history": learned.history}
    metadata = {"rotation": json.dumps(content), "identity": json.dumps(identity)}
    with files.replacing(path, force=True) as file:
        file.write(save(tensors, metadata))


def load(path, identity):
    """The inverse of `store`.

    Raises
    ------
    ValueError
        The file is damaged, or was made with something else.
    """
    try:
        with safe_open(path, "pt") as stored:
            before = json.loads(stored.metadata()["identity"])
            content = json.loads(stored.metadata()["rotation"])
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        stream, blocks = tensors.pop("stream"), content["blocks"]
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"rotate: found that {path} is damaged, expected a whole file; without it the rotation "
            "is learned again"
        ) from None
    if before != json.loads(json.dumps(identity)):
        raise ValueError(f"rotate: found that {path} was made with other settings or tokens")
    values = tuple(tensors.get(f"values.{i}") for i in range(blocks))
    orders = tuple(
        tuple(tensors[key] for key in sorted(tensors) if key.startswith(f"orders.{i}."))
        for i in range(blocks)
    )
    return Learned(folding.Rotation(stream, values, orders), tuple(content["history"]))
