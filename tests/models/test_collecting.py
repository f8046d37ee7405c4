"""Hessians of a model's layers by hooks, and layers pruned in place."""

import warnings

import numpy as np
import pytest
import torch
from small_models import make_model, make_tokens
from transformers.pytorch_utils import Conv1D

import cuobs


def inputs_of(model, name, tokens):
    """What a layer is given, by a hook of the test's own."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().double().cpu().clone())
    )
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).numpy()


def hooks_of(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hessians_of_every_layer(family):
    model = make_model(family)
    tokens = torch.as_tensor(make_tokens(4, 16))
    with torch.no_grad(), cuobs.collect(model, dtype="float64") as hessians:
        for window in tokens:
            model(window[None])
    assert hooks_of(model) == 0
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    assert list(hessians) == names and len(hessians) == len(names)
    for name, hessian in hessians.items():
        X = inputs_of(model, name, tokens)
        np.testing.assert_allclose(hessian.matrix, X.T @ X, rtol=1e-4, atol=1e-6 * len(X))
        assert hessian.tokens == tokens.numel()


def test_layers_side_by_side_have_hessians_of_their_own():
    """Their sum is made once, and yet none holds another's memory."""
    model = make_model("llama")
    with torch.no_grad(), cuobs.collect(model, ["*.q_proj", "*.k_proj"]) as hessians:
        model(torch.as_tensor(make_tokens(2, 8)))
    q, k = (hessians[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    np.testing.assert_array_equal(q.matrix, k.matrix)
    before = k.matrix.copy()
    q.update(np.ones((3, q.K), "float32"))
    np.testing.assert_array_equal(k.matrix, before)
    assert k.tokens == 16 and q.tokens == 19


def test_one_gram_matrix_for_layers_that_read_one_tensor(monkeypatch):
    model, calls = make_model("llama"), []
    update = cuobs.Hessian.update
    monkeypatch.setattr(
        cuobs.Hessian, "update", lambda self, *a, **k: calls.append(self.K) or update(self, *a, **k)
    )
    with torch.no_grad(), cuobs.collect(model, "model.layers.0.*") as hessians:
        model(torch.as_tensor(make_tokens(1, 8)))
    assert len(hessians) == 7 and len(calls) == 4  # q k v, o, gate up, down


def test_a_tensor_that_was_changed_in_place_is_another():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            self.first(x)
            return self.second(x.mul_(2))

    model, X = Twice(), torch.randn(10, 4)
    for mode in torch.no_grad(), torch.inference_mode():
        expected = (X.T @ X).numpy()
        with mode, cuobs.collect(model) as hessians:
            model(X.clone())
        np.testing.assert_allclose(hessians["first"].matrix, expected, rtol=1e-5)
        np.testing.assert_allclose(hessians["second"].matrix, 4 * expected, rtol=1e-5)


def test_inputs_in_other_forms():
    """By keyword, one token without leading dimensions, none at all, in half precision."""
    layer, X = torch.nn.Linear(4, 2), torch.randn(6, 4)
    with torch.no_grad(), cuobs.collect(layer) as hessians:
        layer(input=X)
        layer(X[0])
        layer(X[:0])
        layer.to(torch.bfloat16)(X.bfloat16())
    assert list(hessians) == [""] and hessians[""].tokens == 13
    halves = X.bfloat16().float()
    expected = X.T @ X + X[:1].T @ X[:1] + halves.T @ halves
    np.testing.assert_allclose(hessians[""].matrix, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_never_ran_is_named():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 4), "idle": torch.nn.Linear(4, 4)})
    with torch.no_grad(), cuobs.collect(model) as hessians:
        model["used"](torch.randn(5, 4))
    assert hessians["used"].tokens == 5 and "idle" in hessians and "other" not in hessians
    with pytest.raises(ValueError, match="^idle: found that this layer has not run"):
        hessians["idle"]
    with pytest.raises(ValueError, match="^idle: "):
        dict(hessians)
    with pytest.raises(KeyError, match="no layer 'usd' .*nearest: used"):
        hessians["usd"]
    assert repr(hessians) == "<Hessians of 2 layers, of which 1 have run>"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_hooks_are_gone_whatever_happens(error):
    model = make_model("llama")
    with pytest.raises(error):
        with cuobs.collect(model):
            raise error
    assert hooks_of(model) == 0
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    with pytest.raises(ValueError, match="^up: X: found 4 elements that are NaN"):
        with torch.no_grad(), cuobs.collect(torch.nn.ModuleDict({"up": layer})):
            X = torch.zeros(3, layer.in_features)
            X[1, :4] = torch.nan
            layer(X)
    assert hooks_of(model) == 0


def test_names_and_models_refused():
    model = make_model("llama")
    for names, error, words in (
        ("*.up_prj", ValueError, r"names: .*'\*.up_prj' .*nearest: .*up_proj"),
        (["*.up_proj", "x"], ValueError, "names: found no linear layer .*'x'"),
    ):
        with pytest.raises(error, match=words):
            cuobs.collect(model, names)
    for wrong, error in ((np.eye(3), TypeError), (torch.nn.ReLU(), ValueError)):
        with pytest.raises(error, match="model: found"):
            cuobs.collect(wrong)
    with pytest.raises(ValueError, match="dtype: found 'float16'"):
        cuobs.collect(model, dtype="float16")
    assert hooks_of(model) == 0


