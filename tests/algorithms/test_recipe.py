"""The recipes of docs/contributing.rst, followed word for word."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

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
    monkeypatch.setattr(RECIPE, "_METHODS", dict(cuobs.methods()))
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


def commands(block):
    """The commands of the page's block that begins with these words."""
    lines = PAGE.split(block)[1].split("::\n\n")[1].split("\n\n")[0].splitlines()
    return [shlex.split(line)[1:] for line in lines]


def test_it_is_a_plugin_of_the_command_line(tmp_path, monkeypatch):
    cli = pytest.importorskip("cuobs_cli", reason="the command line is not installed")
    monkeypatch.chdir(tmp_path)
    methods = dict(cuobs.methods())
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((8, 32)).astype("float32"), rng.standard_normal((128, 32))
    np.save("W.npy", W)
    np.save("X.npy", X)
    Path("activation.py").write_text(recipe("method"))

    def run(*words, code=0):
        monkeypatch.setattr(RECIPE, "_METHODS", dict(methods))  # plugins go again
        done = CliRunner().invoke(cli.main, words)
        assert done.exit_code == code, done.output
        return done

    listed, pruned, compared = commands("it is a plugin of the command line")
    subprocess.run([sys.executable, "-m", "cuobs", *pruned], check=True)
    Path("W-pruned.npy").unlink()
    said = run(*listed).stdout
    assert re.search(r"^activation +weakest inputs, no compensation$", said, re.MULTILINE)
    assert re.search(r"^ +--power  \[default: 2.0\]$", said, re.MULTILINE)
    run(*pruned, "--report", "r.json")
    assert json.load(open("r.json"))["options"] == {"power": 1.0}
    scores = np.linalg.norm(X, axis=0).reshape(-1, 4)
    kept = (scores >= np.sort(scores)[:, 2:3]).ravel()  # the two strongest inputs of each four
    np.testing.assert_array_equal(np.load("W-pruned.npy"), W * kept)
    lines = run(*compared, "--power", "3").stdout.splitlines()
    rows = lines[1 + next(i for i, line in enumerate(lines) if line.startswith("---")) :]
    assert [row.split()[0] for row in rows] == ["wanda", "activation"]
    said = run(*pruned[:-1], "much", code=2).stderr
    assert said == "Error: power: found 'much', expected a number that is finite\n"
    helped = " ".join(run(*pruned[:3], "--help").stdout.split())
    assert "--power NUMBER Of the inputs' norm. [default: 2.0]" in helped


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
    cuobs.register_method(dataclasses.replace(activation, summary="another"), replace=True)
    assert cuobs.methods()["activation"].summary == "another"
    with pytest.raises(TypeError, match="powers: found an unknown argument .nearest: power"):
        cuobs.prune(W, X, method="activation", powers=2.0)
    with pytest.raises(TypeError, match="memory_limits: .*nearest: memory_limit"):
        cuobs.prune(W, X, memory_limits="8GiB")
    with pytest.raises(TypeError, match="options: found str, expected a dict"):
        cuobs.Recipe(options="power")


def test_no_other_file_names_a_method():
    """But for the default and the one that all are compared with; nor any pattern but 2:4."""
    root, found = Path(__file__).parents[2], set()
    names = {*cuobs.methods(), *cuobs.patterns()}
    for path in [*(root / "cuobs").rglob("*.py"), *(root / "cli").rglob("*.py")]:
        if "algorithms" in path.parts or path.name == "pattern.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                found.add((path.relative_to(root).as_posix(), node.value))
    assert {(path, name) for path, name in found if name != "2:4"} == {
        ("cuobs/recipe.py", "admm"), ("cuobs/pruning.py", "admm"),
        ("cuobs/comparing.py", "sparsegpt"),
    }  # fmt: skip
