"""Files of weights that a run lays out before it begins, and fills as its blocks finish."""

import os
from dataclasses import dataclass, field

from cuobs.models.checkpoints.checkpoint import in_place
from cuobs.models.checkpoints.destination import entries_of
from cuobs.models.checkpoints.names import index_name
from cuobs.models.checkpoints.shards import are_laid_out, lay_out, places_in
from cuobs.models.checkpoints.source import SHARDS, StoredPacked


@dataclass(frozen=True)
class Laid:
    """Files of weights, and what lies where in them.

    Attributes
    ----------
    files : dict of str to dict of str to Entry
        What each is to hold, by the names in the files; empty where none are laid out.
    places : dict of str to (Stored or StoredPacked)
        By the model's own names.
    patterns : dict of str to str
        Of the linears that lie packed.
    """

    files: dict = field(default_factory=dict)
    places: dict = field(default_factory=dict)
    patterns: dict = field(default_factory=dict)


def lay_out_run(dst, stored, names, forms, save_dtype, limit):
    """The files of a run.

    Parameters
    ----------
    dst : path
    stored : dict of str to Stored
        The tensors of SRC.
    names : dict of str to str
        Their names by those in the model.
    forms : dict of str to Form
        Of linears that are to lie packed, see `cuobs.models.packed.packing.packed_forms`.
    save_dtype, limit
        See `entries_of` and `cuobs.models.checkpoints.shards.lay_out`.

    Returns
    -------
    Laid
        Without files where the folder holds others, of a run that was begun in another form.
    """
    in_files = {name: names[f"{name}.weight"] for name in forms}
    changed = {}
    for name, form in forms.items():
        changed |= form.described(in_files[name], stored[in_files[name]].dtype)
    files = lay_out(entries_of(stored, changed, (), save_dtype), limit)
    folder = os.path.join(dst, SHARDS)
    if not are_laid_out(folder, files):
        return Laid()
    at = places_in(folder, files)
    places = {own: at[name] for own, name in names.items()}
    for name, (pattern, shape, transposed) in forms.items():
        values, index = at[in_files[name]], at[index_name(in_files[name])]
        places[f"{name}.weight"] = StoredPacked(values, index, pattern, shape, transposed)
    return Laid(files, places, {name: form.pattern for name, form in forms.items()})


def filled(laid, dst, blocks, names):
    """What of finished blocks lies in its place.

    Parameters
    ----------
    laid : Laid
    dst : path
    blocks : int
        How many there are.
    names : dict of str to str
        The names in the files by those in the model.

    Returns
    -------
    dict of str to Stored, or None
        By the names in the files; None where a weight that is to lie packed does not: one that no
        block ran, or one that an earlier try finished in another form.
    """
    found = {
        name: place
        for index in range(blocks)
        for name, place in in_place(dst, index).items()
        if laid.places.get(name) == place
    }
    if any(f"{name}.weight" not in found for name in laid.patterns):
        return None
    result = {}
    for name, place in found.items():
        packed = isinstance(place, StoredPacked)
        result[names[name]] = place.values if packed else place
        if packed:
            result[index_name(names[name])] = place.index
    return result
