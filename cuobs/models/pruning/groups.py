"""Which linears of a block share their input, in what order, and which write into the stream.

Found by one forward of the block with hooks, not by names.
"""

import contextlib
import copy
from typing import NamedTuple

import torch

from cuobs.models.blocks import as_dtype, run
from cuobs.models.structure import linears

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
    with _quick_products(hidden.is_cuda):
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


@contextlib.contextmanager
def _quick_products(on_gpu):
    """tf32 on a GPU: what the products give is summed in float32 all the same."""
    before = torch.get_float32_matmul_precision()
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
