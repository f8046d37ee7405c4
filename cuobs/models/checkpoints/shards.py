"""Files of weights, laid out before any of them is there, so that a tensor is written when it is
final, whatever comes before it in its file.
"""

import contextlib
import os
import shutil

from cuobs import files
from cuobs.containers import header_of
from cuobs.models.checkpoints.marker import sync
from cuobs.models.checkpoints.names import TORCH, bytes_of
from cuobs.models.checkpoints.source import Stored

WEIGHTS = "model.safetensors"
METADATA = {"format": "pt"}


def lay_out(entries, limit):
    """What files are to hold which tensors.

    Parameters
    ----------
    entries : dict of str to Entry
        In the order in which they are shared out.
    limit : int
        Bytes of the largest file, where no single tensor is larger.

    Returns
    -------
    dict of str to dict of str to Entry
        By the names of the files.
    """
    parts, size = [{}], 0
    for name, entry in entries.items():
        if parts[-1] and size + entry.size > limit:
            parts.append({})
            size = 0
        parts[-1][name] = entry
        size += entry.size
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {
        f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)
    }


def places_in(folder, parts):
    """Where the tensors of files that are laid out lie, or will lie: a dict of `Stored`."""
    places = {}
    for title, entries in parts.items():
        path = os.path.join(os.path.abspath(folder), title)
        for name, start in header_of(entries, METADATA)[1].items():
            places[name] = Stored(path, entries[name].dtype, tuple(entries[name].shape), start)
    return places


def reserve(folder, parts):
    """Make the folder of the files, with room on disk for all of their tensors; or it is there."""
    if os.path.isdir(folder):
        return
    making = f"{folder}.tmp"
    shutil.rmtree(making, ignore_errors=True)
    os.makedirs(making)
    try:
        for title, entries in parts.items():
            text, _ = header_of(entries, METADATA)
            with files.replacing(os.path.join(making, title)) as file:
                file.write(text)
                files.reserve(file, len(text) + sum(entry.size for entry in entries.values()))
    except BaseException:
        shutil.rmtree(making)  # a disk that is full is not to be kept so
        raise
    sync(making)
    os.replace(making, folder)
    sync(os.path.dirname(folder))


def are_laid_out(folder, parts):
    """Whether all files are those that `reserve` makes; also where it has made none yet."""
    if not os.path.isdir(folder):
        return True
    for title, entries in parts.items():
        text, _ = header_of(entries, METADATA)
        with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, title), "rb") as f:
            if f.read(len(text)) == text:
                continue
        return False
    return True


def fill(places, take):
    """Write tensors in their places, and have them on disk.

    Parameters
    ----------
    places : dict of str to Stored
        In files that are there.
    take : callable
        Gives a tensor by its name.
    """
    for path in dict.fromkeys(place.file for place in places.values()):
        with files.updating(path) as file:
            for name, place in places.items():
                if place.file == path:
                    file.seek(place.start)
                    file.write(bytes_of(take(name).to(TORCH[place.dtype])))
