"""What reads and writes the residual stream, found by running blocks in float64, not by names."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cuobs.models.blocks import not_finite, run, run_until
from cuobs.models.structure import is_linear, linears

# Relative errors in float64 below this are rounding.
EXACT = 1e-8
NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Norm(NamedTuple):
    """An RMSNorm between the residual stream and the linears that read it.

    Attributes
    ----------
    name : str
    readers : tuple of str
        Linears whose input it is.
    scale : tensor of float64, shape (D,)
        What it multiplies with.
    neutral : (str, float) or None
        Its parameter, and the value of that for a scale of 1: 0 where it multiplies with 1 + w.
        None where it has no scale.
    """

    name: str
    readers: tuple
    scale: torch.Tensor
    neutral: tuple | None


class Values(NamedTuple):
    """Heads of an attention whose values can be given another basis.

    Attributes
    ----------
    source, target : str
        The linear that makes the values, and the one that reads what attention made of them.
    rows : tensor of int, shape (heads, d)
        Rows of the source by key-value head.
    columns : tensor of int, shape (heads, queries, d)
        Columns of the target by key-value head and by query head that reads it.
    """

    source: str
    target: str
    rows: torch.Tensor
    columns: torch.Tensor


class Inner(NamedTuple):
    """Columns of a linear in any order, if the rows of others follow.

    Attributes
    ----------
    sources : tuple of str
        Linears whose output rows belong to those columns, one to one.
    target : str
    """

    sources: tuple
    target: str


class BlockStream(NamedTuple):
    """How a block meets the residual stream.

    Attributes
    ----------
    norms : tuple of Norm
    writers : tuple of str
        Linears whose output is added to the stream.
    values : Values or None
    inner : tuple of Inner
    """

    norms: tuple
    writers: tuple
    values: Values | None
    inner: tuple


class Call(NamedTuple):
    """A call of a module: its first tensor and what it made of it."""

    name: str
    module: nn.Module
    x: torch.Tensor
    y: torch.Tensor


class staying_double(TorchFunctionMode):
    """Modules that widen half precision to float32 narrow float64 to it: here they don't."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the function with float64 wherever a narrower float is asked for."""
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(_double(a) for a in args)
        return function(*args, **{k: _double(v) for k, v in (kwargs or {}).items()})


def _double(value):
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def trace(root, function):
    """Calls of the modules inside a module while a function runs, and what that returns."""
    calls = []

    def watch(name):
        def look(module, args, kwargs, output):
            tensors = [v for v in (*args, *kwargs.values()) if torch.is_tensor(v)]
            if tensors and torch.is_tensor(output):
                calls.append(Call(name, module, tensors[0], output))

        return look

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in root.named_modules()
        if module is not root
    ]
    try:
        return calls, function()
    finally:
        for handle in handles:
            handle.remove()


def maker_of(x, calls):
    """The call whose output a tensor is, the innermost; None if there is none."""
    return next((call for call in calls if _key(call.y) == _key(x)), None)


