"""Pictures, with matplotlib (the extra ``plot``)."""

import importlib.util
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuobs import arrays, extras, files

__all__ = [
    "check_picture",
    "label_points",
    "mask_figure",
    "new_figure",
    "pareto",
    "patterns_figure",
    "save",
]

FORMATS = (".png", ".svg", ".pdf")
# Rows and columns of a mask that are drawn element by element, and cells of a whole weight.
CORNER = (24, 48)
CELLS = (128, 128)

# Where a name may stand: points from its mark, and which way.
REACHES = (6, 16, 28, 42)
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))


def check_picture(path: str) -> None:
    """Refuse a picture that could not be drawn, before any work."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: found {suffix or 'no ending'}, expected {', '.join(FORMATS)}")
    check_matplotlib(path)


def check_matplotlib(name):
    """Refuse to draw something where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{name}: found no matplotlib to draw it with: {extras.hint('plot')}")


def mask_figure(weight: Any, mask: Any = None, pattern: Any = None, title: str = "") -> Any:
    """A corner of a mask, element by element, and the whole weight from afar.

    Parameters
    ----------
    weight : array, shape (M, K)
        Its magnitudes are the colours.
    mask : array of bool, shape (M, K), optional
        True = kept; what is not zero by default.
    pattern : Pattern, optional
        Whose first scope is framed.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    weight = np.abs(arrays.to_numpy(arrays.receive(weight, "W")).astype("float32"))
    kept = weight != 0 if mask is None else arrays.to_numpy(arrays.receive(mask, "mask"))
    M, K = (min(n, most) for n, most in zip(weight.shape, CORNER, strict=True))
    figure = new_figure(10, 4)
    near, far = figure.subplots(1, 2, width_ratios=(1.6, 1))
    figure.suptitle(title, fontsize=10)
    shown = np.where(kept, weight, np.nan)[:M, :K]
    near.imshow(shown, cmap="viridis", interpolation="nearest")
    near.set_title(f"rows 0 to {M - 1}, columns 0 to {K - 1}: kept ones by size", fontsize=9)
    if pattern is not None:
        layout = pattern.compile(*weight.shape)
        for row, column in itertools.product(layout.row_order[0], layout.column_order[0]):
            if row < M and column < K:
                near.add_patch(_frame(row, column))
    means = _means(np.square(weight)) ** 0.5
    image = far.imshow(means, cmap="magma", aspect="auto", extent=(0, weight.shape[1],
                                                                   weight.shape[0], 0))
    far.set_title(f"all {weight.shape[0]} x {weight.shape[1]}: root mean square", fontsize=9)
    figure.colorbar(image, ax=far)
    for axes in (near, far):
        axes.set(xlabel="inputs", ylabel="outputs")
    return figure


def _frame(row, column):
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=0.8)


def _means(array):
    """Means over cells of an array, of which there are few enough to be seen."""
    for axis, most in enumerate(CELLS):
        starts = np.linspace(0, array.shape[axis], min(most, array.shape[axis]) + 1).astype(int)
        sums = np.add.reduceat(array, starts[:-1], axis=axis, dtype="float64")
        array = sums / np.expand_dims(np.diff(starts), 1 - axis)
    return array


def patterns_figure(patterns: list) -> Any:
    """One scope of each pattern where it lies in a weight, a colour a block.

    Parameters
    ----------
    patterns : list of Pattern

    Returns
    -------
    matplotlib.figure.Figure
    """
    layouts = [pattern.compile(*pattern.smallest()) for pattern in patterns]
    heights = [int(layout.row_order[0].max()) + 1 for layout in layouts]
    width = max(16, *(int(layout.column_order[0].max()) + 1 for layout in layouts))
    figure = new_figure(0.4 * width + 1, 0.4 * (sum(heights) + 2 * len(patterns)) + 0.3)
    panels = figure.subplots(len(patterns), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, pattern, layout, height in zip(panels, patterns, layouts, heights, strict=True):
        picture = np.full((height, width), np.nan)
        places = np.ix_(layout.row_order[0], layout.column_order[0])
        picture[places] = layout.blocks % 20
        axes.imshow(picture, cmap="tab20", vmin=0, vmax=19)
        axes.set_title(f"{pattern.label}: {pattern.keeps}", fontsize=9, loc="left")
        axes.set_xticks(np.arange(0, width, 4))
        axes.set_yticks(sorted(layout.row_order[0]))
        axes.set_xticks(np.arange(0.5, width), minor=True)
        axes.set_yticks(np.arange(0.5, height), minor=True)
        axes.grid(which="minor", color="0.85", linewidth=0.5)
        axes.tick_params(which="both", length=0, labelsize=7)
    return figure


def pareto(table: Any, path: str, force: bool = False, title: str | None = None) -> None:
    """Draw loss against time, one mark a method with its name beside it.

    Parameters
    ----------
    table : cuobs.comparing.Table
        As `cuobs.compare` gives it.
    path : str
        .png, .svg or .pdf.
    force : bool
        Overwrite an existing file.
    title : str, optional
        The size of the layer and the pattern by default.
    """
    check_picture(path)
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    if title is None:
        title = f"{table.shape[0]} x {table.shape[1]}, {table.pattern.label}"
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("relative output loss, %")
    points = [(row.seconds, 100 * row.loss, row.method) for row in table]
    front = _frontier(points)
    axes.plot(*zip(*front, strict=True), color="0.8", zorder=1)
    axes.scatter([p[0] for p in points], [p[1] for p in points], s=28, zorder=2)
    axes.margins(x=0.15, y=0.12)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_formatter("{x:g}")
    label_points(axes, points, front)
    save(figure, path, force)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    check_matplotlib("a picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window, no state
    return figure


def save(figure: Any, path: str, force: bool = False) -> None:
    """Write a figure as .png, .svg or .pdf, whole or not at all."""
    check_picture(path)
    with files.replacing(path, force) as f:
        figure.savefig(f, format=os.path.splitext(path)[1][1:].lower())


def label_points(axes: Any, points: list, line: Sequence = ()) -> list:
    """Write the names beside (x, y, name) marks, where they hide no other name, mark or line."""
    from matplotlib.text import Text

    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # else saving moves the marks again
    renderer = figure.canvas.get_renderer()
    half = 5 * figure.dpi / 72
    frame = axes.get_window_extent().extents
    marks = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [(x - half, y - half, x + half, y + half) for x, y in marks]
    corners = axes.transData.transform(line) if len(line) else []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        taken.append((min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2))
    texts = []
    for number, (x, y, name) in enumerate(points):
        tried = []
        for reach, (dx, dy) in itertools.product(REACHES, DIRECTIONS):
            text = axes.annotate(
                name, (x, y), (reach * dx, reach * dy), textcoords="offset points", fontsize=9,
                ha={1: "left", -1: "right", 0: "center"}[dx],
                va={1: "bottom", -1: "top", 0: "center"}[dy],
                arrowprops={"arrowstyle": "-", "color": "0.6", "lw": reach > REACHES[0] and 0.6},
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).extents  # its own counts the arrow too
            clashes = sum(_overlap(box, other) for other in taken) + (not _within(box, frame))
            others = [_distance(box, mark) for i, mark in enumerate(marks) if i != number]
            tried.append(((clashes, reach, -min(others, default=0)), text, box))
        chosen = min(tried, key=lambda t: t[0])
        for candidate in tried:
            if candidate is not chosen:
                candidate[1].remove()
        taken.append(chosen[2])
        texts.append(chosen[1])
    return texts


def _distance(box, point):
    (x0, y0, x1, y1), (x, y) = box, point
    return max(x0 - x, x - x1, 0) ** 2 + max(y0 - y, y - y1, 0) ** 2


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _within(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def _frontier(points):
    """The corners of the steps from one method to the next slower one that loses less."""
    corners = []
    for x, y, _ in sorted(points):
        if not corners:
            corners = [(x, y)]
        elif y < corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return corners
