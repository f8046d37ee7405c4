"""Packed weights beside cuBLAS and PyTorch's 2:4, and a model of 8B shape, on one GPU.

    python -m perf.packed [--only {tables,model}] [--out FOLDER]

Prints the tables of perf/RESULTS.rst; ``packed.json`` and ``packed.png`` go to FOLDER. Ratios are
to cuBLAS on the dense weight, in CUDA graphs, four weights in turn, see
`cuobs.models.packed.timing`.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

import cuobs
from cuobs.models.packed.generation import generation
from cuobs.models.packed.timing import picture, speedup

SHAPES = ("14336x4096", "4096x14336", "4096x4096", "28672x8192", "8192x28672")
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of the patterns beside 2:4.
SOME_TOKENS = (1, 64, 256, 2048)
# Blocks of the model: a compiler takes each for itself, and takes a second or two.
BLOCKS = 8
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".")
    parser.add_argument("--only", choices=("tables", "model"))
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
    if arguments.only != "model":
        tables(arguments.out)
    if arguments.only != "tables":
        end_to_end()


def tables(out):
    """Layer shapes: 2:4 for all numbers of tokens, other patterns for some."""
    others = tuple(name for name in cuobs.patterns() if name != "2:4")
    compile_all({"2:4": (("float16", "bfloat16"), TOKENS)}
                | {name: (("float16",), SOME_TOKENS) for name in others})  # fmt: skip
    found = {}
    for dtype, patterns, tokens in (("float16", ("2:4",), TOKENS), ("bfloat16", ("2:4",), TOKENS),
                                    ("float16", others, SOME_TOKENS)):  # fmt: skip
        title = f"{dtype}, {', '.join(patterns)}"
        found[title] = []
        for shape in SHAPES:
            began = time.perf_counter()
            found[title] += speedup(shape, tokens, dtype, patterns, search=False)
            print(f"{title}, {shape}: {time.perf_counter() - began:.0f} s", flush=True)
        table(found[title], title)
        spread(found[title], patterns)
        # What is measured is kept, should the time run out.
        picture(found["float16, 2:4"], os.path.join(out, "packed.png"), force=True)
        with open(os.path.join(out, "packed.json"), "w") as file:
            json.dump({
                "device": torch.cuda.get_device_name(),
                **{title: [asdict(t) for t in timings] for title, timings in found.items()},
            }, file, indent=1)  # fmt: skip


def compile_all(plan):
    """Compile the kernels of all ways side by side, which they would be one by one as they run."""
    from cuobs.ops.cuda import packed, packed_ways
    from cuobs.pattern import parse

    torch.zeros(1, device="cuda")
    jobs = {}
    for (pattern, (dtypes, counts)), shape in itertools.product(plan.items(), SHAPES):
        layout = parse(pattern).compile(*map(int, shape.split("x")))
        for dtype, tokens in itertools.product(dtypes, counts):
            most = 1 << (tokens - 1).bit_length()
            for way in packed_ways.ways(layout, most, packed_ways.device(0)):
                jobs[pattern, dtype, packed_ways.compiled(way)] = layout

    def compile_one(job):
        (_, dtype, way), layout = job
        packed.function(layout, dtype, way, packed_ways.entry(way))

    began = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, jobs.items()))
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)


def table(timings, title):
    """A table in reStructuredText."""
    names = list(dict.fromkeys(n for t in timings for n in (*t.seconds, *t.faults)))
    widths = [13, 6, 9, *(max(6, len(name)) for name in names)]
    rule = "  ".join("=" * w for w in widths)

    def row(*cells):
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)).rstrip())

    print(f"\n{title}: times as fast as cuBLAS\n\n{rule}")
    row("weight", "tokens", "dense µs", *names)
    print(rule)
    for t in timings:
        gains = (f"{t.gain(name):.2f}" if t.gain(name) else "-" for name in names)
        row(f"{t.rows} x {t.columns}", t.tokens, f"{1e6 * t.dense:.1f}", *gains)
    print(rule + "\n", flush=True)
    for fault in dict.fromkeys(f"{n}: {why}" for t in timings for n, why in t.faults.items()):
        print(f"does not run  {fault}")


def spread(timings, patterns):
    """The least and the largest gain over the large shapes, for each number of tokens."""
    for name in patterns:
        parts = []
        for tokens in dict.fromkeys(t.tokens for t in timings):
            gains = [t.gain(name) for t in timings
                     if t.tokens == tokens and t.rows != t.columns and t.gain(name)]  # fmt: skip
            if gains:
                parts.append(f"{tokens}: {min(gains):.2f} to {max(gains):.2f}")
        print(f"{name}, large shapes, tokens: gain  {', '.join(parts)}", flush=True)


def end_to_end():
    """Blocks of an 8B Llama with random weights, 2:4 in bfloat16, one sequence."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(LLAMA | {"num_hidden_layers": BLOCKS}, file)
        for compiled in (False, True):
            row, = generation(folder, "2:4", (1,), dtype="bfloat16", compiled=compiled)
            how = "compiled" if compiled else "as they are"
            print(f"{BLOCKS} blocks, {how}: {row.dense:.1f} tokens/s dense, {row.packed:.1f} "
                  f"packed, {row.gain:.2f} times as fast; weights "
                  f"{row.dense_bytes / 2**30:.2f} and {row.packed_bytes / 2**30:.2f} GiB",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
