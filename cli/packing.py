"""cuobs pack, unpack, pack-model, unpack-model: weights that hold only what is kept."""

import os

import click
from cuobs_cli import common, display, models, options

import cuobs
from cuobs import files


@click.command(cls=options.Command, short_help="Pack a pruned weight.")
@click.argument("w", metavar="W", type=click.Path())
@options.pattern
@options.output("-o", "--out", required=True, metavar="F", help="The packed weight.")
@options.force
def pack(w, pattern, out, force):
    """Pack the weight W, which obeys a pattern, into a .npz or .safetensors file."""
    common.check_inputs(w)
    common.check_outputs([w], {"--out": out}, force)
    _check_named(out)
    W = files.load(w)
    packed = cuobs.pack(W, pattern)
    packed.save(out, force)
    click.echo(
        f"{w} packed by {pattern.label} ({pattern.keeps}): {W.nbytes} bytes are "
        f"{packed.nbytes} ({packed.nbytes / W.nbytes:.4f})"
    )
    common.show_written(out)


@click.command(cls=options.Command, short_help="The dense weight of a packed one.")
@click.argument("packed", metavar="PACKED", type=click.Path())
@options.output("-o", "--out", required=True, metavar="F", help="The dense weight.")
@options.force
def unpack(packed, out, force):
    """Write the dense weight of PACKED, which cuobs pack has written."""
    common.check_inputs(packed)
    common.check_outputs([packed], {"--out": out}, force)
    found = cuobs.Packed.load(packed)
    files.check_format(out, found.dtype)
    files.save(out, found.unpack(), force)
    common.show_written(out)


@click.command("pack-model", cls=options.Command, short_help="Pack a pruned model.")
@click.argument("src", metavar="DIR", type=click.Path())
@click.argument("dst", type=click.Path())
@options.option("--pattern", metavar="P", group=options.WHAT,
                show_default="what cuobs_report.json in DIR says, or 2:4",
                help="What the linears obey; those that do not stay dense.")
@options.setting("device")
@models.resume
@models.shard_size
@models.trust
def pack_model(src, dst, pattern, **given):
    """Pack the pruned model in DIR into DST.

    After `import cuobs.models`, transformers opens DST with AutoModelForCausalLM.from_pretrained.
    """
    found = models.load()
    from cuobs.models.planning import check_packing

    if pattern:
        cuobs.pattern.parse(pattern)
    source = check_packing(
        src, dst, False, given["shard_size"], given["device"], given["resume"]
    )
    try:
        with display.Progress("packing") as bar:
            report = found.pack_folder(src, dst, pattern, progress=bar.callback(),
                                       **common.given(given))  # fmt: skip
    except (KeyboardInterrupt, OSError, MemoryError):
        models.say_unfinished(dst)
        raise
    for line in (*report.lines(), *source.lines()):
        click.echo(line)
    click.echo(f"files        {_size(src)} in {src}, {_size(dst)} in {dst}")
    common.show_written(dst)


@click.command("unpack-model", cls=options.Command, short_help="Undo pack-model.")
@click.argument("src", metavar="DIR", type=click.Path())
@click.argument("dst", type=click.Path())
@models.shard_size
@models.trust
def unpack_model(src, dst, **given):
    """Write the packed model in DIR as a plain checkpoint with exact zeros, bit for bit."""
    found = models.load()
    from cuobs.models.planning import check_packing

    source = check_packing(src, dst, True, given["shard_size"])
    with display.Progress("unpacking") as bar:
        names = found.unpack_folder(src, dst, progress=bar.callback(), **common.given(given))
    for line in (f"unpacked     {len(names)} linears", *source.lines()):
        click.echo(line)
    common.show_written(dst)


def _check_named(path):
    if not files.by_name(path):
        raise ValueError(f"--out: found {path}, expected .npz or .safetensors")


def _size(folder):
    """The bytes of a folder's weights, to read."""
    found = sum(
        entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".safetensors")
    )
    return f"{found / 2**20:.1f} MiB"
