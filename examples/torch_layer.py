"""Prune a layer of a PyTorch model in place, from the activations that a hook collects."""

import torch

import cuobs

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = torch.nn.Sequential(
    torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)
).to(device)
batches = [torch.randn(64, 256, device=device) for _ in range(32)]

with torch.no_grad(), cuobs.collect(model, "2") as hessians:
    for batch in batches:
        model(batch)

result = cuobs.prune_linear(model[2], hessian=hessians["2"], pattern="2:4")
print(f"{result.method}: loss {100 * result.loss:.2f}%, sparsity {result.sparsity:.0%}, "
      f"{result.seconds:.2f} s on {result.device}")
