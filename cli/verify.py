"""cuobs verify"""

import json
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
@options.as_json
@click.pass_context
def verify(ctx, w, pattern, as_json):
    """Check a weight, or a pruned model, for its pattern.

    The exit code is 1 where it is broken.

    Of the folder of a pruned model every layer that its report names is looked at, by the pattern
    that it was pruned to, or by --pattern, and by its mask where the folder holds masks.
    """
    if os.path.isdir(w):
        given = ctx.get_parameter_source("pattern") not in options.NOT_GIVEN
        return _verify_folder(w, pattern if given else None, as_json)
    files.existing_file(files.split(w)[0], "a weight, or the folder of a pruned model")
    common.check_array("W", w)
    found = cuobs.verify(files.load(w), pattern)
    if as_json:
        return _say({"weight": w, "pattern": pattern.label, **_content(found)})
    if found:
        click.echo(f"{w} obeys {pattern.label} ({pattern.keeps}) in {found.scopes} scopes")
        return
    row, column = found.first
    click.echo(
        f"{w} breaks {pattern.label} ({pattern.keeps}) in {found.broken} of "
        f"{found.scopes} scopes; the first begins at row {row}, column {column}"
    )
    sys.exit(1)


def _say(content):
    """Print what was found as JSON; the exit code is 1 where a pattern is broken."""
    click.echo(json.dumps(content, indent=2))
    sys.exit(0 if content["obeys"] else 1)


def _content(found):
    """What JSON says of a `cuobs.Verification`."""
    first = found.first and [int(place) for place in found.first]
    return {"obeys": bool(found), "scopes": found.scopes, "broken": found.broken, "first": first}


def _layer(layer):
    """What JSON says of a `LayerVerification`."""
    found = dict.fromkeys(("obeys", "scopes", "broken", "first"))
    found |= {} if layer.found is None else _content(layer.found)
    return {"name": layer.name, "pattern": layer.pattern.label, **found, "obeys": bool(layer),
            "outside": layer.outside}  # fmt: skip


def _verify_folder(folder, pattern, as_json):
    models.load(as_json)
    from cuobs.models.checkpoints.verifying import verify_folder

    layers = verify_folder(folder, pattern)
    bad = [layer for layer in layers if not layer]
    if as_json:
        obeys = bool(layers) and not bad
        return _say({"model": folder, "obeys": obeys, "layers": [_layer(x) for x in layers]})
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
