"""The public names, and the examples in the docstrings."""

import configparser
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import cuobs

PUBLIC = [
    "Hessian", "Method", "Option", "Packed", "Pattern", "Problem", "Pruned", "Recipe", "Result",
    "Settings", "Verification", "View", "collect", "compare", "methods", "pack", "patterns",
    "prune", "prune_linear", "reconstruct", "register_method", "register_pattern",
    "relative_loss", "verify",
]
MODULES = [m.name for m in pkgutil.walk_packages(cuobs.__path__, "cuobs.")]


def test_public_names():
    assert sorted(cuobs.__all__) == sorted(PUBLIC)
    submodules = {name.split(".")[1] for name in MODULES}
    public = {name for name in dir(cuobs) if not name.startswith("_")} - submodules
    assert public | {"compare", "methods"} == set(PUBLIC)
    assert all(callable(getattr(cuobs, name)) for name in PUBLIC)
    assert not any(hasattr(cuobs, name) for name in ("none", "none.prune", "sharing.none", ""))


def test_methods_and_patterns():
    assert list(cuobs.methods()) == [
        "magnitude", "wanda", "obs-local", "obs-full", "obs-split", "obs-interleaved",
        "sparsegpt", "obs-ordered", "true-obs", "admm",
    ]
    assert [n for n, m in cuobs.methods().items() if m.resolves] == ["true-obs", "admm"]
    for name, method in cuobs.methods().items():
        assert method.name == name and callable(method.function) and method.summary
    assert list(cuobs.patterns()) == ["2:4", "4:8", "coupled-2:4", "block16-row8"]


def test_signatures_that_others_rely_on():
    def names(function):
        return list(inspect.signature(function).parameters)

    parameters = inspect.signature(cuobs.prune).parameters
    assert list(parameters) == [
        "W", "X", "hessian", "pattern", "method", "refine", "damp", "target", "dtype", "device",
        "precision", "memory_limit", "workers", "batch_rows", "devices", "progress", "options",
    ]
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    defaults = {name: p.default for name, p in parameters.items()
                if p.default is not None and name != "options"}
    assert defaults == {
        "W": inspect.Parameter.empty, "pattern": "2:4", "method": "admm", "damp": 0.01,
        "dtype": "float32", "device": "auto", "precision": "tensor",
    }
    for function in (cuobs.prune, cuobs.compare, cuobs.reconstruct):
        for name, parameter in inspect.signature(function).parameters.items():
            for fields in (cuobs.Recipe, cuobs.Settings):
                if name != "options" and hasattr(fields, name):
                    assert parameter.default == getattr(fields, name), (function, name)
    own = {(m.name, o.name): (o.type, o.default) for m in cuobs.methods().values()
           for o in m.options}
    assert own == {
        ("obs-split", "splits"): (int, 64), ("obs-interleaved", "splits"): (int, 64),
        ("obs-ordered", "group"): (int, None), ("obs-ordered", "order"): (str, "largest"),
        ("true-obs", "group"): (int, None), ("true-obs", "order"): (str, "gap"),
        ("admm", "schedule"): (str, "default"),
    }
    assert names(cuobs.reconstruct) == ["W", "mask", "H", "damp", "target", "dtype", "device"]
    assert names(cuobs.relative_loss) == ["W", "W_pruned", "H"]
    assert names(cuobs.verify) == ["W", "pattern"]
    fields = {f.name for f in dataclasses.fields(cuobs.Result)}
    assert fields >= {"weight", "mask", "loss", "sparsity", "seconds", "hessian_seconds", "recipe",
                      "settings", "cost"}
    for name in ("method", "pattern", "refine", "damp", "options", "device"):
        assert isinstance(getattr(cuobs.Result, name), property)
    assert [f.name for f in dataclasses.fields(cuobs.Recipe)] == [
        "pattern", "method", "options", "refine", "damp"
    ]
    assert [f.name for f in dataclasses.fields(cuobs.Settings)] == [
        "device", "dtype", "precision", "workers", "batch_rows", "memory_limit", "progress",
        "devices", "others",
    ]
    for method in cuobs.methods().values():
        defaults = {o.name: o.default for o in method.options}
        function = inspect.signature(method.function).parameters
        assert {n: p.default for n, p in function.items() if n != "problem"} == defaults


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = getattr(cuobs, name)
    assert thing.__doc__ and len(thing.__doc__.strip()) > 20
    if inspect.isfunction(thing) and inspect.signature(thing).parameters:
        assert "Parameters\n" in thing.__doc__


