"""The report of a pruned model as one page that needs nothing besides itself."""

from html import escape

import cuobs
from cuobs.arrays import size_text
from cuobs.models.summary import target_text, time_text
from cuobs.pattern import parse

__all__ = ["report_page"]

WORST = 10
# Steps of colour from no loss to the largest, and the width of one in the legend.
STEPS, SWATCH = 9, 18
# What the pictures' columns, one a block, may be wide, the width that they are to fill, the height
# of a row, and that of the line of drift.
NARROWEST, WIDEST, FULL, ROW, TALL = 12, 40, 980, 24, 120

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d232b; --soft: #5d6874;
  --line: #dfe3e7; --accent: #1f5fa8; --left: #e4e6e8; --code: #f3f4f5;
  --c0: #eef4fa; --c1: #d5e4f2; --c2: #b3d0e8; --c3: #86b5da; --c4: #5a98c8; --c5: #3a7ab5;
  --c6: #235f9c; --c7: #13467f; --c8: #092f5c; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2126; --ink: #e6e9ec;
  --soft: #98a3ae; --line: #313840; --accent: #7fb4ea; --left: #2d3339; --code: #23292f;
  --c0: #17324d; --c1: #1b4166; --c2: #205280; --c3: #2a669c; --c4: #3d7fb8; --c5: #5a99ce;
  --c6: #82b4de; --c7: #b0d0ec; --c8: #e3f0fb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .8rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.3rem; margin-top: 1.2rem; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 1rem;
  margin-top: 1.5rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1.1rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; white-space: nowrap; }
.tile span { color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-top: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .87rem; }
tbody th { font-weight: 500; min-width: 9rem; }
td.n, th.n { text-align: right; white-space: nowrap; }
.pairs th { width: 13rem; color: var(--soft); font-weight: 400; }
pre { background: var(--code); border-radius: 8px; padding: .8rem 1rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .87rem; }
code { font-size: .92em; overflow-wrap: anywhere; }
svg { display: block; } svg text { fill: var(--soft); font-size: 11px; }
svg text.name { fill: var(--ink); font-size: 12px; }
rect.left { fill: var(--left); } .drift { fill: none; stroke: var(--accent); stroke-width: 2; }
.dot { fill: var(--accent); } .grid { stroke: var(--line); }
"""


def report_page(report, title):
    """A report as one HTML page with its own style and pictures, and no program.

    Parameters
    ----------
    report : ModelReport
    title : str
        What the page is of: the folder's name.

    Returns
    -------
    str
    """
    settings = report.settings
    pattern = parse(settings["pattern_view"])
    lead = f"{settings['pattern']} ({pattern.keeps}) by {settings['method']}"
    source = str(report.protocol.get("source", ""))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(source)} pruned to {escape(lead)}</p>',
        _tiles(report),
        _section("Loss by block and layer", _heat(report)),
        _section("Drift of the hidden states", _drift(report)),
        _section(f"The {WORST} layers that lose most", _worst(report)),
        _section("Perplexity", _perplexity(report)),
        _section("Settings", _pairs(_settings(report))),
        _section("Protocol", _pairs(_protocol(report))),
        _section("Command", _command(report)),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body>\n<main>\n{body}\n<p class="soft">cuobs {escape(cuobs.__version__)}</p>\n</main>\n'
        "</body>\n</html>\n"
    )


def _section(title, content):
    return content and f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _tiles(report):
    losses = [row.loss for row in report.layers if row.loss is not None]
    tiles = [
        (f"{dense:.2f} → {pruned:.2f}", f"perplexity, {name}")
        for name, (dense, pruned) in report.perplexity.items()
    ]
    if losses:
        tiles.append((f"{sum(losses) / len(losses):.2%}", f"mean loss of {len(losses)} layers"))
    tiles += [
        (f"{report.sparsity:.2%}", "of the weights in the blocks are zero"),
        (
            time_text(report.whole_seconds or report.seconds),
            f"on {report.settings.get('device', '?')}, "
            f"{size_text(report.whole_peak or report.memory_peak)} at most",
        ),
    ]
    inner = "".join(f"<div class=tile><b>{escape(a)}</b><span>{escape(b)}</span></div>"
                    for a, b in tiles)  # fmt: skip
    return f"<div class=tiles>{inner}</div>"


def _grid(report):
    """The labels of each block's layers; where columns begin, and how wide each is."""
    labels = [block.labels() for block in report.blocks]
    left = 16 + max((7 * len(label) for block in labels for label in block), default=0)
    step = (FULL - left) // max(1, len(labels))
    return labels, max(left, 64), max(NARROWEST, min(WIDEST, step))


