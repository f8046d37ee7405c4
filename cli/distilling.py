"""cuobs write-calibration: it needs the extra ``model``, imported when called."""

import click
from cuobs_cli import common, display, models, options


@click.command("write-calibration", cls=options.Command,
               short_help="Let a model write its own calibration windows.")
@click.argument("src", type=click.Path())
@options.output("-o", "--out", metavar="F.npz", required=True, help="Where to write.")
@options.option("--windows", default=1024, type=options.Integer(), metavar="N",
                group=options.WHAT, help="How many.")
@options.option("--sequence-length", type=options.Integer(), metavar="N", group=options.WHAT,
                show_default="2048, or what the model allows", help="Tokens of a window.")
@options.option("--temperature", default=1.0, type=float, metavar="T", group=options.WHAT,
                help="Below 1 the likelier tokens come even oftener.")
@models.seed("Draws the tokens.", options.WHAT)
@options.setting("device")
@models.trust
@options.force
def write_calibration(
    src, out, windows, sequence_length, temperature, seed, device, trust_remote_code, force
):
    """Let the model in the folder SRC (or a .gguf) sample windows of tokens.

    The first token of each is drawn from the vocabulary without special ones, all others from what
    the model gives. 'prune-model --calibration F.npz' reads them; '--calibration self:1024' writes
    and uses them in one go.
    """
    common.check_outputs([src], {"-o": out}, force)
    found = models.load()
    with display.Progress("tokens") as progress:
        tokens = found.write_calibration(
            src, out, windows, sequence_length, temperature=temperature, seed=seed, device=device,
            trust_remote_code=trust_remote_code, force=force, progress=progress.callback(),
        )  # fmt: skip
    click.echo(f"tokens   {tokens.shape[0]} windows of {tokens.shape[1]} tokens, seed {seed}")
    common.show_written(out)
