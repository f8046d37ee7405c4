"""What the commands share: layers, outputs, progress."""

import os

import click
from cuobs_cli import options

import cuobs
from cuobs import files, sharing

# Where a context keeps the whole command, for reports.
COMMAND = "cuobs.command"


def layer_arguments(command):
    """W, X and --hessian, of which one of the last two is needed."""
    for decorate in (
        options.option("--hessian", type=click.Path(), metavar="H.npz", group=options.INPUT,
                       help="What 'cuobs hessian' wrote, in place of X."),
        click.argument("x", metavar="[X]", required=False, type=click.Path()),
        click.argument("w", metavar="W", type=click.Path()),
    ):  # fmt: skip
        command = decorate(command)
    return command


def given(keys):
    """Those of some keys that are not None."""
    return {name: value for name, value in keys.items() if value is not None}


def one_layer(config):
    """Refuse a config with entries for whole models, and devices that are not there."""
    for name in ("layers", "skip", "model"):
        if entries := getattr(config, name):
            raise ValueError(
                f"{name}: found {', '.join(entries)}, expected such entries with prune-model alone"
            )
    sharing.first(config.settings)


def parse_headers_once():
    """Halve what most kernels of CuPy's take to compile: a first call waits for dozens.

    CuPy reads this where it is imported. What is parsed lies in the folder of temporary files, some
    10 MB for each kind of program, and stays there if the process is killed: this is for commands
    that end soon.
    """
    os.environ.setdefault("CUPY_NVRTC_USE_PCH", "1")


def load_layer(w, x, hessian, device):
    """W, and X and the Hessian or None, mapped and not yet read."""
    W = files.load(w)
    X = files.load(x) if x else None
    return W, X, None if hessian is None else load_hessian(hessian, device)


def load_hessian(spec, device="auto"):
    """A Hessian that cuobs wrote, or the matrix itself as an array of a file."""
    path, key = files.split(spec)
    if key is None and files.keys(path) != [None]:
        return cuobs.Hessian.load(path, device=device)
    return files.load(spec)


def check_inputs(*specs):
    """Refuse files that are not there or hold no arrays; a None is left out."""
    for spec in specs:
        if spec:
            files.keys(files.split(spec)[0])


def check_layer(w, x, hessian):
    """Refuse what can't be the files of a layer, before it is asked what may be written."""
    if (x is None) == (hessian is None):
        found = "neither" if x is None else "both"
        raise ValueError(f"X, hessian: found {found}, expected exactly one of them")
    check_inputs(w, x, hessian)
    check_array("W", w)
    if x:
        check_array("X", x)


def check_array(name, spec):
    """Refuse the file of a Hessian or of a packed weight where an array is expected."""
    path, key = files.split(spec)
    held = set() if key else set(files.keys(path))
    if {"hessian", "tokens"} <= held:
        way_out = f", or --hessian {path}" if name == "X" else ""
        raise ValueError(f"{name}: found a Hessian in {path}, expected an array{way_out}")
    if {"packed", "values", "index"} <= held:
        raise ValueError(
            f"{name}: found a packed weight in {path}, expected an array, as 'cuobs unpack' "
            "writes it"
        )


def check_outputs(inputs, outputs, force):
    """Refuse outputs that can't or mustn't be written, before any work.

    Parameters
    ----------
    inputs : list of str or None
    outputs : dict
        Option to path; a None is left out.
    force : bool
    """
    taken = {}
    inputs = {os.path.realpath(files.split(spec)[0]) for spec in inputs if spec}
    for option, spec in outputs.items():
        if spec is None:
            continue
        if not spec:
            raise ValueError(f"{option}: found an empty path, expected a file's")
        path = files.split(spec)[0]
        place = os.path.realpath(path)
        if place in inputs and not force:
            raise ValueError(f"{option}: found the input {path}, expected a new path or --force")
        if place in taken:
            raise ValueError(f"{option}: found {path}, which {taken[place]} writes already")
        taken[place] = option
        files.check_output(path, force)


def show_layer(shape, X, tokens):
    """Say how large a weight and its inputs are: swapped ones may have the same columns."""
    click.echo(f"weight   {by(shape)}")
    inputs = f"{shape[1]} columns" if X is None else by(X.shape)
    each = "" if tokens is None else f", {tokens / shape[1]:.1f} tokens a column"
    click.echo(f"inputs   {inputs}{each}")


def show_written(*paths):
    """Say which files or folders there are now; a None is left out."""
    for path in paths:
        if path:
            click.echo(f"written  {path}")


def by(shape):
    """A shape as it is said: 576 x 1536."""
    return " x ".join(map(str, shape))
