"""What the commands share: errors, options, outputs, progress."""

import os

import click

import cuobs
from cuobs import files

BAD_INPUT = 2
INTERRUPTED = 130


class Commands(click.Group):
    """A group that turns what a user did wrong into one sentence and exit code 2."""

    def invoke(self, ctx):
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
            failure = click.ClickException(sentence(error))
            failure.exit_code = BAD_INPUT
            raise failure from error


def sentence(error):
    """An exception's message on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) and not text.startswith("memory: "):
        text = f"out of memory ({text}): try a lower --memory-limit" if text else "out of memory"
    return text


def layer_arguments(command):
    """W, X and --hessian, of which one of the last two is needed."""
    command = click.option(
        "--hessian", metavar="H.npz", help="What 'cuobs hessian' wrote, in place of X."
    )(command)
    command = click.argument("x", metavar="[X]", required=False)(command)
    return click.argument("w", metavar="W")(command)


pattern_option = click.option(
    "--pattern",
    default="2:4",
    show_default=True,
    metavar="P",
    help="A name (" + ", ".join(cuobs.patterns()) + "), n:m, n:mxb, or the text form "
    "'view=... block=... scope=... keep=...'; see 'cuobs patterns'.",
)

force_option = click.option("--force", is_flag=True, help="Overwrite what exists.")


def method_options(command):
    """The options that cuobs.prune and cuobs.compare take; those not given stay its own."""
    for option in reversed(
        [
            click.option("--refine", metavar="exact", help="Re-solve the weights of any mask."),
            click.option("--splits", type=int, help="Spans of the split methods.  [64]"),
            click.option(
                "--group", type=int, help="Scopes between two updates.  [a tenth of them]"
            ),
            click.option("--order", metavar="O", help="Which scopes go first; see 'methods'."),
            click.option("--schedule", metavar="S", help="'slow' is better and takes longer."),
            click.option("--damp", type=float, help="Damping, of the mean diagonal.  [0.01]"),
            click.option("--dtype", metavar="T", help="Compute in float32 or float64.  [float32]"),
            click.option("--device", metavar="D", help="auto, cpu or cuda.  [auto]"),
            click.option("--precision", metavar="P", help="tensor or fp32.  [tensor]"),
            click.option("--memory-limit", metavar="SIZE", help="For example 8GiB."),
            click.option("--workers", type=int, help="Threads on the CPU.  [one a core]"),
        ]
    ):
        command = option(command)
    return command


def given(options):
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def load_layer(w, x, hessian, device=None):
    """W, and X or the Hessian, mapped and not yet read."""
    W = files.load(w)
    X = files.load(x) if x else None
    if hessian is None:
        return W, {"X": X}
    return W, {"X": X, "hessian": load_hessian(hessian, device or "auto")}


def load_hessian(spec, device="auto"):
    """A Hessian that cuobs wrote, or the matrix itself as an array of a file."""
    path, key = files.split(spec)
    if key is None and files.keys(path) != [None]:
        return cuobs.Hessian.load(path, device=device)
    return files.load(spec)


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
    for option, spec in given(outputs).items():
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


def keeps(pattern):
    """What a pattern keeps, in words that can't be read the other way round."""
    blocks, elements = 1, 1
    for scope, block in zip(pattern.scope, pattern.block, strict=True):
        blocks, elements = blocks * scope, elements * block
    what = {1: "", 2: " pairs"}.get(elements, f" blocks of {elements}")
    return f"keep {pattern.keep} of {blocks}{what}"
