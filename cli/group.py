"""The command `cuobs`: its commands by name, plugins, and errors in one sentence."""

import contextlib
import difflib
import importlib
import importlib.util
import os
import shlex
import signal
import sys
import threading
import warnings
from pathlib import Path

import click
from cuobs_cli import display
from cuobs_cli.common import COMMAND

import cuobs
from cuobs import files

BAD_INPUT = 2
INTERRUPTED = 130
# Where each command is. A module is imported when its command is asked for, and imports neither
# PyTorch nor matplotlib before it runs.
SECTIONS = {
    "A layer": {
        "prune": "prune:prune",
        "compare": "compare:compare",
        "hessian": "hessian:hessian",
        "verify": "verify:verify",
        "pack": "packing:pack",
        "unpack": "packing:unpack",
        "plot": "plot:plot",
    },
    "A whole model": {
        "prune-model": "models:prune_model",
        "eval-model": "models:eval_model",
        "report": "reporting:report",
        "rotate": "rotating:rotate",
        "write-calibration": "distilling:write_calibration",
        "pack-model": "packing:pack_model",
        "unpack-model": "packing:unpack_model",
        "speedup": "models:speedup",
    },
    "What there is": {
        "methods": "listing:methods",
        "patterns": "listing:patterns",
        "info": "info:info",
    },
}
COMMANDS = {name: place for section in SECTIONS.values() for name, place in section.items()}


class Stopped(KeyboardInterrupt):
    """A signal that asks to stop, as Ctrl-C does."""


@contextlib.contextmanager
def stopped_by_signals():
    """Let SIGTERM and SIGHUP stop as Ctrl-C does, so that no temporary file is left."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup has a signal ignored
            if number and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number, frame):
    raise Stopped(number)


@contextlib.contextmanager
def one_sentence():
    """Turn what a user did wrong into one sentence and exit code 2, and Ctrl-C into 130.

    A warning is one line, without the place in the code that it comes from.
    """
    try:
        with stopped_by_signals(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                yield
            finally:
                display.clear()
    except Stopped as stopped:
        click.echo("Stopped.", err=True)
        raise click.exceptions.Exit(128 + stopped.args[0]) from None
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if _another_says_it():
            raise click.exceptions.Exit(BAD_INPUT) from error
        failure = click.ClickException(sentence(error))
        failure.exit_code = BAD_INPUT
        raise failure from error


def _another_says_it():
    """Whether this is one of several processes of torchrun and not yet apart from the first."""
    distributed = sys.modules.get("torch.distributed")
    apart = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return os.environ.get("RANK", "0") != "0" and not apart


def _show_warning(message, *_, **__):
    display.say(f"Warning: {' '.join(str(message).split())}", err=True)


class Commands(click.Group):
    """The commands of `COMMANDS`, with errors in one sentence."""

    def list_commands(self, ctx):
        """The names, in the order in which they are shown."""
        return list(COMMANDS)

    def get_command(self, ctx, name):
        """The command of a name, or None."""
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].split(":")
        return getattr(importlib.import_module(f"cuobs_cli.{module}"), attribute)

    def resolve_command(self, ctx, args):
        """The command of the first argument; of one that there is not, which it is near to."""
        name = str(args[0])
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        if nearest and name not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command {name!r}. Did you mean {nearest[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):
        """Write a section for each kind of command."""
        width = max(map(len, COMMANDS))
        for title, names in SECTIONS.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(title):
                formatter.write_dl([
                    (f"{name:{width}}", command.get_short_help_str(formatter.width))
                    for name, command in commands.items()
                ])  # fmt: skip

    def parse_args(self, ctx, args):
        """Read the options before the command, plugins among them."""
        ctx.meta[COMMAND] = shlex.join(["cuobs", *map(str, args)])
        with one_sentence():
            return super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Run the command."""
        with one_sentence():
            return super().invoke(ctx)


def sentence(error):
    """An exception's message on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename:
        text = f"{error.filename}: found no such file"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) and not text.startswith("memory: "):
        text = f"out of memory ({text}): try a lower --memory-limit" if text else "out of memory"
    return text


def load_plugin(path):
    """Run a Python file that brings a method: its METHOD, or what it registers itself.

    Raises
    ------
    ValueError
        It fails, or brings neither a method nor a pattern.
    """
    files.existing_file(path, "FILE.py with a method")
    before = cuobs.methods(), cuobs.patterns()
    spec = importlib.util.spec_from_file_location(f"cuobs_plugin_{Path(path).stem}", path)
    if spec is None:
        raise ValueError(f"{path}: found no Python file, expected FILE.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if hasattr(module, "METHOD"):
            cuobs.register_method(module.METHOD)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if (cuobs.methods(), cuobs.patterns()) == before and not hasattr(module, "METHOD"):
        raise ValueError(f"{path}: found no METHOD in it, expected a cuobs.Method of this name")


def _load_plugins(ctx, parameter, paths):
    for path in paths:
        load_plugin(path)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cuobs.__version__, prog_name="cuobs")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    is_eager=True,
    expose_value=False,
    type=click.Path(),
    metavar="FILE.py",
    callback=_load_plugins,
    help="A method of one's own, see docs/contributing.rst; may be repeated.",
)
def main():
    """Prune linear layers to patterns that hardware can use.

    Arrays are .npy files, or arrays in files of several: file.npz:key,
    file.safetensors:tensor.name. W is (outputs, inputs), X is (..., inputs).
    """
