"""cuobs prune-model, eval-model, speedup: they need the extra ``model``, imported when called."""

import json
import math
import os
import sys

import click
from cuobs_cli import common, options
from cuobs_cli.common import COMMAND
from cuobs_cli.view import View

import cuobs
from cuobs import files, plotting
from cuobs.model_choices import ROTATION_STEPS, SAMPLES, SAVE_DTYPES, SCORES, TARGETS

# Options that `prune_folder` takes as they are, whatever is done to the model.
FOLDER = (
    "samples", "sequence_length", "seed", "attention_mask", "evaluate", "packed", "shard_size",
    "save_dtype", "trust_remote_code", "resume", "batch_tokens", "distill_calibration", "dry_run",
    "host_memory",
)  # fmt: skip
# Options that say how something is done, and the one that asks for it.
LEANING = {
    "tune_rate": "tune", "rotate_steps": "rotate", "rotate_score": "rotate",
    "rotate_permute": "rotate", "distill_rate": "distill",
}  # fmt: skip
CALIBRATION, TARGET = "Calibration", "Target and tuning"
ROTATION, DISTILLATION, GENERATE = "Rotation", "Distillation", "End to end"
SCORE = "What is learned against: w² / C_jj, or w² H_jj ('activations')."
PERMUTE = "Deal the inner columns of each MLP out to the scopes, and order those of the stream."


def _share(ctx, parameter, value):
    """A share, or two of them, first and last block: 0.5 or 0.25,0.75."""
    if value is None:
        return None
    try:
        parts = [float(v) for v in value.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2):
        raise click.BadParameter(f"found {value!r}, expected a number, or two as 0.25,0.75")
    return parts[0] if len(parts) == 1 else tuple(parts)


trust = options.option(
    "--trust-remote-code", is_flag=True, group=options.HOW,
    help="Run code that the model's folder holds, where it needs it.",
)  # fmt: skip


def samples(default):
    """The decorator that gives a command ``--samples``."""
    return options.option("--samples", default=default, type=options.Integer(), metavar="N",
                          group=CALIBRATION, help="Calibration windows.")  # fmt: skip


def sequence_length(group):
    """The decorator that gives a command ``--sequence-length``."""
    return options.option("--sequence-length", type=options.Integer(), metavar="N", group=group,
                          show_default="that of tokens; of a text 2048, or what the model allows",
                          help="Tokens of a window.")  # fmt: skip


def seed(what, group):
    """The decorator that gives a command ``--seed``."""
    return options.option("--seed", default=0, type=int, metavar="N", group=group, help=what)


resume = options.option(
    "--resume", is_flag=True, group=options.HOW, help="Go on with an unfinished run."
)
shard_size = options.option("--shard-size", default="5GB", metavar="SIZE", group=options.OUTPUT,
                            help="Largest file of weights.")  # fmt: skip
save_dtype = options.option(
    "--save-dtype", type=options.Name(SAVE_DTYPES), group=options.OUTPUT,
    show_default="as in SRC, of a GGUF half precision", help="What the weights are written in.",
)  # fmt: skip


@click.command("prune-model", cls=options.ModelCommand,
               short_help="Prune a language model, folder to folder.")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@options.option("--skip", multiple=True, metavar="GLOB", group=options.WHAT,
                help="Linears that stay as they are, as '*.k_proj'; may be repeated.")
@options.option("--eval", "evaluate", multiple=True, type=click.Path(), metavar="F",
                group=options.WHAT,
                help="Perplexity on a text or tokens, before and after, in windows as long, and "
                "how near the result is to SRC; may be repeated.")
@options.option("--calibration", required=True, multiple=True, type=click.Path(), metavar="F",
                group=CALIBRATION,
                help="A text, tokens.npz:key (windows, length), or self:1024, windows that the "
                "dense model writes itself; may be repeated. With --distill, self beside another "
                "serves distillation alone.")
@samples(SAMPLES)
@sequence_length(CALIBRATION)
@seed("Draws the windows of a text.", CALIBRATION)
@options.option("--attention-mask", type=click.Path(), metavar="F:K", group=CALIBRATION,
                help="0 where a calibration token is padding.")
