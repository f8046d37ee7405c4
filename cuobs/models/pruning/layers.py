"""The linears of a model that are pruned, by which recipe, and why others stay as they are."""

import re
from dataclasses import dataclass

import numpy as np

from cuobs import arrays, footprint
from cuobs.models.structure import linears, oriented, shared_weights


@dataclass
class Layers:
    """What becomes of each linear in the blocks.

    Attributes
    ----------
    prefix : str
        Name of the list of blocks.
    recipes : dict
        (index of the block, name inside it) to the `Recipe` of a linear that is pruned.
    left : dict
        Likewise to the reason why a linear stays as it is.
    outside : list of str
        Linears outside the blocks.
    """

    prefix: str
    recipes: dict
    left: dict
    outside: list

    @property
    def patterns(self):
        """The pattern of each linear that is pruned, by its name in the model."""
        return {
            f"{self.prefix}.{index}.{inner}": own.pattern
            for (index, inner), own in self.recipes.items()
        }


def choose_layers(model, prefix, blocks, recipe):
    """Say for each linear in the blocks how it is pruned, or why it is not: `Layers`.

    Shapes alone are looked at: the model may be on the meta device.

    Raises
    ------
    ValueError
        Nothing could be pruned, or the recipe names linears that are not there.
    """
    inside = [f"{prefix}.{i}.{n}" for i, block in enumerate(blocks) for n in linears(block)]
    outside = [name for name in linears(model) if name not in set(inside)]
    recipe.check_names([*inside, *outside])
    shared = shared_weights(model, prefix, blocks)
    found = Layers(prefix, {}, {}, outside)
    for index, block in enumerate(blocks):
        for inner, module in linears(block).items():
            name, place = f"{prefix}.{index}.{inner}", (index, inner)
            own = recipe.of(name)
            if own is None:
                reason = "skipped"
            elif place in shared:
                reason = f"it shares its weight with {shared[place]}"
            else:
                reason = _indivisible(own.pattern, oriented(module).shape)
            if reason:
                found.left[place] = reason
            else:
                found.recipes[place] = own
    if not found.recipes:
        # those that differ in names and shapes alone are said once
        alike = {re.sub(r"\d+", "", reason): reason for reason in [*found.left.values()][::-1]}
        reasons = "; ".join([*alike.values()][::-1])
        raise ValueError(
            f"model: found no linear that could be pruned ({reasons}), expected at least one"
        )
    return found


def check_limit(layers, blocks, settings, device):
    """Refuse a ``memory_limit`` under which a linear can't be pruned alone, before any work.

    Parameters
    ----------
    layers : Layers
    blocks : list of torch.nn.Module
    settings : Settings
    device : torch.device

    Raises
    ------
    ValueError
        Names the linear and says how much is needed.
    """
    xp, seen = np if device.type == "cpu" else arrays.find_cupy(), set()
    for (index, inner), recipe in layers.recipes.items():
        weight = oriented(linears(blocks[index])[inner])
        kind = tuple(weight.shape), repr(recipe)
        if kind in seen:
            continue
        seen.add(kind)
        given = footprint.Given(arrays.dtype_of(weight))
        try:
            footprint.check([recipe], settings, kind[0], xp, given)
        except ValueError as error:
            raise ValueError(f"{layers.prefix}.{index}.{inner}: {error}") from None


def _indivisible(pattern, shape):
    try:
        pattern.compile(*shape)
    except ValueError as error:
        return str(error)
    return ""
