"""Whether the files of a pruned model obey its patterns and its masks; PyTorch is not needed."""

import os
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from cuobs import files, validation
from cuobs.models.checkpoints.source import MASKS, find_source, stored_tensors
from cuobs.models.report import read_report
from cuobs.pattern import Verification, parse, verify

__all__ = ["LayerVerification", "verify_folder"]


class LayerVerification(NamedTuple):
    """What was found of a layer.

    Attributes
    ----------
    name : str
        As its tensor in the files, without ``.weight``.
    pattern : Pattern
    found : cuobs.Verification or None
        None where there is no such tensor, or it has another shape than the report says.
    outside : int or None
        Weights that are not zero where the mask says so; None without masks.
    """

    name: str
    pattern: object
    found: Verification | None
    outside: int | None

    def __bool__(self):
        return bool(self.found) and not self.outside


def verify_folder(folder: str | PathLike, pattern: Any = None) -> list:
    """Look at every layer that the report of a pruned model says was pruned.

    Parameters
    ----------
    folder : path
        What `prune_folder` wrote.
    pattern : str or Pattern, optional
        What the layers are to obey; by default what each was pruned to.

    Returns
    -------
    list of LayerVerification

    Raises
    ------
    ValueError, FileNotFoundError
        The folder holds no report of pruning, or a file is damaged.
    """
    source = find_source(folder)
    stored = stored_tensors(source)
    report = read_report(source.folder)
    masks = _masks(source)
    result = []
    for row in (row for row in report.layers if row.loss is not None):
        wanted = parse(pattern or _pattern(row, report.settings))
        name = f"{row.name}.weight"
        shape = row.shape[::-1] if row.transposed else row.shape
        if name not in stored or stored[name].shape != shape:
            result.append(LayerVerification(row.name, wanted, None, None))
            continue
        with validation.naming(name):
            weight = files.load(f"{source.path(stored[name].file)}:{name}")
            found = verify(weight.T if row.transposed else weight, wanted)
        outside = masks and _outside(weight, masks.get(row.name))
        result.append(LayerVerification(row.name, wanted, found, outside))
    return result


def _pattern(row, settings):
    """The pattern of a layer in a form that is known without the plugin that may have named it."""
    own = row.pattern or settings["pattern"]
    if own != settings["pattern"]:
        return own
    try:
        return parse(own)
    except ValueError:
        return settings["pattern_view"]


def _masks(source):
    """The packed masks by the name of their linear; None where there is no file of them."""
    path = source.path(MASKS)
    if not os.path.isfile(path):
        return None
    return {name.removesuffix(".mask"): mask for name, mask in files.load_arrays(path).items()}


def _outside(weight, packed):
    """Weights that a mask says are zero and that are not; all of them where there is no mask."""
    if packed is None or packed.shape[0] != weight.shape[0]:
        return int(weight.size)
    kept = np.unpackbits(np.asarray(packed), axis=1, count=weight.shape[1]).astype(bool)
    return int(np.count_nonzero(np.asarray(weight)[~kept]))
