"""Keep the zeros of a pruned model while anybody's loop trains it."""

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Kept:
    """Weights whose zeros are held until `remove`; made by `keep_zeros`."""

    def __init__(self, weights, masks, optimizer=None):
        self._weights = weights
        self._ids = {id(weight) for weight in weights.values()}
        self._pruned = {name: ~masks[name].to(weight.device) for name, weight in weights.items()}
        self._handles = [
            _on_gradient(weight, self._masked(name)) for name, weight in weights.items()
        ]
        if optimizer is None:
            self._handles.append(register_optimizer_step_post_hook(self._stepped))
            return
        try:
            self._handles.append(optimizer.register_step_post_hook(self._stepped))
        except AttributeError:  # not one of PyTorch's, or a wrapper around one
            self._handles.append(_AfterStep(optimizer, self.restore))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    @torch.no_grad()
    def restore(self):
        """Set every pruned weight to zero."""
        for name, weight in self._weights.items():
            weight.data.masked_fill_(self._pruned_of(name, weight), 0)

    def remove(self):
        """Set them to zero once more and hold them no longer."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _masked(self, name):
        def hook(gradient):
            if gradient.layout != torch.strided:
                return gradient  # `restore` follows the step
            # A gradient that is no number must not pass either, so this is no product.
            return gradient.masked_fill(self._pruned_of(name, gradient), 0)

        return hook

    def _stepped(self, optimizer, *_):
        own = (p for group in optimizer.param_groups for p in group["params"])
        if any(id(parameter) in self._ids for parameter in own):
            self.restore()

    def _pruned_of(self, name, like):
        """Where a weight is pruned, on the device on which it lies now."""
        if self._pruned[name].device != like.device:
            self._pruned[name] = self._pruned[name].to(like.device)
        return self._pruned[name]


def _on_gradient(weight, hook):
    """Register a hook on a parameter's gradient, one that is to learn only later too."""
    learns = weight.requires_grad
    weight.requires_grad_(True)
    try:
        return weight.register_hook(hook)
    finally:
        weight.requires_grad_(learns)


class _AfterStep:
    """Call a function after each step of an optimizer that is not one of PyTorch's."""

    def __init__(self, optimizer, function):
        self._optimizer, self._own = optimizer, optimizer.__dict__.get("step")
        step = optimizer.step

        def stepped(*args, **kwargs):
            result = step(*args, **kwargs)
            function()
            return result

        optimizer.step = stepped

    def remove(self):
        if self._own is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._own


def keep_zeros(model: Any, optimizer: Any = None, *, masks: dict | None = None) -> Kept:
    """Hold a pruned model's zeros in any training loop, from now until the end of a ``with``.

    Gradients are zero where a weight is pruned, so that neither clipping nor an optimizer's
    moments see them; and after each step of an optimizer the pruned weights are set to zero again,
    whatever moved them: momentum from before, an update that mixes the elements of a matrix, a
    fused kernel.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters may move to another device or be cast in place, but not be replaced
        (as a wrapper that shards or flattens them does).
    optimizer : optional
        Whose steps are watched: one of ``torch.optim``, or anything with ``step``. By default all
        optimizers of PyTorch's class that hold a pruned weight of the model are.
    masks : dict of tensor of bool, optional
        By the name of a module or of a parameter, in the form of its weight, True = kept, as
        `cuobs.models.load_masks` gives them. By default the zeros that linears have now:
        ``nn.Linear`` and ``Conv1D`` weights that hold some, but not only zeros.

    Returns
    -------
    Kept
        A context manager that is active already: without ``with``, call ``remove`` when training
        has ended.

    Raises
    ------
    ValueError, TypeError
        There is nothing to hold, or a mask does not fit its weight.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> with keep_zeros(layer):
    ...     layer(torch.ones(4)).sum().backward()
    ...     optimizer.step()
    >>> (layer.weight != 0).tolist()
    [[True, False, False, True]]
    """
    weights, masks = pruned_weights(model) if masks is None else masked_weights(model, masks)
    if not weights:
        raise ValueError(
            f"model: found no zeros in the linears of {type(model).__name__}, expected a pruned "
            "model or masks"
        )
    if optimizer is not None and not hasattr(optimizer, "step"):
        raise TypeError(f"optimizer: found {type(optimizer).__name__}, expected one with step()")
    return Kept(weights, masks, optimizer)


def merge_masked(model: Any, masks: dict | None = None) -> Any:
    """Merge the adapters of a PEFT model into its pruned weights and keep their pattern.

    Merging adds a dense product to the weights, zeros included: what ``merge_and_unload`` alone
    gives is dense again. Here the part that falls on pruned weights is dropped, so that the result
    is not quite the function that was trained. It is when each step trains the masked sum; where
    that matters train the weights themselves with `keep_zeros`.

    Parameters
    ----------
    model : peft.PeftModel
        With adapters on pruned linears.
    masks : dict of tensor of bool, optional
        By the name that a module has in the merged model, as in `keep_zeros`; by default the zeros
        of the weights under the adapters.

    Returns
    -------
    torch.nn.Module
        The merged model, changed in place.

    Raises
    ------
    ValueError, TypeError
        The model has no adapters or no zeros, or a mask is wrong; nothing is merged then.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TypeError(f"model: found {type(model).__name__}, expected one of PEFT with adapters")
    if masks is None:
        weights, masks = pruned_weights(model)
        if not weights:
            raise ValueError("model: found no zeros under its adapters, expected a pruned model")
        merged = model.merge_and_unload()
    else:
        # Before anything is merged: PEFT holds a layer's own weight in a base_layer.
        base = model.get_base_model() if hasattr(model, "get_base_model") else model.model
        own = base.named_parameters(remove_duplicate=False)
        _checked_masks(masks, {name.replace(".base_layer.", "."): weight for name, weight in own})
        merged = model.merge_and_unload()
        weights, masks = masked_weights(merged, masks)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.data.masked_fill_(~masks[name].to(weight.device), 0)
    return merged


def pruned_weights(model):
    """The weights of linears that hold zeros, but not only zeros, and their masks, by name."""
    weights, masks = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        if not module.weight.is_floating_point():
            continue  # codes of a quantised weight, where 0 is no zero
        mask = module.weight.detach() != 0
        if bool(mask.any()) and not bool(mask.all()):
            key = f"{name}.weight" if name else "weight"
            weights[key], masks[key] = module.weight, mask
    return weights, masks


def masked_weights(model, masks):
    """The weights that masks name, and the masks, by the weights' names and in their order."""
    return _checked_masks(masks, dict(model.named_parameters(remove_duplicate=False)))


def _checked_masks(masks, parameters):
    """The same, of parameters by their names."""
    if not isinstance(masks, dict):
        raise TypeError(
            f"masks: found {type(masks).__name__}, expected a dict of them by the names of modules"
        )
    weights, found = {}, {}
    for name, mask in sorted(masks.items()):
        key = name if name in parameters else f"{name}.weight"
        if key not in parameters:
            raise ValueError(f"masks: found {name!r}, expected names of the model's modules")
        mask, weight = torch.as_tensor(mask), parameters[key]
        if not weight.is_floating_point():
            raise TypeError(f"masks: found {weight.dtype} in {key}, expected floating point")
        if mask.dtype != torch.bool:
            raise TypeError(f"masks: found {mask.dtype} for {name}, expected bool (True = kept)")
        if mask.shape != weight.shape:
            raise ValueError(
                f"masks: found shape {tuple(mask.shape)} for {name}, expected "
                f"{tuple(weight.shape)} as its weight"
            )
        weights[key], found[key] = weight, mask
    return weights, found
