"""What a model is made of, found by its structure and not by names."""

from torch import nn

from cuobs.modules import is_linear, is_transposed
from cuobs.torch.parameters import fault_of

__all__ = [
    "check_plain",
    "find_blocks",
    "is_linear",
    "is_transposed",
    "linears",
    "oriented",
    "refuse_adapters",
    "refuse_mixture",
    "shared_weights",
    "text_body",
]

# What a refusal of experts ends in.
DENSE = (
    "expected dense blocks of matrices: experts see too few tokens each, and cuobs does not prune "
    "them"
)


def find_blocks(model):
    """The list of blocks of a causal language model and its name.

    It is the ``nn.ModuleList`` that holds the most weights in linears, of those that read text.

    Returns
    -------
    name : str
    blocks : torch.nn.ModuleList

    Raises
    ------
    ValueError
        There is none, a weight is held in a form that is no matrix of floats, or a block is a
        mixture of experts.
    """
    best, name, size = None, "", 0
    inside = {id(module) for module in text_body(model).modules()}
    for candidate, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) in inside:
            weights = sum(m.weight.numel() for m in linears(module).values())
            if weights > size:
                best, name, size = module, candidate, weights
    if best is None:
        raise ValueError(
            f"model: found no list of blocks with linear layers in {type(model).__name__}, "
            "expected a causal language model"
        )
    for index, block in enumerate(best):
        refuse_adapters(f"{name}.{index}", block)
        refuse_mixture(f"{name}.{index}", block)
        for inner, module in linears(block).items():
            if not module.weight.is_floating_point():
                raise ValueError(
                    f"model: found {name}.{index}.{inner} in {module.weight.dtype}, expected a "
                    "model that is not quantized"
                )
    return name, best


def text_body(model):
    """The part of a model that reads text: without the towers of its pictures and sounds."""
    find = getattr(model, "get_decoder", None)
    body = find() if find else None
    return body if isinstance(body, nn.Module) else model


def linears(module):
    """Linears inside a module by name: ``nn.Linear``, and GPT-2's ``Conv1D``."""
    return {name: m for name, m in module.named_modules() if is_linear(m)}


def oriented(module, weight=None):
    """The weight of a linear (or one of its shape) as (outputs, inputs), a view."""
    weight = module.weight.data if weight is None else weight
    return weight.T if is_transposed(module) else weight


def refuse_mixture(name, block):
    """Refuse a block with experts: tokens that a linear does not see tell nothing about it.

    A list of linears is one of experts by its name alone; that each of them sees every token is
    looked at when the block runs.
    """
    for inner, module in block.named_modules():
        several = isinstance(module, nn.ModuleList) and sum(bool(linears(m)) for m in module) > 1
        if several and "expert" in inner.lower():
            raise ValueError(
                f"model: found a mixture of experts in {name} ({inner}), a list of {len(module)}, "
                f"{DENSE}"
            )
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if sum(n > 1 for n in shape) > 2:
                place = f"{inner}.{key}".lstrip(".")
                expert = "expert" in place.lower() or "expert" in type(module).__name__.lower()
                what = "a mixture of experts" if expert else "a weight of three dimensions"
                raise ValueError(
                    f"model: found {what} in {name} ({place} of shape {shape}), {DENSE}"
                )


def check_plain(name, module, materialised=True):
    """Refuse a linear whose weight is not a plain parameter that can be changed in place.

    Parameters
    ----------
    name : str
    module : torch.nn.Module
        A linear, or what stands for one.
    materialised : bool
        Whether the weight has to be there.
    """
    fault = fault_of(module, materialised)
    if fault:
        found, way_out = fault
        raise ValueError(f"model: found {name} {found}, expected a plain parameter: {way_out}")


def refuse_adapters(name, block):
    """Refuse a block with adapters: what is pruned would not be what runs."""
    for inner, module in block.named_modules():
        if hasattr(module, "base_layer") or "lora_A" in inner.split("."):
            raise ValueError(
                f"model: found an adapter in {name} ({inner}), expected plain linears: merge it "
                "first, model = model.merge_and_unload()"
            )


def shared_weights(model, prefix, blocks):
    """Names (index, name) of linears whose weight is also used elsewhere, and where: a dict."""
    owner, shared = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            owner.setdefault(id(parameter), []).append(f"{name}.{key}")
    for index, block in enumerate(blocks):
        for name, module in linears(block).items():
            own = f"{prefix}.{index}.{name}.weight"
            others = [n for n in owner.get(id(module.weight), ()) if n != own]
            if others:
                shared[index, name] = others[0]
    return shared
