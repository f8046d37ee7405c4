"""What options of whole models may be, and how much they take where nothing is said.

Here, since `cuobs.models` can't be imported where its packages are not installed.
"""

__all__ = ["ROTATION_STEPS", "ROTATION_WINDOWS", "SAMPLES", "SAVE_DTYPES", "SCORES", "TARGETS"]

# Shares of a target, dense and residual, see `cuobs.models.pruning.targets`; "mixed" leaves both
# to the caller.
TARGETS = {"mixed": None, "pruned": (0.0, 0.0), "dense": (1.0, 0.0)}
# What weights may be written in.
SAVE_DTYPES = ("float16", "bfloat16", "float32")
# Of a rotation, see `cuobs.models.rotate`: the score of a weight w in column j is w² / C_jj with C
# the inverse of the damped H, which is lost when all others may make up for it; or w² H_jj.
SCORES = ("compensated", "activations")
# Steps of Adam that learn a rotation.
ROTATION_STEPS = 100
# Calibration windows, to prune and to learn a rotation.
SAMPLES, ROTATION_WINDOWS = 128, 64