@options.option("--drop-first-token/--keep-first-token", default=True, group=CALIBRATION,
                help="Leave the first token of a window out of the sums.")
@options.option("--target", type=options.Name(TARGETS), default="mixed", group=TARGET,
                help="What a layer is to give: its outputs in the dense model, in the pruned one, "
                "or between.")
@options.option("--dense-share", callback=_share, metavar="A", show_default="0.5", group=TARGET,
                help="Of a mixed target; two, as 0.25,0.75, go from the first block to the last.")
@options.option("--residual-share", callback=_share, metavar="B", show_default="0.5", group=TARGET,
                help="Of a mixed target: of what the residual stream has lost.")
@options.option("--tune", default=0, type=int, metavar="N", group=TARGET,
                help="Passes of gradient descent over each pruned block's kept weights.")
@options.option("--tune-rate", type=float, metavar="R", show_default="3e-4", group=TARGET,
                help="Their learning rate.")
@options.option("--rotate", is_flag=True, group=ROTATION,
                help="Give the model another basis first, in which it prunes more easily; the "
                "whole model is in memory then.")
@options.option("--rotate-steps", type=int, metavar="N", group=ROTATION,
                show_default=str(ROTATION_STEPS),
                help="Steps of learning it.")
@options.option("--rotate-score", type=options.Name(SCORES), show_default=SCORES[0],
                group=ROTATION, help=SCORE)
@options.option("--rotate-permute/--no-rotate-permute", default=None, show_default="permute",
                group=ROTATION, help=PERMUTE)
@options.option("--distill", default=0, type=int, metavar="N", group=DISTILLATION,
                help="Passes in which all kept weights learn together what the dense model says; "
                "both are in memory then, whole.")
@options.option("--distill-rate", type=float, metavar="R", show_default="3e-4",
                group=DISTILLATION, help="Their learning rate.")
@options.option("--distill-calibration", multiple=True, type=click.Path(), metavar="F",
                group=DISTILLATION,
                help="As --calibration, for distillation alone, which then sees what prunes "
                "twice; may be repeated.")
@options.option("--batch-tokens", type=options.Integer(), metavar="N", group=options.HOW,
                show_default="by the device", help="Tokens in a block at once.")
@options.option("--host-memory", metavar="SIZE", group=options.HOW,
                help="Of the host, as 6GiB: hidden states beyond it go to a scratch file in DST; "
                "--rotate, --distill, self and a GGUF need the whole model in it.")
@resume
@options.option("--dry-run", is_flag=True, group=options.HOW,
                help="Say what would be pruned, and what it would take; read no weights.")
@options.option("--masks", is_flag=True, group=options.OUTPUT,
                help="Write cuobs_masks.safetensors too.")
@options.option("--packed", is_flag=True, group=options.OUTPUT,
                help="Write the pruned linears packed, see pack-model.")
@options.output("--plot", metavar="F.png", help="Draw the loss by layer.")
@shard_size
@save_dtype
@options.quiet
@options.as_json
@trust
def prune_model(src, dst, config, calibration, masks, plot, quiet, as_json, **given):
    """Prune the linear layers of the causal language model in the folder SRC (or a .gguf) into DST.

    Block by block, each fed by what is pruned so far. DST holds all that SRC does, as plain dense
    safetensors with exact zeros, which open wherever SRC's do.
    """
    folder = {name: given.pop(name) for name in FOLDER}
    arguments = _arguments(config, given)
    if plot:
        if folder["dry_run"]:
            raise ValueError("--plot: found it with --dry-run, expected it without")
        _check_plot(plot)
    models = load(quiet or as_json)
    view = View(quiet or as_json)
    try:
        report = models.prune_folder(
            src, dst, calibration, save_masks=masks, say=view.say, progress=view.progress,
            starting=view.starting, on_block=view.block,
            command=click.get_current_context().meta.get(COMMAND), **folder, **arguments,
        )  # fmt: skip
    except (KeyboardInterrupt, OSError, MemoryError):
        view.close()
        if view.began:
            say_unfinished(dst)
        raise
    if report is None:  # another process writes and speaks
        return
    if as_json:
        click.echo(report.to_json(), nl=False)
    if plot:
        from cuobs.models.summary import picture

        picture(report, plot)
    if not (folder["dry_run"] or quiet or as_json):
        common.show_written(dst, plot)


