"""Learn another basis by gradient descent on the share of the score that a pattern prunes."""

import math
from itertools import islice
from typing import NamedTuple

import torch

from cuobs.models import memory
from cuobs.models.ranks import current
from cuobs.models.rotating.folding import Rotation
from cuobs.models.rotating.pruned_share import Scopes, pruned_share
from cuobs.models.rotating.rotation_moments import compiled, gather
from cuobs.models.rotating.rotation_prediction import piece_within


class Learned(NamedTuple):
    """A rotation and how the objective went: a number a step and one after the last."""

    rotation: Rotation
    history: tuple


def learn(model, stream, tokens, counted, patterns, recipe, mask=None, device="cpu", progress=None):
    """Learn R1 and R2 for patterns; the model stays as it is.

    ``R = exp(A − Aᵀ)``, A = 0 at the start. What falls is the share of the score that the pattern
    prunes in each layer, weighted by the layers' sizes. Nothing is drawn at random.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    stream : cuobs.models.rotating.folding.Stream
        Of `cuobs.models.rotating.folding.examine`.
    tokens, counted : tensor of int, shape (windows, length)
        And which of them enter the sums.
    patterns : dict of Pattern
        By the name of a linear; those that are not named do not count.
    recipe : RotationRecipe
    mask : tensor of int, shape (windows, length), optional
        0 where a token is padding.
    device, progress
        See `cuobs.models.rotate`.

    Returns
    -------
    Learned
        The best basis that was seen.

    Raises
    ------
    ValueError
        There is no pattern, or none divides its layer.
    """
    device = torch.device(device)
    gathered = gather(model, stream, tokens, mask, counted, patterns, device, recipe)
    orders = tuple(block.orders for block in gathered)
    objective = Objective(stream, gathered, patterns, recipe.compensated, device)
    best, history = _descend(objective, recipe.steps, recipe.rate, progress)
    order = objective.scopes_in_order(best) if recipe.permute else None
    return Learned(objective.rotation(best, orders, order), tuple(history))


@torch.enable_grad()
def _descend(objective, steps, rate, progress):
    """Adam on the generators of the rotations; the best ones, and the objective at each step."""
    generators = [A.requires_grad_() for A in objective.zeros()]
    optimizer = torch.optim.Adam(generators, lr=rate)
    best, history = None, []
    for step in range(steps + 1):
        bases = [exponential(A) for A in generators]
        leaves = [R.detach().requires_grad_() for R in bases]
        history.append(objective.backward(leaves))
        if history[-1] <= min(history):
            best = [A.detach().clone() for A in generators]
        if step == steps:
            return best, history
        optimizer.zero_grad()
        memory.trim(bases[0].device)
        _back(bases, leaves)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        if progress:
            progress(step + 1, steps)


def _back(roots, leaves):
    """Go on from leaves to what they were detached from; some may not have been used."""
    used = [(root, leaf.grad) for root, leaf in zip(roots, leaves, strict=True)]
    used = [pair for pair in used if pair[1] is not None]
    if used:
        torch.autograd.backward(*zip(*used, strict=True))


def exponential(A):
    """exp(A − Aᵀ), orthogonal."""
    return torch.linalg.matrix_exp(A - A.mT)


class Stack(NamedTuple):
    """Weights of one name and shape in several blocks.

    Attributes
    ----------
    weight : tensor, shape (L, M, K)
    scopes : Scopes
    writes : bool
        Whether they write into the residual stream.
    norm : (int, tensor) or None
        Which norm's output they read, and the place of each block among those that have it.
    values : (int, tensor) or None
        Which `Heads` they belong to, and the place of each block in them.
    scale : tensor, shape (L, K), or None
        What the squares of weights are multiplied with, where no basis changes it.
    """

    weight: torch.Tensor
    scopes: Scopes
    writes: bool
    norm: tuple | None
    values: tuple | None
    scale: torch.Tensor | None


class Heads(NamedTuple):
    """Blocks whose values are rotated alike: same rows, same columns.

    Attributes
    ----------
    values : cuobs.models.rotating.residual.Values
    blocks : list of int
    moments : tensor, shape (L, heads, queries, d, d)
    """

    values: tuple
    blocks: list
    moments: torch.Tensor