def _heat(report):
    """A cell for each layer: blocks from left to right, kinds of layers one below the other."""
    losses = [row.loss for row in report.layers if row.loss is not None]
    if not losses:
        return ""
    labels, left, step = _grid(report)
    kinds = list(dict.fromkeys(label for block in labels for label in block))
    most = max(losses) or 1.0
    bottom = ROW * len(kinds)
    width = max(left + step * len(labels), left + SWATCH * STEPS + 120)
    out = [_svg(width, bottom + 62, "Loss of each layer by block")]
    for y, kind in enumerate(kinds):
        out.append(f'<text class=name x="{left - 8}" y="{ROW * y + 16}" text-anchor="end">'
                   f"{escape(kind)}</text>")  # fmt: skip
    for x, (block, names) in enumerate(zip(report.blocks, labels, strict=True)):
        for row, name in zip(block.layers, names, strict=True):
            out.append(_cell(row, left + step * x, ROW * kinds.index(name), step, most))
    out += _ticks(report, left, step, bottom + 14)
    out += _scale(left, bottom + 28, most)
    return "".join((*out, "</svg>"))


def _cell(row, x, y, width, most):
    place = f'x="{x}" y="{y}" width="{width - 2}" height="{ROW - 2}" rx="2"'
    if row.loss is None:
        title = escape(f"{row.name}: {row.note}")
        return f"<rect class=left {place}><title>{title}</title></rect>"
    step = min(STEPS - 1, int(STEPS * row.loss / most))
    return (
        f'<rect {place} style="fill:var(--c{step})"><title>{escape(row.name)}: {row.loss:.2%}'
        "</title></rect>"
    )


def _scale(x, y, most):
    """What the colours stand for."""
    yield from (
        f'<rect x="{x + SWATCH * i}" y="{y}" width="{SWATCH}" height="10" '
        f'style="fill:var(--c{i})"/>'
        for i in range(STEPS)
    )
    end = x + SWATCH * STEPS
    yield f'<text x="{x}" y="{y + 24}">0</text>'
    yield f'<text x="{end}" y="{y + 24}" text-anchor="end">{most:.1%}</text>'
    yield f'<rect class=left x="{end + 22}" y="{y}" width="10" height="10" rx="2"/>'
    yield f'<text x="{end + 38}" y="{y + 9}">left as it is</text>'