@pytest.mark.parametrize("module", [
    "cuobs", "cuobs.ops", "cuobs.config", "cuobs.files", "cuobs.plotting",
    *(pytest.param(f"cuobs.{name}", marks=pytest.mark.model) for name in ("models", "torch")),
])  # fmt: skip
def test_public_names_have_type_hints(module):
    """Functions, and the methods of classes: each parameter, and what comes back."""
    if module in ("cuobs.models", "cuobs.torch"):
        pytest.importorskip("transformers")
    module = importlib.import_module(module)
    functions = {}
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            functions[name] = thing
        elif inspect.isclass(thing):
            functions |= {f"{name}.{n}": f for n, f in vars(thing).items()
                          if inspect.isfunction(f) and not n.startswith("_")}
    assert functions
    for name, function in functions.items():
        signature = inspect.signature(inspect.unwrap(function))
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert bare in ([], ["self"]), f"{name}: {bare}"
        assert signature.return_annotation is not signature.empty, name


def modules():
    """Each module, those that need PyTorch or whose examples do marked."""
    for module in ["cuobs", *MODULES]:
        needs = module.startswith(("cuobs.models", "cuobs.torch", "cuobs.collecting"))
        yield pytest.param(module, marks=[pytest.mark.model] if needs else [])


@pytest.mark.parametrize("module", list(modules()))
def test_docstrings(module):
    """Examples give what they say."""
    if module.startswith(("cuobs.models", "cuobs.torch")):
        pytest.importorskip("transformers")
    if module == "cuobs.collecting":
        pytest.importorskip("torch")
    if module.endswith(".cuda") or ".cuda." in module:
        pytest.importorskip("cupy")
    with np.printoptions(legacy=False):
        assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_examples_are_found():
    """Each of these shows how it is used; a finder that finds nothing would pass the test above."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("prune", "prune_linear", "collect", "reconstruct", "relative_loss", "verify",
                 "Hessian", "Pattern"):
        thing = getattr(cuobs, name)
        tests = finder.find(thing, name, module=importlib.import_module(thing.__module__))
        assert any(test.examples for test in tests), name


@pytest.mark.model
def test_importing_needs_no_extra():
    """CuPy, PyTorch, safetensors and matplotlib are loaded only when asked for."""
    import subprocess
    import sys

    loaded = subprocess.run(
        [sys.executable, "-c", "import cuobs, sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()
    assert not {"cupy", "torch", "safetensors", "matplotlib", "ml_dtypes"} & set(loaded)


def test_every_package_is_installed():
    """setup.cfg lists them by hand."""
    root = Path(__file__).parents[1]
    listed = configparser.ConfigParser()
    listed.read(root / "setup.cfg")
    folders = {path.parent.relative_to(root) for path in (root / "cuobs").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"cuobs_cli"}
    assert sorted(packages) == listed["options"]["packages"].split()


def test_methods_come_after_an_import_that_was_interrupted():
    """In a notebook Ctrl-C is no end: what is asked for again is imported again."""
    import subprocess
    import sys

    code = """
import sys

class Stop:
    def find_spec(self, name, *_):
        if name == "cuobs.algorithms.obs_full":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
from cuobs.recipe import methods
try:
    methods()
except KeyboardInterrupt:
    print(*methods())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == list(cuobs.methods()), found.stderr
