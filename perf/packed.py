"""Packed weights beside cuBLAS and PyTorch's 2:4, and a model of 8B shape, on one GPU.

    python -m perf.packed [--only {tables,model}] [--out FOLDER]
    python -m perf.packed --show FOLDER/packed.json

Prints the tables of perf/RESULTS.rst; ``packed.json``, from which they are printed again without a
device, and ``packed.png`` go to FOLDER. Ratios are
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
from cuobs.models.packed.timing import TORCH, Timing, picture, speedup

SHAPES = ("14336x4096", "4096x14336", "4096x4096", "28672x8192", "8192x28672")
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of the patterns beside 2:4.
SOME_TOKENS = (1, 64, 256, 1024, 2048)
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
    parser.add_argument("--show", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.show:
        show(arguments.show)
        return
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
    found, path = {"device": torch.cuda.get_device_name()}, os.path.join(out, "packed.json")
    for dtype, patterns, tokens in (("float16", ("2:4",), TOKENS), ("float16", others, SOME_TOKENS),
                                    ("bfloat16", ("2:4",), TOKENS)):  # fmt: skip
        title = f"{dtype}, {', '.join(patterns)}"
        found[title] = []
        for shape in SHAPES:
            began = time.perf_counter()
            found[title] += map(asdict, speedup(shape, tokens, dtype, patterns, search=False))
            print(f"{title}, {shape}: {time.perf_counter() - began:.0f} s", flush=True)
            # What is measured is kept, should the time run out.
            with open(path, "w") as file:
                json.dump(found, file, indent=1)
    picture([Timing(**t) for t in found["float16, 2:4"]], os.path.join(out, "packed.png"),
            force=True)  # fmt: skip
    show(path)


def show(path):
    """Print what was measured: 2:4 in both dtypes side by side, then other patterns."""
    with open(path) as file:
        found = json.load(file)
    print(found.pop("device"))
    runs = {title: [Timing(**t) for t in timings] for title, timings in found.items()}
    by_patterns = {}
    for title, timings in runs.items():
        dtype, patterns = title.split(", ", 1)
        by_patterns.setdefault(patterns, {})[dtype] = timings
    for patterns, by_dtype in by_patterns.items():
        columns = [
            (name if dtype == "float16" else f"{dtype}: {name}", timings, name)
            for dtype, timings in by_dtype.items() for name in dict.fromkeys(
                n for t in timings for n in (*t.bounds, TORCH) if n != TORCH or patterns == "2:4")
        ]  # fmt: skip
        table(next(iter(by_dtype.values())), columns)
        for dtype, timings in by_dtype.items():
            spread(timings, patterns.split(", "), dtype)
            for n, why in dict.fromkeys(i for t in timings for i in t.faults.items()):
                print(f"does not run  {dtype}, {n}: {why}")


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
            here = packed_ways.device(0)
            for way in packed_ways.ways(layout, most, here):
                for program in packed_ways.programs(layout, way, most, here):
                    jobs[pattern, dtype, program] = layout

    def compile_one(job):
        (_, dtype, way), layout = job
        packed.function(layout, dtype, way, packed_ways.entry(way))

    began = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, jobs.items()))
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)


def table(dense, columns):
    """A table in reStructuredText: of each column, its title, its timings and what they time."""
    widths = [13, 6, 8, *(max(4, len(title)) for title, _, _ in columns)]
    rule = "  ".join("=" * w for w in widths)

    def row(*cells):
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)).rstrip())

    print(f"\n{rule}")
    row("weight", "tokens", "dense µs", *(title for title, _, _ in columns))
    print(rule)
    for n, t in enumerate(dense):
        gains = [t.gain(name) for _, timings, name in columns for t in timings[n : n + 1]]
        row(f"{t.rows} × {t.columns}", t.tokens, f"{1e6 * t.dense:.1f}",
            *("-" if gain is None else f"{gain:.2f}" for gain in gains),
            *[""] * (len(columns) - len(gains)))  # fmt: skip
    print(rule + "\n", flush=True)


def spread(timings, names, dtype):
    """The least and the largest gain over the large shapes, for each number of tokens."""
    for name in names:
        parts = []
        for tokens in dict.fromkeys(t.tokens for t in timings):
            gains = [t.gain(name) for t in timings
                     if t.tokens == tokens and t.rows != t.columns and t.gain(name)]  # fmt: skip
            if gains:
                parts.append(f"{tokens}: {min(gains):.2f} to {max(gains):.2f}")
        print(f"{dtype}, {name}, large shapes, tokens: gain  {', '.join(parts)}", flush=True)


def end_to_end():
    """An 8B Llama with random weights, 2:4 in bfloat16, one sequence."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(LLAMA, file)
        began = time.perf_counter()
        for row in generation(folder, "2:4", (1,), dtype="bfloat16", compiled=(False, True)):
            how = "compiled" if row.compiled else "as they are"
            print(f"blocks {how}: {row.dense:.1f} tokens/s dense, {row.packed:.1f} packed, "
                  f"{row.gain:.2f} times as fast")  # fmt: skip
        print(f"weights {row.dense_bytes / 2**30:.2f} and {row.packed_bytes / 2**30:.2f} GiB; "
              f"measured in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
