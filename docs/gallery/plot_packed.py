"""
Where a packed weight's bytes lie
=================================

A tile of a 2:4 weight, 16 rows of 64 columns: which lane of a warp holds each element, where the
kept values of the first lanes are stored, and the bits of one lane's index word.
"""

import matplotlib.pyplot as plt
import numpy as np

import cuobs

W = np.zeros((16, 64), np.float32)
rng = np.random.default_rng(0)
kept = np.argsort(rng.random((16, 16, 4)), axis=2)[..., :2]
# Each kept element holds the number of its place, so that it can be found again.
places = np.arange(1, 1025).reshape(16, 16, 4)
np.put_along_axis(W.reshape(16, 16, 4), kept, np.take_along_axis(places, kept, 2), 2)
packed = cuobs.pack(W, "2:4")
values = packed.values[0, 0].astype(int)  # (loads, lanes, 8)
lanes = np.zeros((16, 64))
for _, lane, _ in np.ndindex(values.shape):
    for place in values[:, lane].ravel():
        row, column = divmod(place - 1, 64)
        lanes[row, column // 4 * 4 : column // 4 * 4 + 4] = lane

figure, (tile, memory) = plt.subplots(
    2, 1, figsize=(11, 6.5), layout="constrained", height_ratios=(3, 2)
)
tile.imshow(lanes % 4 + lanes // 4 % 2 * 4, cmap="Set3", vmin=0, vmax=11)
for row in range(16):
    for group in range(4):
        tile.text(16 * group + 7.5, row, f"lane {lanes[row, 16 * group]:.0f}", ha="center",
                  va="center", fontsize=6)  # fmt: skip
    for column in np.flatnonzero(W[row]):
        tile.plot(column, row, "k.", markersize=2)
tile.set(title="a tile: dots are kept, a lane holds four scopes in each of two rows",
         xticks=range(0, 64, 16), yticks=range(0, 16, 8))  # fmt: skip

memory.axis("off")
table = []
for load in range(2):
    for lane in (0, 1, 4):
        elements = [f"{(v - 1) // 64},{(v - 1) % 64}" for v in values[load, lane]]
        table.append([f"values[0, 0, {load}, {lane}]", *elements])
word = int(packed.index[0, 0, 0, 0]) & 0xFFFFFFFF
table.append(["index[0, 0, 0, 0], 4 bits each", *(f"{word >> 4 * i & 15}" for i in range(8))])
shown = memory.table(table, loc="center", cellLoc="center",
                     colWidths=[0.28] + [0.09] * 8)  # fmt: skip
shown.auto_set_font_size(False)
shown.set_fontsize(8)
memory.set_title("in memory: row,column of each value; masks of lane 0's scopes, row 0 and row 8")
