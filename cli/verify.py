"""cuobs verify"""

import os
import sys

import click
from cuobs_cli import common, models, options

import cuobs
from cuobs import files

# Layers that are named before the rest are counted.
NAMED = 10


@click.command(cls=options.Command, short_help="Check a weight, or a pruned model.")
@click.argument("w", metavar="W|DIR", type=click.Path())
@options.pattern
@click.pass_context
def verify(ctx, w, pattern):
    """Check a weight, or a pruned model, for its pattern.

    The exit code is 1 where it is broken.

    Of the folder of a pruned model every layer that its report names is looked at, by the pattern
    that it was pruned to, or by --pattern, and by its mask where the folder holds masks.
    """
    if os.path.isdir(w):
        given = ctx.get_parameter_source("pattern") not in options.NOT_GIVEN
        return _verify_folder(w, pattern if given else None)
    files.existing_file(files.split(w)[0], "a weight, or the folder of a pruned model")
    common.check_array("W", w)
    found = cuobs.verify(files.load(w), pattern)
    if found:
        click.echo(f"{w} obeys {pattern.label} ({pattern.keeps}) in {found.scopes} scopes")
        return
    row, column = found.first
    click.echo(
        f"{w} breaks {pattern.label} ({pattern.keeps}) in {found.broken} of "
        f"{found.scopes} scopes; the first begins at row {row}, column {column}"
    )
    sys.exit(1)


def _verify_folder(folder, pattern):
    models.load()
    from cuobs.models.checkpoints.verifying import verify_folder

    layers = verify_folder(folder, pattern)
    bad = [layer for layer in layers if not layer]
    for layer in bad[:NAMED]:
        click.echo(f"{layer.name}: {_fault(layer)}")
    if len(bad) > NAMED:
        click.echo(f"and {len(bad) - NAMED} more")
    if bad or not layers:
        what = "what it was pruned to" if pattern is None else pattern.label
        click.echo(f"{folder} breaks {what} in {len(bad)} of {len(layers)} layers")
        sys.exit(1)
    for label in dict.fromkeys(layer.pattern.label for layer in layers):
        mine = [layer for layer in layers if layer.pattern.label == label]
        scopes = sum(layer.found.scopes for layer in mine)
        masks = "" if mine[0].outside is None else ", and the masks"
        click.echo(
            f"{folder} obeys {label} ({mine[0].pattern.keeps}){masks} in {len(mine)} "
            f"layers, {scopes} scopes"
        )


def _fault(layer):
    if layer.found is None:
        return "no weight of this name and shape"
    if layer.found:
        return f"{layer.outside} weights that the mask says are pruned are not zero"
    row, column = layer.found.first
    return (
        f"breaks {layer.pattern.label} in {layer.found.broken} of {layer.found.scopes} scopes; the "
        f"first begins at row {row}, column {column}"
    )
