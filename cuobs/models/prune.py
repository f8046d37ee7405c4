"""Prune a causal language model in memory, block by block and group by group.

Two streams of hidden states run side by side: those of the dense model and those of the model
pruned so far. Each group of linears that read one tensor shares one Hessian, taken where all
that comes before the group is pruned already.
"""

import copy
import hashlib
import numbers
import re
import time
from functools import partial

import numpy as np
import torch

import cuobs
from cuobs import validation
from cuobs.models import checkpoint, memory
from cuobs.models.blocks import (
    capture,
    evaluating,
    not_by_window,
    run,
    run_until,
    running_alone,
    windows_of,
)
from cuobs.models.calibration import check_tokens, to_array
from cuobs.models.report import BlockReport, LayerReport, ModelReport
from cuobs.models.structure import (
    find_blocks,
    linears,
    oriented,
    probe,
    shared_weights,
)
from cuobs.models.targets import TARGETS, Moments, target_weights
from cuobs.models.tuning import STEP_WINDOWS, tune_block
from cuobs.recipe import SETTINGS, Recipe, Settings, method_options

# Where the Hessian of a layer is not positive definite, λ grows tenfold up to this share.
MAX_DAMP = 10.0
# What a block adds to a window's hidden states differs by less, however many windows run with it.
WINDOWS_DIFFER = 0.1
# Tokens that run through a block at once.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
# Options of `cuobs.prune` that are passed on beside those of its method.
OPTIONS = ("refine", *(key for key in SETTINGS if key != "device"))