def read_block(block, hidden, call, where):
    """How a block meets the residual stream.

    Parameters
    ----------
    block : torch.nn.Module
        In float64.
    hidden : tensor of float64, shape (B, T, D)
    call : tuple
        Its other arguments, in float64.
    where : str
        Its name, for errors.

    Returns
    -------
    stream : BlockStream
    out : tensor of float64, shape (B, T, D)
        The hidden states that leave it.

    Raises
    ------
    ValueError
        Another basis of the stream would be another function.
    """
    calls, out = trace(block, lambda: run(block, hidden, call))
    if not bool(out.isfinite().all()):
        raise not_finite(f"behind {where}")
    called = [c.name for c in calls]
    for name in linears(block):
        if called.count(name) != 1:
            raise refused(f"that {where} runs {name} {called.count(name)} times", "once")
    width = hidden.shape[-1]
    made = [c for c in calls if is_linear(c.module)]
    wide = [c for c in made if c.y.shape[-1] == width]
    shares = explain(out - hidden, [c.y for c in wide])
    writers = [] if shares is None else [c for c, s in zip(wide, shares, strict=True) if s]

    def in_stream(x):
        return explain(x - hidden, [c.y for c in writers]) is not None

    norms = {}
    for linear in made:
        maker = maker_of(linear.x, calls)
        if maker is not None and maker.x.shape == hidden.shape and in_stream(maker.x):
            norms.setdefault(maker.name, []).append(linear.name)
        elif linear.x.shape == hidden.shape and in_stream(linear.x):
            raise refused(
                f"that {where}.{linear.name} reads the residual stream with no norm before it",
                "an RMSNorm there",
            )
    modules = dict(block.named_modules())
    # Norms first: a LayerNorm is the better reason where there are two.
    found = tuple(
        Norm(name, tuple(readers), *rms_scale(modules[name], width, f"{where}.{name}"))
        for name, readers in norms.items()
    )
    if shares is None:
        raise refused(_not_written(where, wide, calls), "linears that write into it as they are")
    if not found or not writers:
        raise refused(
            f"no RMSNorm between the residual stream and the linears of {where}", "one"
        )
    order = [c.name for c in made]
    writing = tuple(c.name for c in writers)
    values = _find_values(block, hidden, call, found, writing, order)
    inner = _find_inner(block, hidden, call, found, writing, order)
    return BlockStream(found, writing, values, inner), out


def refused(found, expected):
    """The error of a model that has no free basis."""
    return ValueError(f"rotate: found {found}, expected {expected}")


def explain(d, parts, tolerance=EXACT):
    """Numbers with which tensors add up to another, 0 where one is not needed; None if none do."""
    d = d.flatten()
    if not bool(d.any()):
        return [0.0] * len(parts)
    if not parts:
        return None
    A = torch.stack([p.flatten() for p in parts], dim=1)
    scale = A.norm(dim=0).clamp_min(1e-300)
    A = A / scale
    shares = torch.linalg.lstsq(A.cpu(), d.cpu()[:, None], driver="gelsd").solution[:, 0]
    error = (d - A @ shares.to(A)).norm()
    if not bool(error <= tolerance * d.norm()):
        return None
    needed = shares.abs() > tolerance * shares.abs().max()
    return [float(s) if n else 0.0 for s, n in zip(shares / scale.cpu(), needed, strict=True)]


def rms_scale(norm, width, where):
    """The scale of an RMSNorm, and its parameter with the value that makes it 1.

    Raises
    ------
    ValueError
        It is none.
    """
    norm = copy.deepcopy(norm).double()
    device = next((p.device for p in norm.parameters()), torch.device("cpu"))
    # Large, so that the norm's epsilon does not count.
    x = 1e4 * torch.randn(8, width, dtype=torch.float64, generator=_generator()).to(device)
    with staying_double():
        y, moved = norm(x), norm(x + 1e4)
    unit = x / x.square().mean(1, keepdim=True).sqrt()
    scale = (y * unit).sum(0) / unit.square().sum(0)
    if not _near(y, unit * scale):
        if _near(y, moved):
            raise refused(
                f"that {where} takes the mean away (LayerNorm), which holds in one basis alone",
                "RMSNorm",
            )
        raise refused(f"that {where} is no RMSNorm without bias", "one")
    for name, parameter in norm.named_parameters():
        for neutral in (1.0, 0.0):
            own = parameter.detach() + (1 - neutral)
            if own.shape == scale.shape and _near(own, scale):
                return own, (name, neutral)
    if _near(scale, scale.mean().expand_as(scale)):
        return torch.ones_like(scale), None
    raise refused(f"that {where} has a scale that is not its weight", "RMSNorm")


def _near(a, b):
    return bool((a - b).norm() <= EXACT * (b.norm() + 1e-300))


def _generator():
    return torch.Generator().manual_seed(0)


