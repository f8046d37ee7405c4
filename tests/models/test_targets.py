"""Targets against the formula written out in float64."""

import numpy as np
import pytest
import torch

from cuobs.layer import check_layer, solve_layer
from cuobs.models.pruning.targets import Moments, target_weights
from cuobs.recipe import Recipe, Settings

N, M, K = 200, 12, 16


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N, K))
    return {
        "W": rng.standard_normal((M, K)),
        "X": X,
        "Xh": X + 0.3 * rng.standard_normal((N, K)),
        "h": rng.standard_normal((N, M)),
        "hh": rng.standard_normal((N, M)),
    }


def target_weight(W, moments, damp, alpha, beta):
    return target_weights([W], moments, damp, alpha, [beta])[0]


def moments_of(data, pieces=3):
    moments = Moments()
    tensors = {name: torch.tensor(a, dtype=torch.float32) for name, a in data.items()}
    for rows in torch.arange(N).chunk(pieces):
        moments.update(*(tensors[name][rows] for name in ("Xh", "X", "h", "hh")))
    return moments


def formula(data, alpha, beta, damp=0.01):
    """METHODS: W* = (W(α XᵀX̂ + (1−α) Ĥ) + λW + β (h − ĥ)ᵀX̂) Hλ⁻¹, solved directly."""
    W, X, Xh, h, hh = (data[name] for name in ("W", "X", "Xh", "h", "hh"))
    H = Xh.T @ Xh
    lam = damp * np.diag(H).mean()
    right = W @ (alpha * X.T @ Xh + (1 - alpha) * H) + lam * W + beta * (h - hh).T @ Xh
    return np.linalg.solve(H + lam * np.eye(len(H)), right.T).T


@pytest.mark.parametrize("alpha,beta", [(0.5, 0.5), (1, 0), (0, 1), (0.25, 0.75)])
def test_formula(data, alpha, beta):
    W = torch.tensor(data["W"], dtype=torch.float32)
    found = target_weight(W, moments_of(data), 0.01, alpha, beta)
    np.testing.assert_allclose(found.numpy(), formula(data, alpha, beta), rtol=2e-4, atol=2e-5)


def test_several_linears_at_once(data):
    W = torch.tensor(data["W"], dtype=torch.float32)
    moments = moments_of(data)
    both = target_weights([W[:5], W], moments, 0.01, 0.5, [0, 0.5])
    torch.testing.assert_close(both[0], target_weight(W[:5], moments, 0.01, 0.5, 0))
    torch.testing.assert_close(both[1], target_weight(W, moments, 0.01, 0.5, 0.5))


def test_no_shares_give_the_weight_itself(data):
    W = torch.tensor(data["W"], dtype=torch.float32)
    assert torch.equal(target_weight(W, moments_of(data), 0.01, 0, 0), W)


def test_where_nothing_is_lost_the_target_is_the_weight(data):
    data = {**data, "Xh": data["X"], "hh": data["h"]}
    W = torch.tensor(data["W"], dtype=torch.float32)
    assert torch.equal(target_weight(W, moments_of(data), 0.01, 0.5, 0.5), W)


def test_dead_column_keeps_its_weight_and_changes_no_other(data):
    data = {**data, "Xh": data["Xh"].copy(), "X": data["X"].copy()}
    data["Xh"][:, 3] = 0
    W = torch.tensor(data["W"], dtype=torch.float32)
    found = target_weight(W, moments_of(data), 0.01, 0.5, 0.5)
    assert torch.equal(found[:, 3], W[:, 3])
    without = {**data, "W": np.delete(data["W"], 3, 1), "Xh": np.delete(data["Xh"], 3, 1),
               "X": np.delete(data["X"], 3, 1)}  # fmt: skip
    # λ is a share of the mean over all columns, the dead one included.
    mean = np.diag(data["Xh"].T @ data["Xh"]).mean()
    damp = 0.01 * mean / np.diag(without["Xh"].T @ without["Xh"]).mean()
    # The dead input is alive in the dense model; the target can't ask for it.
    extra = 0.5 * np.outer(data["W"][:, 3], data["X"][:, 3] @ without["Xh"])
    H = without["Xh"].T @ without["Xh"]
    H += damp * np.diag(H).mean() * np.eye(K - 1)
    expected = formula(without, 0.5, 0.5, damp) + np.linalg.solve(H, extra.T).T
    np.testing.assert_allclose(
        np.delete(found.numpy(), 3, 1), expected, rtol=2e-4, atol=2e-5
    )


def test_singular_hessian_is_said():
    Xh = torch.zeros(4, K)
    Xh[:, :2] = torch.tensor([[1.0, 1.0]])
    moments = Moments()
    moments.update(Xh, Xh + 1)
    with pytest.raises(np.linalg.LinAlgError):
        target_weight(torch.ones(M, K), moments, 0.0, 0.5, 0)


def test_half_precision_is_widened():
    Xh = torch.full((64, 4), 300.0, dtype=torch.float16)
    moments = Moments()
    moments.update(Xh)
    assert moments.hessian.dtype == torch.float32
    assert float(moments.hessian[0, 0]) == 64 * 300.0**2


@pytest.mark.parametrize("pattern", ["2:4", "coupled-2:4", "block16-row8"])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_a_pull_is_the_target_by_the_methods_own_factor(pattern, scale):
    """(W* − W) Hλ on the right-hand side gives what W* itself gives, dead columns apart."""
    rng = np.random.default_rng(0)
    K = 64
    W, X = rng.standard_normal((32, K)), scale * rng.standard_normal((500, K))
    X[:, 5] = 0
    H, pull = X.T @ X, scale**2 * 50 * rng.standard_normal((32, K))
    damped = H + 0.01 * np.diag(H).mean() * np.eye(K)
    damped[5, 5] = 1
    target = W + np.linalg.solve(damped, pull.T).T
    recipe, settings = Recipe(pattern, "sparsegpt"), Settings("cpu", "float64")
    found = [
        solve_layer(recipe, settings, check_layer(W, goal, "float64"), H, right)
        for goal, right in ((target, None), (None, lambda: pull))
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6, atol=1e-9)
    assert (found[0][1] == found[1][1]).all() and not found[1][0][:, 5].any()
