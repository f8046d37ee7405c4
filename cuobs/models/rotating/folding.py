"""Give the residual stream another basis and fold it into the weights: the same function.

Norm scales go into the linears that read them, then everything that reads or writes the stream is
rotated. All in float64; what a model is made of is told by `cuobs.models.rotating.residual`.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

from cuobs.models import memory
from cuobs.models.blocks import as_dtype, capture, evaluating, explaining, run
from cuobs.models.rotating.residual import (
    Norm,
    explain,
    maker_of,
    read_block,
    refused,
    rms_scale,
    staying_double,
    trace,
)
from cuobs.models.structure import (
    check_plain,
    find_blocks,
    is_linear,
    linears,
    oriented,
    shared_weights,
)

# Tokens on which a model is examined.
EXAMINED = 64
# ‖folded − dense‖ / ‖dense‖ in float64 that is rounding.
ROUNDING = 1e-10
# The same for logits in the model's own dtype, as a multiple of its machine epsilon, and at most.
LOGITS, LOGITS_MOST = 2000, 0.5
# Rows of an embedding in float64 at once.
ROWS = 16384


class Stream(NamedTuple):
    """A model whose residual stream has a free basis.

    Attributes
    ----------
    prefix : str
        Name of the list of blocks.
    width : int
    blocks : tuple of cuobs.models.rotating.residual.BlockStream
    embeddings : tuple of str
        Embeddings whose sum enters the first block.
    norm : cuobs.models.rotating.residual.Norm
        Between the last block and the head.
    head : str
    """

    prefix: str
    width: int
    blocks: tuple
    embeddings: tuple
    norm: Norm
    head: str


class Rotation(NamedTuple):
    """Another basis: tensors of float64 on the CPU.

    Attributes
    ----------
    stream : tensor, shape (D, D)
        R1, orthogonal: hidden states h become h R1.
    values : tuple of (tensor, shape (heads, d, d)) or None
        R2 of each key-value head, by block.
    orders : tuple of tuple of tensor
        By block, the order of the inner columns of each of `BlockStream.inner`, or empty.
    """

    stream: torch.Tensor
    values: tuple
    orders: tuple


@torch.no_grad()
def examine(model, tokens, device=None):
    """Find how a model meets its residual stream, and try another basis on some tokens.

    Each block, and the head, is copied to float64 and folded with a random basis.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    tokens : tensor of int, shape (windows, length)
    device : torch.device, optional
        Where blocks are tried.

    Returns
    -------
    Stream

    Raises
    ------
    ValueError
        Another basis would be another function; it says why.
    """
    prefix, blocks = find_blocks(model)
    for (index, name), other in shared_weights(model, prefix, blocks).items():
        raise refused(
            f"that {prefix}.{index}.{name} shares its weight with {other}", "a weight of its own"
        )
    for name, module in linears(blocks).items():
        check_plain(f"{prefix}.{name}", module)
    device = torch.device(device or next(model.parameters()).device)
    tokens = tokens[:1, :EXAMINED]
    generator = torch.Generator().manual_seed(0)
    with evaluating(model):
        outside = _outside(model, prefix, tokens)
        entry, calls = capture(model, blocks, [(tokens, None)], device)
        hidden, streams = entry[0].double(), []
        basis = random_basis((), hidden.shape[-1], generator).to(device)
        for index, (block, (call,)) in enumerate(zip(blocks, calls, strict=True)):
            where = f"{prefix}.{index}"
            block = copy.deepcopy(block).to(device).double()
            call = as_dtype(call, torch.float64)
            with staying_double(), _in_float64(where):
                stream, out = read_block(block, hidden, call, where)
                _try(block, stream, basis, hidden, call, out, where, generator)
            streams.append(stream)
            hidden = out
            memory.trim(device)
        embeddings = _embeddings(outside, entry[0])
        norm, head = _tail(model, outside, hidden, basis)
    _check_nothing_else(model, blocks, (*embeddings, norm.name, head))
    return Stream(prefix, hidden.shape[-1], tuple(streams), embeddings, norm, head)


def _in_float64(where):
    """Say that a block does not run in float64, where that is so."""
    return explaining(lambda reason: refused(
        f"that {where} does not run in float64 ({reason})", "one that does"
    ), RuntimeError)  # fmt: skip


def random_basis(batch, size, generator):
    """Random orthogonal matrices of float64."""
    A = torch.randn(*batch, size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(A)[0]


def _try(block, stream, basis, hidden, call, out, where, generator):
    """Fold a block with a random basis and see whether it still is the same function."""
    values, orders = None, []
    if stream.values is not None:
        heads, d = stream.values.rows.shape
        values = random_basis((heads,), d, generator)
    for inner in stream.inner:
        columns = oriented(dict(block.named_modules())[inner.target]).shape[1]
        orders.append(torch.randperm(columns, generator=generator))
    fold_block(block, stream, basis, values, orders)
    deviation = _distance(run(block, hidden @ basis, call), out @ basis)
    if not deviation <= ROUNDING:
        raise refused(
            f"that {where} in another basis gives hidden states that differ by {deviation:.1e} of "
            "their norm (something in it depends on the basis)",
            f"at most {ROUNDING:g}",
        )


@torch.no_grad()
def fold_block(block, stream, basis=None, values=None, orders=()):
    """Fold norm scales and another basis into the linears of a block, in place.

    Parameters
    ----------
    block : torch.nn.Module
        In any dtype; the products are float64.
    stream : BlockStream
    basis : tensor, shape (D, D), optional
        R1; norm scales alone are folded without it.
    values : tensor, shape (heads, d, d), optional
        R2.
    orders : sequence of tensor
        Of the columns of each of ``stream.inner``.
    """
    modules = dict(block.named_modules())
    names = dict.fromkeys([n for norm in stream.norms for n in norm.readers] + [*stream.writers])
    if basis is not None:
        basis = basis.to(modules[next(iter(names))].weight.device, torch.float64)
    for norm in stream.norms:
        make_neutral(modules[norm.name], norm)
    for name in names:  # one at a time: in float64 a weight takes up to four times as much
        weight, bias = oriented(modules[name]), modules[name].bias
        b = None if bias is None else bias.data.double()
        W, b = _folded(name, weight.double(), b, stream, basis, values, orders)
        weight.copy_(W)
        if b is not None:
            bias.copy_(b)


def _folded(name, W, b, stream, basis, values, orders):
    """A linear's weight and bias, float64, as `fold_block` gives them to it."""
    scales = [norm.scale for norm in stream.norms if name in norm.readers]
    for scale in scales:
        W = W * scale.to(W)
    if basis is not None and scales:
        W = W @ basis
    if basis is not None and name in stream.writers:
        W, b = basis.T @ W, b if b is None else b @ basis
    if values is not None:
        W, b = _rotated_values(name, W, b, stream.values, values.to(W))
    for inner, order in zip(stream.inner, orders, strict=False):
        order = order.to(W.device)
        if name in inner.sources:
            W, b = W[order], b if b is None else b[order]
        if name == inner.target:
            W = W[:, order]
    return W, b


