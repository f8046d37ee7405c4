import re

from cuobs_cli import view

from cuobs.models.report import BlockReport, LayerReport, ModelReport


def a_report():
    rows = [
        LayerReport("model.layers.2.self_attn.q_proj", (8, 8), loss=0.05),
        LayerReport("model.layers.2.mlp.down_proj", (8, 8), loss=0.123),
        LayerReport("model.layers.2.mlp.up_proj", (8, 9), note="left as it is: its shape"),
    ]
    settings = {"method": "admm", "damp": 0.01, "pattern": "2:4", "drop_first_token": True,
                "pattern_view": "view=(M,K):(K,1) block=(1,1) scope=(1,4) keep=2",
                "target": "mixed", "dense_share": (0.5, 0.5), "residual_share": (0.5, 0.5),
                "device": "cpu"}  # fmt: skip
    blocks = [BlockReport(2, rows, drift=0.045, seconds=1234.5)]
    protocol = {"tokens": 46, "tokens_a_column": 5.8}
    return ModelReport(settings, protocol, blocks, memory_peak=13 * 2**30)


def test_a_block_is_a_line_of_80_columns_with_the_layer_that_loses_most():
    line = view.block_line(a_report(), 126)
    assert len(line) <= 80 and max(map(len, (view.EACH, view.DRIFT))) <= 80
    other = a_report()
    other.blocks[0].layers[0].loss = 0.5
    assert view.block_line(other, 126).index("drift") == line.index("drift")
    assert line.startswith("block   3/126  at most 12.3% down_proj  drift  4.5%  1234.5 s  13")


def test_drift_is_explained_and_layers_that_stay_are_named(capsys):
    shown = view.View()
    shown.starting(a_report())
    assert "block" not in capsys.readouterr().out  # a dry run ends here
    shown.starting(a_report())
    shown.block(a_report(), 126)
    shown.block(a_report(), 126)
    out = capsys.readouterr().out
    assert out.count("each block") == 1 and out.index("each block") < out.index("block   3/126")
    assert "tokens       46, 5.8 a column" in out
    assert "‖h − ĥ‖ / ‖h‖" in out and "up_proj: left as it is" in out
    assert not re.search(r"[\r\x1b]", out)


def test_quiet(capsys):
    shown = view.View(quiet=True)
    shown.starting(a_report())
    shown.block(a_report(), 126)
    shown.progress("text", 1, 2)
    assert shown.began
    assert capsys.readouterr() == ("", "")
