"""From a checkpoint's folder to that of the same model in another basis."""

import json
from dataclasses import asdict
from functools import partial

import cuobs
from cuobs.models import loading
from cuobs.models.calibration import is_tokens, load_tokens
from cuobs.models.destination import changed_tensors, finish
from cuobs.models.names import ignored
from cuobs.models.pipeline import names_in_files, read_windows, what_is_written
from cuobs.models.planning import check_folders
from cuobs.models.residual import refused
from cuobs.models.rotation import WINDOWS, check_arguments, rotate
from cuobs.models.source import stored_tensors

REPORT = "cuobs_rotation.json"


def rotate_folder(
    src,
    dst,
    calibration,
    *,
    pattern="2:4",
    samples=WINDOWS,
    sequence_length=None,
    seed=0,
    attention_mask=None,
    shard_size="5GB",
    save_dtype=None,
    trust_remote_code=False,
    device="auto",
    say=None,
    progress=None,
    **options,
):
    """Rotate the model of a folder (or a GGUF) into another folder; it stays dense.

    Parameters
    ----------
    src, dst, calibration, samples, sequence_length, seed, attention_mask, shard_size, save_dtype
        See `prune_folder`.
    trust_remote_code, device, say
        See `prune_folder`.
    pattern : str or Pattern
        What the basis is learned for.
    progress : callable, optional
        Called with (label, done, total).
    **options
        Of `rotate`: steps, rate, score, permute, damp.

    Returns
    -------
    RotationReport
        As it is written to ``cuobs_rotation.json``.
    """
    say = say or (lambda line: None)
    source, shard_bytes, save_dtype = check_folders(
        src, dst, calibration, samples, sequence_length, seed, attention_mask, (), False,
        shard_size, save_dtype,
    )  # fmt: skip
    pattern = cuobs.pattern.parse(pattern)
    check_arguments(**{key: value for key, value in options.items() if key != "permute"})
    model = loading.load_model(source, trust_remote_code)
    names = names_in_files(source, model)
    check_all_known(source, model, names)
    for line in what_is_written(source, model, names, save_dtype):
        say(line)
    if source.gguf is not None and save_dtype is None:
        save_dtype = loading.gguf_dtype(source)[0]
    tokenizer = None
    if not is_tokens(calibration):
        tokenizer = loading.load_tokenizer(source, trust_remote_code)
    tokens = read_windows(calibration, model, tokenizer, samples, sequence_length, seed)
    mask = attention_mask and load_tokens(attention_mask, samples, tokens.shape[1], kinds="biu")
    say(f"calibration  {calibration}: {len(tokens)} windows of {tokens.shape[1]} tokens")
    report = rotate(
        model, tokens, pattern, attention_mask=mask, windows=samples, device=device,
        progress=progress and partial(progress, "rotation"), **options,
    )  # fmt: skip
    if source.gguf is None:
        changed, config, extra = changed_tensors(model, source, names), untied(source.config), {}
    else:
        changed, config, extra = loading.as_checkpoint(model)
    extra[REPORT] = json.dumps({"cuobs": cuobs.__version__, **asdict(report)}, indent=2) + "\n"
    finish(
        source, dst, changed, config=config, extra=extra, save_dtype=save_dtype,
        shard_size=shard_bytes,
    )  # fmt: skip
    return report


def check_all_known(source, model, names):
    """Refuse a checkpoint with tensors that would stay in the old basis.

    Raises
    ------
    ValueError
        The files hold tensors that the model does not, or the model makes some of several.
    """
    if source.gguf is not None:
        return
    unknown = [
        name
        for name in ignored(stored_tensors(source), names, model)
        if not name.endswith("inv_freq")  # frequencies of old checkpoints, which have no basis
    ]
    if unknown:
        raise refused(
            f"{len(unknown)} tensors of {source.name} that {type(model).__name__} does not hold, "
            f"{unknown[0]} among them",
            "none: they would go on reading the residual stream in its old basis",
        )
    own = model.state_dict(keep_vars=True)
    named = {id(own[name]) for name in names if name in own}
    for name, _ in model.named_parameters():
        if id(own[name]) not in named:
            raise refused(
                f"that {name} is put together from several tensors of {source.name}",
                "one that lies in the files as the model holds it",
            )


def untied(config):
    """A model's config whose head has a weight of its own."""
    result = {**config, "tie_word_embeddings": False}
    for key, part in config.items():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            result[key] = {**part, "tie_word_embeddings": False}
    return result