def _ticks(report, left, step, y):
    """Numbers of some blocks, as the names of their layers have them."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**9) if step * n >= 26)
    for place, block in enumerate(report.blocks):
        if place % every == 0:
            x = left + step * place + step / 2 - 1
            yield f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{block.index}</text>'


def _drift(report):
    """A line of ‖h − ĥ‖ / ‖h‖ behind each block, under the columns of the map."""
    found = [(i, block.drift) for i, block in enumerate(report.blocks) if block.drift is not None]
    if len(found) < 2:
        return ""
    most = max(drift for _, drift in found) or 1.0
    _, left, step = _grid(report)
    width = left + step * len(report.blocks)
    out = [_svg(width, TALL + 30, "Drift behind each block")]
    for share in (0, 0.5, 1):
        y = 8 + TALL * (1 - share)
        out.append(f'<line class=grid x1="{left}" x2="{width}" y1="{y}" y2="{y}"/>'
                   f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share * most:.1%}</text>'
                   )  # fmt: skip
    points = [
        (left + step * i + step / 2 - 1, 8 + TALL * (1 - drift / most)) for i, drift in found
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    out.append(f'<polyline class=drift points="{path}"/>')
    for (i, drift), (x, y) in zip(found, points, strict=True):
        out.append(f'<circle class=dot cx="{x:.1f}" cy="{y:.1f}" r="3"><title>block '
                   f"{report.blocks[i].index}: {drift:.2%}</title></circle>")  # fmt: skip
    out += _ticks(report, left, step, TALL + 26)
    note = "‖h − ĥ‖ / ‖h‖ of the hidden states behind each block, h dense and ĥ pruned"
    return "".join((*out, "</svg>")) + f'<p class="soft">{note}</p>'


def _svg(width, height, label):
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    )


def _worst(report):
    rows = sorted((r for r in report.layers if r.loss is not None), key=lambda r: -r.loss)[:WORST]
    header = ["layer", "outputs × inputs", "loss", "zeros", "damping"]
    cells = [
        [row.name, f"{row.shape[0]} × {row.shape[1]}", f"{row.loss:.2%}", f"{row.sparsity:.2%}",
         "" if row.damp is None else f"{row.damp:g}"]
        for row in rows
    ]  # fmt: skip
    if any(row.note for row in rows):
        header.append("note")
        cells = [[*cell, row.note] for cell, row in zip(cells, rows, strict=True)]
    return rows and _table(header, cells, numbers=(1, 2, 3, 4))


def _perplexity(report):
    """Each text in a row: what the model said of it before and after."""
    shapes, before = report.protocol.get("evaluated", {}), report.perplexity_pruned
    header = ["text", "windows", "dense", "pruned", "times the dense"]
    if before:
        header[3:4] = ["pruned", "distilled"]
    if report.agreement:
        header += ["divergence", "same likeliest token"]
    rows = []
    for name, (dense, after) in report.perplexity.items():
        row = [name, f"{shapes[name][0]} of {shapes[name][1]} tokens" if name in shapes else ""]
        values = [dense, *([before.get(name)] if before else []), after]
        row += [*(_number(value, ".2f") for value in values), _number(after / dense, ".3f")]
        if report.agreement:
            found = report.agreement.get(name, {})
            row += [_number(found.get("divergence"), ".4f"), _number(found.get("same_top"), ".1%")]
        rows.append(row)
    return rows and _table(header, rows, numbers=range(2, len(header)))


def _number(value, form):
    """A number in a form; nothing where there is none."""
    return "" if value is None else format(value, form)


def _table(header, rows, numbers=()):
    def cell(tag, i, value):
        kind = " class=n" if i in numbers else ""
        return f"<{tag}{kind}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(header))
    body = "\n".join(
        "<tr>" + "".join(cell("th" if i == 0 else "td", i, v) for i, v in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _pairs(pairs):
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in pairs
    )
    return f"<table class=pairs><tbody>\n{rows}\n</tbody></table>"


def _settings(report):
    """Names and values of what decides the result, those that say nothing left out."""
    settings = dict(report.settings)
    yield "target", target_text(settings)
    for name in ("target", "dense_share", "residual_share"):
        settings.pop(name, None)
    off = tuple(f"{name}_" for name in ("tune", "distill", "rotate") if not settings.get(name))
    for name, value in settings.items():
        if value not in (None, {}, [], "") and not name.startswith(off):
            yield name.replace("_", " "), _plain(value)


def _protocol(report):
    for name, value in report.protocol.items():
        if name not in ("evaluated", "command") and value is not None:
            yield name.replace("_", " "), _plain(value)
    for name, values in (
        ("linears outside the blocks", report.left),
        ("tensors carried over", report.carried),
        ("files left out", [f"{file} ({why})" for file, why in report.left_out.items()]),
    ):
        if values:
            yield name, ", ".join(values)
    if report.rotation:
        yield from report.rotation.summary()
    if report.distillation:
        yield from report.distillation.summary()


def _plain(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    return str(value)


def _command(report):
    command = report.protocol.get("command")
    return command and f"<pre>{escape(command)}</pre>"
