"""A report for people: lines of a table, closing lines, a picture."""

import os

from cuobs import files
from cuobs.arrays import size_text
from cuobs.models.report import Agreement
from cuobs.plotting import check_picture
from cuobs.recipe import Recipe, methods

__all__ = ["outcome", "picture", "summary", "target_text", "time_text"]


def summary(report):
    """Lines of a table: what there is to say of the steps and layers, besides the `outcome`."""
    losses = [row.loss for row in report.layers if row.loss is not None]
    whole = [row.name for row in report.layers if row.loss is None]
    peak, predicted = size_text(report.memory_peak), size_text(report.memory_predicted)
    lines = [] if report.rotation is None else report.rotation.summary()
    memory = "memory of both" if lines else "memory of pruning"
    for name, near in report.agreement.items():
        lines.append(("to the dense model", f"{name}: {Agreement(**near).text()}"))
    if report.distillation is not None:
        lines += report.distillation.summary()
    if losses:
        mean = sum(losses) / len(losses)
        lines.append(("loss a layer", f"{mean:.2%} mean, {max(losses):.2%} largest"))
    lines += [
        ("zeros", f"{report.sparsity:.2%} of the weights in the blocks"),
        ("left as they are", f"{len(whole)} of {len(report.layers)} linears in the blocks"),
        (memory, f"{peak} ({predicted} predicted)"),
    ]
    width = max(len(name) for name, _ in lines)
    return [f"{name:<{width}}  {value}" for name, value in lines]


def outcome(report):
    """Three lines: what was lost and won, what it cost, and what to try next."""
    found = [f"{name}: perplexity {_perplexities(report, name)}" for name in report.perplexity]
    if not found:
        drift = next((b.drift for b in report.blocks[::-1] if b.drift is not None), None)
        found = ["not measured" if drift is None else f"drift {drift:.1%} behind the last block"]
    steps = [s for s in (report, report.rotation, report.distillation) if s is not None]
    seconds = report.whole_seconds or sum(step.seconds for step in steps)
    peak = max(report.whole_peak, *(step.memory_peak for step in steps))
    return [
        f"lost and won  {'; '.join(found)}",
        f"cost          {time_text(seconds)}, {size_text(peak)} at most",
        f"to try next   {_next(report)}",
    ]


def _next(report):
    """The step that is most likely to win more, of those that were not taken."""
    settings, done = report.settings, report.distillation
    if settings["target"] == "pruned":
        return "--target mixed, which costs a second stream of hidden states"
    used = methods().get(settings.get("method"))
    if used and used.operations and not any(used.operations):
        return f"--method {Recipe.method}, {methods()[Recipe.method].summary}"
    if done is None:
        return "--distill 2 --distill-calibration self:1024, windows of its own"
    if not done.kept:
        return "a lower --distill-rate: what distillation did was taken back"
    if settings.get("rotate") is False:
        return "--rotate, where the model's norms let another basis through"
    if not report.perplexity:
        return "--eval F, a text unlike the calibration, to see what is left of the model"
    return f"more windows of the model's own: {done.windows + done.aside} were seen"


def _perplexities(report, name):
    before, after = report.perplexity[name]
    if name not in report.perplexity_pruned:
        return f"{before:.2f} dense, {after:.2f} pruned"
    pruned = report.perplexity_pruned[name]
    return f"{before:.2f} dense, {pruned:.2f} pruned, {after:.2f} distilled"


def time_text(seconds):
    """Seconds for people."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def target_text(settings):
    """A target in words."""
    if settings["target"] != "mixed":
        return settings["target"]
    shares = (_share(settings[key]) for key in ("dense_share", "residual_share"))
    return "mixed, dense share {}, residual share {}".format(*shares)


def _share(value):
    first, last = value
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


def picture(report, path, force=False):
    """Draw the loss of every layer by block, one line for each linear of a block.

    Parameters
    ----------
    report : ModelReport
    path : str
        .png, .svg or .pdf.
    force : bool
        Overwrite an existing file.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = {}
    for block in report.blocks:
        for label, row in zip(block.labels(), block.layers, strict=True):
            if row.loss is not None:
                lines.setdefault(label, []).append((block.index, 100 * row.loss))
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=kind)
    axes.set_xlabel("block")
    axes.set_ylabel("relative output loss, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with files.replacing(path, force) as f:
        figure.savefig(f, format=os.path.splitext(path)[1][1:].lower())
