"""Prune a model, train it further in a loop of one's own, and see that its pattern still holds.

    python examples/fine_tune_pruned.py            # a tiny random model, seconds
    python examples/fine_tune_pruned.py SRC DST    # a checkpoint, into a new folder

Zeros stay zero because of the one line with `keep_zeros`; without it the first step of AdamW fills
them. In transformers' Trainer it is ``callbacks=[cuobs.models.KeepZeros()]``.
"""

import os
import shutil
import subprocess
import sys
import tempfile

import torch
import transformers

from cuobs import models

STEPS, STEP_WINDOWS = 20, 8
WINDOWS, LENGTH = 32, 64


def main():
    if len(sys.argv) not in (1, 3) or os.path.exists(sys.argv[-1]) and len(sys.argv) == 3:
        sys.exit("expected nothing, or a checkpoint's folder and a new one")
    with tempfile.TemporaryDirectory() as work:
        src, dst = sys.argv[1:] or (make_tiny(f"{work}/dense"), f"{work}/tuned")
        # What the model writes itself stands for a text here.
        tokens = models.write_calibration(src, f"{work}/own.npz", WINDOWS, LENGTH)
        pruned = f"{work}/pruned"
        report = models.prune_folder(src, pruned, f"{work}/own.npz", save_masks=True)
        print(f"pruned: {report.sparsity:.0%} zeros in {len(report.layers)} linears")

        model = models.load_model(pruned)
        dtype = model.dtype
        fine_tune(model.float(), torch.from_numpy(tokens))

        shutil.copytree(pruned, dst)  # tokenizer, report and masks
        model.to(dtype).save_pretrained(dst)
        check = [sys.executable, "-m", "cuobs", "verify", dst]
        sys.exit(subprocess.run(check).returncode)


def fine_tune(model, windows):
    """Some steps on windows of tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    with models.keep_zeros(model):
        for step in range(STEPS):
            start = step * STEP_WINDOWS % len(windows)
            batch = windows[start : start + STEP_WINDOWS]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0 or step + 1 == STEPS:
                print(f"step {step + 1:>2}  loss {loss.item():.3f}")


def make_tiny(path):
    """A random model of the Llama family, saved."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return os.fspath(path)


if __name__ == "__main__":
    main()
