"""The host memory that pruning a checkpoint takes which is larger than that.

    python -m perf.larger_than_memory [FOLDER] [--blocks 32] [--windows 4] [--length 128] [OPTIONS]

A Llama of 8B shape (hidden size 4096, 14336 in its MLP, 32 and 8 heads, a vocabulary of 128256; 16
GB with 32 blocks) with random weights in bfloat16 is written into FOLDER, shard by shard, unless it
is there, and random tokens (``tokens.npz:t``, of which ``few`` are four windows). Then ``cuobs
prune-model`` runs on it in a process of its own, with the OPTIONS, by magnitude to 2:4 by default;
the largest memory that this held is what the system counts of it, pages of files included.
"""

import argparse
import contextlib
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import torch
import transformers

from cuobs.containers import write_tensors
from cuobs.models.checkpoints.names import bytes_of, entry_of

VOCABULARY = 128256
# Random numbers of which all weights are made: no power of two, so that no two rows are alike.
NUMBERS = 2**24 + 1
OPTIONS = ("--method", "magnitude", "--target", "pruned")


def write_checkpoint(folder, blocks, hidden=4096, inner=14336):
    """A random Llama, a shard for each block and one for what is around them."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=blocks, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    numbers = torch.empty(NUMBERS).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    numbers, shards = numbers.bfloat16(), {}
    for name, tensor in model.state_dict().items():
        index = name.split(".")[2] if ".layers." in name else blocks
        shards.setdefault(f"model-{int(index):05}.safetensors", {})[name] = tensor
    for title, tensors in shards.items():
        with open(os.path.join(folder, title), "wb") as file:
            entries = {name: entry_of(tensor) for name, tensor in tensors.items()}
            write_tensors(
                file, entries, lambda name, own=tensors: _random(name, own[name], numbers)
            )
    weight_map = {name: title for title, tensors in shards.items() for name in tensors}
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {}, "weight_map": weight_map}, file)


def _random(name, like, numbers):
    """The bytes of a tensor, piece by piece: ones for a norm, else some of the random numbers."""
    if like.ndim == 1:
        yield bytes_of(torch.ones_like(like, device="cpu"))
        return
    numbers = numbers.roll(zlib.crc32(name.encode()) % len(numbers))
    for start in range(0, like.numel(), len(numbers)):
        yield bytes_of(numbers[: like.numel() - start])


def main():
    """Write, prune, and say what that took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default="larger_than_memory")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, help="Stop after so many.")
    arguments, options = parser.parse_known_args()
    source, dst = (os.path.join(arguments.folder, name) for name in ("source", "pruned"))
    if not os.path.exists(os.path.join(source, "model.safetensors.index.json")):
        os.makedirs(source, exist_ok=True)
        write_checkpoint(source, arguments.blocks)
    tokens = np.random.default_rng(0).integers(
        0, VOCABULARY, (arguments.windows, arguments.length), np.int32
    )
    np.savez(os.path.join(arguments.folder, "tokens.npz"), t=tokens, few=tokens[:4])
    shutil.rmtree(dst, ignore_errors=True)
    command = [
        sys.executable, "-m", "cuobs", "prune-model", source, dst, "--calibration",
        os.path.join(arguments.folder, "tokens.npz:t"),
        *(options or OPTIONS),
    ]  # fmt: skip
    began, done = time.perf_counter(), False
    with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
        done = subprocess.run(command, check=True, timeout=arguments.seconds) is not None
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    files = [os.path.join(source, name) for name in os.listdir(source)]
    print(
        f"{datetime.date.today()}: checkpoint {sum(map(os.path.getsize, files)) / 1e9:.1f} GB, "
        f"host memory at the peak {peak / 2**30:.2f} GiB, {seconds:.0f} s"
        f"{'' if done else ' (not finished)'}: {' '.join(command[3:])}"
    )


if __name__ == "__main__":
    main()
