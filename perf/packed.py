"""Packed weights beside cuBLAS and PyTorch's 2:4, and an 8B model end to end, on one GPU.

    python -m perf.packed [--quick] [--out FOLDER]

Prints the tables of perf/RESULTS.rst; ``packed.json`` and ``packed.png`` go to FOLDER. Ratios are
to cuBLAS on the dense weight, in CUDA graphs, four weights in turn, see
`cuobs.models.packed.timing`.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

import cuobs
from cuobs.models.packed.generation import generation
from cuobs.models.packed.timing import picture, speedup, verdict

SHAPES = ("14336x4096", "4096x14336", "4096x4096", "28672x8192", "8192x28672")
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".")
    parser.add_argument("--quick", action="store_true", help="2:4 in float16 alone, no model")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
    compile_all(("2:4",) if arguments.quick else tuple(cuobs.patterns()))
    found = {}
    for dtype in ("float16",) if arguments.quick else ("float16", "bfloat16"):
        patterns = tuple(cuobs.patterns()) if dtype == "float16" else ("2:4",)
        patterns = ("2:4",) if arguments.quick else patterns
        found[dtype] = []
        for shape in SHAPES:
            began = time.perf_counter()
            search = shape == SHAPES[0] and dtype == "float16"
            found[dtype] += speedup(shape, TOKENS, dtype, patterns, search)
            print(f"{dtype} {shape}: {time.perf_counter() - began:.0f} s", flush=True)
        table(found[dtype], dtype)
        for line in verdict(found[dtype]):
            print(line)
    picture(found["float16"], os.path.join(arguments.out, "packed.png"), force=True)
    rows = [] if arguments.quick else end_to_end()
    with open(os.path.join(arguments.out, "packed.json"), "w") as file:
        json.dump({
            "device": torch.cuda.get_device_name(),
            **{dtype: [asdict(t) for t in timings] for dtype, timings in found.items()},
            "generation": [asdict(row) for row in rows],
        }, file, indent=1)  # fmt: skip


def compile_all(patterns):
    """Compile the kernels of all ways side by side, which they would be one by one as they run."""
    from cuobs.ops.cuda import packed, packed_ways
    from cuobs.pattern import parse

    torch.zeros(1, device="cuda")
    jobs = {}
    for pattern in patterns:
        for shape in SHAPES:
            layout = parse(pattern).compile(*map(int, shape.split("x")))
            for dtype in ("float16", "bfloat16") if pattern == "2:4" else ("float16",):
                for tokens in TOKENS:
                    for way in packed_ways.ways(layout, tokens, packed_ways.device(0)):
                        jobs[pattern, dtype, packed_ways.compiled(way)] = layout

    def compile_one(job):
        (_, dtype, way), layout = job
        packed.function(layout, dtype, way, packed_ways.entry(way))

    began = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, jobs.items()))
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)


def table(timings, dtype):
    """A table of one dtype in reStructuredText."""
    names = list(dict.fromkeys(n for t in timings for n in (*t.seconds, *t.faults)))
    widths = [13, 6, 9, *(max(6, len(name)) for name in names)]
    rule = "  ".join("=" * w for w in widths)

    def row(*cells):
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)).rstrip())

    print(f"\n{dtype}, times as fast as cuBLAS\n\n{rule}")
    row("weight", "tokens", "dense µs", *names)
    print(rule)
    for t in timings:
        gains = (f"{t.gain(name):.2f}" if t.gain(name) else "-" for name in names)
        row(f"{t.rows} x {t.columns}", t.tokens, f"{1e6 * t.dense:.1f}", *gains)
    print(rule + "\n", flush=True)
    for fault in dict.fromkeys(f"{n}: {why}" for t in timings for n, why in t.faults.items()):
        print(f"does not run  {fault}")


def end_to_end():
    """A Llama of 8B shape with random weights, 2:4 in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(LLAMA, file)
        plain = generation(folder, "2:4", dtype="bfloat16", say=print)
        rows = plain + generation(folder, "2:4", (1,), dtype="bfloat16", compiled=True)
    first = rows[0]
    print(f"weights: {first.dense_bytes / 2**30:.2f} GiB dense, {first.packed_bytes / 2**30:.2f} "
          f"packed ({first.packed_bytes / first.dense_bytes:.3f})")  # fmt: skip
    for n, row in enumerate(rows):
        how = "" if n < len(plain) else ", blocks compiled"
        print(f"{row.sequences} sequences{how}: {row.dense:.1f} tokens/s dense, "
              f"{row.packed:.1f} packed, {row.gain:.2f} times as fast", flush=True)  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
