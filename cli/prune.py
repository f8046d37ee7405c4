"""cuobs prune"""

import json
import os

import click
from cuobs_cli import common, display

import cuobs
from cuobs import files


@click.command(short_help="Prune a weight.")
@common.layer_arguments
@common.pattern_option
@click.option(
    "--method",
    default="admm",
    show_default=True,
    metavar="M",
    help="One of " + ", ".join(cuobs.methods()) + ".",
)
@click.option("-o", "--out", metavar="F", help="Where to write.  [W-pruned.npy, or W's format]")
@click.option("--mask-out", metavar="F", help="Also write the mask, True = kept.")
@click.option("--report", metavar="F.json", help="Also write what was done and found.")
@common.method_options
@common.force_option
def prune(w, x, hessian, pattern, method, out, mask_out, report, force, **options):
    """Prune the weight W under the activations X, or under their Hessian."""
    out = _output(w, out)
    common.check_outputs(
        [w, x, hessian], {"-o": out, "--mask-out": mask_out, "--report": report}, force
    )
    W, data = common.load_layer(w, x, hessian, options["device"])
    files.check_format(out, W.dtype)
    files.check_replaced(out)
    if mask_out:
        files.check_format(mask_out, bool)
        files.check_replaced(mask_out)
    with display.Progress(method) as progress:
        result = cuobs.prune(
            W,
            **data,
            pattern=pattern,
            method=method,
            progress=progress.callback(),
            **common.given(options),
        )
    files.save(out, result.weight, force)
    if mask_out:
        files.save(mask_out, result.mask, force)
    if report:
        content = {
            "cuobs": cuobs.__version__,
            "weight": w,
            "activations": x,
            "hessian": hessian,
            "written": out,
            "mask": mask_out,
            "shape": list(W.shape),
            "dtype": str(W.dtype),
            "method": result.method,
            "pattern": str(result.pattern),
            "refine": result.refine,
            "damp": result.damp,
            "options": result.options,
            "loss": result.loss,
            "sparsity": result.sparsity,
            "seconds": result.seconds,
            "hessian_seconds": result.hessian_seconds,
            "device": result.device,
        }
        files.write_text(report, json.dumps(content, indent=2) + "\n", force)
    resolved = ", weights re-solved" if result.refine else ""
    click.echo(f"method    {result.method}{resolved}")
    click.echo(f"pattern   {result.pattern.label}: {common.keeps(result.pattern)}")
    click.echo(f"loss      {result.loss:.3%}")
    click.echo(f"sparsity  {result.sparsity:.2%}")
    click.echo(
        f"time      {result.seconds:.2f} s, and {result.hessian_seconds:.2f} s for the Hessian"
    )
    for path in (out, mask_out, report):
        if path:
            click.echo(f"written   {path}")


def _output(w, out):
    """The output with a key, W's own where none is given."""
    path, key = files.split(w)
    if out is None:
        out = "W-pruned" + (os.path.splitext(path)[1] or ".npy")
    if key is None and files.by_name(path):
        names = files.keys(path)
        key = names[0] if len(names) == 1 else None
    if key and files.by_name(out):
        out = f"{out}:{key}"
    return out
