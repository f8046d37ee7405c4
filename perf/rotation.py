"""What a rotation gives: seconds to learn it, its objective, and perplexity after pruning.

    python perf/rotation.py MODEL --tokens tokens.npz [--patterns 2:4 4:8] [--variants plain ...]

MODEL is a checkpoint's folder or a GGUF; the tokens hold ``calibration`` and ``prose`` (windows,
length), as examples/smollm2/tokens.npz does. Of the calibration the last 32 windows are held out.
Every variant starts from the dense model, and each prints one line:

=============  ===================================================================================
none           not rotated
plain          R1 and R2 learned against ``w² H_jj``, 100 steps
300            the same, 300 steps
permuted       plain, and the inner columns of each MLP dealt out by ``Σ w² / C_jj``, the stream's
               scopes ordered by their share of the score
compensated    R1 and R2 learned against ``w² / C_jj``
=============  ===================================================================================
"""

import argparse
import copy
import json
import os
import time

import numpy as np
import torch

from cuobs import models
from cuobs.models.rotating.rotation import rotate

VARIANTS = {
    "none": None,
    "plain": {},
    "300": {"steps": 300},
    "permuted": {"permute": True},
    "compensated": {"score": "compensated"},
}
HELD_OUT = 32


def main():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    default = os.path.join(here, "examples", "smollm2", "tokens.npz")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--tokens", default=default)
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, help="tokens of a window, all unless given")
    parser.add_argument("--evaluated", type=int, help="windows of prose, all unless given")
    parser.add_argument("--steps", type=int, help="instead of the variant's own")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--target", default="pruned")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="append each result to this file, one a line")
    args = parser.parse_args()

    device = torch.device(args.device)
    dense = models.load_model(args.model)
    with np.load(args.tokens) as file:
        calibration, prose = (
            file[key].astype(np.int64)[:, : args.length] for key in ("calibration", "prose")
        )
    held, calibration = calibration[-HELD_OUT:], calibration[: args.windows]
    texts = {"held": held[: args.evaluated], "prose": prose[: args.evaluated]}
    print(f"device   {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    print(f"dense    {measured(dense, texts, device)}", flush=True)
    for pattern in args.patterns:
        for variant in args.variants:
            try:
                found = run(dense, calibration, texts, pattern, variant, device, args)
            except Exception as error:  # a fault in one must not cost the others
                print(f"{pattern} {variant}: {type(error).__name__}: {error}", flush=True)
                continue
            print("  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(json.dumps(found) + "\n")


def run(dense, calibration, texts, pattern, variant, device, args):
    """Rotate a copy of the dense model, prune it, and say what was found."""
    model, options = copy.deepcopy(dense), VARIANTS[variant]
    found = {"pattern": pattern, "variant": variant}
    if options is not None:
        if args.steps:
            options = {**options, "steps": args.steps}
        report = rotate(model, calibration, pattern, device=device, **options)
        found |= {
            "objective": f"{report.before:.4f} to {report.after:.4f}",
            "seconds": round(report.seconds, 2),
            "learning": round(report.learning, 2),
            "deviation": f"{report.deviation:.1e}",
            "GiB": round(report.memory_peak / 2**30, 2),
            "untied MB": round(report.untied / 1e6, 1),
        }
    began = time.perf_counter()
    models.prune_model(
        model, calibration, pattern=pattern, method=args.method, target=args.target,
        drop_first_token=args.target != "pruned", device=device.type,
    )  # fmt: skip
    found["pruned, s"] = round(time.perf_counter() - began, 2)
    found["perplexity"] = measured(model, texts, device)
    return found


def measured(model, texts, device):
    """Perplexity of each text."""
    values = {n: models.perplexity(model, part, device) for n, part in texts.items() if len(part)}
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


if __name__ == "__main__":
    main()