def say_unfinished(dst):
    """What is to be done with a folder whose run was stopped."""
    from cuobs.models.checkpoints.source import unfinished

    if unfinished(dst):
        click.echo(f"{dst} is not complete; --resume goes on with it.", err=True)


def _check_plot(path):
    plotting.check_picture(path)
    if os.path.exists(path):
        raise FileExistsError(f"--plot: found {path}, expected a new path")
    files.check_output(path)


def _arguments(config, target):
    """A config, and options that go before its ``[model]``, as arguments of `prune_folder`."""
    recipe, settings = config.recipe, config.settings
    given = config.model | options.chosen(click.get_current_context(), target)
    for name, other in LEANING.items():
        if name in given and name not in config.model and not given.get(other):
            raise ValueError(f"{name}: found it without {other}, expected both")
    if config.skip and given.get("skip"):
        raise ValueError(
            f"skip: found {', '.join(given['skip'])} beside the globs of --config, expected one "
            "of them"
        )
    return common.given({
        "pattern": recipe.pattern, "method": recipe.method, "refine": recipe.refine,
        "damp": recipe.damp, **recipe.options,
        **{key: getattr(settings, key) for key in cuobs.recipe.SETTINGS},
        "layers": config.layers or None, "skip": list(config.skip) or None, **given,
    })  # fmt: skip


@click.command("eval-model", cls=options.Command, short_help="Perplexity of a model.")
@click.argument("folder", metavar="DIR", type=click.Path())
@options.option("--text", required=True, type=click.Path(), metavar="F", group=options.WHAT,
                help="A text, or tokens.npz:key.")
@sequence_length(options.WHAT)
@options.option("--against", type=click.Path(), metavar="SRC", group=options.WHAT,
                help="The dense model: say how near DIR is to it.")
