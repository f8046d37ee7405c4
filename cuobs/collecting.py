"""Layers of a PyTorch model: their Hessians collected by hooks, their weights pruned in place."""

import contextlib
import dataclasses
import difflib
import weakref
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from cuobs import arrays, validation
from cuobs.hessian import Hessian
from cuobs.modules import is_linear, is_module, weight_of
from cuobs.pruning import prune

__all__ = ["Hessians", "collect", "prune_linear"]


def prune_linear(layer: Any, X: Any = None, *, hessian: Any = None, **options: Any) -> Any:
    """Prune a linear layer of PyTorch in place.

    Parameters
    ----------
    layer : nn.Linear or Conv1D
        Its weight keeps dtype, device and whether it learns; it stays the same parameter.
    X : tensor, shape (..., K), or batches of them, optional
        The layer's inputs, as in `cuobs.prune`.
    hessian : Hessian or tensor, shape (K, K), optional
        In place of X, see `cuobs.collect`.
    **options
        Of `cuobs.prune`.

    Returns
    -------
    Result
        Its weight is that of the layer, of shape (outputs, inputs).

    Raises
    ------
    TypeError, ValueError
        It is no linear layer, its weight is no plain parameter, or as in `cuobs.prune`. The layer
        is then as it was.

    Examples
    --------
    >>> import torch
    >>> import cuobs
    >>> layer = torch.nn.Linear(32, 8)
    >>> cuobs.prune_linear(layer, torch.randn(256, 32), pattern="2:4").sparsity
    0.5
    >>> bool(cuobs.verify(layer, "2:4"))
    True
    """
    _check_linear(layer)
    with validation.renaming("W", "layer"):
        result = prune(layer, X, hessian=hessian, **options)
    weight = weight_of(layer, "layer").data
    weight.copy_(result.weight)
    return dataclasses.replace(result, weight=weight)


def _check_linear(layer):
    """Refuse what is no linear layer, or one whose weight can't be changed in place."""
    if not is_module(layer):
        raise TypeError(f"layer: found {type(layer).__name__}, expected an nn.Linear or a Conv1D")
    from cuobs.torch.parameters import fault_of

    weight_of(layer, "layer")
    if fault := fault_of(layer):
        raise ValueError(f"layer: found it {fault[0]}, expected a plain parameter: {fault[1]}")


def collect(
    model: Any,
    names: str | list[str] = "*",
    *,
    dtype: str = "float32",
    precision: str = "tensor",
) -> contextlib.AbstractContextManager:
    """Add up the Hessians of a model's linear layers while it runs.

    Parameters
    ----------
    model : nn.Module
    names : str or list of str
        Globs for the names of the layers, such as ``"*.down_proj"``; a ``*`` stands for dots too.
    dtype, precision : str
        As in `cuobs.Hessian`.

    Returns
    -------
    context manager
        It gives `Hessians`, by name, where the layers' inputs are. All tokens count that reach a
        layer, padding too.

    Raises
    ------
    TypeError, ValueError
        It is no module, or no linear layer has such a name: before it is entered. In a forward:
        inputs are not finite.

    Examples
    --------
    >>> import torch
    >>> import cuobs
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> with torch.no_grad(), cuobs.collect(model) as hessians:
    ...     _ = model(torch.randn(64, 8))
    >>> for name, hessian in hessians.items():
    ...     result = cuobs.prune_linear(model.get_submodule(name), hessian=hessian)
    >>> {name: hessian.tokens for name, hessian in hessians.items()}
    {'0': 64, '2': 64}
    """
    layers = _find(model, names)
    return _collecting(layers, Hessians(layers, dtype, precision))


@contextlib.contextmanager
def _collecting(layers, hessians):
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(
                layer.register_forward_pre_hook(hessians._hook(name), with_kwargs=True)
            )
        yield hessians
    finally:
        for handle in handles:
            handle.remove()
        hessians._last = None


def _find(model, names):
    """The linear layers whose names match a glob or one of several, by name."""
    if not is_module(model):
        raise TypeError(f"model: found {type(model).__name__}, expected a module of PyTorch")
    globs = [names] if isinstance(names, str) else names
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"names: found {validation.shown(names)}, expected a glob or a list")
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    if not linears:
        raise ValueError(f"model: found no linear layer in {type(model).__name__}, expected some")
    found = {}
    for glob in globs:
        matches = {name: m for name, m in linears.items() if fnmatchcase(name, glob)}
        if not matches:
            nearest = difflib.get_close_matches(glob, linears, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"names: found no linear layer that matches {glob!r} among {len(linears)}, "
                f"expected a glob such as '*' (nearest: {nearest})"
            )
        found |= matches
    return {name: linears[name] for name in linears if name in found}


class Hessians(Mapping):
    """The `Hessian` of each layer by name, in the order of the model.

    Asking for that of a layer which has not run is an error that names it.
    """

    def __init__(self, names, dtype, precision):
        self._held = dict.fromkeys(names)
        self._how = {"dtype": dtype, "precision": precision}
        Hessian(1, device="cpu", **self._how)  # refuses what it does not know, before any forward
        # Layers side by side, as those of an attention, read one tensor: its sum is made once.
        self._last = None

    def __getitem__(self, name):
        if name not in self._held:
            nearest = difflib.get_close_matches(str(name), self._held, n=1, cutoff=0.0)
            raise KeyError(f"found no layer {name!r} among those collected (nearest: {nearest[0]})")
        if self._held[name] is None:
            raise ValueError(
                f"{name}: found that this layer has not run, expected a forward through it"
            )
        return self._held[name]

    def __contains__(self, name):
        return name in self._held

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)

    def __repr__(self):
        ran = sum(hessian is not None for hessian in self._held.values())
        return f"<Hessians of {len(self)} layers, of which {ran} have run>"

    def _hook(self, name):
        def add(layer, args, kwargs):
            X = (*args, *kwargs.values())[0]
            if not X.numel():
                return
            with validation.naming(name), arrays.stream_of(X):
                part = self._sum(X)
                if self._held[name] is None:
                    self._held[name] = self._empty(part.K, X)
                self._held[name].merge(part)

        return add

    def _sum(self, X):
        # Tensors of inference mode do not tell whether they were changed in place.
        version = None if X.is_inference() else X._version
        if self._last is not None and version is not None:
            tensor, last, part = self._last
            if tensor() is X and last == version:
                return part
        part = self._empty(X.shape[-1], X)
        part.update(X[None] if X.ndim == 1 else X)
        self._last = weakref.ref(X), version, part
        return part

    def _empty(self, K, X):
        return Hessian(K, device="cuda" if X.is_cuda else "cpu", **self._how)
