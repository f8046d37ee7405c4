"""cuobs verify"""

import sys

import click
from cuobs_cli import options

import cuobs
from cuobs import files


@click.command(cls=options.Command)
@click.argument("w", metavar="W", type=click.Path())
@options.pattern
def verify(w, pattern):
    """Say whether a weight obeys a pattern; exit code 1 if not."""
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
