"""cuobs prune"""

import json
import os

import click
from cuobs_cli import common, display, options

import cuobs
from cuobs import files


@click.command(cls=options.RecipeCommand, short_help="Prune a weight.")
@common.layer_arguments
@options.output("-o", "--out", metavar="F", help="Where to write.",
                show_default="NAME-pruned.npy here, by the name and format of W")
@options.output("--mask-out", metavar="F", help="Also write the mask, True = kept.")
@options.output("--report", metavar="F.json", help="Also write what was done and found.")
@options.force
@options.quiet
@options.as_json
def prune(w, x, hessian, config, out, mask_out, report, force, quiet, as_json):
    """Prune the weight W under the activations X, or under their Hessian."""
    common.parse_headers_once()
    common.one_layer(config)
    common.check_layer(w, x, hessian)
    out = _output(w, out)
    common.check_outputs(
        [w, x, hessian], {"-o": out, "--mask-out": mask_out, "--report": report}, force
    )
    W, X, H = common.load_layer(w, x, hessian, config.settings.device)
    files.check_format(out, W.dtype)
    files.check_replaced(out)
    if mask_out:
        files.check_format(mask_out, bool)
        files.check_replaced(mask_out)
    with display.Progress(config.recipe.method) as progress:
        shown = None if quiet else progress.callback()
        settings = config.replace(progress=shown).settings
        result = config.recipe.run(W, H, settings, X=X)
    files.save(out, result.weight, force)
    if mask_out:
        files.save(mask_out, result.mask, force)
    content = {
        "cuobs": cuobs.__version__,
        "weight": w,
        "activations": x,
        "hessian": hessian,
        "written": out,
        "mask": mask_out,
        "shape": list(W.shape),
        "dtype": str(W.dtype),
        **_content(result),
    }
    text = json.dumps(content, indent=2)
    if report:
        files.write_text(report, text + "\n", force)
    if as_json:
        click.echo(text)
    elif not quiet:
        _show(result, W.shape, X)
        common.show_written(out, mask_out, report)


def _content(result):
    """What a report holds of a result."""
    settings = result.settings
    return {
        "method": result.method,
        "pattern": str(result.pattern),
        "refine": result.refine,
        "damp": result.damp,
        "options": result.options,
        "settings": {key: getattr(settings, key) for key in cuobs.recipe.SETTINGS},
        "tokens": result.tokens,
        "loss": result.loss,
        "sparsity": result.sparsity,
        "seconds": result.seconds,
        "hessian_seconds": result.hessian_seconds,
        "device": result.device,
    }


def _show(result, shape, X):
    common.show_layer(shape, X, result.tokens)
    resolved = ", weights re-solved" if result.refine else ""
    click.echo(f"method   {result.method}{resolved}")
    click.echo(f"pattern  {result.pattern.label}: {result.pattern.keeps}")
    click.echo(f"loss     {result.loss:.3%}")
    click.echo(f"zeros    {result.sparsity:.2%} of the weights")
    click.echo(
        f"time     {result.seconds:.2f} s, and {result.hessian_seconds:.2f} s for the Hessian"
    )


def _output(w, out):
    """The output with a key, W's own where none is given; by W's name in the current folder."""
    path, key = files.split(w)
    if out is None:
        name, ending = os.path.splitext(os.path.basename(path))
        out = f"{name}-pruned{ending or '.npy'}"
    if key is None and files.by_name(path):
        names = files.keys(path)
        key = names[0] if len(names) == 1 else None
    if key and files.by_name(out):
        out = f"{out}:{key}"
    return out
