"""The page of a report."""

import html.parser
import math
import re
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from cuobs_cli import main
from small_models import make_source, make_tokens

from cuobs.models import ModelReport
from cuobs.models.page import report_page
from cuobs.models.report import BlockReport, DistillationReport, LayerReport, read_report

EVIL = "<script>alert('x')</script>&\"'"


def make_report(blocks=3, **changes):
    settings = {
        "pattern": "2:4", "pattern_view": "2:4", "method": "admm", "damp": 0.01, "tune": 0,
        "target": "mixed", "dense_share": (0.5, 0.5), "residual_share": (0.5, 0.5), "skip": None,
        "device": "cpu",
    }  # fmt: skip
    rows = [
        BlockReport(
            i,
            [
                LayerReport(f"m.{i}.a.q", (8, 8), loss=0.01 * (i + 1), sparsity=0.5, damp=0.01),
                LayerReport(f"m.{i}.a.k", (4, 8), note="left as it is: skipped"),
            ],
            drift=0.1 * (i + 1),
        )
        for i in range(blocks)
    ]
    protocol = {"source": "/m/tiny", "calibration": "a.txt", "windows": 3, "length": 24,
                "evaluated": {"t": [4, 24]}, "command": "cuobs prune-model tiny out"}  # fmt: skip
    values = {"perplexity": {"t": (10.0, 12.5)}, "seconds": 7.0, "memory_peak": 2**30, **changes}
    return ModelReport(settings, protocol, rows, **values)


class Parser(html.parser.HTMLParser):
    """Tags as they open, and that each that needs it is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Parser()
    parser.feed(page)
    assert not parser.open
    return parser


def test_what_it_shows():
    found = parse(report_page(make_report(), "tiny-2-4"))
    text = " ".join(found.text)
    for part in (
        "tiny-2-4", "2:4 (keep 2 of 4) by admm", "10.00 → 12.50", "1.250", "4 of 24 tokens",
        "mean loss of 3 layers", "cuobs prune-model tiny out", "8 × 8", "m.2.a.q: 3.00%",
        "mixed, dense share 0.5, residual share 0.5", "block 2: 30.00%",
    ):  # fmt: skip
        assert part in text, part
    cells = [attrs for tag, attrs in found.seen if tag == "rect" and attrs.get("rx")]
    assert sum("style" in cell for cell in cells) == 3
    assert sum(cell.get("class") == "left" for cell in cells) == 3 + 1  # and the legend's
    darkest = [cell for cell in cells if "--c8" in cell.get("style", "")]
    assert len(darkest) == 1  # the largest loss


def test_distilled_models_and_agreement():
    report = make_report()
    report.perplexity_pruned = {"t": 14.25}
    report.agreement = {"t": {"divergence": 0.1234, "same_top": 0.875}}
    report.distillation = DistillationReport({"passes": 3}, 9, 1, 4, [0.5, 0.25, 0.3, 0.28], 1)
    report.whole_seconds, report.whole_peak = 120.0, 3 * 2**30
    text = " ".join(parse(report_page(report, "x")).text)
    for part in ("distilled", "14.25", "0.1234", "87.5%", "2.0 minutes", "3.00 GiB at most",
                 "KL 0.5000 before, 0.2500 after (pass 1 of 3)"):  # fmt: skip
        assert part in text


def test_nothing_is_loaded_and_nothing_runs():
    page = report_page(make_report(), "x")
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|https?:|\son\w+=", page)


def test_everything_is_escaped():
    report = make_report()
    report.protocol |= {"source": EVIL, "calibration": EVIL, "command": EVIL}
    report.settings |= {"method": EVIL, "skip": EVIL}
    report.perplexity = {EVIL: (1.0, 2.0)}
    report.left, report.carried, report.left_out = [EVIL], [EVIL], {EVIL: EVIL}
    for block in report.blocks:
        for row in block.layers:
            row.name += EVIL
            row.note = EVIL
    page = report_page(report, EVIL)
    assert "<script" not in page
    found = parse(page)
    assert "script" not in {tag for tag, _ in found.seen}
    assert "".join(found.text).count("<script>alert('x')") > 15


@pytest.mark.parametrize("change", [
    {"blocks": []},
    {"perplexity": {}},
    {"perplexity": {"t": (math.nan, math.inf)}},
    {"agreement": {"t": {"divergence": None, "same_top": 0.5}}, "perplexity_pruned": {"t": None}},
])  # fmt: skip
def test_what_may_be_missing(change):
    report = make_report()
    for key, value in change.items():
        setattr(report, key, value)
    report.protocol.pop("command")
    parse(report_page(report, "x"))


def test_many_blocks_and_no_loss():
    report = make_report(126)
    for row in report.layers:
        row.loss = None if row.loss is None else 0.0
    page = report_page(report, "x")
    assert ">120</text>" in page and ">119</text>" not in page


def test_from_a_folder(tmp_path):
    source = make_source(tmp_path / "source")
    np.savez(tmp_path / "t.npz", t=make_tokens(4))
    tokens, out, page = f"{tmp_path / 't.npz'}:t", tmp_path / "out", tmp_path / "page.html"

    def run(*args):
        return CliRunner().invoke(main, [str(a) for a in args])

    command = ("prune-model", source, out, "--calibration", tokens, "--device", "cpu",
               "--method", "wanda", "--eval", tokens, "--skip", "*.k_proj")  # fmt: skip
    assert run(*command).exit_code == 0
    report = read_report(out)
    assert report.protocol["command"] == shlex.join(["cuobs", *map(str, command)])
    assert len(report.layers) == 21 and report.blocks[1].drift > 0
    result = run("report", out, "-o", page)
    assert result.exit_code == 0, result.output
    text = " ".join(parse(page.read_text()).text)
    assert "cuobs prune-model" in text and "model.layers.2.mlp.down_proj" in text
    assert run("report", out, "-o", page).exit_code == 2
    assert run("report", out, "-o", page, "--force").exit_code == 0
    for folder, match in ((source, "found no cuobs_report.json"), (tmp_path / "no", "found no")):
        result = run("report", folder, "-o", tmp_path / "b.html")
        assert result.exit_code == 2 and match in result.output
    (out / "cuobs_report.json").write_text("{}")
    assert "found no report of pruning" in run("report", out, "-o", page, "--force").output