def _key(tensor):
    return tensor.data_ptr(), tensor.numel(), tensor._version


def _not_written(where, wide, calls):
    """Why what a block adds to the stream is no sum of its linears' outputs."""
    for linear in wide:
        for after in calls:
            same = _key(after.x) == _key(linear.y) and after.x.shape == linear.y.shape
            if not same or not any(p.ndim == 1 for p in after.module.parameters()):
                continue
            return f"{where}.{after.name} between {linear.name} and the residual stream"
    return (
        f"that what {where} adds to the residual stream is no sum of its linears' outputs "
        "(a scale or a norm of its own may stand behind them)"
    )


def _find_values(block, hidden, call, norms, writers, order):
    """The heads' values, found by what attention makes of values that are known; or None."""
    modules = linears(block)
    for target in writers:
        for source in [n for norm in norms for n in norm.readers]:
            if order.index(source) > order.index(target):
                continue
            rows = modules[source].weight.numel() // hidden.shape[-1]

            def attended(y, source=source, target=target):
                return _input_when(block, modules, {source: lambda _: y}, target, hidden, call)

            # Values that are the same at every token stay what they are, whatever the attention.
            index = torch.arange(1.0, rows + 1, dtype=hidden.dtype, device=hidden.device)
            x = attended(index.expand(*hidden.shape[:2], rows))
            columns = x[0].round()
            known = bool(((columns > 0) & (columns <= rows)).all())
            if not known or not _near(x, columns.expand_as(x)):
                continue
            # Values that are the same in all rows tell by what they become which head they are in.
            y = torch.randn(hidden.shape[:2], dtype=hidden.dtype, generator=_generator())
            x = attended(y.to(hidden.device)[..., None].expand(*hidden.shape[:2], rows))
            found = _heads(columns.long() - 1, x, rows)
            if found is not None:
                return Values(source, target, *found)
    return None


def _heads(rows_of, x, rows):
    """Rows by head and columns by head and query head, from the row that each column shows."""
    changes = (x[:, 1:] - x[:, :-1]).abs().amax(0) > EXACT * x.abs().max()
    edges = [0, *(changes.nonzero().flatten() + 1).tolist(), x.shape[1]]
    heads = {}
    for start, stop in zip(edges, edges[1:], strict=False):
        own = tuple(rows_of[start:stop].tolist())
        heads.setdefault(own, []).append(list(range(start, stop)))
    columns = list(heads.values())
    regular = len({len(row) for row in heads}) == 1 and len({len(c) for c in columns}) == 1
    if not regular or sorted(r for row in heads for r in row) != list(range(rows)):
        return None
    return torch.tensor(list(heads)), torch.tensor(columns)


def _find_inner(block, hidden, call, norms, writers, order):
    """Writers each of whose columns belongs to the same row of linears before it."""
    modules, found = linears(block), []
    for target in writers:
        K = modules[target].weight.numel() // hidden.shape[-1]
        turn = torch.randperm(K, generator=_generator()).to(hidden.device)
        for norm in norms:
            sizes = {modules[n].weight.numel() // hidden.shape[-1] for n in norm.readers}
            if sizes != {K} or order.index(norm.readers[-1]) > order.index(target):
                continue
            plain = _input_when(block, modules, {}, target, hidden, call)
            turned = _input_when(
                block, modules, {n: lambda y: y[..., turn] for n in norm.readers},  # noqa: B023
                target, hidden, call,
            )  # fmt: skip
            if _near(turned, plain[:, turn]):
                found.append(Inner(norm.readers, target))
    return tuple(found)


def _input_when(block, modules, changes, target, hidden, call):
    """The input of a linear when the outputs of others are changed by functions."""
    handles = [
        modules[name].register_forward_hook(lambda _, args, y, change=change: change(y))
        for name, change in changes.items()
    ]
    try:
        return run_until(block, modules[target], hidden, call)
    finally:
        for handle in handles:
            handle.remove()
