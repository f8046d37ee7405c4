"""cuobs rotate: a model in a basis in which it prunes more easily."""

import click
from cuobs_cli import common, display, models, options

from cuobs.model_choices import ROTATION_STEPS, ROTATION_WINDOWS, SCORES


@click.command("rotate", cls=options.Command,
               short_help="Another basis for a model, easier to prune.")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@options.pattern
@options.option("--steps", type=int, metavar="N", group=models.ROTATION,
                show_default=str(ROTATION_STEPS),
                help="Steps of Adam; 0 folds the norms' scales alone.")
@options.option("--score", type=options.Name(SCORES), show_default=SCORES[0],
                group=models.ROTATION, help=models.SCORE)
@options.option("--permute/--no-permute", default=None, show_default="permute",
                group=models.ROTATION, help=models.PERMUTE)
@options.option("--calibration", required=True, type=click.Path(), metavar="F",
                group=models.CALIBRATION, help="A text, or tokens.npz:key (windows, length).")
@models.samples(ROTATION_WINDOWS)
@models.sequence_length(models.CALIBRATION)
@models.seed("Draws the windows of a text.", models.CALIBRATION)
@options.option("--attention-mask", type=click.Path(), metavar="F:K", group=models.CALIBRATION,
                help="0 where a calibration token is padding.")
@options.setting("device")
@models.shard_size
@models.save_dtype
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
    if report is None:  # another process writes and speaks
        return
    click.echo()
    for line in report.lines():
        click.echo(line)
    common.show_written(dst)
