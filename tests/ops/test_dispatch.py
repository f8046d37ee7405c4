"""Each op that has a twin has it, and only arrays come in."""

import ast
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import cuobs
from cuobs import ops
from cuobs.ops import dispatch

PACKAGES = [ops, cuobs.algorithms]
TWINNED = [
    function
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    if not module.ispkg
    for function in vars(import_module(module.name)).values()
    if hasattr(function, "twin") and function.__module__ == module.name
]


@pytest.mark.parametrize("op", TWINNED, ids=lambda op: op.__name__)
def test_the_twin_takes_the_same_arguments(op):
    """Read from its source, which needs no CuPy."""
    path = Path(inspect.getsourcefile(inspect.unwrap(op)))
    tree = ast.parse((path.parent / "cuda" / path.name).read_text())
    twin = next(
        node for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == op.__name__
    )
    names = [argument.arg for argument in twin.args.args]
    ours = list(inspect.signature(op).parameters)
    assert names[: len(ours)] == ours
    assert len(names) - len(ours) <= len(twin.args.defaults)


def test_there_are_twins():
    assert len(TWINNED) > 25


def test_a_twin_may_decline(monkeypatch):
    """The array form then runs, on the array as it is."""
    calls = []

    @dispatch.twinned()
    def double(array):
        return 2 * array

    class Elsewhere:
        def __rmul__(self, factor):
            calls.append(factor)
            return self

    monkeypatch.setattr(dispatch, "_is_cupy", lambda array: isinstance(array, Elsewhere))
    monkeypatch.setattr(
        dispatch, "import_module",
        lambda name: type("Module", (), {"double": staticmethod(lambda array: NotImplemented)}),
    )
    here = Elsewhere()
    assert double(here) is here and calls == [2]
    assert double(np.ones(1)) == 2


@pytest.mark.parametrize("wrong", [[[1.0]], None, 1.0])
def test_other_things_are_refused(wrong):
    with pytest.raises(TypeError, match="A: found .*, expected an array of NumPy or CuPy"):
        ops.gemm(wrong, np.eye(1), np.eye(1))
    with pytest.raises(TypeError, match="X: found .*, expected an array of NumPy or CuPy"):
        ops.add_gram(wrong, np.eye(1))


@pytest.mark.model
def test_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="X: found Tensor"):
        ops.add_gram(torch.ones(2, 2), np.eye(2))


def test_public_ops_are_documented():
    for name in ops.__all__:
        function = getattr(ops, name)
        assert function.__doc__.strip().endswith(".") or "\n" in function.__doc__, name
        module = function.__module__.rpartition(".")[2]
        assert module not in ops.__all__
    page = Path(cuobs.__file__).parent.parent / "docs" / "api" / "ops.rst"
    if page.exists():
        listed = {line.strip() for line in page.read_text().splitlines()}
        assert set(ops.__all__) <= listed