class Objective:
    """The share of the score that patterns prune, by size, as a function of the bases.

    Parameters
    ----------
    stream : cuobs.models.rotating.folding.Stream
    gathered : list of cuobs.models.rotating.rotation_moments.BlockMoments
        Emptied, so that nothing is held twice.
    patterns : dict of Pattern
        By the name of a linear.
    inverse : bool
        Whether moments are inverses, which divide.
    device : torch.device
    """

    def __init__(self, stream, gathered, patterns, inverse, device):
        self.width, self.depth = stream.width, len(gathered)
        self.inverse, self.device = inverse, device
        self.heads = _group_heads(stream, gathered)
        names = dict.fromkeys(name for block in gathered for name in block.norms)
        having = {n: [i for i, b in enumerate(gathered) if n in b.norms] for n in names}
        self.norms = [
            _stacked([gathered[i].norms.pop(name) for i in blocks])
            for name, blocks in having.items()
        ]
        self.stacks = _stack(stream, gathered, patterns, self.heads, having, device)
        gathered.clear()
        moments = sum(M.nbytes for M in (*self.norms, *(h.moments for h in self.heads)))
        free = memory.free(device)
        self.piece = current().least(piece_within(free, moments, device))  # they share the pieces
        self.size = sum(stack.weight.numel() for stack in self.stacks)
        if not self.stacks:
            labels = ", ".join(dict.fromkeys(p.label for p in patterns.values())) or "it"
            raise ValueError(
                f"pattern: found that {labels} divides no linear of the model, expected one"
            )

    def zeros(self):
        """Generators of no rotation: of the stream, and of each of the heads."""
        sizes = [(self.width, self.width)]
        sizes += [(len(h.blocks), len(h.values.rows), *h.moments.shape[-2:]) for h in self.heads]
        return [torch.zeros(size, device=self.device) for size in sizes]

    def rotation(self, generators, orders, order=None):
        """The `Rotation` of generators, orthogonal to float64's rounding.

        Parameters
        ----------
        generators : list of tensor
        orders : tuple
            Of inner columns.
        order : tensor of int, shape (D,), optional
            Of the stream's elements.
        """
        bases = []
        for A in generators:
            R = exponential(A.double())
            bases.append((1.5 * R - 0.5 * R @ (R.mT @ R)).cpu())
        if order is not None:
            bases[0] = bases[0][:, order]
        values = [None] * self.depth
        for heads, R2 in zip(self.heads, bases[1:], strict=True):
            for place, index in enumerate(heads.blocks):
                values[index] = R2[place]
        return Rotation(bases[0], tuple(values), orders)

    def backward(self, bases):
        """The objective; its gradient is added to that of the bases, which are leaves.

        Processes share the pieces of the weights.
        """
        ranks, roots = current(), self._scales(bases)
        scales = [root.detach().requires_grad_() for root in roots]
        total = 0.0
        for stack, part in islice(self._pieces(), ranks.rank, None, ranks.size):
            total += self._backward(stack, part, bases, scales)
        ranks.add_up_gradients([*bases, *scales])
        _back(roots, scales)
        return ranks.total(float(total))

    def _backward(self, stack, part, bases, scales):
        """What some weights add to the objective, and to the gradients; nothing else stays."""
        W, h = self._rotated(stack, part, bases, scales)
        share = pruned_share(W, h, stack.scopes).sum()
        loss = share * (W[0].numel() / self.size)
        del W, h
        memory.trim(self.device)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def scopes_in_order(self, generators):
        """An order of the stream's elements: the scopes that hold the most of the score first.

        What competes with what stays the same. Methods that go from left to right can make up
        the most for what they lose first. None where layers differ in what their scopes are.
        """
        bases = [exponential(A) for A in generators]
        scales, worth, layouts = self._scales(bases), 0.0, {}
        for stack, part in self._pieces():
            layout = stack.scopes.layout
            if stack.norm is not None:
                layouts[layout.column_order.tobytes()] = layout.column_order
                W, h = self._rotated(stack, part, bases, scales)
                score = W.float().square().sum(1) * h
                share = score / score.sum(1, keepdim=True).clamp_min(1e-30)
                worth = worth + (share * W[0].numel()).sum(0)
            if stack.writes and layout.rows > 1:
                return None
        if len(layouts) != 1:
            return None
        places = torch.from_numpy(next(iter(layouts.values())).copy())
        first = worth.cpu()[places].sum(1).argsort(descending=True, stable=True)
        order = torch.empty(self.width, dtype=torch.long)
        order[places.flatten()] = places[first].flatten()
        return order

    def _pieces(self):
        """Each stack, some weights at a time."""
        for stack in self.stacks:
            L, M, K = stack.weight.shape
            count = max(1, self.piece // (M * K))
            for start in range(0, L, count):
                yield stack, slice(start, start + count)

    def _scales(self, bases):
        """What squares of weights are multiplied with: behind each norm, then for all heads."""
        behind = [self._scale(M, bases[0]) for M in self.norms]
        return behind + [
            self._scale(heads.moments, R2[:, :, None])
            for heads, R2 in zip(self.heads, bases[1:], strict=True)
        ]

    def _scale(self, moments, basis):
        """diag(Rᵀ H R): what squares of weights are multiplied with in the new basis."""
        diagonal = ((moments @ basis) * basis).sum(-2)
        return 1 / diagonal if self.inverse else diagonal

    def _rotated(self, stack, part, bases, scales):
        """Some weights in the new basis, and what their squares are multiplied with."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        W = stack.weight[part].to(self.device, dtype)
        stream, values = bases[0].to(W.dtype), bases[1:]
        if stack.values is not None:
            which, places = stack.values
            heads, R2 = self.heads[which].values, values[which][places[part]].to(W.dtype)
        if stack.norm is not None:
            norm, places = stack.norm
            W, h = W @ stream, scales[norm][places[part]]
            if stack.values is not None:
                W = _by_rows(W, R2, heads.rows)
        elif stack.values is not None:
            W = _by_columns(W, R2, heads.columns)
            h = scales[len(self.norms) + which][places[part]].flatten(1)
            h = _ordered(h, 1, heads.columns.flatten().argsort())
        else:
            h = stack.scale[part]
        if stack.writes:
            W = stream.T @ W
        return W, h


def _by_rows(W, R2, rows):
    """R2ᵀ V of each head; W (L, M, K), R2 (L, heads, d, d)."""
    flat = rows.flatten()
    V = R2.mT @ _ordered(W, 1, flat).unflatten(1, rows.shape)
    return _ordered(V.flatten(1, 2), 1, flat.argsort())


def _by_columns(W, R2, columns):
    """O R2 of each query head; W (L, M, K), R2 (L, heads, d, d)."""
    flat = columns.flatten()
    heads = _ordered(W, 2, flat).unflatten(2, columns.shape)
    return _ordered(torch.einsum("lmhqd,lhde->lmhqe", heads, R2).flatten(2), 2, flat.argsort())


def _ordered(x, dim, order):
    """Another order along a dimension, as it is where nothing moves."""
    if bool((order == torch.arange(len(order))).all()):
        return x
    return x.index_select(dim, order.to(x.device))


def _group_heads(stream, gathered):
    """Blocks by what their values look like."""
    groups = {}
    for index, part in enumerate(stream.blocks):
        if part.values is not None:
            v = part.values
            key = v.source, v.target, str(v.rows.tolist()), str(v.columns.tolist())
            groups.setdefault(key, []).append(index)
    return [
        Heads(stream.blocks[own[0]].values, own, torch.stack([gathered[i].heads for i in own]))
        for own in groups.values()
    ]


def _stack(stream, gathered, patterns, heads, having, device):
    """Weights of one name, shape, pattern and role in one tensor."""
    kinds = {}
    for index, (part, block) in enumerate(zip(stream.blocks, gathered, strict=True)):
        norms = {name: list(having).index(n.name) for n in part.norms for name in n.readers}
        for name, W in block.weights.items():
            own = part.values is not None and name in (part.values.source, part.values.target)
            which = next(i for i, h in enumerate(heads) if index in h.blocks) if own else None
            pattern = patterns.get(f"{stream.prefix}.{index}.{name}")
            key = name, tuple(W.shape), pattern, norms.get(name), name in part.writers, which
            kinds.setdefault(key, []).append(index)
    stacks = []
    for (name, shape, pattern, norm, writes, which), blocks in kinds.items():
        layout = compiled(pattern, shape)
        if layout is None:
            continue

        def among(found, number, blocks=blocks):
            places = [found.index(i) for i in blocks]
            return number, torch.tensor(places, device=device)

        scale = None
        if norm is None and which is None:
            scale = torch.stack([gathered[i].scales[name] for i in blocks])
        stacks.append(
            Stack(
                _stacked([gathered[i].weights.pop(name) for i in blocks]),
                Scopes(layout, device),
                writes,
                None if norm is None else among(list(having.values())[norm], norm),
                None if which is None else among(heads[which].blocks, which),
                scale,
            )
        )
        memory.trim(device)
    return stacks


def _stacked(parts):
    """Tensors of a list in one; the list lets go of each as soon as it is copied."""
    whole = parts[0].new_empty(len(parts), *parts[0].shape)
    for i in range(len(parts)):
        whole[i] = parts[i]
        parts[i] = None
    return whole
