import math
import os

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import cuobs
from cuobs import comparing, plotting


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((96, 32)) @ rng.standard_normal((32, 32))
    return rng.standard_normal((8, 32)).astype(np.float32), X.astype(np.float32)


def test_all_methods_are_compared_as_prune_prunes(layer):
    W, X = layer
    table = cuobs.compare(W, X, pattern="4:8", damp=0.1, dtype="float64")
    assert [row.method for row in table] == list(cuobs.methods())
    reference = cuobs.prune(W, X, pattern="4:8", damp=0.1, dtype="float64", method="sparsegpt")
    for row in table:
        one = cuobs.prune(W, X, pattern="4:8", damp=0.1, dtype="float64", method=row.method)
        assert row.loss == pytest.approx(one.loss, rel=1e-9)
        assert row.ratio == pytest.approx(one.loss / reference.loss, rel=1e-9)
        assert row.sparsity == one.sparsity
        assert row.seconds > 0
    assert table.shape == (8, 32) and table.pattern == cuobs.patterns()["4:8"]


def test_hessian_in_place_of_activations(layer):
    W, X = layer
    h = cuobs.Hessian(32)
    h.update(X)
    names = ["magnitude", "sparsegpt"]
    for hessian in (h, X.T @ X):
        for a, b in zip(
            cuobs.compare(W, X, methods=names),
            cuobs.compare(W, hessian=hessian, methods=names),
            strict=True,
        ):
            assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_the_hessian_is_computed_once(layer, monkeypatch):
    seen = []
    update = cuobs.Hessian.update

    def counting(self, X, *args, **kwargs):
        seen.append(len(X))
        return update(self, X, *args, **kwargs)

    monkeypatch.setattr(cuobs.Hessian, "update", counting)
    cuobs.compare(*layer, methods=["magnitude", "wanda", "sparsegpt"])
    assert seen == [96]


def test_options_go_to_the_methods_that_take_them(layer):
    W, X = layer
    names = ["magnitude", "obs-interleaved", "obs-ordered", "true-obs"]
    table = cuobs.compare(W, X, methods=names, splits=2, group=1, order="gap")
    own = [{}, {"splits": 2}, {"group": 1}, {"group": 1, "order": "gap"}]
    for row, options in zip(table, own, strict=True):
        expected = cuobs.prune(W, X, method=row.method, **options)
        assert row.loss == pytest.approx(expected.loss, rel=1e-6)
    exact = cuobs.compare(W, X, methods=["wanda"], refine="exact")[0].loss
    assert exact < 0.95 * cuobs.compare(W, X, methods=["wanda"])[0].loss


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["sparse-gpt"]}, r"found 'sparse-gpt'.*nearest: sparsegpt"),
        ({"methods": ["wanda"], "splits": 4}, "splits: .*none of wanda takes it"),
        ({"order": "gaps"}, r"order: found 'gaps'.*nearest: gap"),
        ({"methods": ["obs-ordered"], "order": "gap"}, "order: found 'gap', expected one of"),
        ({"group": 0}, "group: found 0"),
        ({"damp": -1}, "damp: found -1"),
        ({"refine": "twice"}, "refine: found 'twice'"),
        ({"pattern": "3:5"}, "does not divide"),
    ],
)
def test_mistakes_are_found_before_any_work(given, message, layer, monkeypatch):
    monkeypatch.setattr(cuobs.Hessian, "update", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message):
        cuobs.compare(*layer, **given)


@pytest.mark.parametrize("option", ["foo", "method", "options"])
def test_an_unknown_option_is_named(layer, option):
    with pytest.raises(TypeError, match=f"{option}: found an option"):
        cuobs.compare(*layer, **{option: "wanda"})


def test_without_sparsegpt_there_is_no_ratio(layer):
    table = cuobs.compare(*layer, methods=["wanda", "magnitude"])
    assert [row.ratio for row in table] == [None, None]
    lines = table.text().splitlines()
    assert lines == table.lines(["wanda", "magnitude"])
    assert lines[0].split() == ["method", "loss", "%", "sparsity", "%", "seconds"]
    assert [len(line.split()) for line in lines[1:]] == [4, 4, 4]
    assert "sparsegpt" not in table.rst() + table._repr_html_()


def test_starting_names_each_method(layer):
    names = []
    cuobs.compare(*layer, methods=["wanda", "magnitude"], starting=names.append)
    assert names == ["wanda", "magnitude"]


TABLE = comparing.Table(
    [
        comparing.Row("magnitude", 0.29182, 2.0, 0.5, 0.0123),
        comparing.Row("admm", 0.07369, None, 0.50126, 12.5),
    ],
    cuobs.patterns()["2:4"],
    (96, 1536),
)


def test_table_as_text():
    assert TABLE.text().splitlines() == [
        "method     loss %  / sparsegpt  sparsity %  seconds",
        "---------  ------  -----------  ----------  -------",
        "magnitude  29.182        2.000       50.00    0.012",
        "admm        7.369            -       50.13   12.500",
    ]


def test_table_as_rst():
    rule = "=========  ======  ===========  ==========  ======="
    header, _, *rows = TABLE.text().splitlines()
    assert TABLE.rst().splitlines() == [rule, header, rule, *rows, rule]


def test_table_as_json():
    assert TABLE.json() == {
        "pattern": "view=(M,K):(K,1) block=(1,1) scope=(1,4) keep=2",
        "shape": [96, 1536],
        "rows": [
            {"method": "magnitude", "loss": 0.29182, "ratio": 2.0, "sparsity": 0.5,
             "seconds": 0.0123},
            {"method": "admm", "loss": 0.07369, "ratio": None, "sparsity": 0.50126,
             "seconds": 12.5},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_labels_hide_nothing(seed):
    rng = np.random.default_rng(seed)
    points = [
        (10 ** rng.uniform(-1, 0), 10 + 3 * rng.standard_normal(), f"method-{i}")
        for i in range(12)
    ]
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    marks = axes.scatter(*list(zip(*points, strict=True))[:2], s=28)
    axes.margins(0.15)
    texts = plotting.label_points(axes, points)
    assert sorted(t.get_text() for t in texts) == sorted(name for *_, name in points)
    canvas.draw()
    for text in texts:
        text.arrow_patch.set_visible(False)
        text.arrowprops = text.arrow_patch = None
    boxes = [t.get_window_extent() for t in texts]
    centres = axes.transData.transform(marks.get_offsets())
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*centre) for centre in centres)
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)


def test_picture_is_drawn(tmp_path):
    path = str(tmp_path / "pareto.png")
    plotting.pareto(TABLE, path)
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 500
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.5).mean() < 0.2  # ink, and paper
    with pytest.raises(FileExistsError):
        plotting.pareto(TABLE, path)
    assert os.listdir(tmp_path) == ["pareto.png"]


@pytest.mark.parametrize(("title", "said"), [(None, "96 x 1536, 2:4"), ("W on cuda", "W on cuda")])
def test_a_picture_says_what_it_is_of(monkeypatch, title, said):
    saved = []
    monkeypatch.setattr(plotting, "save", lambda figure, *_: saved.append(figure))
    plotting.pareto(TABLE, "a.png", title=title)
    assert saved[0].axes[0].get_title() == said


def test_picture_that_cannot_be_drawn_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"a.jpeg2: found .jpeg2, expected .png, .svg, .pdf"):
        plotting.check_picture("a.jpeg2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plot\]'"):
        plotting.check_picture("a.png")


def test_loss_of_a_table_is_a_number(layer):
    assert all(math.isfinite(row.loss) and 0 < row.loss < 1 for row in cuobs.compare(*layer))
