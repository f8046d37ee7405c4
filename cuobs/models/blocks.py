"""Run the blocks of a model one by one, with what the model itself passes to each."""

import contextlib
from typing import NamedTuple

import torch

from cuobs.models.parked import home_of


class Entry(NamedTuple):
    """What the blocks are called with.

    Attributes
    ----------
    hidden : list of tensor, shape (B, T, D)
        Hidden states that enter the first block, one a batch.
    calls : list of list of (tuple, dict)
        For each block and each batch, its other positional and its keyword arguments.
    """

    hidden: list
    calls: list


class _Stop(Exception):
    """Ends a forward once what was wanted has been seen."""


@contextlib.contextmanager
def explaining(meaning, errors=(RuntimeError, IndexError)):
    """Say what it means where something does not run: an error made of the first line of why.

    What PyTorch's functions raise counts, but not that a device is full.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except errors as error:
        raise meaning(str(error).partition("\n")[0]) from error


def running_alone(length=None):
    """Say what it means where a block does not run for one window, of a length, of a batch."""
    return explaining(lambda reason: not_by_window(reason, length))


def taking_windows():
    """Say what it means where a model does not run for windows of this length."""
    return explaining(lambda reason: ValueError(
        f"tokens: found windows that the model itself does not run for ({reason}), expected "
        "others: shorter ones where they are longer than its positions"
    ))  # fmt: skip


def not_finite(place):
    """The error of a model whose activations are no numbers, and where."""
    return ValueError(
        f"model: found activations that are NaN or infinite {place}, expected finite ones; where "
        "they overflow float16, a copy of the model in bfloat16 may hold them: "
        "model.bfloat16().save_pretrained(FOLDER)"
    )


def not_by_window(reason, length):
    """The error of a block for which `windows_of` does not give a window's own arguments.

    With ``batch_tokens`` as long as a window, each is a batch; None where that was so.
    """
    advice = "" if length is None else f"; batch_tokens={length} runs them one by one"
    return ValueError(
        f"model: found that a block gives one window something else than among others ({reason}), "
        f"expected windows in the first dimension of all that differs between them{advice}"
    )


@contextlib.contextmanager
def evaluating(model):
    """Without dropout; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def learning_alone(model, weights):
    """Gradients for these weights and no others; afterwards what learns is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, learned in before:
            parameter.grad = None
            parameter.requires_grad_(learned)


@contextlib.contextmanager
def plain_torch():
    """Without autocast, inference mode, gradients or a default device or dtype of the caller's.

    Autocast keeps copies of weights that it has cast until the outermost one ends, and would run on
    with them once they are pruned. So it keeps none here and afterwards, and what turns it off is
    not itself one, which would be the outermost around an autocast of a model's own. Tensors of
    inference mode can't be changed outside of it. Neither is attention left to cuDNN, which plans
    it anew in each thread, and forwards have threads of their own.
    """
    dtype, planned = torch.get_default_dtype(), torch.backends.cuda.cudnn_sdp_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}:
            stack.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
            torch.set_autocast_enabled(kind, False)
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        stack.callback(torch.clear_autocast_cache)
        torch.set_autocast_cache_enabled(False)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.backends.cuda.enable_cudnn_sdp(planned)


class Passing:
    """Blocks that hand their input on unchanged while this is entered, in their own form.

    Parameters
    ----------
    blocks : torch.nn.ModuleList

    Attributes
    ----------
    last : tensor, shape (B, T, D), or None
        What the last block gives instead of its input.
    """

    def __init__(self, blocks):
        self._blocks, self._own, self._form = blocks, [], []
        self.last = None

    def __enter__(self):
        self._own = [b.__dict__.get("forward") for b in self._blocks]  # whoever set one has it back
        for block in self._blocks:
            block.forward = self._forward(block, block is self._blocks[-1])
        return self

    def __exit__(self, *_):
        for block, forward in zip(self._blocks, self._own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward

    def _forward(self, block, is_last):
        whole = block.forward

        def forward(*args, **kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if not self._form:  # a tensor, or a tuple that begins with it: its own forward tells
                out = _run_some(whole, args, kwargs, len(hidden))
                self._form.append(None if torch.is_tensor(out) else tuple(out[1:]))
            hidden = self.last if is_last and self.last is not None else hidden
            return hidden if self._form[0] is None else (hidden, *self._form[0])

        return forward


def _run_some(forward, args, kwargs, windows):
    """What a block gives for one window, or for all where it can't be called for one of them."""
    one, arguments = windows_of((args, kwargs), 0, 1, windows)
    try:
        return forward(*one, **arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError):
        return forward(*args, **kwargs)


