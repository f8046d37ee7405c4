"""
Loss against time
=================

Every method on 96 rows of the example layer, 2:4. Down and to the left is better.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import cuobs
import cuobs.plotting

folder = Path("../../examples/smollm2")
W = np.load(folder / "W.npy")[:96]
X = np.load(folder / "X.npy")
table = cuobs.compare(W, X, pattern="2:4")

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
points = [(row.seconds, 100 * row.loss, row.method) for row in table]
axes.scatter([x for x, _, _ in points], [y for _, y, _ in points])
axes.set(xscale="log", xlabel="seconds", ylabel="relative output loss, %")
axes.margins(0.15)
axes.grid(alpha=0.25)
cuobs.plotting.label_points(axes, points)
