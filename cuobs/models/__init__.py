"""Whole models: prune a causal language model block by block, measure it, and save it."""

from cuobs.extras import hint

try:
    import safetensors  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"cuobs.models needs {error.name}, which is not installed: {hint('model')}"
    ) from None

from cuobs.models.calibration import load_tokens, tokenize
from cuobs.models.checkpoint import load_masks
from cuobs.models.distillation import DistillationReport, distill
from cuobs.models.evaluate import Agreement, agreement, perplexity
from cuobs.models.folder import evaluate_folder, prune_folder
from cuobs.models.loading import load_model
from cuobs.models.prune import prune_model
from cuobs.models.report import BlockReport, LayerReport, ModelReport
from cuobs.models.rotation import RotationReport, rotate
from cuobs.models.rotation_folder import rotate_folder
from cuobs.models.speedup import speedup
from cuobs.models.training import KeepZeros
from cuobs.models.writing import write_windows
from cuobs.torch import keep_zeros, merge_masked

__all__ = [
    "Agreement",
    "BlockReport",
    "DistillationReport",
    "KeepZeros",
    "LayerReport",
    "ModelReport",
    "RotationReport",
    "agreement",
    "distill",
    "evaluate_folder",
    "keep_zeros",
    "load_masks",
    "load_model",
    "load_tokens",
    "merge_masked",
    "perplexity",
    "prune_folder",
    "prune_model",
    "rotate",
    "rotate_folder",
    "speedup",
    "tokenize",
    "write_windows",
]
