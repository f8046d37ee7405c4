"""The recipes of docs/contributing.rst, followed word for word."""

import importlib
import re
from pathlib import Path

import numpy as np

import cuobs

# As modules: `cuobs.pattern` would be found as an attribute too.
REGISTRY = importlib.import_module("cuobs.algorithms")
PATTERN = importlib.import_module("cuobs.pattern")
PAGE = (Path(__file__).parents[2] / "docs" / "contributing.rst").read_text()


def recipe(name):
    block = PAGE.split(f".. recipe: {name}\n")[1].split(".. code-block:: python\n")[1]
    lines = re.match(r"(?:\s*\n|   .*\n)+", block)[0].splitlines()
    return "\n".join(line[3:] for line in lines)


def test_a_method_is_one_function_and_one_registry_line(monkeypatch):
    rng = np.random.default_rng(0)
    scope = {"Method": REGISTRY.Method}
    exec(recipe("method"), scope)
    entry = eval(recipe("registry").strip(), scope)
    monkeypatch.setattr(REGISTRY, "_METHODS", (*REGISTRY._METHODS, entry))
    assert "activation" in cuobs.methods()
    W = rng.standard_normal((8, 32))
    X = rng.standard_normal((128, 32)) * np.tile([1.0, 2.0, 3.0, 4.0], 8)
    for pattern in cuobs.patterns():
        if pattern == "block16-row8":
            continue
        result = cuobs.prune(W, X, pattern=pattern, method="activation")
        assert cuobs.verify(result.weight, pattern)
    result = cuobs.prune(W, X, pattern="2:4", method="activation")
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