def make_neutral(module, norm):
    """Give a norm the scale 1."""
    if norm.neutral is not None:
        name, value = norm.neutral
        module.get_parameter(name).data.fill_(value)


def _rotated_values(name, W, b, heads, R2):
    """Weight and bias of a linear that makes values, or reads what attention made of them."""
    rows, columns = heads.rows.to(W.device), heads.columns.to(W.device)
    if name == heads.source:
        W[rows] = R2.mT @ W[rows]
        if b is not None:
            b[rows] = (b[rows][:, None] @ R2)[:, 0]
    if name == heads.target:
        flat, queries = columns.flatten(), columns.shape[1]
        read = W[:, flat].unflatten(1, columns.shape)
        read = read.permute(1, 2, 0, 3) @ R2[:, None].expand(-1, queries, -1, -1)
        W[:, flat] = read.permute(2, 0, 1, 3).flatten(1)
    return W, b


@torch.no_grad()
def fold(model, stream, rotation, device=None, progress=None):
    """Fold a rotation into a model, in place; a tied head is untied.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    stream : Stream
        Of `examine`.
    rotation : Rotation
    device : torch.device, optional
        Where each block is folded.
    progress : callable, optional
        Called with (done, total) blocks.

    Returns
    -------
    int
        Bytes that untying the head from the embedding adds to the model; 0 where it was not tied.
    """
    blocks = model.get_submodule(stream.prefix)
    head = model.get_submodule(stream.head)
    added = untie(model, stream)
    for index, (block, part) in enumerate(zip(blocks, stream.blocks, strict=True)):
        home = next(block.parameters()).device
        block.to(device or home)
        orders = rotation.orders[index]
        fold_block(block, part, rotation.stream, rotation.values[index], orders)
        block.to(home)
        if progress:
            progress(index + 1, len(blocks))
    for name in stream.embeddings:
        _times(model.get_submodule(name).weight.data, None, rotation.stream, device)
    _times(oriented(head), stream.norm.scale, rotation.stream, device)
    make_neutral(model.get_submodule(stream.norm.name), stream.norm)
    return added


