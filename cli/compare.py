"""cuobs compare"""

import json
import math
from functools import partial

import click
from cuobs_cli import common, display, options

import cuobs
from cuobs import comparing, files, plotting


@click.command(cls=options.CompareCommand, short_help="Set methods side by side on a layer.")
@common.layer_arguments
@options.output("--plot", metavar="F.png", help="Also draw loss against time (extra: plot).")
@options.output("--rst", metavar="F", help="Also write the table as reStructuredText.")
@options.output("--report", metavar="F.json", help="Also write the table as JSON.")
@options.force
@options.as_json
def compare(w, x, hessian, config, methods, own, force, as_json, **outputs):
    """Run every method, or those named, on one layer and print a table.

    An option goes to the methods that take it. Rows are printed as they are found; Ctrl-C keeps
    them, in the files too.
    """
    common.parse_headers_once()
    common.one_layer(config)
    shared = {
        "pattern": config.recipe.pattern,
        "refine": config.recipe.refine,
        "damp": config.recipe.damp,
    }
    if methods is None:
        methods = comparing.all_methods(own, config.settings, **shared)
    comparing.recipes_of(methods, own, **shared)
    common.check_layer(w, x, hessian)
    named = {f"--{name}": path for name, path in outputs.items()}
    common.check_outputs([w, x, hessian], named, force)
    if outputs["plot"]:
        plotting.check_picture(outputs["plot"])
    settings = {key: getattr(config.settings, key) for key in cuobs.recipe.SETTINGS}
    W, X, H = common.load_layer(w, x, hessian, config.settings.device)
    tokens = getattr(H, "tokens", None) if X is None else math.prod(X.shape[:-1])
    with display.Progress("hessian") as progress:
        show_layer = partial(common.show_layer, W.shape, X, tokens)
        rows = _Rows([] if as_json else methods, progress, show_layer)
        try:
            cuobs.compare(
                W, X, hessian=H, methods=methods, progress=progress.callback(),
                starting=rows.starting, finished=rows.finished, **shared, **own, **settings,
            )  # fmt: skip
        finally:
            rows.show_rest()
            if rows.table is not None:
                _write(rows.table, w, config.settings, force, **outputs)
                if as_json:
                    click.echo(_json(rows.table))
                else:
                    common.show_written(*map(outputs.get, ("rst", "report", "plot")))


class _Rows:
    """Prints those rows of a table that it is to, as soon as all before them are there."""

    def __init__(self, methods, progress, show_layer):
        self.table = None
        self._show_layer = show_layer
        self._methods = methods
        self._progress = progress
        self._shown = 0

    def starting(self, name):
        self._progress.label = name

    def finished(self, table):
        self.table = table
        found = {row.method for row in table}
        while self._shown < len(self._methods) and self._methods[self._shown] in found:
            self._show(self._methods[self._shown])
            self._shown += 1

    def show_rest(self):
        """The rows that wait for others, where it was stopped."""
        for row in self.table or ():
            if row.method in self._methods[self._shown :]:
                self._show(row.method)

    def _show(self, name):
        self._progress.clear()
        lines = self.table.lines(self._methods)
        if self._shown == 0:
            self._show_layer()
            click.echo("\n".join(lines[:2]))
        position = [row.method for row in self.table].index(name)
        click.echo(lines[2 + position])


def _json(table):
    return json.dumps(table.json(), indent=2)


def _write(table, name, settings, force, plot, rst, report):
    """Write what was found to the files that were named."""
    if rst:
        files.write_text(rst, table.rst() + "\n", force)
    if report:
        files.write_text(report, _json(table) + "\n", force)
    if plot:
        device = "cpu" if settings.namespace().__name__ == "numpy" else "cuda"
        title = f"{name} ({common.by(table.shape)}), {table.pattern.label}, on {device}"
        plotting.pareto(table, plot, force, title)
