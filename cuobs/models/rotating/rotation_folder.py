"""From a checkpoint's folder to that of the same model in another basis.

What can be known before is checked here; PyTorch is imported afterwards.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any

import cuobs
from cuobs.model_choices import ROTATION_WINDOWS
from cuobs.models.checkpoints.source import find_source
from cuobs.models.planning import Run, check_run, shard_bytes
from cuobs.models.recipe import RotationRecipe
from cuobs.models.tokens.calibration import listed


def rotate_folder(
    src: str | PathLike,
    dst: str | PathLike,
    calibration: str | list[str],
    *,
    pattern: Any = "2:4",
    samples: int = ROTATION_WINDOWS,
    sequence_length: int | None = None,
    seed: int = 0,
    attention_mask: str | None = None,
    shard_size: int | str = "5GB",
    save_dtype: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    say: Callable | None = None,
    progress: Callable | None = None,
    **options: Any,
) -> Any:
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
        As it is written to ``cuobs_rotation.json``; None in processes of torchrun but the first.
    """
    run = Run(
        find_source(src), dst, listed(calibration), samples, sequence_length, seed, attention_mask,
        shard_bytes(shard_size), save_dtype, trust_remote_code, device,
    )  # fmt: skip
    check_run(run)
    pattern = cuobs.pattern.parse(pattern)
    RotationRecipe(**options)
    from cuobs.models.rotating import rotation_pipeline

    say = say or (lambda line: None)
    return rotation_pipeline.rotate_source(run, pattern, options, say, progress)
