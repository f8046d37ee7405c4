"""The folder that a run writes: whether it may, and whether it is complete."""

import contextlib
import json
import os
import shutil

from cuobs import files
from cuobs.models.checkpoints.source import (
    BLOCKS,
    LEFTOVER,
    MARKER,
    REPORT,
    SHARDS,
    STAGING,
    find_source,
    unfinished,
)


def check_destination(src, dst, resume=False):
    """Refuse a folder that must not be written, before any work; nothing is left of the look.

    Parameters
    ----------
    src : path or Source
    dst : path
    resume : bool
        Whether ``dst`` may hold an unfinished run.

    Raises
    ------
    ValueError, FileExistsError, FileNotFoundError, OSError
    """
    dst = os.fspath(dst)
    source = find_source(src)
    folder, place = os.path.realpath(source.folder), os.path.realpath(dst)
    alone = os.path.isfile(source.name)  # a .gguf may have its neighbours
    if place == folder or not alone and place.startswith(folder + os.sep):
        what = "the source itself" if place == folder else "a folder inside the source"
        raise ValueError(f"{dst}: found {what}, expected one outside it")
    if os.path.lexists(dst) and not os.path.isdir(dst):
        raise FileExistsError(f"{dst}: found a file, expected a new folder")
    if unfinished(dst) and os.path.exists(os.path.join(dst, "config.json")):
        settle(dst)  # that came last: all is in place, and only the run's own files are left
    if unfinished(dst) and not resume:
        raise FileExistsError(
            f"{dst}: found an unfinished run, expected --resume to go on with it or a new folder"
        )
    present = os.path.isdir(dst) and [n for n in os.listdir(dst) if not n.startswith(LEFTOVER)]
    if not unfinished(dst) and present:
        what = "a finished model" if os.path.exists(os.path.join(dst, REPORT)) else "files"
        raise FileExistsError(f"{dst}: found {what}, expected a new or empty folder")
    with _folder(dst):
        files.check_output(os.path.join(dst, MARKER), force=True)


def check_began_with(dst, identity, whole=True):
    """Refuse to go on with a run that began with something else.

    Parameters
    ----------
    dst : path
        Of an unfinished run.
    identity : dict
        What decides the result.
    whole : bool
        Whether that is all that does; else keys that are not in it are not looked at.
    """
    marker = os.path.join(dst, MARKER)
    identity = json.loads(json.dumps(identity))
    try:
        with open(marker) as file:
            before = dict(json.load(file))
    except (ValueError, TypeError):
        raise ValueError(
            f"{marker}: found a damaged file, expected what the run began with; start again in a "
            "new folder"
        ) from None
    for key in sorted(identity.keys() | (before.keys() if whole else ())):
        if before.get(key) == identity.get(key):
            continue
        if key in ("tokens", "model"):
            what = "other tokens" if key == "tokens" else "another model"
            raise ValueError(
                f"resume: found {what} than the run began with; where they are the same, another "
                "version of cuobs or transformers began it, and a new folder is needed"
            )
        raise ValueError(
            f"resume: found {key}={identity.get(key)!r}, expected {before.get(key)!r} as the run "
            "began with"
        )


@contextlib.contextmanager
def _folder(path):
    """Make a folder for a moment, with those above it, where it is not there."""
    made = []
    while not os.path.isdir(path):
        made.append(path)
        path = os.path.dirname(os.path.abspath(path))
    for folder in reversed(made):
        os.mkdir(folder)
    try:
        yield
    finally:
        for folder in made:
            os.rmdir(folder)


def settle(dst):
    """Take away what a run needed once all that it was to write is in place, the marker last."""
    shutil.rmtree(os.path.join(dst, BLOCKS), ignore_errors=True)
    sync(dst)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(dst, MARKER))
    sync(dst)


def take_back(dst):
    """Move files of weights that a killed run had begun to put in place back to its blocks.

    Those in staging first: until all are there, some of the same names in ``dst`` may be those of
    an earlier try, which wrote something else.
    """
    home = os.path.join(dst, SHARDS)
    for folder in (os.path.join(dst, STAGING), dst):
        for name in os.listdir(folder) if os.path.isdir(folder) and os.path.isdir(home) else ():
            place = os.path.join(home, name)
            weights = name.startswith("model") and name.endswith(".safetensors")
            if weights and not os.path.exists(place):
                os.replace(os.path.join(folder, name), place)


def abandon(dst, existed):
    """Take away what a run made that was refused before anything was finished.

    Parameters
    ----------
    dst : path
    existed : bool
        Whether the folder was there before.
    """
    blocks = os.path.join(dst, BLOCKS)
    inside = set(os.listdir(dst)) if os.path.isdir(dst) else {None}
    kept = os.listdir(blocks) if os.path.isdir(blocks) else ()
    begun = all(name.startswith(os.path.basename(SHARDS)) for name in kept)
    if inside <= {MARKER, BLOCKS} and begun:
        settle(dst)
        if not existed:
            os.rmdir(dst)


def sync(path):
    """Have a file or a folder on disk before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