@options.setting("device")
@trust
@options.as_json
def eval_model(folder, text, sequence_length, against, device, trust_remote_code, as_json):
    """Measure the perplexity of the model in DIR (or a .gguf) on a text.

    The text is tokenised once and cut into windows without overlap, the tail is dropped; in each
    window all tokens but the first are predicted. With --against SRC also KL(SRC, DIR) of the
    next-token distributions, nats a token, and in how many places both hold the same token for
    the likeliest.
    """
    models = load(as_json)
    found = models.evaluate_folder(
        folder, text, sequence_length, against=against, device=device,
        progress=View(as_json).progress, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    windows, length = found.tokens.shape
    if as_json:
        near = found.agreement and {"model": against, **found.agreement._asdict()}
        # JSON has no infinity.
        measured = found.perplexity if math.isfinite(found.perplexity) else None
        click.echo(json.dumps({
            "model": folder, "text": text, "windows": windows, "length": length,
            "perplexity": measured, "against": near,
        }, indent=2))  # fmt: skip
        return
    click.echo(f"text        {text}: {windows} windows of {length} tokens")
    click.echo(f"perplexity  {found.perplexity:.2f}")
    if found.agreement is not None:
        click.echo(f"to dense    {found.agreement.text()}")


@click.command(cls=options.Command, short_help="Do packed weights pay on this GPU?")
@click.argument("source", metavar="DIR|MxK", type=click.Path())
@options.option("--pattern", "patterns", multiple=True, metavar="P", group=options.WHAT,
                show_default="all named ones, of --generate 2:4", help="May be repeated.")
@options.option("--batch", "batches", type=options.Integer(), multiple=True, metavar="N",
                show_default="from 1 to 2048", group=options.WHAT,
                help="Tokens in a product; may be repeated.")
@options.option("--dtype", type=options.Name(("float16", "bfloat16")),
                show_default="float16, of --generate bfloat16", group=options.WHAT,
                help="What the weights are in.")
@options.option("--generate", is_flag=True, group=GENERATE,
                help="Measure the model in DIR end to end: static cache, CUDA graph.")
@options.option("--sequences", type=options.Integer(), multiple=True, metavar="N", group=GENERATE,
                show_default="1, 8, 32", help="Written side by side; may be repeated.")
@options.option("--new-tokens", type=options.Integer(), metavar="N", group=GENERATE,
                show_default="128", help="Steps that are timed.")
@options.option("--compile", "compiled", is_flag=True, group=GENERATE,
                help="Compile the blocks with torch.compile, dense and packed.")
@options.output("--plot", metavar="F.png", help="Draw the gain against the tokens.")
@options.force
def speedup(
    source, patterns, batches, dtype, generate, sequences, new_tokens, compiled, plot, force
):  # fmt: skip
    """Time layer shapes of the model in DIR, or one shape, dense and packed on this GPU.

    In CUDA graphs, over four weights in turn; beside them PyTorch's own 2:4.
    """
    if plot:
        if generate:
            raise ValueError("--plot: found it with --generate, expected it without")
        plotting.check_picture(plot)
        files.check_output(plot, force)
    if generate and batches:
        raise ValueError("--batch: found it with --generate, expected it without")
    own = {"--sequences": sequences, "--new-tokens": new_tokens, "--compile": compiled}
    for name in (name for name, value in own.items() if value and not generate):
        raise ValueError(f"{name}: found it without --generate, expected both")
    for pattern in patterns:
        cuobs.pattern.parse(pattern)
    found = load()
    from cuobs.models.planning import check_timing

    check_timing(source)
    if generate:
        patterns = patterns or (cuobs.Recipe.pattern,)
        _generate(source, patterns, sequences, new_tokens or 128, dtype, compiled)
        return
    from cuobs.models.packed import timing

    timings = found.speedup(source, batches or timing.BATCHES, dtype or "float16", patterns)
    names = list(dict.fromkeys(n for t in timings for n in (*t.seconds, *t.faults)))
    names.sort(key=lambda name: name in timings[0].bounds)
    click.echo("times as fast as dense")
    widths = [max(9, len(name)) for name in names]
    heads = "  ".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True))
    click.echo(f"{'outputs x inputs':>18}  {'tokens':>7}  {'dense':>10}  {heads}")
    for t in timings:
        gains = "  ".join(
            f"{t.gain(name):{w}.2f}" if t.gain(name) else f"{'-':>{w}}"
            for name, w in zip(names, widths, strict=True)
        )
        shape = f"{t.rows} x {t.columns}"
        click.echo(f"{shape:>18}  {t.tokens:>7}  {1e6 * t.dense:7.1f} us  {gains}")
    for fault in dict.fromkeys(f"{n}: {why}" for t in timings for n, why in t.faults.items()):
        click.echo(f"does not run  {fault}")
    for line in timing.verdict(timings):
        click.echo(line)
    if plot:
        timing.picture(timings, plot, (*patterns, cuobs.Recipe.pattern)[0], force)
        common.show_written(plot)


def _generate(source, patterns, sequences, new_tokens, dtype, compiled):
    from cuobs.models.packed.generation import SEQUENCES, generation

    for pattern in patterns:
        rows = generation(
            source, pattern, sequences or SEQUENCES, new_tokens, dtype or "bfloat16", compiled,
            click.echo,
        )  # fmt: skip
        first = rows[0]
        click.echo(
            f"weights      {first.dense_bytes / 2**30:.2f} GiB dense, "
            f"{first.packed_bytes / 2**30:.2f} GiB packed by {pattern} "
            f"({first.packed_bytes / first.dense_bytes:.3f})"
        )
        for row in rows:
            click.echo(
                f"{row.sequences:>3} sequences  {row.dense:9.1f} tokens/s dense  {row.packed:9.1f} "
                f"packed  {row.gain:.2f} times as fast"
            )


def load(quiet=False):
    """`cuobs.models`, or one sentence that says what to install.

    Without transformers' own bars where they would fill a log or nothing is to be shown.
    """
    if quiet or not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        if "transformers" in sys.modules:  # it has looked at them already
            from transformers.utils import logging

            logging.disable_progress_bar()
    import cuobs.models

    return cuobs.models