def prune_model(
    model,
    tokens,
    *,
    attention_mask=None,
    pattern="2:4",
    method="admm",
    target="mixed",
    dense_share=None,
    residual_share=None,
    drop_first_token=True,
    skip=None,
    damp=0.01,
    tune=0,
    tune_rate=3e-4,
    device="auto",
    batch_tokens=None,
    checkpoint_folder=None,
    resume=False,
    protocol=None,
    masks=None,
    starting=None,
    on_block=None,
    **options,
):
    """Prune the linears in the blocks of a causal language model, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense blocks of ``nn.Linear`` or ``Conv1D``; changed in place, on its own device. Only one
        block at a time moves to ``device``.
    tokens : array of int, shape (windows, length)
        Calibration windows.
    attention_mask : array of bool or int, shape (windows, length), optional
        0 where a token is padding; those tokens enter no sum.
    pattern : str or Pattern
        See `cuobs.patterns`. A layer that it does not divide stays as it is, and the report says
        so.
    method : str
        See `cuobs.methods`.
    target : {"mixed", "pruned", "dense"}
        What a layer is to give: "pruned" its dense weights' outputs for the inputs that the pruned
        model feeds it, as is usual; "dense" the outputs that it has in the dense model; "mixed"
        something between, see the shares.
    dense_share : float or (float, float), optional
        Of a mixed target, 0.5 by default: 0 is "pruned", 1 is "dense". A pair goes evenly from the
        first block to the last.
    residual_share : float or (float, float), optional
        Of a mixed target, 0.5 by default: the share of what the residual stream has lost that
        layers which write into it are to make up for.
    drop_first_token : bool
        Leave the first token of each window out of the sums; its activations are huge and unlike
        all others.
    skip : str, optional
        A regular expression; linears in whose name it is found stay as they are.
    damp : float
        λ as a share of the mean of a Hessian's diagonal. A layer whose Hessian is not positive
        definite gets ten times as much, and more, until it is; the report says so.
    tune : int
        Passes of gradient descent over the calibration tokens in which a block's kept weights
        learn together, masks fixed, to give the hidden states of the dense model; 0 for none.
    tune_rate : float
        The learning rate of those passes at their start.
    device : {"auto", "cpu", "cuda"}
        Where blocks run and are pruned; "auto" takes the GPU where PyTorch and CuPy both find one.
    batch_tokens : int, optional
        Tokens that run through a block at once. It can change results in their last bits.
    checkpoint_folder : path, optional
        Where each finished block is written before the next begins.
    resume : bool
        Go on from the blocks in that folder.
    protocol : dict, optional
        Where the tokens come from, for the report.
    masks : dict, optional
        Filled with the mask of each pruned linear by name, in the form of its weight, True = kept.
    starting : callable, optional
        Called when all is checked, with a `ModelReport` that holds no blocks yet: what will be
        done, and the memory that it is predicted to take.
    on_block : callable, optional
        Called with (report, blocks) after each block, the number of all blocks and the
        `ModelReport` so far.
    **options
        Of `cuobs.prune`: refine, dtype, precision, memory_limit, workers, and the method's own.

    Returns
    -------
    ModelReport

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, the model has no blocks of linears or is a mixture of experts, or its
        activations are not finite.
    """
    tokens, mask, keep = _check_tokens(model, tokens, attention_mask, drop_first_token)
    pattern, shares, skipped, device, options = check_arguments(
        pattern=pattern, method=method, target=target, dense_share=dense_share,
        residual_share=residual_share, skip=skip, damp=damp, tune=tune, tune_rate=tune_rate,
        device=device, batch_tokens=batch_tokens, **options,
    )  # fmt: skip
    if resume and checkpoint_folder is None:
        raise ValueError("resume: found no checkpoint_folder, expected that of the unfinished run")
    name, blocks = find_blocks(model)
    shared = shared_weights(model, name, blocks)
    left = _layers_left(model, name, blocks, shared, pattern, skipped)
    if all((i, n) in left for i, block in enumerate(blocks) for n in linears(block)):
        reasons = "; ".join(dict.fromkeys(left.values()))
        raise ValueError(
            f"model: found no linear that could be pruned ({reasons}), expected at least one"
        )

    batch = max(1, (batch_tokens or BATCH_TOKENS[device.type]) // tokens.shape[1])
    parts = list(zip(tokens.split(batch), keep.split(batch), strict=True))
    given = [None] * len(parts) if mask is None else mask.split(batch)
    follow = target != "pruned" or tune > 0
    settings = {
        "pattern": pattern.label,
        "pattern_view": str(pattern),
        "method": method,
        "target": target,
        "dense_share": shares[0],
        "residual_share": shares[1],
        "drop_first_token": drop_first_token,
        "skip": skip,
        "damp": damp,
        "tune": tune,
        "tune_rate": tune_rate,
        "device": device.type,
        "batch_windows": batch,
        **options,
    }
    inside = {f"{name}.{i}.{n}" for i, b in enumerate(blocks) for n in linears(b)}
    report = ModelReport(
        settings=settings,
        protocol={"windows": len(tokens), "length": tokens.shape[1], **(protocol or {})},
        left=[n for n in linears(model) if n not in inside],
    )
    if checkpoint_folder is not None:
        identity = {**settings, "tokens": _digest(tokens, keep), "blocks": len(blocks)}
        checkpoint.begin(checkpoint_folder, identity, resume)

    with evaluating(model):
        shown = [(t, mask) for (t, _), mask in zip(parts, given, strict=True)]
        report.memory_predicted = memory.predict(
            [m.weight.shape for m in linears(blocks[0]).values()],
            *tokens.shape, model.get_input_embeddings().weight.shape[1], batch,
            dense=follow, tune=STEP_WINDOWS if tune else 0, device=device,
            element=next(blocks.parameters()).element_size(),
            model=sum(p.numel() * p.element_size() for p in model.parameters()),
            forward=_forward_bytes(model, blocks, *shown[0], device),
        )  # fmt: skip
        if starting:
            starting(report)
        began = time.perf_counter()
        memory.reset(device)
        hidden, calls = capture(model, blocks, shown, device)
        counts = [None if bool(k.all()) else k.to(device) for _, k in parts]
        pruned_hidden = list(hidden) if follow else hidden
        room = memory.Room(batch)
        for index, block in enumerate(blocks):
            start = time.perf_counter()
            home = next(block.parameters()).device
            block.to(device)
            dense = copy.deepcopy(block) if follow else None
            mine, calls[index] = calls[index], None
            prefix = f"{name}.{index}"
            stored = None
            if checkpoint_folder is not None:
                digest = checkpoint.digest(block)
                stored = checkpoint.load_block(checkpoint_folder, index, prefix, block, digest)
            after = None
            if index == 0:
                _check_windows(block, hidden[0], mine[0], room)
            if follow:
                after = [_run(dense, h, c, room) for h, c in zip(hidden, mine, strict=True)]
            if stored:
                found, block_masks = stored
            else:
                depth = index / max(1, len(blocks) - 1)
                found, block_masks = _prune_block(
                    block, dense, hidden, pruned_hidden, mine, counts, room,
                    prefix=prefix, index=index, left=left,
                    shares=[a + (b - a) * depth for a, b in shares],
                    arguments={"pattern": pattern, "method": method, "damp": damp, **options,
                               "device": device.type},
                )  # fmt: skip
                if tune:
                    found.tuned = tune_block(
                        block, block_masks, pruned_hidden, after, mine, counts,
                        passes=tune, rate=tune_rate,
                    )  # fmt: skip
                    _measure_sparsity(block, found, prefix)
            last = index + 1 == len(blocks)
            measured = not follow or found.drift is not None
            if not (last and measured):
                # One by one into place: a second copy of all of them may not fit.
                for i, call in enumerate(mine):
                    pruned_hidden[i] = _run(block, pruned_hidden[i], call, room)
            if follow:
                hidden = after
            if not measured:
                found.drift = _drift(hidden, pruned_hidden, counts)
            if not stored:
                _synchronize(device)
                found.seconds = time.perf_counter() - start
                if checkpoint_folder is not None:
                    checkpoint.save_block(
                        checkpoint_folder, index, prefix, block, block_masks, found, digest
                    )
            if masks is not None:
                masks.update({f"{prefix}.{n}": mask.cpu() for n, mask in block_masks.items()})
            block.to(home)
            memory.trim(device)
            report.blocks.append(found)
            report.seconds = time.perf_counter() - began
            report.memory_peak = memory.peak(device)
            if on_block:
                on_block(report, len(blocks))
    return report


def check_arguments(
    *, pattern="2:4", method="admm", target="mixed", dense_share=None, residual_share=None,
    skip=None, damp=0.01, tune=0, tune_rate=3e-4, device="auto", batch_tokens=None, **options,
):  # fmt: skip
    """Refuse arguments of `prune_model` that are wrong whatever the model is.

    Returns
    -------
    pattern : Pattern
    shares : list of (float, float)
        The dense and the residual share of the first and the last block.
    skipped : re.Pattern or None
    device : torch.device
    options : dict
        Those that go on to `cuobs.prune`.
    """
    shares = _check_shares(target, dense_share, residual_share)
    validation.integer("tune", tune, low=0)
    if not isinstance(tune_rate, numbers.Real) or not 0 < tune_rate < float("inf"):
        raise ValueError(f"tune_rate: found {tune_rate!r}, expected a positive number")
    if batch_tokens is not None:
        validation.integer("batch_tokens", batch_tokens)
    device = choose_device(device)
    pattern = cuobs.pattern.parse(pattern)
    for key in options:
        if key not in OPTIONS and key not in method_options():
            known = ", ".join([*OPTIONS, *method_options()])
            raise TypeError(f"{key}: found an unknown argument, expected one of {known}")
    options = {key: value for key, value in options.items() if value is not None}
    Settings(**{key: value for key, value in options.items() if key in SETTINGS})
    own = {key: value for key, value in options.items() if key not in OPTIONS}
    Recipe(pattern, method, own, options.get("refine"), damp)
    return pattern, shares, _check_skip(skip), device, options


def choose_device(name):
    """The device of a name; "auto" takes the GPU where PyTorch and CuPy both find one."""
    if name == "cpu":
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(f"device: found {name!r}, expected 'auto', 'cpu' or 'cuda'")
    if torch.cuda.is_available() and cuobs.arrays.find_cupy() is not None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        fault = cuobs.arrays.cupy_fault() or f"PyTorch {torch.__version__} finds no CUDA device"
        raise ValueError(f"device: found 'cuda', but {fault}")
    return torch.device("cpu")


@torch.no_grad()
def _prune_block(
    block, dense, hidden, pruned_hidden, calls, counts, room, *,
    prefix, index, left, shares, arguments,
):  # fmt: skip
    """Prune a block group by group; its report and the masks by name."""
    plan = probe(block, pruned_hidden[0][:1], windows_of(calls[0], 0, 1, len(hidden[0])))
    modules = linears(block)
    found = BlockReport(index, [])
    rows, masks = {}, {}
    for inner, module in modules.items():
        reason = left.get((index, inner))
        if inner in plan.idle:
            reason = "the block does not run it"
        rows[inner] = LayerReport(f"{prefix}.{inner}", tuple(oriented(module).shape))
        if reason:
            rows[inner].note = f"left as it is: {reason}"
            rows[inner].sparsity = _zeros(module.weight)
    dense_share, residual_share = shares
    for group in plan.groups:
        names = [n for n in group.names if not rows[n].note]
        if not names:
            continue
        writes = bool(residual_share) and any(n in plan.writers for n in names)
        moments = Moments()
        add = partial(_add_windows, moments, block, dense, group, bool(dense_share), writes)
        for batch in zip(hidden, pruned_hidden, calls, counts, strict=True):
            room.each(len(batch[0]), partial(add, *batch))
        if not bool(torch.isfinite(moments.hessian.diagonal()).all()):
            raise ValueError(
                f"model: found activations that are NaN or infinite before {prefix}."
                f"{group.names[0]}, expected finite ones; a wider dtype may hold them"
            )
        memory.make_room(moments.hessian.device)
        new = _prune_group(
            [modules[n] for n in names],
            moments,
            [rows[n] for n in names],
            dense_share,
            [residual_share if n in plan.writers else 0.0 for n in names],
            arguments,
        )
        masks.update(zip(names, new, strict=True))
        memory.make_room(moments.hessian.device)
    found.layers = list(rows.values())
    return found, masks


def _add_windows(
    moments, block, dense, group, inputs, writes, hidden, pruned_hidden, call, counts, start, stop
):
    """Add some windows of a batch to the moments of a group.

    ``inputs`` says whether those of the dense model are wanted, ``writes`` whether the residual
    stream is.
    """
    call = windows_of(call, start, stop, len(hidden))
    before = group.before if writes else ()

    def watch(block, hidden):
        modules = linears(block)
        return run_until(
            block, modules[group.names[0]], hidden[start:stop], call, [modules[n] for n in before]
        )

    Xh, pruned_stream = watch(block, pruned_hidden)
    X, stream = watch(dense, hidden) if inputs or writes else (None, None)
    chosen = None if counts is None else counts[start:stop].flatten().nonzero().flatten()
    moments.update(
        _take(Xh, chosen),
        _take(X, chosen) if inputs else None,
        *((_take(stream, chosen), _take(pruned_stream, chosen)) if writes else ()),
    )


def _prune_group(modules, moments, rows, dense_share, residual_shares, arguments):
    """Prune linears that share their inputs, in place, and complete their rows; their masks."""
    began = time.perf_counter()
    H = moments.hessian
    weights = [oriented(m).contiguous() for m in modules]
    damp = arguments["damp"]
    while True:
        try:
            goals = target_weights(weights, moments, damp, dense_share, residual_shares)
            results = _prune_together(weights, H, goals, {**arguments, "damp": damp})
            break
        except np.linalg.LinAlgError as error:
            damp = max(10 * damp, 1e-4)
            if damp > MAX_DAMP:
                raise ValueError(
                    f"model: found that the Hessian of {rows[0].name} stays singular up to damp="
                    f"{damp / 10:g} ({error}), expected activations that differ"
                ) from None
        except ValueError as error:
            raise ValueError(f"{rows[0].name}: {error}") from error
    masks = []
    for module, W, row, share, (new, mask) in zip(
        modules, weights, rows, residual_shares, results, strict=True
    ):
        row.loss = cuobs.relative_loss(W, new, H)
        row.sparsity = _zeros(new)
        row.damp = damp
        row.dense_share, row.residual_share = float(dense_share), float(share)
        if damp != arguments["damp"]:
            row.note = f"damped by {damp:g}: its Hessian is not positive definite with less"
        oriented(module).copy_(new)
        masks.append(oriented(module, mask))
    seconds = time.perf_counter() - began
    whole = sum(len(W) for W in weights)
    for row, W in zip(rows, weights, strict=True):
        row.seconds = seconds * len(W) / whole
    return masks


def _prune_together(weights, H, goals, arguments):
    """The new weight and the mask of each linear: one call for all where scopes stay the same."""
    pattern = arguments["pattern"]
    counts = [len(W) for W in weights]
    if len(weights) > 1 and not _stackable(pattern, counts, H.shape[0]):
        return [
            part
            for W, goal in zip(weights, goals, strict=True)
            for part in _prune_together([W], H, [goal], arguments)
        ]
    result = cuobs.prune(torch.cat(weights), hessian=H, target=torch.cat(goals), **arguments)
    return list(zip(result.weight.split(counts), result.mask.split(counts), strict=True))


def _stackable(pattern, counts, K):
    """Whether weights set one below the other have the scopes that each has alone."""
    try:
        stacked = pattern.compile(sum(counts), K)
    except ValueError:
        return False
    alone = [pattern.compile(count, K) for count in counts]
    starts = np.cumsum([0, *counts[:-1]])
    rows = [layout.row_order + start for layout, start in zip(alone, starts, strict=True)]
    if any(layout.rows != stacked.rows for layout in alone):
        return False
    found = {tuple(group) for group in np.concatenate(rows).tolist()}
    same = all(
        np.array_equal(layout.column_order, stacked.column_order)
        and np.array_equal(layout.blocks, stacked.blocks)
        for layout in alone
    )
    return same and found == {tuple(group) for group in stacked.row_order.tolist()}


def _forward_bytes(model, blocks, tokens, mask, device):
    """What a window takes in the first block, measured on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    home, block = next(blocks[0].parameters()).device, blocks[0]
    shown = tokens[:1], None if mask is None else mask[:1]
    (hidden,), calls = capture(model, blocks, [shown], device)
    block.to(device)
    try:
        return memory.taken(lambda: _run(block, hidden, calls[0][0], memory.Room(1)), device)
    finally:
        block.to(home)


def _run(block, hidden, call, room):
    """The hidden states that leave a block, all windows of a batch or a few at once."""

    def part(start, stop):
        return run(block, hidden[start:stop], windows_of(call, start, stop, len(hidden)))

    with torch.no_grad():
        parts = room.each(len(hidden), part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_windows(block, hidden, call, room):
    """Refuse a block for which `windows_of` does not give a window's own arguments."""
    if len(hidden) == 1:
        return
    whole = _run(block, hidden, call, room)[:1].float()
    with running_alone():
        alone = _run(block, hidden[:1], windows_of(call, 0, 1, len(hidden)), memory.Room(1))
    differs, adds = (whole - alone).norm(), (whole - hidden[:1]).norm()
    if differs > WINDOWS_DIFFER * adds:
        raise not_by_window(f"{float(differs / adds):.0%} of what it adds to the first differs")


def _take(x, chosen):
    """The rows of the tokens that count; all of them where chosen is None."""
    return x if chosen is None else x.index_select(0, chosen)


def _drift(hidden, pruned_hidden, counts):
    """‖h − ĥ‖ / ‖h‖ over the tokens that count."""
    lost = whole = 0.0
    for h, hh, counted in zip(hidden, pruned_hidden, counts, strict=True):
        h, hh = (x.float() if counted is None else x[counted].float() for x in (h, hh))
        lost, whole = lost + (h - hh).square().sum(), whole + h.square().sum()
    return float((lost / whole).sqrt())


def _measure_sparsity(block, found, prefix):
    modules = linears(block)
    for row in found.layers:
        row.sparsity = _zeros(modules[row.name[len(prefix) + 1 :]].weight)


def _zeros(weight):
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_tokens(model, tokens, attention_mask, drop_first_token):
    """Tokens as a tensor (windows, length), their attention mask or None, and which count."""
    array = check_tokens(model, tokens)
    keep, mask = np.ones(array.shape, bool), None
    if attention_mask is not None:
        values = to_array(attention_mask)
        keep = values == 1
        if keep.shape != array.shape:
            raise ValueError(
                f"attention_mask: found shape {keep.shape}, expected {array.shape} as the tokens"
            )
        if not (keep | (values == 0)).all():
            raise ValueError("attention_mask: found other values, expected 0 and 1 alone")
        mask = torch.from_numpy(keep.astype(np.int64))
    if drop_first_token:
        keep[np.arange(len(keep)), keep.argmax(axis=1)] = False
    if not keep.any():
        raise ValueError("tokens: found none that count, expected longer windows")
    return torch.from_numpy(array), mask, torch.from_numpy(keep)


def _check_shares(target, dense_share, residual_share):
    """The shares as pairs (first block, last block)."""
    validation.name_of("target", target, TARGETS)
    pairs = []
    given = {"dense_share": dense_share, "residual_share": residual_share}
    for (name, value), fixed in zip(given.items(), TARGETS[target] or (None, None), strict=True):
        if fixed is not None and value is not None:
            raise ValueError(
                f"{name}: found {value!r} with target={target!r}, expected it with 'mixed' alone"
            )
        value = fixed if fixed is not None else 0.5 if value is None else value
        pair = value if isinstance(value, tuple | list) else (value, value)
        try:
            pair = tuple(float(v) for v in pair)
        except (TypeError, ValueError):
            pair = ()
        if len(pair) != 2 or not all(0 <= v <= 2 for v in pair):
            raise ValueError(f"{name}: found {value!r}, expected a share from 0 to 2, or two")
        pairs.append(pair)
    return pairs


def _check_skip(skip):
    try:
        return re.compile(skip) if skip else None
    except TypeError:
        raise TypeError(
            f"skip: found {type(skip).__name__}, expected a regular expression"
        ) from None
    except re.error as error:
        raise ValueError(f"skip: found {skip!r}, no regular expression ({error})") from None


def _layers_left(model, name, blocks, shared, pattern, skipped):
    """Why a linear (block, name inside it) stays as it is."""
    if skipped and not any(skipped.search(n) for n in linears(model)):
        raise ValueError(
            f"skip: found no linear in whose name {skipped.pattern!r} is, expected part of one as "
            f"{name}.0.{next(iter(linears(blocks[0])))}"
        )
    left = {}
    for index, block in enumerate(blocks):
        for inner, module in linears(block).items():
            if skipped and skipped.search(f"{name}.{index}.{inner}"):
                left[index, inner] = "skipped"
            elif (index, inner) in shared:
                left[index, inner] = f"it shares its weight with {shared[index, inner]}"
            else:
                try:
                    pattern.compile(*oriented(module).shape)
                except ValueError as error:
                    left[index, inner] = str(error)
    return left


def _digest(*tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
