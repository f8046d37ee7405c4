"""The recipes of docs/contributing.rst, followed word for word."""

import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import cuobs

# As modules: `cuobs.pattern` would be found as an attribute too.
RECIPE = importlib.import_module("cuobs.recipe")
PATTERN = importlib.import_module("cuobs.pattern")
PAGE = (Path(__file__).parents[2] / "docs" / "contributing.rst").read_text()


def recipe(name):
    block = PAGE.split(f".. recipe: {name}\n")[1].split(".. code-block:: python\n")[1]
    lines = re.match(r"(?:\s*\n|   .*\n)+", block)[0].splitlines()
    return "\n".join(line[3:] for line in lines)


@pytest.fixture
def activation(monkeypatch):
    """The page's method, registered for a test."""
    scope = {}
    exec(recipe("method"), scope)
    monkeypatch.setattr(RECIPE, "_METHODS", dict(RECIPE._METHODS))
    cuobs.register_method(scope["METHOD"])
    return scope["METHOD"]


def test_a_method_with_an_option_is_one_file(activation):
    rng = np.random.default_rng(0)
    assert list(cuobs.methods())[-1] == "activation"
    W = rng.standard_normal((8, 32))
    X = rng.standard_normal((128, 32)) * np.tile([1.0, 2.0, 3.0, 4.0], 8)
    for pattern in cuobs.patterns():
        if pattern == "block16-row8":
            continue
        result = cuobs.prune(W, X, pattern=pattern, method="activation")
        assert cuobs.verify(result.weight, pattern)
    result = cuobs.prune(W, X, pattern="2:4", method="activation")
    assert result.options == {"power": 2.0}
    assert (result.mask == np.tile([False, False, True, True], (8, 8))).all()


def test_a_pattern_is_one_line(monkeypatch):
    rng = np.random.default_rng(0)
    line = re.search(r'^    ("1:4": Pattern\(.*\)),$', PAGE, re.MULTILINE)[1]
    added = eval("{" + line + "}", {"Pattern": cuobs.Pattern})
    monkeypatch.setattr(PATTERN, "_NAMED", {**PATTERN._NAMED, **added})
    W, X = rng.standard_normal((4, 16)), rng.standard_normal((64, 16))
    for method in cuobs.methods():
        result = cuobs.prune(W, X, pattern="1:4", method=method)
        assert result.sparsity == 0.75
        assert cuobs.verify(result.weight, "1:4")


def test_its_option_reaches_the_method_everywhere(activation):
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((4, 8)), rng.standard_normal((64, 8))
    # Of the two blocks of a scope the first has the larger sum of squares, the second of norms.
    X *= [5.0, 0.1, 3.0, 3.0, 5.0, 0.1, 3.0, 3.0] / np.linalg.norm(X, axis=0)
    pairs = "view=(M,K):(K,1) block=(1,2) scope=(1,2) keep=1"
    by = {power: cuobs.prune(W, X, pattern=pairs, method="activation", power=power)
          for power in (1.0, 2.0)}
    assert by[2.0].mask[0].tolist() == [True, True, False, False] * 2
    assert by[1.0].mask[0].tolist() == [False, False, True, True] * 2
    table = cuobs.compare(W, X, pattern=pairs, methods=["wanda", "activation"], power=1.0)
    assert table[1].loss == by[1.0].loss
    with pytest.raises(ValueError, match="power: found 'much', expected a number"):
        cuobs.prune(W, X, method="activation", power="much")
    with pytest.raises(ValueError, match="splits: found 3, but activation takes power"):
        cuobs.prune(W, X, method="activation", splits=3)
    with pytest.raises(ValueError, match="method: found 'activation', a name that is taken"):
        cuobs.register_method(dataclasses.replace(activation, summary="another"))
