"""cuobs hessian"""

import click
from cuobs_cli import common, display, options

import cuobs
from cuobs import files
from cuobs.activations import check_matrix


@click.command(cls=options.Command, short_help="Add up the Hessian of activations.")
@click.argument("specs", metavar="X...", nargs=-1, required=True, type=click.Path())
@options.output("-o", "--out", metavar="H.npz", required=True, help="Where to write.")
@options.setting("dtype", default=None, show_default="float32, or the widest of the files",
                 help="Add up in this precision.")
@options.setting("device")
@options.force
def hessian(specs, out, dtype, device, force):
    """Add up the Hessian of activations X, read in pieces, for 'prune --hessian'.

    An X may also be what this command wrote before, here or on another machine.
    """
    common.check_inputs(*specs)
    common.check_outputs(specs, {"-o": out}, force)
    files.check_format(out, dtype or "float32")
    if not files.by_name(out):
        raise ValueError(f"-o: found {out}, expected .npz or .safetensors")
    parts = [(spec, _load(spec, device)) for spec in specs]
    sums = [part for _, part in parts if isinstance(part, cuobs.Hessian)]
    if dtype is None:
        dtype = "float64" if any(h.matrix.dtype == "float64" for h in sums) else "float32"
    K = sums[0].K if sums else None
    for spec, part in parts:
        if not isinstance(part, cuobs.Hessian):
            with files.naming(spec):
                K = check_matrix(part, K).shape[1]
    total = cuobs.Hessian(K, dtype=dtype, device=device)
    for spec, part in parts:
        with files.naming(spec), display.Progress(spec) as progress:
            if isinstance(part, cuobs.Hessian):
                total.merge(part)
            else:
                total.update(part, progress=progress.callback())
    total.save(out, force)
    unknown = total.tokens is None
    found = "an unknown number" if unknown else total.tokens
    click.echo(f"tokens   {found} from {len(parts)} file{'s' * (len(parts) > 1)}")
    click.echo(f"columns  {K}" + ("" if unknown else f", {total.tokens / K:.1f} tokens each"))
    common.show_written(out)


def _load(spec, device):
    path, key = files.split(spec)
    if key is None and "hessian" in files.keys(path):
        return cuobs.Hessian.load(path, device=device)
    return files.load(spec)
