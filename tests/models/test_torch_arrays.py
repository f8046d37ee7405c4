"""cuobs.prune on PyTorch tensors: the same kind comes back, on the same device."""

import numpy as np
import pytest
import torch

import cuobs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((32, 32)) / 6 + np.eye(32)
    return rng.standard_normal((8, 32)), rng.standard_normal((256, 32)) @ mix


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_tensor_comes_back_as_it_came(layer, dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    W, X = (torch.tensor(a, dtype=getattr(torch, dtype), device=device) for a in layer)
    W = torch.nn.Parameter(W)
    result = cuobs.prune(W, X, pattern="2:4", method="sparsegpt", device=device)
    assert isinstance(result.weight, torch.Tensor) and not result.weight.requires_grad
    assert result.weight.dtype == W.dtype and result.weight.device == W.device
    assert result.mask.dtype == torch.bool and result.mask.device == W.device
    assert (result.weight[~result.mask] == 0).all()
    assert cuobs.verify(torch.nn.Parameter(result.weight), "2:4")
    assert result.device == device
    plain = cuobs.prune(
        W.detach().cpu().double().numpy(), X.cpu().double().numpy(), pattern="2:4",
        method="sparsegpt", device="cpu",
    )  # fmt: skip
    assert (result.mask.cpu().numpy() == plain.mask).mean() > 0.98
    tolerance = {"bfloat16": 2e-2, "float16": 2e-3}.get(dtype, 1e-4)
    assert abs(result.loss - plain.loss) < 0.02 * plain.loss + tolerance


def test_bfloat16_is_rounded_to_nearest(layer):
    """The weights are those of a float32 run, rounded as PyTorch rounds."""
    W, X = (torch.tensor(a, dtype=torch.bfloat16) for a in layer)
    short = cuobs.prune(W, X, method="sparsegpt", device="cpu").weight
    long = cuobs.prune(W.float(), X, method="sparsegpt", device="cpu").weight
    assert torch.equal(short, long.bfloat16())


def test_hessian_takes_tensors_in_any_leading_shape(layer):
    _, X = layer
    h = cuobs.Hessian(32, dtype="float64")
    h.update(torch.tensor(X).reshape(4, 64, 32))
    np.testing.assert_allclose(h.matrix, X.T @ X, rtol=1e-12)


def test_target_and_reconstruct_take_tensors(layer):
    W, X = (torch.tensor(a) for a in layer)
    H = X.T @ X
    moved = cuobs.prune(W, hessian=H, target=1.5 * W, method="admm", dtype="float64", device="cpu")
    mask = moved.mask
    same = cuobs.reconstruct(W, mask, H, target=1.5 * W, dtype="float64", device="cpu")
    assert isinstance(same, torch.Tensor)
    torch.testing.assert_close(moved.weight, same, rtol=1e-9, atol=1e-9)
