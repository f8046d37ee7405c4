"""From a checkpoint's folder to that of a pruned model.

What can be known before is checked here; PyTorch is imported afterwards.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

import cuobs
from cuobs import arrays, files, validation
from cuobs.model_choices import SAMPLES
from cuobs.models.checkpoints.marker import check_began_with
from cuobs.models.checkpoints.source import find_source, unfinished
from cuobs.models.planning import (
    Run,
    View,
    check_device,
    check_host_memory,
    check_length,
    check_model,
    check_run,
    check_sources,
    check_text,
    shard_bytes,
    vocabulary_of,
)
from cuobs.models.recipe import read_arguments
from cuobs.models.tokens.calibration import SELF_WINDOWS, check_cut, listed


def prune_folder(
    src: str | PathLike,
    dst: str | PathLike,
    calibration: str | list[str],
    *,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    attention_mask: str | None = None,
    evaluate: Sequence = (),
    resume: bool = False,
    save_masks: bool = False,
    packed: bool = False,
    shard_size: int | str = "5GB",
    save_dtype: str | None = None,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    say: Callable | None = None,
    progress: Callable | None = None,
    starting: Callable | None = None,
    drop_first_token: bool = True,
    distill_calibration: str | Sequence[str] = (),
    on_block: Callable | None = None,
    command: str | None = None,
    host_memory: int | str | None = None,
    **options: Any,
) -> Any:
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
    calibration : str or list of str
        Each a text file, ``tokens.npz:key``, or ``self:1024``: windows that the dense model
        samples itself. With ``distill`` those serve distillation alone where there is something
        else, and the first ``samples`` of them prune where there is not.
    samples : int
        Windows of each: drawn from a text by the seed, taken from the front of tokens.
    sequence_length : int, optional
        Tokens of a window; of a text 2048, or what the model allows; of tokens their own.
    seed : int
        Of the draw, of what the model writes, and of the order in which it is distilled.
    attention_mask : str, optional
        An array like the calibration tokens, 0 where one is padding.
    evaluate : sequence of str
        Texts or tokens whose perplexity is measured before and after, in windows as long as those
        of the calibration, and how near the result is to the dense model there.
    resume : bool
        Go on with an unfinished run, with the same arguments.
    save_masks : bool
        Write ``cuobs_masks.safetensors`` too.
    packed : bool
        Write the pruned linears packed, see `pack_folder`.
    shard_size : int or str
        The largest file of weights: bytes, or a size like "5GB".
    save_dtype : {"float16", "bfloat16", "float32"}, optional
        What the weights are written in. By default each in the dtype that it has; of a GGUF in
        half precision unless its matrices are held in float32.
    trust_remote_code : bool
        Run the code that SRC holds, where its model needs it.
    dry_run : bool
        Check all that can be checked without weights, say which linears are pruned and why others
        are not, predict memory and time, and stop there; nothing is written.
    device : {"auto", "cpu", "cuda"}
    say : callable, optional
        Called with lines of text: the protocol, what will be done, and what was found.
    progress : callable, optional
        Called with (label, done, total) while a text is evaluated.
    starting : callable, optional
        See `prune_model`; called before the dense model is evaluated.
    distill_calibration : str or list of str
        What serves distillation alone, in the forms of ``calibration``, all windows of it. A pass
        then sees the windows that pruned twice.
    command : str, optional
        What was asked for on the command line, for the report.
    host_memory : int or str, optional
        Of `prune_model`. A rotation, distillation, windows of the model's own and a GGUF need the
        whole model in memory; otherwise blocks are read from their files one at a time.
    drop_first_token, on_block, **options
        Of `prune_model`.

    Returns
    -------
    ModelReport
        None in processes of torchrun but the first, which writes.
    """
    if options.get("batch_tokens") is not None:
        validation.integer("batch_tokens", options["batch_tokens"])
    settings = {"device": device, "drop_first_token": drop_first_token, **options}
    recipe = read_arguments({k: value for k, value in settings.items() if k != "batch_tokens"})
    calibration, distill_calibration = listed(calibration), listed(distill_calibration)
    if distill_calibration and not recipe.distill:
        raise ValueError("distill_calibration: found it without distill, expected its passes too")
    if host_memory is not None:
        host_memory = arrays.parse_size(host_memory, "host_memory")
    run = Run(
        find_source(src), dst, calibration, samples, sequence_length, seed, attention_mask,
        shard_bytes(shard_size), save_dtype, trust_remote_code, device, tuple(evaluate), resume,
        save_masks, packed, distill_calibration, command, host_memory,
    )  # fmt: skip
    check_run(run)
    if resume and unfinished(dst):  # distillation has a state of its own
        began = {"cuobs": cuobs.__version__, **replace(recipe, distill=0).described()}
        check_began_with(dst, began, whole=False)
    if distill_calibration:
        check_sources(run.source, [*calibration, *distill_calibration], None, sequence_length)
    check_host_memory(run, recipe)
    nothing = lambda *_: None  # noqa: E731
    view = View(say or nothing, progress, starting or nothing, on_block or nothing)
    if resume and not unfinished(dst):
        view.say(f"resume       found no unfinished run in {dst}: a new one begins")
    from cuobs.models import pipeline

    step = pipeline.plan if dry_run else pipeline.prune
    return step(run, view, {"drop_first_token": drop_first_token, **options})


