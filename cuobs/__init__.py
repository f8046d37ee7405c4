"""Second-order pruning of linear layers to patterns that hardware can use.

`prune` prunes a weight W (outputs, inputs) under calibration activations X (tokens, inputs);
`compare` sets the methods side by side, `Hessian` adds up XᵀX in pieces, `verify` checks a pattern
and `pack` stores what it keeps. `collect` and `prune_linear` are for layers of PyTorch, and
``cuobs.models`` is for whole models. `methods` and `patterns` list what there is.
"""

# A name is imported when it is first asked for: ``python -m cuobs`` comes through here before its
# own first line, and what takes time here could be interrupted nowhere.

TYPE_CHECKING = False  # of the name that checkers of types know, without its module
if TYPE_CHECKING:
    from cuobs.algorithms import methods, register_method
    from cuobs.collecting import collect, prune_linear
    from cuobs.comparing import compare
    from cuobs.hessian import Hessian
    from cuobs.loss import relative_loss
    from cuobs.packed import Packed, pack
    from cuobs.pattern import Pattern, Verification, View, patterns, register_pattern, verify
    from cuobs.problem import Problem, Pruned
    from cuobs.pruning import prune, reconstruct
    from cuobs.recipe import Method, Option, Recipe, Settings
    from cuobs.result import Result

__version__ = "0.1.0"

__all__ = [
    "Hessian",
    "Method",
    "Option",
    "Packed",
    "Pattern",
    "Problem",
    "Pruned",
    "Recipe",
    "Result",
    "Settings",
    "Verification",
    "View",
    "collect",
    "compare",
    "methods",
    "pack",
    "patterns",
    "prune",
    "prune_linear",
    "reconstruct",
    "register_method",
    "register_pattern",
    "relative_loss",
    "verify",
]

_HOMES = {
    "algorithms": ("methods", "register_method"),
    "collecting": ("collect", "prune_linear"),
    "comparing": ("compare",),
    "hessian": ("Hessian",),
    "loss": ("relative_loss",),
    "packed": ("Packed", "pack"),
    "pattern": ("Pattern", "Verification", "View", "patterns", "register_pattern", "verify"),
    "problem": ("Problem", "Pruned"),
    "pruning": ("prune", "reconstruct"),
    "recipe": ("Method", "Option", "Recipe", "Settings"),
    "result": ("Result",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name):
    import importlib
    from importlib.util import find_spec

    if name in _HOME:
        value = getattr(importlib.import_module(f"cuobs.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name.isidentifier() and not name.startswith("_") and find_spec(f"cuobs.{name}"):
        return importlib.import_module(f"cuobs.{name}")
    raise AttributeError(f"module 'cuobs' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
