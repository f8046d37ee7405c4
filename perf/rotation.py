"""What a rotation gives: seconds to learn it, its objective, and perplexity after pruning.

    python perf/rotation.py MODEL --tokens tokens.npz [--patterns 2:4 4:8] [--variants both ...]

MODEL is a checkpoint's folder or a GGUF; the tokens hold ``calibration`` and ``prose`` (windows,
length), as examples/smollm2/tokens.npz does. Of the calibration the last 32 windows are held out.
Every variant starts from the dense model, and each prints one line: perplexity as the mean of
several prunings whose dampings differ in the seventh digit, and how far they spread.

=============  ===================================================================================
none           not rotated
plain          R1 and R2 learned against ``w² H_jj``
permuted       plain, and the inner columns of each MLP dealt out by ``Σ w² / C_jj``, the stream's
               scopes ordered by their share of the score
compensated    R1 and R2 learned against ``w² / C_jj``
both           compensated and permuted, the default of ``--rotate``
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
    "plain": {"score": "activations", "permute": False},
    "permuted": {"score": "activations"},
    "compensated": {"permute": False},
    "both": {},
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
    parser.add_argument("--steps", type=int, default=300, help="of learning a rotation")
    parser.add_argument("--repeats", type=int, default=5, help="prunings of each variant")
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
    for name, part in texts.items():
        print(f"dense    {name} {models.perplexity(dense, part, device):.2f}", flush=True)
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
    drop = args.target != "pruned"
    if options is not None:
        report = rotate(
            model, calibration, pattern, steps=args.steps, drop_first_token=drop, device=device,
            **options,
        )  # fmt: skip
        found |= {
            "objective": f"{report.before:.4f} to {report.after:.4f}",
            "seconds": round(report.seconds, 2),
            "learning": round(report.learning, 2),
            "deviation": f"{report.deviation:.1e}",
            "GiB": round(report.memory_peak / 2**30, 2),
            "untied MB": round(report.untied / 1e6, 1),
        }
    began, repeats = time.perf_counter(), []
    for repeat in range(args.repeats):
        pruned = copy.deepcopy(model)
        models.prune_model(
            pruned, calibration, pattern=pattern, method=args.method, target=args.target,
            drop_first_token=drop, damp=0.01 * (1 + 1e-6 * repeat), device=device.type,
        )  # fmt: skip
        repeats.append([models.perplexity(pruned, part, device) for part in texts.values()])
    found["pruned and measured, s"] = round((time.perf_counter() - began) / args.repeats, 2)
    for name, values in zip(texts, np.transpose(repeats), strict=True):
        found[name] = f"{np.exp(np.log(values).mean()):.2f}"
        if args.repeats > 1:
            found[name] += f" ± {values.std(ddof=1):.2f}"
    return found


if __name__ == "__main__":
    main()
