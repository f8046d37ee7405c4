"""What needs PyTorch and no transformers: training and running pruned layers."""

from cuobs.extras import hint

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"cuobs.torch needs {error.name}, which is not installed: {hint('model')}"
    ) from None

from cuobs.torch.keep_zeros import keep_zeros, merge_masked
from cuobs.torch.packed import PackedLinear

__all__ = ["PackedLinear", "keep_zeros", "merge_masked"]
