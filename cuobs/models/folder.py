"""From a checkpoint's folder to that of a pruned model."""

import math
import os
import re
from functools import partial

import torch

from cuobs import arrays, validation
from cuobs.models import loading
from cuobs.models.calibration import (
    check_cut,
    check_file,
    check_tokens,
    is_tokens,
    load_tokens,
    longest_window,
    tokenize,
)
from cuobs.models.checkpoint import masks_file
from cuobs.models.destination import changed_tensors, check_destination, finish
from cuobs.models.evaluate import perplexity
from cuobs.models.names import ignored, match
from cuobs.models.prune import check_arguments, choose_device, prune_model
from cuobs.models.source import (
    HOLDERS,
    MASKS,
    REPORT,
    find_source,
    stored_tensors,
    unfinished,
)
from cuobs.models.structure import find_blocks, is_transposed, linears

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
SAVE_DTYPES = ("float16", "bfloat16", "float32")


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
    save_dtype=None,
    trust_remote_code=False,
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
        A checkpoint of transformers, the name of one in the Hub's cache, or a GGUF that
        transformers opens. Never written.
    dst : path
        A new or empty folder, or with ``resume`` that of an unfinished run. It holds the tensors
        of SRC, by the same names, as plain dense safetensors with exact zeros where they are
        pruned, all its further files, and ``cuobs_report.json``.
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
    save_dtype : {"float16", "bfloat16", "float32"}, optional
        What the weights are written in. By default each in the dtype that it has; of a GGUF in
        half precision unless its matrices are held in float32.
    trust_remote_code : bool
        Run the code that SRC holds, where its model needs it.
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
    source, shard_bytes, save_dtype = check_folders(
        src, dst, calibration, samples, sequence_length, seed, attention_mask, evaluate, resume,
        shard_size, save_dtype,
    )  # fmt: skip
    check_arguments(device=device, **options)
    if resume and not unfinished(dst):
        say(f"resume       found no unfinished run in {dst}: a new one begins")
    place = choose_device(device)
    model = loading.load_model(source, trust_remote_code)
    names = names_in_files(source, model, options.get("skip"))
    for line in what_is_written(source, model, names, save_dtype):
        say(line)
    if source.gguf is not None and save_dtype is None:
        save_dtype = loading.gguf_dtype(source)[0]

    tokenizer = None
    if not all(is_tokens(spec) for spec in (calibration, *evaluate)):
        tokenizer = loading.load_tokenizer(source, trust_remote_code)
    tokens = read_windows(calibration, model, tokenizer, samples, sequence_length, seed)
    length = tokens.shape[1]
    texts = {
        name: read_windows(spec, model, tokenizer, None, length, seed)
        for name, spec in zip(_short_names(evaluate), evaluate, strict=True)
    }
    mask = attention_mask and load_tokens(attention_mask, samples, length, kinds="biu")
    protocol = {
        "source": source.name,
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
        report.left = [_file_name(name, names) for name in report.left]
        if starting:
            starting(report)
        before.update(measure("dense"))
        if bad := [name for name, value in before.items() if math.isnan(value)]:
            raise ValueError(
                f"model: found that its perplexity on {bad[0]} is no number, expected finite "
                "weights; a wider dtype may hold its activations"
            )

    def done(report, blocks):
        for row in report.blocks[-1].layers:
            row.transposed = is_transposed(model.get_submodule(row.name))
            row.name = _file_name(row.name, names)
        if on_block:
            on_block(report, blocks)

    try:
        report = prune_model(
            model, tokens, attention_mask=mask, checkpoint_folder=dst, resume=resume,
            protocol=protocol, keep_masks=save_masks, device=device, starting=checked,
            drop_first_token=drop_first_token, on_block=done, **options,
        )  # fmt: skip
        if save_dtype is not None:
            model.to(save_dtype)  # what is measured is what is written
        after = measure("pruned")
    except torch.cuda.OutOfMemoryError:
        raise MemoryError(
            "memory: found the device full, expected fewer samples, shorter windows or fewer "
            "batch_tokens"
        ) from None
    report.perplexity = {name: (before[name], after[name]) for name in texts}
    masks = report.masks if save_masks else None
    _write(source, dst, model, names, report, masks, save_dtype, shard_bytes)
    return report


def check_folders(
    src, dst, calibration, samples, sequence_length, seed, attention_mask, evaluate, resume,
    shard_size, save_dtype,
):  # fmt: skip
    """Refuse what is wrong whatever the weights are; the source, bytes and dtype of its files."""
    check_cut(samples, sequence_length)
    validation.integer("seed", seed, low=0)
    try:
        shard_bytes = arrays.parse_size(shard_size)
    except ValueError:
        raise ValueError(
            f"shard_size: found {shard_size!r}, expected bytes, or a size like '5GB'"
        ) from None
    if save_dtype is not None:
        validation.name_of("save_dtype", save_dtype, SAVE_DTYPES)
        save_dtype = getattr(torch, save_dtype)
    if attention_mask and not is_tokens(calibration):
        raise ValueError(
            f"attention_mask: found it with the text {calibration}, expected tokens.npz:key, whose "
            "windows it belongs to"
        )
    for spec in (calibration, *evaluate, *([attention_mask] if attention_mask else ())):
        check_file(spec)
    source = find_source(src)
    check_destination(source, dst, resume)
    return source, shard_bytes, save_dtype


def read_windows(spec, model, tokenizer, samples, length, seed):
    """Windows of a text or of a file of tokens, which the model can read."""
    if is_tokens(spec):
        found = load_tokens(spec, samples, length)
    else:
        found = tokenize(spec, tokenizer, length or _default_length(model), samples, seed)
    with validation.naming(spec):
        return check_tokens(model, found)


def _short_names(specs):
    """The names of files without their folders, unless two are then alike."""
    names = [os.path.basename(spec) for spec in specs]
    return names if len(set(names)) == len(names) else [os.fspath(spec) for spec in specs]


def names_in_files(source, model, skip):
    """The names that a model's tensors have in its files, by those that they have in memory.

    Raises
    ------
    ValueError
        A linear that would be pruned lies in the files in another form.
    """
    if source.gguf is not None:
        return {name: name for name in model.state_dict()}
    names = match(model, source, stored_tensors(source))
    prefix, blocks = find_blocks(model)
    for inner in linears(blocks):
        name = f"{prefix}.{inner}"
        if f"{name}.weight" not in names and not (skip and re.search(skip, name)):
            raise ValueError(
                f"{source.name}: found that {name} is put together from tensors of other shapes or "
                "values when it is loaded, expected one that lies in the files as it is pruned; "
                "--skip leaves it as it is"
            )
    return names


def what_is_written(source, model, names, save_dtype):
    """Lines of text: the dtype of what is written, and what is carried over untouched."""
    if source.gguf is not None:
        dtype, kinds = loading.gguf_dtype(source)
        dtype = str(save_dtype or dtype).removeprefix("torch.")
        yield f"weights      {', '.join(kinds)} in {source.gguf}, written in {dtype}"
        return
    stored = stored_tensors(source)
    if kept := ignored(stored, names, model):
        size = sum(stored[name].nbytes for name in kept) / 2**20
        yield (
            f"carried over {len(kept)} tensors that {type(model).__name__} does not hold "
            f"({size:.1f} MiB): {_some(kept)}"
        )
    if files := [name for name in source.carried if name.endswith(HOLDERS)]:
        yield f"carried over {_some(files)}, as they are"
    for why in dict.fromkeys(source.left_out.values()):
        yield f"left out     {_some([n for n, w in source.left_out.items() if w == why])}: {why}"


def _some(names, most=3):
    """A few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _file_name(linear, names):
    """The name of a linear by that of its weight in the files."""
    return names.get(f"{linear}.weight", f"{linear}.weight").removesuffix(".weight")


def _write(source, dst, model, names, report, masks, save_dtype, shard_bytes):
    config, extra = None, {}
    if source.gguf is None:
        changed = changed_tensors(model, source, names)
        report.carried = ignored(stored_tensors(source), names, model)
        report.left_out = source.left_out
    else:
        changed, config, extra = loading.as_checkpoint(model)
    extra[REPORT] = report.to_json()
    if masks is not None:
        extra[MASKS] = masks_file({_file_name(name, names): m for name, m in masks.items()})
    finish(
        source, dst, changed, config=config, extra=extra, save_dtype=save_dtype,
        shard_size=shard_bytes,
    )  # fmt: skip


def evaluate_folder(
    folder, text, sequence_length=None, *, device="auto", progress=None, trust_remote_code=False
):
    """The perplexity of the model of a folder (or a GGUF) on a text or on tokens.

    Returns
    -------
    perplexity : float
    tokens : ndarray of int64, shape (windows, length)
    """
    place = choose_device(device)
    check_cut(None, sequence_length)
    check_file(text)
    source = find_source(folder)
    if is_tokens(text):
        tokens = load_tokens(text, None, sequence_length)
        model = loading.load_model(source, trust_remote_code)
    else:
        tokenizer = loading.load_tokenizer(source, trust_remote_code)
        model = loading.load_model(source, trust_remote_code)
        length = _default_length(model) if sequence_length is None else sequence_length
        tokens = tokenize(text, tokenizer, length)
    step = progress and partial(progress, "perplexity")
    return perplexity(model, tokens, place, step), tokens


def _default_length(model):
    """Tokens of a window of a text: 2048, or what the model allows."""
    return min(DEFAULT_LENGTH, longest_window(model) or DEFAULT_LENGTH)
