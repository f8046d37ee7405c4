"""What a model is made of, found by its structure and by one forward of a block, not by names."""

import copy
from typing import NamedTuple

import torch
from torch import nn

from cuobs.models.blocks import as_dtype, run

# A linear whose output enters the residual stream has a share of 1 in what a block adds to it.
TOLERANCE = 1e-2


class Group(NamedTuple):
    """Linears that read one and the same tensor.

    Attributes
    ----------
    names : tuple of str
        Names inside the block, in the order in which they run.
    before : tuple of str
        Writers into the residual stream that run before this group.
    """

    names: tuple
    before: tuple


class Plan(NamedTuple):
    """How a block is pruned.

    Attributes
    ----------
    groups : tuple of Group
        In the order in which they run.
    writers : tuple of str
        Linears whose output is added to the residual stream as it is, in order.
    idle : tuple of str
        Linears that the block's forward does not call.
    """

    groups: tuple
    writers: tuple
    idle: tuple


def find_blocks(model):
    """The list of blocks of a causal language model and its name.

    It is the ``nn.ModuleList`` that holds the most weights in linears.

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
    for candidate, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            weights = sum(m.weight.numel() for m in linears(module).values())
            if weights > size:
                best, name, size = module, candidate, weights
    if best is None:
        raise ValueError(
            f"model: found no list of blocks with linear layers in {type(model).__name__}, "
            "expected a causal language model"
        )
    for index, block in enumerate(best):
        refuse_mixture(f"{name}.{index}", block)
        for inner, module in linears(block).items():
            if not module.weight.is_floating_point():
                raise ValueError(
                    f"model: found {name}.{index}.{inner} in {module.weight.dtype}, expected a "
                    "model that is not quantized"
                )
    return name, best


def linears(module):
    """Linears inside a module by name: ``nn.Linear``, and GPT-2's ``Conv1D``."""
    return {name: m for name, m in module.named_modules() if is_linear(m)}


def is_linear(module):
    """Whether a module is a linear layer."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module):
    """Whether a linear holds its weight as (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def oriented(module, weight=None):
    """The weight of a linear (or one of its shape) as (outputs, inputs), a view."""
    weight = module.weight.data if weight is None else weight
    return weight.T if is_transposed(module) else weight


def refuse_mixture(name, block):
    """Refuse a block with experts: tokens that a linear does not see tell nothing about it."""
    found = None
    for inner, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and sum(bool(linears(m)) for m in module) > 1:
            found = inner
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        if not convolution and any(p.ndim > 2 for p in module.parameters(recurse=False)):
            found = inner
    if found is not None:
        raise ValueError(
            f"model: found a mixture of experts in {name} ({found or 'itself'}), expected dense "
            "blocks: experts see too few tokens each, and cuobs does not prune them"
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
            others = [n for n in owner[id(module.weight)] if n != own]
            if others:
                shared[index, name] = others[0]
    return shared


@torch.no_grad()
def probe(block, hidden, call):
    """Run a block once to see which linears share an input, in what order, and which write.

    Parameters
    ----------
    block : torch.nn.Module
    hidden : tensor, shape (B, T, D)
        Hidden states that enter it; one window is enough.
    call : tuple
        Its other arguments, see `cuobs.models.blocks.capture`.

    Returns
    -------
    Plan
    """
    # In float32, so that what the block adds can be told from rounding.
    block = copy.deepcopy(block).float()
    hidden, call = hidden.float(), as_dtype(call, torch.float32)
    inputs, outputs, order, kept = {}, {}, [], []

    def hook(name):
        def look(module, args, output):
            x = args[0]
            kept.append(x)  # so that no other tensor comes to lie at its address
            if name in inputs:
                raise ValueError(f"model: found that {name} runs twice in a block, expected once")
            if x.numel() // x.shape[-1] != tokens:
                raise ValueError(
                    f"model: found that {name} sees {x.numel() // x.shape[-1]} of {tokens} "
                    "tokens, expected dense blocks that show every token to every linear"
                )
            inputs[name] = (x.data_ptr(), x.shape[-1], x._version)
            outputs[name] = output.reshape(tokens, -1)
            order.append(name)

        return look

    tokens = hidden.shape[0] * hidden.shape[1]
    modules = linears(block)
    for name, module in modules.items():
        module.register_forward_hook(hook(name))
    out = run(block, hidden, call)
    writers = _writers(order, outputs, (out - hidden).reshape(tokens, -1))

    members = {}
    for name in order:
        members.setdefault(inputs[name], []).append(name)
    groups = []
    for names in members.values():
        before = tuple(w for w in writers if order.index(w) < order.index(names[0]))
        groups.append(Group(tuple(names), before))
    idle = tuple(name for name in modules if name not in inputs)
    return Plan(tuple(groups), writers, idle)


def _writers(order, outputs, added):
    """Those linears whose outputs add up to what the block adds to its input."""
    names = [n for n in order if outputs[n].shape == added.shape]
    if not names:
        return ()
    A = torch.stack([outputs[n].flatten() for n in names], dim=1).double()
    scale = A.norm(dim=0).clamp_min(1e-30)
    d = added.flatten().double()
    if not bool(torch.isfinite(d).all()):
        return ()
    A /= scale
    shares = torch.linalg.pinv(A.T @ A, hermitian=True) @ (A.T @ d)
    error = (d - A @ shares).norm() / d.norm().clamp_min(1e-30)
    shares /= scale
    whole = (shares - 1).abs() < TOLERANCE
    none = shares.abs() < TOLERANCE
    if error > TOLERANCE or not bool((whole | none).all()):
        return ()
    return tuple(n for n, w in zip(names, whole.tolist(), strict=True) if w)
