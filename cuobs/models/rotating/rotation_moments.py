"""What learning a rotation needs of each block: folded weights and second moments of inputs."""

import copy
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from cuobs.hessian import damping
from cuobs.models import memory
from cuobs.models.blocks import capture, evaluating, not_finite, run, windows_of
from cuobs.models.ranks import Ranks, current
from cuobs.models.rotating.folding import fold_block
from cuobs.models.structure import linears, oriented

# Tokens that run through a block at once.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}


class BlockMoments(NamedTuple):
    """A block with the scales of its norms folded, and in what its weights are measured.

    A moment is H, the mean of xxᵀ over the tokens that count, or where scores are those after
    compensation the inverse of the damped H.

    Attributes
    ----------
    weights : dict of tensor, shape (M, K)
        By linear; for a GPU in bfloat16, and on the host where it has no room for all of them;
        on the CPU in their own dtype, or float32 in place of float64.
    norms : dict of tensor, shape (D, D)
        Moments by norm.
    heads : tensor, shape (heads, queries, d, d), or None
        Moments of what attention gives, by key-value head and query head.
    scales : dict of tensor, shape (K,)
        Of the other writers' inputs: what the square of a weight is multiplied with.
    orders : tuple of tensor
        In which the inner columns are laid out already.
    """

    weights: dict
    norms: dict
    heads: torch.Tensor | None
    scales: dict
    orders: tuple


@torch.no_grad()
def gather(model, stream, tokens, mask, counted, patterns, device, recipe):
    """Weights and moments of all blocks, the hidden states going from one to the next.

    Processes share the windows where there is one for each.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    stream : cuobs.models.rotating.folding.Stream
    tokens, mask, counted : tensor, shape (windows, length)
        The mask may be None; ``counted`` tells which tokens enter the sums.
    patterns : dict of Pattern
        By the name of a linear.
    device : torch.device
    recipe : RotationRecipe
        How moments are damped, whether scores are w² / C_jj, and inner columns dealt out.

    Returns
    -------
    list of BlockMoments
    """
    blocks = model.get_submodule(stream.prefix)
    ranks = current() if len(tokens) >= current().size else Ranks()
    tokens, counted = tokens[ranks.share], counted[ranks.share]
    mask = None if mask is None else mask[ranks.share]
    batch = batch_of(tokens.shape[1], device)
    parts = tokens.split(batch)
    masks = [None] * len(parts) if mask is None else mask.split(batch)
    counts = counted.split(batch)
    found, room = [], memory.Room(batch)
    size = sum(m.weight.numel() for m in linears(blocks).values())
    home = device if stays(size, device) else torch.device("cpu")
    with evaluating(model):
        hidden, calls = capture(model, blocks, list(zip(parts, masks, strict=True)), device)
        for index, (block, part) in enumerate(zip(blocks, stream.blocks, strict=True)):
            where, own = f"{stream.prefix}.{index}", calls[index]
            block = copy.deepcopy(block).to(device)
            fold_block(block, part)
            whole = recipe.compensated or recipe.permute
            sums = _sums(block, part, hidden, own, counts, room, ranks, whole=whole)
            if not all(bool(total.isfinite().all()) for total in sums.values()):
                raise not_finite(f"in {where}")
            found.append(_measured(block, part, sums, where, patterns, device, recipe))
            for name, W in found[-1].weights.items():
                found[-1].weights[name] = W.to(home)
            own.clear()
            del block, sums  # before those of the next
            memory.trim(device)
    return found


