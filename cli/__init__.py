"""The command line: parse, call cuobs, print. It knows no method, no pattern and no algebra."""

import click
from cuobs_cli import common, compare, hessian, info, listing, models, prune, verify

import cuobs


@click.group(cls=common.Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cuobs.__version__, prog_name="cuobs")
def main():
    """Prune linear layers to patterns that hardware can use.

    Arrays are .npy files, or arrays in files of several: file.npz:key,
    file.safetensors:tensor.name. W is (outputs, inputs), X is (..., inputs).
    """


for _command in (
    prune.prune, compare.compare, hessian.hessian, verify.verify, listing.patterns,
    listing.methods, info.info, *models.COMMANDS,
):  # fmt: skip
    main.add_command(_command)
