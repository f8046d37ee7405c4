"""
What the patterns look like
===========================

One colour for each block of a scope, and the mask that a random weight gets: dark is kept.
"""

import matplotlib.pyplot as plt
import numpy as np

import cuobs

rng = np.random.default_rng(0)
W, X = rng.standard_normal((16, 32)), rng.standard_normal((256, 32))
patterns = cuobs.patterns()
figure, panels = plt.subplots(len(patterns), 2, figsize=(9, 9), layout="constrained")
for (blocks, kept), (name, pattern) in zip(panels, patterns.items(), strict=True):
    layout = pattern.compile(*W.shape)
    picture = np.full(W.shape, np.nan)
    picture[np.ix_(layout.row_order[0], layout.column_order[0])] = layout.blocks
    blocks.imshow(picture, cmap="tab10", vmin=0, vmax=9)
    blocks.set_title(f"{name}: the blocks of one scope", fontsize=9)
    kept.imshow(~cuobs.prune(W, X, pattern=name, method="sparsegpt").mask, cmap="gray")
    kept.set_title(f"{name}: what sparsegpt keeps", fontsize=9)
for axes in panels.flat:
    axes.set(xticks=[], yticks=[])
