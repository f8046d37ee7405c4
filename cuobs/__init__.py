"""Second-order pruning of linear layers to patterns that hardware can use."""

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