def untie(model, stream):
    """Give the head a weight of its own; bytes that it takes, 0 where it had one."""
    head = model.get_submodule(stream.head)
    weight = head.weight
    tied = any(model.get_submodule(name).weight is weight for name in stream.embeddings)
    if tied:
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return weight.numel() * weight.element_size() if tied else 0


def untied_config(config):
    """A model's config whose head has a weight of its own."""
    result = {**config, "tie_word_embeddings": False}
    for key, part in config.items():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            result[key] = {**part, "tie_word_embeddings": False}
    return result


def logits_of(model, tokens):
    """Logits of the first tokens of a window, float32 on the CPU."""
    home = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        logits = model(input_ids=tokens[:1, :EXAMINED].to(home), use_cache=False).logits
    return logits.cpu().to(torch.promote_types(logits.dtype, torch.float32))


def check_logits(model, tokens, dense, dtypes=()):
    """‖z' − z‖ / ‖z‖ of a folded model's logits, its weights rounded to some dtypes or its own.

    Raises
    ------
    ValueError
        They are not those of the dense model.
    """
    deviation = _distance(logits_of(model, tokens), dense)
    # In float64 too, transformers' norms compute in float32.
    dtypes = next(model.parameters()).dtype, torch.float32, *dtypes
    limit = min(LOGITS * max(torch.finfo(dtype).eps for dtype in dtypes), LOGITS_MOST)
    if not deviation <= limit:
        raise refused(
            f"logits that differ by {deviation:.1e} of their norm", f"at most {limit:.1g}"
        )
    return deviation


def _times(weight, scale, basis, device):
    """W diag(scale) R in place, in float64, some rows at a time."""
    device = device or weight.device
    basis = basis.to(device)
    for rows in weight.split(ROWS):
        wide = rows.to(device).double()
        if scale is not None:
            wide *= scale.to(device)
        rows.copy_(wide @ basis)
        del wide  # before the next is made


def _distance(a, b):
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def _check_nothing_else(model, blocks, names):
    """Refuse a model with parts that tokens do not pass: they would stay in the old basis."""
    parts = blocks, *map(model.get_submodule, names)
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise refused(
                f"that {name} takes no part in what tokens alone become",
                "a model of text: what else there is would go on using the stream's old basis",
            )


def _outside(model, prefix, tokens):
    """Calls of the modules outside the blocks in one forward."""
    home = next(model.parameters()).device
    calls, _ = trace(model, lambda: model(input_ids=tokens.to(home), use_cache=False))
    return [c for c in calls if not c.name.startswith(prefix + ".")]


def _embeddings(outside, hidden):
    """Embeddings whose sum enters the first block."""
    width = hidden.shape[-1]
    made = [c for c in outside if isinstance(c.module, nn.Embedding) and c.y.shape[-1] == width]
    parts = [c.y.to(hidden.device).double().expand(hidden.shape) for c in made]
    shares = explain(hidden.double(), parts, 16 * torch.finfo(hidden.dtype).eps)
    if not made or shares is None:
        raise refused("that what enters the first block is no sum of embeddings", "one")
    return tuple(c.name for c, share in zip(made, shares, strict=True) if share)


def _tail(model, outside, hidden, basis):
    """The last norm and the head, tried in another basis."""
    module = model.get_output_embeddings()
    call = next((c for c in outside if c.module is module), None)
    if call is None or not is_linear(module):
        raise refused("no linear head", "a causal language model with one")
    maker = maker_of(call.x, outside)
    if maker is None or maker.x.shape != hidden.shape:
        raise refused(f"no norm before {call.name}", "an RMSNorm there")
    norm = Norm(maker.name, (call.name,), *rms_scale(maker.module, hidden.shape[-1], maker.name))
    tolerance = 0.1 if maker.x.element_size() < 4 else 1e-2
    if _distance(maker.x.to(hidden), hidden) > tolerance:
        raise refused(
            f"that {maker.name} reads something else than what the last block gives", "that alone"
        )
    own = copy.deepcopy(maker.module).to(hidden.device).double()
    with staying_double():
        before = own(hidden)
        make_neutral(own, norm)
        after = own(hidden @ basis)
    error = whole = 0.0
    for rows in oriented(module).split(ROWS):
        rows = rows.to(hidden)
        z = before @ rows.T
        rows = rows * norm.scale.to(rows)
        folded = after @ (rows @ basis).T
        del rows  # before the next are made
        error, whole = error + float((folded - z).square().sum()), whole + float(z.square().sum())
    if not error <= ROUNDING**2 * whole:
        raise refused(
            f"logits that differ by {(error / whole) ** 0.5:.1e} of their norm in another basis",
            f"at most {ROUNDING:g}",
        )
    return norm, call.name
