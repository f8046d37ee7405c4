"""Weights that can be changed in place, and those that can not."""

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["fault_of"]


def fault_of(module, materialised=True):
    """What is wrong with the weight of a linear and the way out, or None."""
    if hasattr(module, "weight_orig"):
        return (
            "under a mask of torch.nn.utils.prune",
            "make it permanent first, torch.nn.utils.prune.remove(module, 'weight')",
        )
    if parametrize.is_parametrized(module, "weight"):
        return (
            "under a parametrization",
            "take it off first, torch.nn.utils.parametrize.remove_parametrizations(module, "
            "'weight')",
        )
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "with a weight that is computed from others (as weight_norm does)",
            "take that off first, torch.nn.utils.remove_weight_norm(module)",
        )
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return (
            f"with a weight of type {type(weight).__name__}",
            "load the model whole, neither quantized nor distributed",
        )
    if materialised and weight.is_meta:
        return (
            "on the meta device, as offloaded weights are",
            "load the model whole, without device_map and without offloading",
        )
    if weight.is_inference():
        return "made inside torch.inference_mode", "load the model outside of it"
    return None
