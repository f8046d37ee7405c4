"""Seconds a block and memory of pruning a whole model of 8B shape on GPUs, step by step.

    python -m perf.whole_model [--method admm --target mixed] [--blocks 4] [--windows 128]
    torchrun --nproc-per-node 2 -m perf.whole_model [--alone] [...]

A Llama with hidden size 4096, 14336 in its MLP, 32 and 8 heads, random weights in bfloat16, windows
of 2048 tokens. Each setting runs twice: as it is, for the seconds of each block and the peak memory
beside what was predicted, and with the device waited for after each step, for the shares of steps.
Under torchrun the processes share the work, each with a GPU; steps are shown for each. With
``--alone`` the first of them does it alone before, for the ratio; its steps come first.
"""

import argparse
import contextlib
import time

import numpy as np
import torch
import transformers
from torch import distributed

import cuobs
from cuobs import layer, problem
from cuobs.models import prune_model
from cuobs.models import ranks as processes
from cuobs.models.pruning import prune as loop
from cuobs.models.pruning import resident, rows, streams, targets
from cuobs.ops import factors

# Seconds a block after the first and GiB at the peak, predicted and measured, as they were with
# every group's inputs by forwards from the block's start and sums in tf32; one H100, 2026-11-25.
BEFORE = {("sparsegpt", "pruned"): (1.5, 25.0, 13.3), ("admm", "mixed"): (4.2, 29.8, 29.1)}
# (where, name, what it is called here); those inside others are taken off them.
STEPS = (
    (loop, "probe", "finding groups"),
    (streams.Passage, "inputs", "forwards to a group"),
    (streams.Passage, "leave", "forwards to the end"),
    (targets.Moments, "update", "sums"),
    (processes.Ranks, "add_up", "sums of all processes"),
    (rows, "pulls", "targets"),
    (problem.Problem, "pull", "targets"),
    (problem.Problem, "inverse", "factors and inverses"),
    (factors, "reversed_cholesky", "factors and inverses"),
    (factors, "upper_inverse", "factors and inverses"),
    (factors, "factors_by_rows", "factors and inverses"),
    (factors, "gram_by_rows", "factors and inverses"),
    (layer, "resolve", "re-solve"),
    (rows, "solve_layer", "pruning"),
    (rows, "_losses", "losses"),
    (processes.Ranks, "begin_gather", "rows of all processes"),
    (loop, "prune_rows", "checks and copies"),
    (resident.Resident, "load", "blocks to the device"),
    (resident.Resident, "store", "blocks back"),
)


def make_model(blocks, hidden=4096, inner=14336, heads=32, groups=8):
    """A random Llama on the CPU, in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval().cpu()


@contextlib.contextmanager
def stepwise(spent):
    """Add the seconds of each step to a dict, those of steps inside it taken off."""
    open_steps, originals = [], []

    def timed(function, label):
        def call(*args, **kwargs):
            torch.cuda.synchronize()
            open_steps.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                whole = time.perf_counter() - began
                spent[label] = spent.get(label, 0.0) + whole - open_steps.pop()
                if open_steps:
                    open_steps[-1] += whole

        return call

    for place, name, label in STEPS:
        originals.append((place, name, getattr(place, name)))
        setattr(place, name, timed(originals[-1][2], label))
    try:
        yield
    finally:
        for place, name, function in reversed(originals):
            setattr(place, name, function)


def run(arguments, method, target, ranks):
    """Prune and print what it took, with all processes; their seconds a block."""
    tokens = np.random.default_rng(0).integers(3, 32000, (arguments.windows, arguments.length))
    options = {"method": method, "target": target, "pattern": arguments.pattern}
    model = make_model(arguments.blocks)
    marks = [time.perf_counter()]
    report = prune_model(
        model, tokens, **options,
        starting=lambda _: marks.append(time.perf_counter()),
        on_block=lambda *_: marks.append(time.perf_counter()),
    )  # fmt: skip
    before, first, *others = np.diff(marks)
    if ranks.leads:
        show(report, method, target, ranks.size, before, first, *others)
    return min(others, default=first)


def run_stepwise(arguments, method, target):
    """Prune two blocks, the device waited for after each step; the seconds of the second one's."""
    tokens = np.random.default_rng(0).integers(3, 32000, (arguments.windows, arguments.length))
    spent, marks = {}, []
    with stepwise(spent):
        prune_model(
            make_model(2), tokens, method=method, target=target, pattern=arguments.pattern,
            on_block=lambda *_: marks.append((time.perf_counter(), dict(spent))),
        )  # fmt: skip
    (began, before), (ended, after) = marks
    steps = {label: after[label] - before.get(label, 0.0) for label in after}
    return steps | {"all else": ended - began - sum(steps.values()), "step by step": ended - began}


def show_steps(steps, alone, ranks):
    """Print the seconds of steps: of one process alone, if it was, and of each of several."""
    found = [steps]
    if ranks.size > 1:
        found = [None] * ranks.size
        distributed.all_gather_object(found, steps)
    if ranks.leads:
        found = [alone, *found] if alone else found
        for label in dict.fromkeys(label for one in found for label in one):
            print(" ", *(f"{one.get(label, 0.0):7.3f}" for one in found), "s ", label, flush=True)


def show(report, method, target, size, before, first, *others):
    """Print the seconds of blocks, the memory and the loss of a run."""
    gib = [n / 2**30 for n in (report.memory_predicted, report.memory_peak)]
    then = f"then {min(others):.3f} to {max(others):.3f} s a block; " if others else ""
    print(f"\n{method}, {target}, {size} GPU: {before:.1f} s before, first block {first:.2f} s, "
          f"{then}memory {gib[0]:.1f} GiB "
          f"predicted, {gib[1]:.1f} at the peak ({gib[0] / gib[1] - 1:+.0%}); mean loss "
          f"{np.mean([row.loss for row in report.layers]):.6f}", flush=True)  # fmt: skip
    if (method, target) in BEFORE:
        print("  before: {:.1f} s a block; {:.1f} GiB predicted, {:.1f} at the peak".format(
            *BEFORE[method, target]))  # fmt: skip


def main():
    """Run the settings that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append")
    parser.add_argument("--target", action="append")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--alone", action="store_true", help="first without the other processes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("found no CUDA device, expected one")
    methods = arguments.method or ["sparsegpt", "admm"]
    wanted = arguments.target or ["pruned", "mixed"]
    with processes.joined() as ranks:
        if ranks.leads:
            print(f"{ranks.size} x {torch.cuda.get_device_name()}, cuobs {cuobs.__version__}, "
                  f"torch {torch.__version__}")  # fmt: skip
        for method, target in zip(methods, wanted, strict=True):
            alone = by_step = None
            if arguments.alone and ranks.leads:
                with processes.apart() as one:
                    alone = run(arguments, method, target, one)
                    by_step = run_stepwise(arguments, method, target)
            ranks.agree(None)  # the others wait
            together = run(arguments, method, target, ranks)
            if alone:
                print(f"  {alone / together:.2f} times as fast as one GPU")
            show_steps(run_stepwise(arguments, method, target), by_step, ranks)


if __name__ == "__main__":
    main()
