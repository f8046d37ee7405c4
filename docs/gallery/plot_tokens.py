"""
How many tokens
===============

The loss on the calibration tokens and on tokens kept aside, by the number of calibration tokens
for each of the 1536 columns, for two dampings. With few tokens the method fits what it is shown;
more damping holds it back.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import cuobs

folder = Path("../../examples/smollm2")
W = np.load(folder / "W.npy")[:48].astype(np.float32)
X = np.load(folder / "X.npy").astype(np.float32)
train, aside = X[:-1024], X[-1024:]
counts = [384, 768, 1536, 3072]

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
for damp, colour in ((0.01, "tab:blue"), (0.1, "tab:orange")):
    seen, unseen = [], []
    for count in counts:
        H = train[:count].T @ train[:count]
        result = cuobs.prune(W, hessian=H, pattern="2:4", method="sparsegpt", damp=damp)
        seen.append(100 * result.loss)
        unseen.append(100 * cuobs.relative_loss(W, result.weight, aside.T @ aside))
    per_column = [count / W.shape[1] for count in counts]
    axes.plot(per_column, seen, "--", color=colour, label=f"damp {damp}, calibration")
    axes.plot(per_column, unseen, "-o", color=colour, label=f"damp {damp}, kept aside")
axes.set(xscale="log", xlabel="calibration tokens a column", ylabel="relative output loss, %")
axes.grid(alpha=0.25)
axes.legend()
