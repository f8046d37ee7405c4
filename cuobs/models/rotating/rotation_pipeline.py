"""A model of a folder rotated into another one, once all that can be known before is checked."""

import json
from dataclasses import asdict
from functools import partial

import torch

import cuobs
from cuobs.arrays import size_text
from cuobs.models.blocks import plain_torch
from cuobs.models.checkpoints import loading
from cuobs.models.checkpoints.destination import changed_tensors, finish
from cuobs.models.checkpoints.names import check_all_known
from cuobs.models.checkpoints.source import MASKS
from cuobs.models.checkpoints.source import REPORT as PRUNED
from cuobs.models.pipeline import (
    names_in_files,
    stored_dtypes,
    what_is_written,
    written_dtype,
)
from cuobs.models.pruning.prune import choose_device
from cuobs.models.ranks import joined
from cuobs.models.recipe import RotationRecipe
from cuobs.models.rotating.folding import check_logits, logits_of, untied_config
from cuobs.models.rotating.rotation import patterns_of, rotate
from cuobs.models.rotating.rotation_prediction import (
    FEWEST,
    check_rotation,
    predict_rotation,
    rotation_work,
)
from cuobs.models.tokens.calibration import load_tokens
from cuobs.models.tokens.mixture import WindowReader, gather, read_given

REPORT = "cuobs_rotation.json"


@plain_torch()
def rotate_source(run, pattern, options, say, progress):
    """Rotate the model of a `Run`'s source into its folder, see `rotate_folder`."""
    with joined(run.device) as ranks:
        if not ranks.leads:
            say, progress = lambda line: None, None
        if run.source.gguf is None:  # which takes seconds to be read for its config alone
            _check_room(run, pattern, options)
        model = loading.load_model(run.source, run.trust_remote_code)
        names = names_in_files(run.source, model)
        check_all_known(model, run.source, names)
        for line in what_is_written(run.source, model, names, run.save_dtype):
            say(line)
        mixture = ranks.agree(_read(run, model, progress) if ranks.leads else None)
        tokens, mask = mixture.pruning, run.attention_mask
        if mask:
            mask = load_tokens(mask, run.samples, tokens.shape[1], kinds="biu")
        for line in mixture.lines(run.seed) if ranks.leads else ():
            say(f"calibration  {line}")
        work, place = _work(run, model, tokens.shape, pattern, options)
        say(f"memory       about {size_text(predict_rotation(work, place))} on {place.type}")
        shown = torch.as_tensor(tokens[:1])
        dense = logits_of(model, shown)
        report = rotate(
            model, tokens, pattern, attention_mask=mask, windows=run.samples, device=run.device,
            progress=progress and partial(progress, "rotation"), **options,
        )  # fmt: skip
        if not ranks.leads:
            return None
        save_dtype = written_dtype(run.source, run.save_dtype)
        dtypes = stored_dtypes(run.source, names)
        if save_dtype is not None:  # what is compared is what is written
            loading.cast_stored(model, save_dtype)
            report.deviation = check_logits(model, shown, dense)
        elif len(set(dtypes.values())) > 1:
            loading.round_stored(model, dtypes)
            report.deviation = check_logits(model, shown, dense, dtypes.values())
        _write(run, model, names, report, save_dtype)
    return report


def _check_room(run, pattern, options):
    """Refuse a model that there is no room to rotate, before its weights are read."""
    model = loading.empty_as_stored(run.source, run.trust_remote_code)
    check_rotation(*_work(run, model, FEWEST, pattern, options))


def _work(run, model, windows, pattern, options):
    """What rotating takes, a `RotationWork`, and the device."""
    place, recipe = choose_device(run.device), RotationRecipe(windows=run.samples, **options)
    return rotation_work(model, windows, patterns_of(model, pattern), recipe, place), place


def _read(run, model, progress):
    """The windows to learn from, a `Mixture`."""
    reader = WindowReader(
        run.source, model, run.seed, choose_device(run.device),
        trust_remote_code=run.trust_remote_code,
        progress=progress and partial(progress, "windows of the model's own"),
    )  # fmt: skip
    sources = run.calibration, [], reader
    given, length = read_given(*sources, samples=run.samples, length=run.sequence_length)
    return gather(given, *sources, samples=run.samples, length=length)


def _write(run, model, names, report, save_dtype):
    source = run.source
    if report.untied:
        report.untied = model.get_output_embeddings().weight.nbytes
    if source.gguf is None:
        changed, extra = changed_tensors(model, source, names), {}
        config = untied_config(source.config)
    else:
        changed, config, extra = loading.as_checkpoint(model)
    extra[REPORT] = json.dumps({"cuobs": cuobs.__version__, **asdict(report)}, indent=2) + "\n"
    finish(
        source, run.dst, changed, config=config, extra=extra, without=(PRUNED, MASKS),
        save_dtype=save_dtype, shard_size=run.shard_bytes,
    )  # fmt: skip
