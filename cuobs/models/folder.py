"""From a checkpoint's folder to that of a pruned model."""

import math
import os
from functools import partial

import torch

from cuobs import arrays, validation
from cuobs.models import checkpoint
from cuobs.models.calibration import (
    check_cut,
    check_file,
    check_tokens,
    is_tokens,
    load_tokens,
    longest_window,
    tokenize,
)
from cuobs.models.evaluate import perplexity
from cuobs.models.prune import check_arguments, choose_device, prune_model

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048


def prune_folder(
    src,
    dst,
    calibration,
    *,
    samples=DEFAULT_SAMPLES,
    sequence_length=None,
    seed=0,
    attention_mask=None,
    evaluate=(),
    resume=False,
    save_masks=False,
    shard_size="5GB",
    device="auto",
    say=None,
    progress=None,
    starting=None,
    drop_first_token=True,
    on_block=None,
    **options,
):
    """Prune the model of a folder (or a GGUF) into another folder.

    Parameters
    ----------
    src : path
        A checkpoint of transformers, or a GGUF that transformers opens. Never written.
    dst : path
        A new or empty folder, or with ``resume`` that of an unfinished run. It holds plain dense
        safetensors with exact zeros, tokenizer, config, and ``cuobs_report.json``.
    calibration : str
        A text file, or ``tokens.npz:key``.
    samples : int
        Windows: drawn from a text by the seed, taken from the front of tokens.
    sequence_length : int, optional
        Tokens of a window; of a text 2048, or what the model allows; of tokens their own.
    seed : int
        Of the draw.
    attention_mask : str, optional
        An array like the calibration tokens, 0 where one is padding.
    evaluate : sequence of str
        Texts or tokens whose perplexity is measured before and after, in windows as long as those
        of the calibration.
    resume : bool
        Go on with an unfinished run, with the same arguments.
    save_masks : bool
        Write ``cuobs_masks.safetensors`` too.
    shard_size : int or str
        The largest file of weights: bytes, or a size like "5GB".
    device : {"auto", "cpu", "cuda"}
    say : callable, optional
        Called with lines of text: the protocol, what will be done, and what was found.
    progress : callable, optional
        Called with (label, done, total) while a text is evaluated.
    starting : callable, optional
        See `prune_model`; called before the dense model is evaluated.
    drop_first_token, on_block, **options
        Of `prune_model`.

    Returns
    -------
    ModelReport
    """
    say = say or (lambda line: None)
    check_cut(samples, sequence_length)
    validation.integer("seed", seed, low=0)
    try:
        shard_bytes = arrays.parse_size(shard_size)
    except ValueError:
        raise ValueError(
            f"shard_size: found {shard_size!r}, expected bytes, or a size like '5GB'"
        ) from None
    check_arguments(device=device, **options)
    if attention_mask and not is_tokens(calibration):
        raise ValueError(
            f"attention_mask: found it with the text {calibration}, expected tokens.npz:key, whose "
            "windows it belongs to"
        )
    for spec in (calibration, *evaluate, *([attention_mask] if attention_mask else ())):
        check_file(spec)
    checkpoint.check_destination(src, dst, resume)
    place = choose_device(device)
    model = checkpoint.load_model(src)
    tokenizer = None
    if not all(is_tokens(spec) for spec in (calibration, *evaluate)):
        tokenizer = checkpoint.load_tokenizer(src)

    def windows(spec, samples, length):
        if is_tokens(spec):
            found = load_tokens(spec, samples, length)
        else:
            found = tokenize(spec, tokenizer, length or _default_length(model), samples, seed)
        with validation.naming(spec):
            return check_tokens(model, found)

    tokens = windows(calibration, samples, sequence_length)
    length = tokens.shape[1]
    names = [os.path.basename(spec) for spec in evaluate]
    names = names if len(set(names)) == len(names) else [os.fspath(spec) for spec in evaluate]
    texts = {n: windows(spec, None, length) for n, spec in zip(names, evaluate, strict=True)}
    mask = None
    if attention_mask is not None:
        mask = load_tokens(attention_mask, samples, length, kinds="biu")
    protocol = {
        "source": os.fspath(src),
        "calibration": os.fspath(calibration),
        "windows": len(tokens),
        "length": length,
        "seed": None if is_tokens(calibration) else seed,
        "evaluated": {name: list(part.shape) for name, part in texts.items()},
    }
    all_of_it = is_tokens(calibration) or len(tokens) < samples
    drawn = "" if all_of_it else f", drawn with seed {seed}"
    say(f"calibration  {calibration}: {len(tokens)} windows of {length} tokens{drawn}")
    for name, part in texts.items():
        say(f"evaluation   {name}: {len(part)} windows of {part.shape[1]} tokens, no overlap")

    def measure(stage):
        found = {}
        for name, part in texts.items():
            label = f"perplexity, {name}, {stage}"
            found[name] = perplexity(model, part, place, progress and partial(progress, label))
            say(f"{label}: {found[name]:.2f}")
        return found

    before = {}

    def checked(report):
        if starting:
            starting(report)
        before.update(measure("dense"))
        if bad := [name for name, value in before.items() if math.isnan(value)]:
            raise ValueError(
                f"model: found that its perplexity on {bad[0]} is no number, expected finite "
                "weights; a wider dtype may hold its activations"
            )

    masks = {} if save_masks else None
    try:
        report = prune_model(
            model, tokens, attention_mask=mask, checkpoint_folder=dst, resume=resume,
            protocol=protocol, masks=masks, device=device, starting=checked,
            drop_first_token=drop_first_token, on_block=on_block, **options,
        )  # fmt: skip
        after = measure("pruned")
    except torch.cuda.OutOfMemoryError:
        raise MemoryError(
            "memory: found the device full, expected fewer samples, shorter windows or fewer "
            "batch_tokens"
        ) from None
    report.perplexity = {name: (before[name], after[name]) for name in texts}
    checkpoint.finish(src, dst, model, report, masks, shard_bytes)
    return report


def evaluate_folder(folder, text, sequence_length=None, *, device="auto", progress=None):
    """The perplexity of the model of a folder (or a GGUF) on a text or on tokens.

    Returns
    -------
    perplexity : float
    tokens : ndarray of int64, shape (windows, length)
    """
    place = choose_device(device)
    check_cut(None, sequence_length)
    check_file(text)
    checkpoint.find_source(folder)
    if is_tokens(text):
        tokens = load_tokens(text, None, sequence_length)
        model = checkpoint.load_model(folder)
    else:
        tokenizer = checkpoint.load_tokenizer(folder)
        model = checkpoint.load_model(folder)
        length = _default_length(model) if sequence_length is None else sequence_length
        tokens = tokenize(text, tokenizer, length)
    step = progress and partial(progress, "perplexity")
    return perplexity(model, tokens, place, step), tokens


def _default_length(model):
    """Tokens of a window of a text: 2048, or what the model allows."""
    return min(DEFAULT_LENGTH, longest_window(model) or DEFAULT_LENGTH)
