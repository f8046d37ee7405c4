"""Linear layers of PyTorch, known by what they are; PyTorch is not imported for it."""

import sys

__all__ = ["is_linear", "is_module", "is_transposed", "weight_of"]


def is_module(thing):
    """Whether something is a module of PyTorch."""
    nn = getattr(sys.modules.get("torch"), "nn", None)
    return nn is not None and isinstance(thing, nn.Module)


def is_linear(module):
    """Whether a module is an ``nn.Linear`` or a ``Conv1D`` of transformers."""
    return isinstance(module, sys.modules["torch"].nn.Linear) or is_transposed(module)


def is_transposed(module):
    """Whether a linear holds its weight as (inputs, outputs), as GPT-2's ``Conv1D`` does."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(thing, name):
    """The weight (outputs, inputs) of a linear layer; anything but a module as it is.

    Raises
    ------
    TypeError
        It is a module of another kind.
    """
    if not is_module(thing):
        return thing
    if not is_linear(thing):
        raise TypeError(
            f"{name}: found a module {type(thing).__name__} of {type(thing).__module__}, expected "
            "an array, an nn.Linear or a Conv1D"
        )
    return thing.weight.T if is_transposed(thing) else thing.weight