@torch.no_grad()
def capture(model, blocks, batches, device, passing=None, hidden=None):
    """Run the model up to its blocks and note what each of them is called with.

    The blocks hand their input on unchanged meanwhile, so this costs an embedding.

    Parameters
    ----------
    model : torch.nn.Module
    blocks : torch.nn.ModuleList
    batches : list of (tokens, attention mask or None)
        Tensors of shape (B, T).
    device : torch.device
        Where the result is kept.
    passing : Passing, optional
        Of these blocks, where it is needed afterwards too.
    hidden : list, optional
        Or what takes hidden states as one does.

    Returns
    -------
    Entry
    """
    home = home_of(model)
    body = getattr(model, "base_model", model)
    seen = []

    def watch(block, args, kwargs):
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.append((hidden, args[1:], kwargs))

    hidden = [] if hidden is None else hidden
    calls = [[] for _ in blocks]
    handles = [b.register_forward_pre_hook(watch, with_kwargs=True) for b in blocks]
    try:
        with passing or Passing(blocks):
            for tokens, mask in batches:
                seen.clear()
                arguments = {} if mask is None else {"attention_mask": mask.to(home)}
                with taking_windows():
                    body(input_ids=tokens.to(home), use_cache=False, **arguments)
                if len(seen) != len(blocks):
                    raise ValueError(
                        f"model: found that {len(seen)} of {len(blocks)} blocks run once a "
                        "forward, expected each of them"
                    )
                moved = {}
                hidden.append(seen[0][0].to(device))
                for i, (_, args, kwargs) in enumerate(seen):
                    before = calls[i][0] if calls[i] else None
                    calls[i].append(_place((args, kwargs), before, device, moved))
    finally:
        for handle in handles:
            handle.remove()
    return Entry(hidden, calls)


def _place(value, like, device, moved):
    """A copy of nested arguments on the device; tensors equal to those of `like` are its own."""
    if isinstance(value, tuple | list):
        likes = like if isinstance(like, tuple | list) and len(like) == len(value) else ()
        likes = likes or [None] * len(value)
        return type(value)(
            _place(v, w, device, moved) for v, w in zip(value, likes, strict=True)
        )
    if isinstance(value, dict):
        likes = like if isinstance(like, dict) else {}
        return {k: _place(v, likes.get(k), device, moved) for k, v in value.items()}
    if hasattr(value, "get_seq_length"):
        return None  # a cache would grow with every run
    if not torch.is_tensor(value):
        return value
    if id(value) not in moved:
        placed = value.to(device)
        same = torch.is_tensor(like) and like.shape == value.shape and like.dtype == value.dtype
        # The tensor is kept beside its copy, so that its id stays its own.
        moved[id(value)] = value, like if same and torch.equal(like, placed) else placed
    return moved[id(value)][1]


def as_dtype(call, dtype):
    """Nested arguments with their floating-point tensors in another dtype."""
    if isinstance(call, tuple | list):
        return type(call)(as_dtype(v, dtype) for v in call)
    if isinstance(call, dict):
        return {k: as_dtype(v, dtype) for k, v in call.items()}
    return call.to(dtype) if torch.is_tensor(call) and call.is_floating_point() else call


def windows_of(call, start, stop, batch):
    """Nested arguments for some windows of a batch alone."""
    if isinstance(call, tuple | list):
        return type(call)(windows_of(v, start, stop, batch) for v in call)
    if isinstance(call, dict):
        return {k: windows_of(v, start, stop, batch) for k, v in call.items()}
    each = torch.is_tensor(call) and call.ndim > 1 and call.shape[0] == batch
    return call[start:stop] if each else call


def run(block, hidden, call):
    """The hidden states that leave a block."""
    args, kwargs = call
    out = block(hidden, *args, **kwargs)
    return out if torch.is_tensor(out) else out[0]


def run_until(block, module, hidden, call):
    """The input (tokens, K) of a module inside a block; the forward ends there."""
    found = []

    def stop(_, args):
        found.append(args[0])
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_Stop):
            run(block, hidden, call)
    finally:
        handle.remove()
    return found[0].reshape(-1, found[0].shape[-1])
