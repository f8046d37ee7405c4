"""cuobs plot"""

import os

import click
from cuobs_cli import common, options

import cuobs
from cuobs import files, plotting


@click.group(short_help="Draw a mask.")
def plot():
    """Draw pictures (extra: plot)."""


@plot.command(cls=options.Command, short_help="Draw what is not zero in a weight.")
@click.argument("w", metavar="W", type=click.Path())
@options.output("-o", "--out", metavar="F.png", help="Where to draw it: .png, .svg or .pdf.",
                show_default="W-mask.png")
@options.option("--pattern", type=options.PatternName(), metavar="P", group=options.WHAT,
                help="Frame one of its scopes.")
@options.force
def mask(w, out, pattern, force):
    """Draw what is not zero in a weight, a corner of it and the whole from afar."""
    if out is None:
        out = os.path.splitext(os.path.basename(files.split(w)[0]))[0] + "-mask.png"
    common.check_inputs(w)
    common.check_outputs([w], {"-o": out}, force)
    plotting.check_picture(out)
    W = files.load(w)
    if W.ndim != 2:
        raise ValueError(f"{w}: found {W.ndim} dimensions, expected 2 (rows, columns)")
    title = w if pattern is None else f"{w}, {pattern.label}"
    if pattern is not None and not cuobs.verify(W, pattern):
        title += " (which it breaks)"
    plotting.save(plotting.mask_figure(W, pattern=pattern, title=title), out, force)
    common.show_written(out)