def linear_of(W, transposed, **to):
    layer = Conv1D(*W.shape) if transposed else torch.nn.Linear(*W.shape[::-1])
    layer.weight.data = W.T.clone() if transposed else W.clone()
    return layer.to(**to)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_pruned_in_place(transposed, dtype):
    torch.manual_seed(0)
    W, X = torch.randn(8, 32), torch.randn(200, 32)
    layer = linear_of(W, transposed, dtype=dtype)
    parameter, bias = layer.weight, layer.bias.clone()
    parameter.requires_grad_(not transposed)
    result = cuobs.prune_linear(layer, [X[:90], X[90:]], pattern=(2, 4), device="cpu")
    expected = cuobs.prune(W.to(dtype), X, device="cpu")
    assert layer.weight is parameter and parameter.dtype == dtype
    assert parameter.requires_grad is not transposed and torch.equal(layer.bias, bias)
    assert torch.equal(parameter.data.T if transposed else parameter.data, expected.weight)
    assert torch.equal(result.weight, expected.weight) and torch.equal(result.mask, expected.mask)
    assert result.loss == expected.loss and cuobs.verify(layer, "2:4")


def test_a_layer_is_not_taken_for_its_inputs():
    """Fewer tokens than outputs: an array would be warned of as swapped, a layer can't be."""
    layer, X = torch.nn.Linear(8, 64), torch.randn(32, 8)
    for call in (
        lambda: cuobs.prune_linear(layer, X, method="wanda", device="cpu"),
        lambda: cuobs.prune(layer, X, method="wanda", device="cpu"),
        lambda: cuobs.compare(layer, X, methods=["wanda"], device="cpu"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    with pytest.warns(UserWarning, match="X: found 32 rows and W 64, .* swapped"):
        cuobs.prune(layer.weight.data, X, method="wanda", device="cpu")


def test_by_the_hessians_of_a_model():
    """The three lines of README."""
    model, tokens = make_model("llama"), torch.as_tensor(make_tokens(8, 16))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad(), cuobs.collect(model, "*.down_proj") as hessians:
        model(tokens)
    for name, hessian in hessians.items():
        cuobs.prune_linear(model.get_submodule(name), hessian=hessian, method="sparsegpt")
    for name, parameter in model.named_parameters():
        pruned = name.removesuffix(".weight") in hessians
        assert pruned == bool(name.endswith("down_proj.weight"))
        assert torch.equal(parameter, before[name]) is not pruned
        if pruned:
            assert cuobs.verify(parameter, "2:4")


def test_weights_that_are_made_of_others_are_refused():
    from torch.nn.utils import parametrizations
    from torch.nn.utils import prune as masks

    X = torch.randn(50, 32)
    layers = [torch.nn.Linear(32, 8) for _ in range(3)]
    masks.l1_unstructured(layers[0], "weight", amount=0.5)
    parametrizations.weight_norm(layers[1])
    for layer, words in (
        (layers[0], "layer: found it under a mask of torch.nn.utils.prune, .*remove"),
        (layers[1], "layer: found it under a parametrization, expected a plain"),
        (layers[2].to("meta"), "layer: found it on the meta device"),
        (torch.nn.Conv2d(3, 4, 2), "layer: found a module Conv2d of torch.nn"),
        (torch.randn(8, 32), "layer: found Tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            cuobs.prune_linear(layer, X)


def test_what_fails_leaves_the_layer_as_it_was():
    layer = torch.nn.Linear(32, 8)
    before = layer.weight.clone()
    for arguments in ({"X": torch.randn(9, 31)}, {}, {"X": torch.randn(50, 32), "pattern": "3:7"}):
        with pytest.raises(ValueError):
            cuobs.prune_linear(layer, **arguments)
    assert torch.equal(layer.weight, before)
    layer.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^layer: found 1 elements that are NaN .*\(3, 5\)"):
        cuobs.prune_linear(layer, torch.randn(50, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_device(dtype):
    """Hessians stay where the activations are; on another stream of PyTorch as well."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make_model("llama").to("cuda", dtype)
    tokens = torch.as_tensor(make_tokens(8, 16), device="cuda")
    X = inputs_of(model, "model.layers.1.mlp.down_proj", tokens)
    for stream in torch.cuda.current_stream(), torch.cuda.Stream():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            with cuobs.collect(model, "*.down_proj") as hessians:
                for window in tokens:
                    model(window[None])
            hessian = hessians["model.layers.1.mlp.down_proj"]
            assert repr(hessian) == f"Hessian(K={hessian.K}, tokens=128, float32 on cuda)"
            off = np.linalg.norm(hessian.matrix.get() - X.T @ X)
            assert off < (1e-3 if dtype == torch.float32 else 2e-2) * np.linalg.norm(X.T @ X)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    result = cuobs.prune_linear(layer, hessian=hessian, method="sparsegpt")
    assert result.device == "cuda" and layer.weight.is_cuda and layer.weight.dtype == dtype
    assert cuobs.verify(layer, "2:4") and torch.equal(result.weight, layer.weight)
