"""Weights shared out over processes, each gathered where a forward wants it.

A process holds a slice of each: to learn takes a gradient and two moments of the slice alone. What
a block has gathered is let go of behind it, where its forward is done again for the gradient.
Published as ZeRO [1]_, third stage, and as fully sharded data parallel training.

.. [1] Rajbhandari, Rasley, Ruwase, He, "ZeRO: memory optimizations toward training trillion
   parameter models", SC 2020.
"""

import contextlib
from functools import partial

import torch

from cuobs.models.ranks import Ranks


class Split:
    """Equal slices of flattened tensors, the last ones filled up with zeros.

    Parameters
    ----------
    ranks : Ranks
        Each of them has a slice.
    shapes : list of tuple
        Of the whole tensors.
    """

    def __init__(self, ranks: Ranks, shapes: list):
        self.ranks, self.shapes = ranks, [torch.Size(shape) for shape in shapes]

    def own(self, tensor):
        """This process's slice of a tensor."""
        size = -(-tensor.numel() // self.ranks.size)
        part = tensor.reshape(-1)[size * self.ranks.rank :][:size]
        return torch.nn.functional.pad(part, (0, size - len(part)))

    def whole(self, number, own):
        """The tensor of a number, of everyone's slices."""
        shape = self.shapes[number]
        return self.ranks.gather(own, [len(own)] * self.ranks.size)[: shape.numel()].view(shape)


class _Gathered(torch.autograd.Function):
    """A whole weight; the gradient of a slice is the sum of everyone's."""

    @staticmethod
    def forward(context, own, split, number, dtype):
        context.split, context.dtype = split, own.dtype
        return split.whole(number, own.to(dtype))

    @staticmethod
    def backward(context, gradient):
        ranks = context.split.ranks
        flat = gradient.to(context.dtype).reshape(-1)
        size = -(-len(flat) // ranks.size)
        flat = torch.nn.functional.pad(flat, (0, size * ranks.size - len(flat)))
        return ranks.add_up_slices(flat), None, None, None


@contextlib.contextmanager
def sharded(model, names, ranks, device, learns=True):
    """Hold a slice of each named weight meanwhile, in place of the whole.

    Parameters
    ----------
    model : torch.nn.Module
        Whose modules gather their weights when they run, and have their own again afterwards.
    names : list of str
        Of weights of linears that are shared with no other module.
    ranks : Ranks
    device : torch.device
    learns : bool
        Whether, where this ends well, their own are changed to what has become of the slices.

    Yields
    ------
    slices : list of tensor, shape (n,)
        In float32 on the device.
    split : Split
    """
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    weights = [module.weight for module in modules]
    split = Split(ranks, [weight.shape for weight in weights])
    slices = [split.own(weight.detach()).to(device, torch.float32) for weight in weights]
    forwards = [module.__dict__.get("forward") for module in modules]
    for number, (module, own) in enumerate(zip(modules, slices, strict=True)):
        run = module.forward
        module._parameters["weight"] = None
        module.forward = partial(_run, module, run, own, split, number)
    try:
        yield slices, split
        for number, (weight, own) in enumerate(zip(weights, slices, strict=True) if learns else ()):
            weight.data.copy_(split.whole(number, own.detach()))
    finally:
        for module, weight, forward in zip(modules, weights, forwards, strict=True):
            module._parameters["weight"] = weight
            del module.forward
            if forward is not None:
                module.forward = forward


def _run(module, forward, own, split, number, *args, **given):
    """A module's forward with its weight gathered, in what products are taken in."""
    kind = own.device.type
    half = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if half else torch.float32
    module.__dict__["weight"] = _Gathered.apply(own, split, number, dtype)
    try:
        return forward(*args, **given)
    finally:
        del module.__dict__["weight"]
