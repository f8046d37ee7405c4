"""Prune the example layer from NumPy: by name, by a pattern of one's own, and a mask re-solved."""

from pathlib import Path

import numpy as np

import cuobs

folder = Path(__file__).parent / "smollm2"
W = np.load(folder / "W.npy")
X = np.load(folder / "X.npy", mmap_mode="r")

hessian = cuobs.Hessian(W.shape[1])
hessian.update(X)

result = cuobs.prune(W, hessian=hessian, pattern="2:4")
print(f"admm       2:4          loss {100 * result.loss:.2f}% in {result.seconds:.1f} s")

coupled = cuobs.Pattern(
    view="(M,K/16,8,2):(K,16,1,8)", block=(1, 1, 1, 2), scope=(1, 1, 4, 1), keep=2
)
result = cuobs.prune(W, hessian=hessian, pattern=coupled, method="sparsegpt")
print(f"sparsegpt  coupled-2:4  loss {100 * result.loss:.2f}% in {result.seconds:.1f} s")

better = cuobs.reconstruct(W, result.mask, hessian)
print(f"           re-solved    loss {100 * cuobs.relative_loss(W, better, hessian):.2f}%")