def batch_of(length, device):
    """Windows of a length that run through a block at once."""
    return max(1, BATCH_TOKENS.get(device.type, 4096) // length)


def stays(size, device):
    """Whether a device holds so many weights: a GPU that they fill no more than a third of."""
    return device.type != "cuda" or 2 * size <= memory.free(device) // 3


def _sums(block, part, hidden, calls, counts, room, ranks, whole):
    """Mean second moments of what linears read, while the hidden states pass through a block."""
    modules = linears(block)
    inputs = {norm.readers[0]: None for norm in part.norms} | dict.fromkeys(part.writers)
    chosen, new, sums = None, {}, defaultdict(float)

    def watch(name):
        def look(_, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            new[name] = _moment(name, x[chosen].float(), part, whole)

        return look

    def passed(start, stop):
        nonlocal chosen
        call = windows_of(calls[i], start, stop, len(hidden[i]))
        chosen = counts[i][start:stop].flatten().nonzero().flatten().to(hidden[i].device)
        new.clear()
        out = run(block, hidden[i][start:stop], call)
        return out, {name: new.pop(name) for name in list(new)}

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in inputs]
    try:
        for i in range(len(hidden)):
            hidden[i] = _added(sums, room.each(len(hidden[i]), passed))
    finally:
        for handle in handles:
            handle.remove()
    ranks.add_up(*sums.values())
    tokens = ranks.total(sum(int(c.sum()) for c in counts))
    for total in sums.values():
        total /= tokens
    return dict(sums)


def _added(sums, results):
    """What leaves a block for a batch, whose moments are added to the sums."""
    for _, new in results:
        for name in list(new):
            sums[name] += new.pop(name)
    return results[0][0] if len(results) == 1 else torch.cat([out for out, _ in results])


def _moment(name, x, part, whole):
    """The second moments that are needed of a linear's inputs: all, by head, or the diagonal."""
    if whole or any(name == norm.readers[0] for norm in part.norms):
        return x.T @ x
    if part.values is not None and name == part.values.target:
        heads = x[:, part.values.columns.to(x.device)].permute(1, 2, 3, 0)
        return heads @ heads.mT
    return x.square().sum(0)


def _measured(block, part, sums, where, patterns, device, recipe):
    """The `BlockMoments` of the sums, of the weights that have a pattern."""
    modules = linears(block)
    norms = {norm.name: _form(sums[norm.readers[0]], recipe) for norm in part.norms}
    heads, scales, costs = None, {}, {}
    for name in part.writers:  # one at a time: an inverse takes five times what its sum does
        form = _form(sums[name], recipe)
        diagonal = form.diagonal().clone() if form.ndim == 2 else form
        if part.values is not None and name == part.values.target:
            columns = part.values.columns.to(form.device)
            heads = form if form.ndim == 4 else form[columns[..., None], columns[..., None, :]]
        else:
            scales[name] = 1 / diagonal if recipe.compensated else diagonal
        if recipe.permute and any(name == inner.target for inner in part.inner):
            inverse = form if recipe.compensated else _damped_inverse(sums[name], recipe.damp)
            costs[name] = inverse.diagonal().clone()
    names = dict.fromkeys([*(n for norm in part.norms for n in norm.readers), *part.writers])
    weights = {name: _as_kept(oriented(modules[name]), device).contiguous() for name in names}
    orders = _deal_out(weights, scales, costs, part, where, patterns) if recipe.permute else ()
    weights = {n: W for n, W in weights.items() if patterns.get(f"{where}.{n}") is not None}
    return BlockMoments(weights, norms, heads, scales, orders)


def _as_kept(W, device):
    """A weight in what it is kept in: on a GPU bfloat16, else what it has if no float64."""
    if device.type == "cuda":
        return W.to(torch.bfloat16)
    return W.float() if W.element_size() > 4 else W


def _form(H, recipe):
    """In what a basis is measured: H, or the inverse of the damped H."""
    return _damped_inverse(H, recipe.damp) if recipe.compensated else H


def _deal_out(weights, scales, costs, part, where, patterns):
    """Deal inner columns out to the scopes by Σ w² / C_jj, in place; their orders."""
    orders = []
    for inner in part.inner:
        W = weights[inner.target]
        worth = W.float().square().sum(0) / costs[inner.target]
        order = deal(worth, W.shape, patterns.get(f"{where}.{inner.target}"))
        orders.append(order)
        order = order.to(W.device)
        for name in inner.sources:
            weights[name] = weights[name][order]
        weights[inner.target] = W[:, order]
        scales[inner.target] = scales[inner.target][order]
    return tuple(orders)


def _damped_inverse(H, damp):
    """(H + λI)⁻¹; where that is not positive definite, λ grows tenfold."""
    H = H.double()
    undamped, before = H.diagonal().clone(), 0.0
    while True:
        H.diagonal().add_(damping(undamped, damp - before))
        factor, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            del H  # room for the inverse
            return torch.cholesky_inverse(factor).float()
        before, damp = damp, max(10 * damp, 1e-4)


def compiled(pattern, shape):
    """The layout of a pattern; None where there is none or it does not divide the shape."""
    try:
        return pattern and pattern.compile(*shape)
    except ValueError:
        return None


def deal(worth, shape, pattern):
    """An order of columns that deals them out to the scopes by what they are worth.

    The first blocks of all scopes get the dearest columns, the last ones the cheapest, so that
    each scope chooses between columns of all kinds. The dearest of all go to the first scope:
    methods that go from left to right can make up for the most there.

    Parameters
    ----------
    worth : tensor, shape (K,)
    shape : tuple of int
        (M, K) of the weight.
    pattern : Pattern or None

    Returns
    -------
    tensor of int, shape (K,)
        On the CPU; as it is where a scope is no choice between columns.
    """
    order, layout = torch.arange(len(worth)), compiled(pattern, shape)
    if layout is None:
        return order
    kinds = np.unique(layout.blocks, axis=1, return_inverse=True)[1].ravel()
    count, scopes = int(kinds.max()) + 1, layout.column_groups
    if count == 1:
        return order
    # Ranks by block of the scope, scope, and column of the block.
    ranks = torch.argsort(worth.cpu(), descending=True, stable=True).reshape(count, scopes, -1)
    for block in range(count):
        places = layout.column_order[:, np.flatnonzero(kinds == block)]
        order[torch.from_numpy(places.copy()).flatten()] = ranks[block].flatten()
    return order
