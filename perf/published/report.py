"""RESULTS.rst from results.json: the published table and ours side by side.

    python -m perf.published report perf/published/results.json perf/RESULTS.rst

Only what stands between the two marks in RESULTS.rst is written anew.
"""

from pathlib import Path

from cuobs.comparing import rst_table
from perf.published import from_results
from perf.published.rows import PATTERNS, ROWS
from perf.published.stages import table

BEGIN, END = ".. begin measured", ".. end measured"
TEMPLATE = Path(__file__).parents[1] / "RESULTS.rst"


def write(results, path):
    """Fill in a copy of RESULTS.rst."""
    before, _, rest = TEMPLATE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{render(results)}\n\n{END}{after}")


def render(results):
    """The measured part."""
    parts = [_facts(results)]
    if judged(results):
        parts += ["Targets\n-------", _targets(results)]
    for pattern in PATTERNS:
        title = f"{pattern}, published and ours"
        parts += [title + "\n" + "-" * len(title), _side_by_side(results, pattern)]
    parts += _stages(results)
    return "\n\n".join(parts)


def judged(results):
    """Whether the layer is the one that targets and losses are known for."""
    return results["layer"] == "seven layers"


def measured(row, record, judge):
    """A row's figures as text: loss, seconds, and whether they are as they should be."""
    cells = []
    if "loss" in record:
        met = row.loss_is_met(record["loss"]) if judge else None
        cells.append(f"{record['loss']:.3f} %{_verdict(met)}")
    met = record["seconds"] <= row.target if judge and row.target else None
    cells.append(f"{record['seconds']:.4f} s{_verdict(met)}")
    if record.get("peak"):
        cells.append(f"{record['peak'] / 2**30:.2f} GiB")
    return cells


def _verdict(met):
    return {None: "", True: " ok", False: " MISSED"}[met]


def _facts(results):
    ceilings = ", ".join(
        f"{name} {value:.3g} {'GB/s' if name == 'copy' else 'TFLOP/s'}"
        for name, value in results["ceilings"].items()
    )
    return "\n".join(
        [
            f":Device: {results['device']} (measured ceilings: {ceilings})",
            f":Date: {results['date']}",
            f":Layer: {results['layer']}, {results['shapes']}",
            f":Command: ``{results['command']}``",
        ]
    )


def _targets(results):
    header = ("row", "package s", "target s", "aim s", "ours s", "loss %", "required", "GiB")
    lines = []
    for row in ROWS:
        record = results["rows"].get(row.name)
        if not record or "error" in record:
            continue
        if not (row.target or row.loss or row.most):
            continue
        required = "-"
        if row.loss is not None:
            required = f"{row.loss:.2f} ± {row.within}"
        elif row.most is not None:
            required = f"≤ {row.most:.2f}"
        lines.append(
            (
                row.name,
                *map(_seconds, (row.package, row.target, row.aim, record["seconds"])),
                _percent(record.get("loss"), 3),
                required,
                f"{record['peak'] / 2**30:.1f}" if record.get("peak") else "-",
            )
        )
    return rst_table(header, lines)


def _side_by_side(results, pattern):
    """One pattern's table, losses also over that of SparseGPT on the same rows."""
    header = (
        "method", "published loss %", "/ sparsegpt", "published s",
        "our loss %", "/ sparsegpt", "our s", "times as fast",
    )  # fmt: skip
    rows = [row for row in ROWS if row.pattern == pattern and row.method != "gram"]
    losses = {name: record.get("loss") for name, record in results["rows"].items()}
    seconds = {name: record.get("seconds") for name, record in results["rows"].items()}
    reference = {row.first: row for row in rows if row.label == "sparsegpt"}
    lines = []
    for row in rows:
        published, taken = row.published or (None, None)
        base = reference.get(row.first)
        if published is None and losses.get(row.name) is None:
            continue
        lines.append(
            (
                row.label + (f", first {row.first} rows" if row.first else ""),
                _percent(published),
                _ratio(published, base and base.published and base.published[0]),
                _seconds(taken),
                _percent(losses.get(row.name)),
                _ratio(losses.get(row.name), base and losses.get(base.name)),
                _seconds(seconds.get(row.name)),
                f"{taken / seconds[row.name]:.3g}" if taken and row.name in seconds else "-",
            )
        )
    return rst_table(header, lines)


def _stages(results):
    """Where the time goes, for the rows that were profiled."""
    parts = []
    for row in ROWS:
        if spent := results["rows"].get(row.name, {}).get("stages"):
            lines = "\n".join("    " + line for line in table(spent)[:8])
            parts.append(f"{row.name}::\n\n{lines}")
    return ["Where the time goes\n-------------------", *parts] if parts else []


def _percent(loss, digits=2):
    return "-" if loss is None else f"{loss:.{digits}f}"


def _ratio(loss, base):
    return f"{loss / base:.3f}" if loss and base else "-"


def _seconds(value):
    return "-" if value is None else f"{value:.4g}" if value >= 100 else f"{value:.3g}"


def main(argv):
    from_results(argv, "report", write)
