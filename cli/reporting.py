"""cuobs report"""

import os

import click
from cuobs_cli import common, options

from cuobs import files


@click.command(cls=options.Command, short_help="A page of a pruned model's report.")
@click.argument("folder", metavar="DIR", type=click.Path())
@options.output("-o", "--out", default="report.html", metavar="F.html", help="Where to write it.")
@options.force
def report(folder, out, force):
    """Write what was done to the pruned model in DIR as one page for a browser.

    The loss of every layer as a map, the layers that lose most, perplexities, settings, protocol,
    the command. The page is one file and loads nothing.
    """
    from cuobs_cli import models

    models.load()
    from cuobs.models.page import report_page
    from cuobs.models.report import read_report

    common.check_outputs([], {"-o": out}, force)
    if not out.lower().endswith((".html", ".htm")):
        raise ValueError(f"-o: found {out}, expected a name that ends in .html")
    content = read_report(folder)
    title = os.path.basename(os.path.abspath(folder))
    files.write_text(out, report_page(content, title), force)
    common.show_written(out)
