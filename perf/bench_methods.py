"""Every method from the Hessian on: time, loss and sparsity."""

import numpy as np
import pytest

import cuobs
from perf.sparsegpt_columns import sparsegpt_columns

# On the GPU the group of scopes is that of the published benchmark.
METHODS = (
    ("magnitude", {}),
    ("wanda", {}),
    ("obs-local", {}),
    ("obs-full", {}),
    ("obs-split", {"splits": 64}),
    ("obs-interleaved", {"splits": 8}),
    ("obs-interleaved", {"splits": 64}),
    ("sparsegpt", {}),
    ("sparsegpt", {"refine": "exact"}),
    ("obs-ordered", {"order": "largest"}),
    ("true-obs", {"order": "gap"}),
    ("admm", {}),
)
OTHERS = [name for name in cuobs.patterns() if name != "2:4"]


def _check(problem, pattern, claimed=None):
    """Refuse a weight that breaks the pattern or loses other than it says; loss and sparsity."""

    def check(result):
        weight = getattr(result, "weight", result)
        assert cuobs.verify(weight, pattern)
        loss = cuobs.relative_loss(problem.W, weight, problem.H)
        assert loss == pytest.approx(claimed or result.loss, rel=1e-3)
        sparsity = 1 - int((weight != 0).sum()) / weight.size
        assert sparsity >= 0.5
        return {"loss %": f"{100 * loss:.3f}", "sparsity %": f"{100 * sparsity:.2f}"}

    return check


def _clock(clock, problem, pattern, method, options):
    clock(
        lambda: cuobs.prune(
            problem.W, hessian=problem.H, pattern=pattern, method=method, **options
        ),
        _check(problem, pattern),
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [pytest.param(m, o, id=" ".join([m, *map(str, o.values())])) for m, o in METHODS],
)
@pytest.mark.benchmark(group="2:4")
def test_method(clock, problem, method, options):
    if "order" in options:
        options = options | {"group": 256 if problem.large else 40}
    _clock(clock, problem, "2:4", method, options)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
@pytest.mark.parametrize("pattern", OTHERS)
@pytest.mark.benchmark(group="other patterns")
def test_pattern(clock, problem, method, pattern):
    _clock(clock, problem, pattern, method, {})


@pytest.mark.benchmark(group="2:4")
def test_reconstruct_sparsegpt_mask(clock, problem):
    exact = cuobs.prune(problem.W, hessian=problem.H, method="sparsegpt", refine="exact")
    clock(
        lambda: cuobs.reconstruct(problem.W, exact.mask, problem.H),
        _check(problem, "2:4", claimed=exact.loss),
    )


@pytest.mark.benchmark(group="2:4")
def test_sparsegpt_column_by_column_in_numpy(clock, problem):
    if problem.xp is not np:
        pytest.skip("the column-by-column baseline is NumPy's, for the CPU")
    ours = cuobs.prune(problem.W, hessian=problem.H, method="sparsegpt")
    clock(
        lambda: sparsegpt_columns(problem.W, problem.H)[0],
        _check(problem, "2:4", claimed=ours.loss),
    )
