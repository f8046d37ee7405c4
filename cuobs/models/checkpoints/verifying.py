"""Whether the files of a pruned model obey its patterns and its masks; PyTorch is not needed."""

import os
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from cuobs import files, validation
from cuobs.models.checkpoints.source import MASKS, find_source
from cuobs.models.report import read_report
from cuobs.ops.packed import unpack
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
        What `prune_folder` wrote, or `pack_folder`, whose weights are unpacked one by one.
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
    source = find_source(folder, packed=None)
    stored = source.stored
    report = read_report(source.folder)
    masks = _masks(source)
    result = []
    for row in (row for row in report.layers if row.loss is not None):
        wanted = parse(pattern or _pattern(row, report.settings))
        with validation.naming(f"{row.name}.weight"):
            weight = _weight(source, stored, row, report.settings)
            if weight is None or weight.shape != row.shape:
                result.append(LayerVerification(row.name, wanted, None, None))
                continue
            found = verify(weight, wanted)
        stands = weight.T if row.transposed else weight
        outside = masks and _outside(stands, masks.get(row.name))
        result.append(LayerVerification(row.name, wanted, found, outside))
    return result


def _weight(source, stored, row, settings):
    """The weight of a layer, (outputs, inputs), unpacked where it is packed, or None."""
    names = f"{row.name}.weight", f"{row.name}.index"
    held = [_load(source, stored, name) for name in names if name in stored]
    if len(held) < 2:  # dense
        return held[0].T if held and row.transposed else held[0] if held else None
    layout = parse(_pattern(row, settings)).compile(*row.shape)
    return unpack(*(np.asarray(array) for array in held), layout)


def _load(source, stored, name):
    return files.load(f"{source.path(stored[name].file)}:{name}")


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
