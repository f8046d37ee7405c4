"""The exact re-solve by conjugate gradients, on Hessians that are hard for float32."""

import warnings

import layers
import numpy as np
import oracles
import pytest

import cuobs
from cuobs.layout import Layout
from cuobs.problem import Problem
from cuobs.recipe import Settings
from cuobs.refine import excess, resolve

# Wide enough that the CPU takes conjugate gradients too.
K = 1024


def decaying(rng):
    """Singular values over four orders of magnitude: what few iterations do not reach."""
    Q = np.linalg.qr(rng.standard_normal((K, K)))[0]
    return (np.logspace(0, -4, K)[:, None] * Q) * 30 * np.exp(0.3 * rng.standard_normal(K))


def few_tokens(rng):
    """A quarter as many tokens as columns."""
    return rng.standard_normal((K // 4, K)) * np.exp(0.5 * rng.standard_normal(K))


def few_directions(rng):
    """Twenty directions a thousand times as strong as the rest."""
    X = rng.standard_normal((2 * K, 20)) @ rng.standard_normal((20, K))
    return X + 0.03 * rng.standard_normal((2 * K, K))


def solved(xp, X, damp, rng):
    """What a re-solve in float32 loses, over what the best weights lose; and what it says."""
    H, T = X.T @ X, rng.standard_normal((6, K))
    smallest = np.argsort((T**2 * H.diagonal()).reshape(6, -1, 4), axis=2).argsort(axis=2)
    mask = (smallest >= 2).reshape(6, K)
    settings = Settings(device="cpu" if xp is np else "cuda")
    problem = Problem.build(xp.asarray(T, "float32"), xp.asarray(H, "float32"), Layout.plain(6, K),
                            damp, settings)
    weight, converged = resolve(problem, xp.asarray(mask))
    bound = excess(problem, xp.asarray(mask), weight)
    _, damped = oracles.damped(T, H, damp)
    weight = layers.host(weight).astype(float) * problem.weight_unit
    best = oracles.exact(T, damped, mask)

    def loss(new):
        return np.einsum("mk,kl,ml", T - new, damped, T - new, optimize=True)

    return loss(weight) / loss(best) - 1, bound, converged


@pytest.mark.parametrize("make, damp", [(few_tokens, 1e-2), (few_tokens, 1e-4), (decaying, 1e-2),
                                        (decaying, 1e-4)])
def test_float32_comes_to_the_least_loss(xp, rng, make, damp):
    """A plateau of small gains is not taken for the end: without the bound up to 20% were left."""
    more, bound, converged = solved(xp, make(rng), damp, rng)
    assert converged and -1e-4 < more < 0.01
    assert more <= bound + 1e-3


def test_what_float32_can_not_solve_is_said(xp, rng):
    """So little damping that no float32 finds the directions it leaves."""
    more, bound, converged = solved(xp, few_directions(rng), 1e-6, rng)
    assert more > 0.04 and bound > 0.04 and not converged


def test_results_say_whether_they_converged(xp, rng):
    X, W = few_directions(rng), rng.standard_normal((4, K))
    H = xp.asarray(X.T @ X)
    device = "cpu" if xp is np else "cuda"
    with pytest.warns(UserWarning, match="conjugate gradients did not converge"):
        result = cuobs.prune(xp.asarray(W), hessian=H, method="wanda", refine="exact", damp=1e-6,
                             device=device)
    assert not result.converged
    with pytest.warns(UserWarning, match="dtype='float64'"):
        cuobs.reconstruct(xp.asarray(W), result.mask, H, damp=1e-6, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuobs.prune(xp.asarray(W), hessian=H, method="wanda", refine="exact",
                           device=device).converged
