"""When ADMM and the exact re-solve stop, and which way the re-solve goes: figures of their own."""

import layers
import numpy as np
import oracles
import pytest

from cuobs import Settings, refine
from cuobs.algorithms.admm import admm
from cuobs.layout import Layout
from cuobs.pattern import parse
from cuobs.problem import Problem


def problem_of(W, H, dtype="float64", **settings):
    layout = parse("2:4").compile(*W.shape)
    settings = Settings(dtype=dtype, device="cpu", **settings)
    return Problem.build(W.astype(dtype), H.astype(dtype), layout, 0.01, settings)


@pytest.mark.parametrize("schedule, growth", [
    ("default", (1.06, 1.04, 1.03)), ("slow", (1.04, 1.02, 1.02)),
])
def test_admm_takes_as_many_steps(example, schedule, growth):
    """Until less than 3 of 10000 pruned elements change: here 2 of 8192, and not 3."""
    W, X = (np.asarray(a[:, :512], "float64") for a in example)
    W, H = W[:32], X.T @ X
    steps = []
    problem = problem_of(W, H, progress=lambda *at: steps.append(at))
    found = admm(problem, schedule)
    mask, count = oracles.admm_mask(
        *oracles.damped(W, H), oracles.scopes("2:4", *W.shape), 0.1, growth, every=1,
        kept=(1.2, 1.7),
    )
    assert len(steps) == count > 30
    np.testing.assert_array_equal(found.mask, mask)


class Taken(Exception):
    """The way that was taken."""


@pytest.mark.parametrize("dtype, K, way", [
    ("float32", 119, "factor"), ("float32", 121, "iterate"),
    ("float64", 1499, "factor"), ("float64", 1501, "iterate"),
])
def test_rows_are_factored_where_that_is_less_work(monkeypatch, dtype, K, way):
    """kept³/3 against 40 iterations of K² in float32 and 500 in float64; here all are kept."""

    def taken(name):
        def take(*_, **__):
            raise Taken(name)

        return take

    monkeypatch.setattr(refine, "_factor_rows", taken("factor"))
    monkeypatch.setattr(refine, "masked_cg", taken("iterate"))
    W = np.ones((1, K))
    problem = Problem.build(
        W.astype(dtype), np.eye(K, dtype=dtype), Layout.plain(1, K), 0.0,
        Settings(dtype=dtype, device="cpu"),
    )
    with pytest.raises(Taken, match=way):
        refine.resolve(problem, W != 0)


@pytest.mark.parametrize("dtype, tolerance, settled", [
    ("float32", 1e-5, 5e-4), ("float64", 1e-12, 0.0),
])
def test_where_the_iterations_stop(monkeypatch, dtype, tolerance, settled):
    """By the residual beside the target, and by what an iteration gains beside the loss left."""
    calls = []

    def descend(A, residual, mask, X, **how):
        calls.append(how)
        return X, True

    monkeypatch.setitem(refine.ITERATIONS, dtype, 0)
    monkeypatch.setattr(refine, "masked_cg", descend)
    W, H = layers.random_layer(4, 32)
    problem = problem_of(W, H, dtype)
    mask = W > 0
    refine.resolve(problem, mask)
    seen, *further = calls
    target, Hl = oracles.damped(W, H)
    expected = tolerance**2 * np.einsum("mk,k,mk->m", target, np.diag(Hl), target)
    np.testing.assert_allclose(seen["limit"], expected, rtol=1e-5)
    away = target * ~mask
    assert seen["energy"] == pytest.approx(np.einsum("mk,kl,ml", away, Hl, away), rel=1e-5)
    assert seen["settled"] == settled and seen["max_iterations"] == 320
    # Where it stopped is far from the best: float32 is asked to go on.
    assert [call["settled"] for call in further] == ([5e-6] * 2 if dtype == "float32" else [])
