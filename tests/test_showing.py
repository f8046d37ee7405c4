"""How results, Hessians and tables show themselves, and pictures of masks and patterns."""

import os
import re

import layers
import numpy as np
import pytest
from click.testing import CliRunner
from cuobs_cli import main

import cuobs
from cuobs import plotting


def pruned(method="sparsegpt", seed=0, **options):
    W, H = layers.random_layer(8, 32, seed)
    h = cuobs.Hessian(32, dtype="float64", device="cpu")
    h.update(np.linalg.cholesky(H).T)
    return cuobs.prune(W, hessian=h, method=method, device="cpu", **options)


def test_a_result_says_what_it_is():
    result = pruned()
    first, second = repr(result).splitlines()
    assert first == "Result(8 x 32, 2:4: keep 2 of 4, sparsegpt,"
    assert re.fullmatch(
        rf" +loss {result.loss:.3%}, sparsity 50\.00%, \d+\.\d\d s on cpu\)", second
    )
    assert "sparsegpt with weights solved again" in repr(pruned(refine="exact"))
    html = pruned(pattern="view=(M,K/4,4):(K,4,1) block=(1,1,1) scope=(1,1,4) keep=2")._repr_html_()
    assert html.startswith("<table>") and f"{result.loss:.3%}" in html


def test_a_hessian_says_what_it_is(tmp_path):
    h = cuobs.Hessian(4, device="cpu")
    assert repr(h) == "Hessian(K=4, tokens=0, float32 on cpu)"
    h.update(np.ones((7, 4)))
    assert repr(h) == "Hessian(K=4, tokens=7, float32 on cpu)"
    np.savez(tmp_path / "H.npz", hessian=np.eye(3))
    h = cuobs.Hessian.load(tmp_path / "H.npz", device="cpu")
    assert repr(h) == "Hessian(K=3, tokens=unknown, float64 on cpu)"


def test_results_are_compared_without_an_error():
    result, again = pruned(), pruned()
    assert result == again and not result != again
    for other in (pruned(seed=1), pruned(damp=0.1), pruned("wanda"), pruned("true-obs"), None, 3.0):
        assert result != other and not result == other
    changed = pruned()
    changed.weight[0, 0] += 1
    assert changed != result
    wider = pruned()
    wider.mask = np.ones((8, 64), bool)
    assert wider != result
    halves = pruned()
    halves.weight = halves.weight.astype("float32")
    assert halves != result
    with pytest.raises(TypeError):
        hash(result)


@pytest.fixture(scope="module")
def table():
    W, H = layers.random_layer(8, 32)
    return cuobs.compare(W, hessian=H, methods=["wanda", "sparsegpt", "admm"], device="cpu")


def test_a_table_is_what_it_prints(table):
    assert repr(table) == str(table) == table.text()
    html = table._repr_html_()
    assert html.count("<tr>") == 4 and "<caption>2:4, 8 x 32</caption>" in html
    for cell in ("loss %", "wanda", f"{100 * table['admm'].loss:.3f}"):
        assert f">{cell}</t" in html


def test_rows_by_name(table):
    assert table["admm"] is table[2] and table[0].method == "wanda"
    assert [row.method for row in table[1:]] == ["sparsegpt", "admm"]
    with pytest.raises(KeyError, match="found no row 'adm', expected one of wanda, sparsegpt"):
        table["adm"]


def test_to_pandas(table):
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert list(frame.index) == ["wanda", "sparsegpt", "admm"]
    assert list(frame.columns) == ["loss", "ratio", "sparsity", "seconds"]
    assert frame.loc["sparsegpt", "ratio"] == 1 and isinstance(frame, pandas.DataFrame)


def test_without_pandas(table, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas"):
        table.to_pandas()


# Pictures


@pytest.mark.parametrize("pattern", ["2:4", "block16-row8", "2:4x3"])
def test_a_mask_is_drawn_as_it_is(pattern, tmp_path):
    pytest.importorskip("matplotlib")
    M = 32 if pattern == "block16-row8" else 8
    W, H = layers.random_layer(M, 96)
    result = cuobs.prune(W, hessian=H, method="wanda", device="cpu", pattern=pattern)
    figure = result.plot(tmp_path / "mask.svg")
    near, far = figure.axes[:2]
    shown = np.asarray(near.images[0].get_array().filled(np.nan))
    rows, columns = plotting.CORNER
    np.testing.assert_array_equal(~np.isnan(shown), result.mask[:rows, :columns])
    np.testing.assert_allclose(
        shown[result.mask[:rows, :columns]],
        np.abs(result.weight[:rows, :columns][result.mask[:rows, :columns]]), rtol=1e-6,
    )
    framed = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in near.patches}
    layout = result.pattern.compile(M, 96)
    assert framed == {(r, c) for r in layout.row_order[0] for c in layout.column_order[0]
                      if r < rows and c < columns}
    np.testing.assert_allclose(far.images[0].get_array(), np.abs(result.weight), rtol=1e-6)
    assert f"{pattern} by wanda" in figure.get_suptitle()
    assert os.path.getsize(tmp_path / "mask.svg") > 1000
    with pytest.raises(FileExistsError):
        result.plot(tmp_path / "mask.svg")


def test_a_large_weight_is_drawn_by_cells():
    array = np.random.default_rng(0).random((300, 1000))
    means = plotting._means(array)
    assert means.shape == plotting.CELLS
    cell = array[: 300 // 128, : 1000 // 128]
    assert means[0, 0] == pytest.approx(cell.mean())
    assert means.min() > 0.05 and means.max() < 0.95
    np.testing.assert_array_equal(plotting._means(array[:3, :5]), array[:3, :5])


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def test_plot_mask_and_patterns(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    np.save("W.npy", pruned().weight.astype("float16"))
    np.save("cube.npy", np.ones((2, 2, 2)))
    assert run("plot", "mask", "W.npy", "--pattern", "2:4").stdout == "written  W-mask.png\n"
    assert open("W-mask.png", "rb").read(4) == b"\x89PNG"
    assert "existing file" in run("plot", "mask", "W.npy", code=2).stderr
    run("plot", "mask", "W.npy", "--force", "--pattern", "1:4")
    assert "3 dimensions" in run("plot", "mask", "cube.npy", code=2).stderr
    assert ".png, .svg, .pdf" in run("plot", "mask", "W.npy", "-o", "W.gif", code=2).stderr
    said = run("patterns", "2:4", "block16-row8", "--svg", "F.svg").stdout
    assert said.endswith("written  F.svg\n") and "<svg" in open("F.svg").read()
    assert "ends in .svg" in run("patterns", "--svg", "F.png", code=2).stderr
    assert sorted(os.listdir(".")) == ["F.svg", "W-mask.png", "W.npy", "cube.npy"]


def test_patterns_are_drawn_as_they_are():
    pytest.importorskip("matplotlib")
    patterns = [*cuobs.patterns().values(), cuobs.pattern.parse("4:8x1")]
    figure = plotting.patterns_figure(patterns)
    assert len(figure.axes) == len(patterns)
    for axes, pattern in zip(figure.axes, patterns, strict=True):
        layout = pattern.compile(*pattern.smallest())
        picture = np.asarray(axes.images[0].get_array().filled(-1))
        own = np.ix_(layout.row_order[0], layout.column_order[0])
        np.testing.assert_array_equal(picture[own], layout.blocks)
        picture[own] = -1
        assert (picture == -1).all()
        assert axes.get_title("left") == f"{pattern.label}: {pattern.keeps}"