class Evaluation(NamedTuple):
    """What `evaluate_folder` found.

    Attributes
    ----------
    perplexity : float
    tokens : ndarray of int64, shape (windows, length)
    agreement : cuobs.models.Agreement or None
        With the other model.
    """

    perplexity: float
    tokens: object
    agreement: object = None


def evaluate_folder(
    folder: str | PathLike,
    text: str,
    sequence_length: int | None = None,
    *,
    against: str | PathLike | None = None,
    device: str = "auto",
    progress: Callable | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """The perplexity of the model of a folder (or a GGUF) on a text or on tokens.

    Parameters
    ----------
    folder : path
    text : str
        A text file, or ``tokens.npz:key``.
    sequence_length : int, optional
        Tokens of a window.
    against : path, optional
        The folder of the dense model, to see how near the first is to it.
    device : {"auto", "cpu", "cuda"}
    progress : callable, optional
        Called with (label, done, total).
    trust_remote_code : bool

    Returns
    -------
    Evaluation
    """
    check_device(device)
    check_cut(None, sequence_length)
    source = find_source(folder, packed=None)
    check_model(source)
    check_text(source, text, None, sequence_length)
    other = None if against is None else find_source(against)
    if other is not None:
        check_model(other)
        own, its = vocabulary_of(source), vocabulary_of(other)
        if own and its and own != its:
            raise ValueError(f"against: found a vocabulary of {its}, expected {own} as of {folder}")
    from cuobs.models import pipeline

    return Evaluation(
        *pipeline.evaluate(
            source, other, text, sequence_length, device, progress, trust_remote_code
        )
    )


def write_calibration(
    src: str | PathLike,
    out: str | PathLike,
    windows: int = SELF_WINDOWS,
    sequence_length: int | None = None,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Callable | None = None,
) -> Any:
    """Write windows that the model of a folder (or a GGUF) samples itself into a file.

    Parameters
    ----------
    src : path
    out : path
        .npz, .safetensors or .npy; the array is called ``tokens``.
    windows : int
    sequence_length : int, optional
        Tokens of a window; 2048, or what the model allows.
    temperature, seed, progress
        See `write_windows`.
    device : {"auto", "cpu", "cuda"}
    trust_remote_code : bool
    force : bool
        Overwrite an existing file.

    Returns
    -------
    ndarray of int64, shape (windows, length)
    """
    check_device(device)
    check_cut(windows, sequence_length)
    validation.integer("seed", seed, low=0)
    validation.positive("temperature", temperature)
    out = os.fspath(out)
    files.check_output(out, force)
    files.check_format(out, np.dtype("int32"))
    source = find_source(src)
    check_model(source)
    if sequence_length is not None:
        check_length(source, "sequence_length", sequence_length)
    from cuobs.models import pipeline

    tokens = pipeline.write(
        source, windows, sequence_length, temperature, seed, device, progress, trust_remote_code
    )
    content = tokens.astype(np.int32)
    if files.by_name(out):
        files.save_arrays(out, {"tokens": content}, force)
    else:
        files.save(out, content, force)
    return tokens
