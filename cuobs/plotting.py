"""Pictures, with matplotlib (the extra ``plot``)."""

import importlib.util
import itertools
import os

from cuobs import extras, files

__all__ = ["FORMATS", "check_picture", "label_points", "pareto"]

FORMATS = (".png", ".svg", ".pdf")

# Where a name may stand: points from its mark, and which way.
REACHES = (6, 16, 28, 42)
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))


def check_picture(path):
    """Refuse a picture that could not be drawn, before any work."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: found {suffix or 'no ending'}, expected {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f"{path}: found no matplotlib to draw it with: {extras.hint('plot')}"
        )


def pareto(table, path, force=False):
    """Draw loss against time, one mark a method with its name beside it.

    Parameters
    ----------
    table : list of Row
        As `cuobs.compare` gives it.
    path : str
        .png, .svg or .pdf.
    force : bool
        Overwrite an existing file.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window, no state
    axes = figure.add_subplot()
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
    with files.replacing(path, force) as f:
        figure.savefig(f, format=os.path.splitext(path)[1][1:].lower())


def label_points(axes, points, line=()):
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
