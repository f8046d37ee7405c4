"""Loss against time, published and ours, from results.json.

    python -m perf.published picture perf/published/results.json perf/published/results.png

The layers differ, so each loss is set over that of SparseGPT on the same layer. A method's name
stands beside its variant (splits, group, order, schedule) that loses least.
"""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cuobs.plotting import label_points
from perf.published import from_results
from perf.published.rows import PATTERNS, ROWS


def points(results, pattern):
    """(seconds, loss over SparseGPT's, method) of the published rows and of ours, all rows of W."""
    rows = [row for row in ROWS if row.pattern == pattern and not row.first]
    measured = [
        (record["seconds"], record["loss"], row.method + " + exact" * ("refine" in row.options))
        for row in rows
        if "loss" in (record := results["rows"].get(row.name, {})) and row.method != "resolve"
    ]
    published = [
        (row.published[1], row.published[0], row.method)
        for row in rows
        if row.published and row.published[1] > 0
    ]
    return _over_sparsegpt(published), _over_sparsegpt(measured)


def _over_sparsegpt(found):
    base = next((loss for _, loss, method in found if method == "sparsegpt"), None)
    return [(seconds, loss / base, method) for seconds, loss, method in found] if base else []


def _named_once(found):
    """The same points; only the one with the lowest loss of each method keeps its name."""
    best = {}
    for point in sorted(found, key=lambda point: -point[1]):
        best[point[2]] = point
    return [point if best[point[2]] is point else (*point[:2], "") for point in found]


def draw(results, path):
    """Draw results into a file, one panel a pattern."""
    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, pattern in zip(panels.flat, PATTERNS, strict=True):
        published, ours = points(results, pattern)
        for found, colour, label in (
            (published, "tab:orange", "published"),
            (ours, "tab:blue", f"cuobs, {results['device']}"),
        ):
            if found:
                axes.scatter(*list(zip(*found, strict=True))[:2], s=24, c=colour, label=label)
        axes.set(title=pattern, xscale="log")
        axes.margins(x=0.1, y=0.1)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_formatter("{x:g}")
    panels[0, 0].legend(fontsize=9)
    figure.supxlabel("seconds from the Hessian on")
    figure.supylabel("relative output loss over that of SparseGPT")
    for axes, pattern in zip(panels.flat, PATTERNS, strict=True):
        published, ours = points(results, pattern)
        label_points(axes, _named_once(published) + _named_once(ours))
    figure.savefig(path)


def main(argv):
    from_results(argv, "picture", draw)
