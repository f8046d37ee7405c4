"""Second-order pruning of linear layers to patterns that hardware can use."""

from cuobs.algorithms import methods
from cuobs.comparing import compare
from cuobs.hessian import Hessian
from cuobs.loss import relative_loss
from cuobs.pattern import Pattern, Verification, View, patterns, verify
from cuobs.pruning import Result, prune, reconstruct

__version__ = "0.1.0"

__all__ = [
    "Hessian",
    "Pattern",
    "Result",
    "Verification",
    "View",
    "compare",
    "methods",
    "patterns",
    "prune",
    "reconstruct",
    "relative_loss",
    "verify",
]
