"""cuobs compare"""

import json

import click
from cuobs_cli import common, display

import cuobs
from cuobs import files


@click.command(short_help="Set methods side by side on a layer.")
@common.layer_arguments
@common.pattern_option
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="M",
    help="One of " + ", ".join(cuobs.methods()) + "; may be repeated.  [all]",
)
@common.method_options
@click.option("--plot", metavar="F.png", help="Also draw loss against time (extra: plot).")
@click.option("--rst", metavar="F", help="Also write the table as reStructuredText.")
@click.option("--json", "json_path", metavar="F", help="Also write the table as JSON.")
@common.force_option
def compare(w, x, hessian, pattern, methods, plot, rst, json_path, force, **options):
    """Run every method, or those named, on one layer and print a table.

    An option goes to the methods that take it.
    """
    common.check_outputs(
        [w, x, hessian], {"--plot": plot, "--rst": rst, "--json": json_path}, force
    )
    if plot:
        from cuobs import plotting

        plotting.check_picture(plot)
    W, data = common.load_layer(w, x, hessian, options["device"])
    with display.Progress("hessian") as progress:

        def starting(name):
            progress.label = name

        table = cuobs.compare(
            W,
            **data,
            pattern=pattern,
            methods=methods or None,
            progress=progress.callback(),
            starting=starting,
            **common.given(options),
        )
    click.echo(table.text())
    if rst:
        files.write_text(rst, table.rst() + "\n", force)
    if json_path:
        files.write_text(json_path, json.dumps(table.json(), indent=2) + "\n", force)
    if plot:
        plotting.pareto(table, plot, force)
    for path in (rst, json_path, plot):
        if path:
            click.echo(f"written  {path}")
