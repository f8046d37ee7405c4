"""Whole models: prune a causal language model block by block, measure it, and save it.

What is here is imported when it is first asked for: what a command refuses, it refuses before
PyTorch and transformers are.
"""

import importlib
import importlib.util

from cuobs.extras import hint
from cuobs.models.packed import registration

_HOMES = {
    "cuobs.models.tokens.calibration": ("load_tokens", "tokenize"),
    "cuobs.models.checkpoints.checkpoint": ("load_masks",),
    "cuobs.models.distilling.distillation": ("distill",),
    "cuobs.models.evaluate": ("agreement", "perplexity"),
    "cuobs.models.folder": ("Evaluation", "evaluate_folder", "prune_folder", "write_calibration"),
    "cuobs.models.checkpoints.loading": ("load_model",),
    "cuobs.models.packed.packing": ("Packing", "pack_folder", "pack_model", "unpack_folder"),
    "cuobs.models.pruning.prune": ("prune_model",),
    "cuobs.models.packed.quantizer": ("PackedConfig",),
    "cuobs.models.report": (
        "Agreement", "BlockReport", "DistillationReport", "LayerReport", "ModelReport",
        "RotationReport", "read_report",
    ),
    "cuobs.models.rotating.rotation": ("rotate",),
    "cuobs.models.rotating.rotation_folder": ("rotate_folder",),
    "cuobs.models.packed.timing": ("speedup",),
    "cuobs.models.distilling.training": ("KeepZeros",),
    "cuobs.models.checkpoints.verifying": ("LayerVerification", "verify_folder"),
    "cuobs.models.tokens.writing": ("write_windows",),
    "cuobs.torch": ("keep_zeros", "merge_masked"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)

for _needed in ("safetensors", "torch", "transformers"):
    if importlib.util.find_spec(_needed) is None:
        raise ImportError(f"cuobs.models needs {_needed}, which is not installed: {hint('model')}")


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'cuobs.models' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__():
    return [*globals(), *__all__]


registration.register()
