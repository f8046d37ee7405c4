"""Sums in one order, so that learning gives the same bits again."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def repeatable(device):
    """Deterministic kernels meanwhile, and on a GPU tf32 for products in float32."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write all memory twice
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.set_float32_matmul_precision(before[1])
