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
    h = cuobs.Hessian(32, dtype="float64", device="cpu")
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


def batches(X, dtype=torch.float32, **how):
    return [torch.tensor(x, dtype=dtype, **how) for x in (X[:9], X[9:140], X[140:])]


FORMS = {
    "bfloat16": lambda X: batches(X, torch.bfloat16),
    "with gradients": lambda X: batches(X, requires_grad=True),
    "as a hook gives them": lambda X: [(x[None],) for x in batches(X)],
    "generator": lambda X: (x for x in batches(X)),
    "DataLoader": lambda X: torch.utils.data.DataLoader(torch.tensor(X).float(), batch_size=7),
    "DataLoader of a TensorDataset": lambda X: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(X).float()), batch_size=100
    ),
    "rows": lambda X: list(torch.tensor(X, requires_grad=True).float()),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_batches_of_tensors(layer, form):
    W, X = layer
    given = form(X)
    h = cuobs.Hessian(32, device="cpu")
    h.update(form(X))
    short = torch.tensor(X).bfloat16().double().numpy() if form is FORMS["bfloat16"] else X
    np.testing.assert_allclose(h.matrix, short.T @ short, rtol=1e-4, atol=1e-3)
    result = cuobs.prune(torch.tensor(W), given, method="sparsegpt", device="cpu")
    assert result.tokens == h.tokens == 256
    assert isinstance(result.weight, torch.Tensor)


def test_modules_are_their_weights(layer):
    from transformers.pytorch_utils import Conv1D

    W, X = (torch.tensor(a, dtype=torch.float32) for a in layer)
    linear, turned = torch.nn.Linear(32, 8), Conv1D(8, 32)
    linear.weight.data, turned.weight.data = W.clone(), W.T.clone()
    expected = cuobs.prune(W, X, device="cpu", method="sparsegpt")
    for module in (linear, turned):
        result = cuobs.prune(module, X, device="cpu", method="sparsegpt")
        assert torch.equal(result.weight, expected.weight)
        assert not cuobs.verify(module, "2:4")
        assert cuobs.relative_loss(module, result.weight, X.T @ X) == pytest.approx(result.loss)
        again = cuobs.reconstruct(module, result.mask, X.T @ X, device="cpu")
        assert again.shape == W.shape
    assert torch.equal(linear.weight, W)


@pytest.mark.parametrize("make, words", [
    (lambda W: W.to_sparse_csr(), "W: found a tensor of layout torch.sparse_csr"),
    (lambda W: W.to("meta"), "W: found a tensor on the meta device"),
    (lambda W: torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), "W: found dtype qint8"),
    (lambda W: W.to(torch.float8_e4m3fn), "W: found dtype float8_e4m3fn"),
    (lambda W: torch.nested.nested_tensor([W, W]), "W: found a nested tensor"),
    (lambda W: torch.nn.Conv2d(3, 4, 2), "W: found a module Conv2d"),
    (lambda W: torch.nn.Sequential(torch.nn.Linear(32, 8)), "W: found a module Sequential"),
])
def test_tensors_that_hold_no_plain_numbers(layer, make, words):
    W, X = (torch.tensor(a, dtype=torch.float32) for a in layer)
    with pytest.raises(TypeError, match=words):
        cuobs.prune(make(W), X, device="cpu")
    with pytest.raises(TypeError, match=words.replace("a module ", "").replace("W:", "X:")):
        cuobs.prune(W, make(W), device="cpu")


def test_views_that_numpy_has_not(layer):
    W, X = (torch.tensor(a, dtype=torch.float32) for a in layer)
    plain = cuobs.prune(-W, X, device="cpu", method="sparsegpt")
    view = cuobs.prune(W._neg_view(), X, device="cpu", method="sparsegpt")
    assert torch.equal(plain.weight, view.weight)
