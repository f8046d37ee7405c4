"""cuobs rotate: a model in a basis in which it prunes more easily."""

import click
from cuobs_cli import common, display, models, options


@click.command("rotate", cls=options.Command,
               short_help="Another basis for a model, easier to prune.")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@options.pattern
@options.option("--steps", type=int, metavar="N", show_default="100", group=models.ROTATION,
                help="Steps of Adam; 0 folds the norms' scales alone.")
@options.option("--score", type=options.Name(models.SCORES), metavar="S",
                show_default="activations", group=models.ROTATION, help=models.SCORE)
@options.option("--permute", is_flag=True, group=models.ROTATION, help=models.PERMUTE)
@options.option("--calibration", required=True, type=click.Path(), metavar="F",
                group=models.CALIBRATION, help="A text, or tokens.npz:key (windows, length).")
@options.option("--samples", default=64, type=int, group=models.CALIBRATION,
                help="Calibration windows.")
@options.option("--sequence-length", type=int, metavar="T", show_default="2048",
                group=models.CALIBRATION, help="Tokens of a window.")
@options.option("--seed", default=0, type=int, group=models.CALIBRATION,
                help="Draws the windows of a text.")
@options.option("--attention-mask", type=click.Path(), metavar="F:K", group=models.CALIBRATION,
                help="0 where a calibration token is padding.")
@options.setting("device")
@options.option("--shard-size", default="5GB", group=options.OUTPUT,
                help="Largest file of weights.")
@options.option("--save-dtype", type=options.Name(models.SAVE_DTYPES), metavar="T",
                group=options.OUTPUT, show_default="as in SRC, of a GGUF half precision",
                help="Write the weights in " + ", ".join(models.SAVE_DTYPES) + ".")
@models.trust
def rotate(src, dst, calibration, **given):
    """Write the model in the folder SRC (or a .gguf) into DST in another basis: the same function.

    The basis of the residual stream and of each head's values is learned so that the pattern
    prunes less of what counts, and is folded into the weights. DST is a plain dense model that
    opens wherever SRC does; prune it as any other.
    """
    found = models.load()
    with display.Progress("rotation") as bar:
        step = bar.callback()
        report = found.rotate_folder(
            src, dst, calibration, say=click.echo,
            progress=step and (lambda label, done, total: step(done, total)),
            **common.given(given),
        )  # fmt: skip
    click.echo()
    for line in report.lines():
        click.echo(line)
    common.show_written(dst)
