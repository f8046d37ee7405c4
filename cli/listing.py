"""cuobs patterns, cuobs methods"""

import string

import click
from cuobs_cli import common, options

import cuobs
from cuobs import plotting

LETTERS = string.ascii_letters
WIDTH = 32


@click.command(cls=options.Command, short_help="Draw the patterns.")
@click.argument("chosen", metavar="[PATTERN]...", nargs=-1, type=options.PatternName())
@options.output("--svg", metavar="F.svg", help="Draw them as a picture too (extra: plot).")
@options.force
def patterns(chosen, svg, force):
    """Draw one scope of each named pattern, or of those given."""
    chosen = list(chosen or cuobs.patterns().values())
    if svg:
        common.check_outputs([], {"--svg": svg}, force)
        if not svg.lower().endswith(".svg"):
            raise ValueError(f"--svg: found {svg}, expected a file's name that ends in .svg")
        plotting.save(plotting.patterns_figure(chosen), svg, force)
    for pattern in chosen:
        click.echo(f"{pattern.label}: {pattern.keeps}")
        if pattern.name:
            click.echo(f"  {pattern}")
        click.echo("")
        click.echo("\n".join("    " + line for line in drawing(pattern)))
        click.echo("")
    click.echo("Each letter is a block of one scope, which competes with the other letters;")
    click.echo("dots belong to other scopes.")
    common.show_written(svg)


@click.command(cls=options.Command, short_help="List the methods and their options.")
def methods():
    """List the methods, what they do and which options they take."""
    known = cuobs.methods()
    width = max(map(len, known))
    for name, method in known.items():
        click.echo(f"{name:{width}}  {method.summary}")
        for option in method.options:
            flag = "--" + option.name.replace("_", "-")
            choices = f" {', '.join(option.choices)}" if option.choices else ""
            default = option.computed if option.default is None else option.default
            click.echo(f"{'':{width}}  {flag}{choices}  [default: {default}]")


def drawing(pattern):
    """The first scope of a pattern where it lies in the weight, as lines of text."""
    layout = pattern.compile(*pattern.smallest())
    rows, columns = layout.row_order[0], layout.column_order[0]
    left, right = int(columns.min()), int(columns.max())
    lines, last = [], None
    for row in sorted(map(int, rows)):
        if last is not None and row > last + 1:
            between = row - last - 1
            lines.append(f"  ({between} row{'s' * (between > 1)} between)")
        last = row
        cells = ["."] * (right - left + 1)
        blocks = layout.blocks[list(rows).index(row)]
        for column, block in zip(columns, blocks, strict=True):
            cells[column - left] = LETTERS[block % len(LETTERS)]
        more = " ..." if len(cells) > WIDTH else ""
        lines.append(f"row {row:<3} " + " ".join(cells[:WIDTH]) + more)
    return lines
