"""A model of a folder rotated into another one, once all that can be known before is checked."""

import json
from dataclasses import asdict
from functools import partial

import cuobs
from cuobs.models.checkpoints import loading
from cuobs.models.checkpoints.destination import changed_tensors, finish
from cuobs.models.checkpoints.names import check_all_known
from cuobs.models.checkpoints.source import MASKS
from cuobs.models.checkpoints.source import REPORT as PRUNED
from cuobs.models.pipeline import (
    names_in_files,
    what_is_written,
    written_dtype,
)
from cuobs.models.pruning.prune import choose_device
from cuobs.models.ranks import joined
from cuobs.models.rotating.folding import untied_config
from cuobs.models.rotating.rotation import rotate
from cuobs.models.tokens.calibration import listed, load_tokens
from cuobs.models.tokens.mixture import WindowReader, gather

REPORT = "cuobs_rotation.json"


def rotate_source(
    source, dst, calibration, pattern, options, *, samples, sequence_length, seed, attention_mask,
    shard_bytes, save_dtype, trust_remote_code, device, say, progress,
):  # fmt: skip
    """Rotate the model of a source into another folder, see `rotate_folder`."""
    with joined(device) as ranks:
        if not ranks.leads:
            say, progress = lambda line: None, None
        model = loading.load_model(source, trust_remote_code)
        names = names_in_files(source, model)
        check_all_known(model, source, names)
        for line in what_is_written(source, model, names, save_dtype):
            say(line)
        save_dtype = written_dtype(source, save_dtype)
        reader = WindowReader(
            source, model, seed, choose_device(device), trust_remote_code=trust_remote_code,
            progress=progress and partial(progress, "windows of the model's own"),
        )  # fmt: skip
        read = partial(
            gather, listed(calibration), [], reader, samples=samples, length=sequence_length
        )
        mixture = ranks.agree(read() if ranks.leads else None)
        tokens = mixture.pruning
        mask = attention_mask and load_tokens(attention_mask, samples, tokens.shape[1], kinds="biu")
        for line in mixture.lines(seed) if ranks.leads else ():
            say(f"calibration  {line}")
        report = rotate(
            model, tokens, pattern, attention_mask=mask, windows=samples, device=device,
            progress=progress and partial(progress, "rotation"), **options,
        )  # fmt: skip
        if not ranks.leads:
            return None
        _write(source, dst, model, names, report, save_dtype, shard_bytes)
    return report


def _write(source, dst, model, names, report, save_dtype, shard_bytes):
    if save_dtype is not None:
        loading.cast_stored(model, save_dtype)
    if report.untied:
        report.untied = model.get_output_embeddings().weight.nbytes
    if source.gguf is None:
        changed, extra = changed_tensors(model, source, names), {}
        config = untied_config(source.config)
    else:
        changed, config, extra = loading.as_checkpoint(model)
    extra[REPORT] = json.dumps({"cuobs": cuobs.__version__, **asdict(report)}, indent=2) + "\n"
    finish(
        source, dst, changed, config=config, extra=extra, without=(PRUNED, MASKS),
        save_dtype=save_dtype, shard_size=shard_bytes,
    )  # fmt: skip
