"""cuobs write-calibration, prune-model --distill, eval-model --against."""

import re

import numpy as np
from click.testing import CliRunner
from cuobs_cli import main
from small_models import make_source, make_tokens


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_from_a_folder_to_one_that_is_distilled(tmp_path):
    source = make_source(tmp_path / "source")
    np.savez(tmp_path / "tokens.npz", text=make_tokens(16))
    text = f"{tmp_path}/tokens.npz:text"
    own = tmp_path / "own.npz"
    wrote = run("write-calibration", source, "-o", own, "--windows", 20, "--sequence-length", 24,
                "--device", "cpu")  # fmt: skip
    assert wrote.exit_code == 0, wrote.output
    assert "20 windows of 24 tokens, seed 0" in wrote.output
    again = run("write-calibration", source, "-o", own, "--device", "cpu")
    assert again.exit_code == 2 and "--force" in again.output
    dst = tmp_path / "out"
    pruned = run(
        "prune-model", source, dst, "--calibration", text, "--distill", 2, "--distill-rate", 1e-3,
        "--distill-calibration", own, "--eval", text, "--method", "magnitude", "--target",
        "pruned", "--device", "cpu",
    )  # fmt: skip
    assert pruned.exit_code == 0, pruned.output
    for expected in (
        r"calibration  .*own.npz: 20 windows of 24 tokens",
        r"distillation 2 passes over 35 windows, 14 steps; 1 window kept aside",
        r"pass 2/2     KL 0\.\d+ on the windows kept aside",
        r"lost and won .* dense, [\d.]+ pruned, [\d.]+ distilled",
        r"to the dense model +tokens.npz:text: KL 0\.\d+",
    ):
        assert re.search(expected, pruned.output), (expected, pruned.output)
    found = run("eval-model", dst, "--text", text, "--against", source, "--device", "cpu")
    assert found.exit_code == 0, found.output
    assert re.search(r"KL 0\.\d+, the same likeliest token in \d+\.\d%", found.output)


def test_steps_that_do_harm_are_taken_back_and_it_says_so(tmp_path):
    source, dst = make_source(tmp_path / "source"), tmp_path / "out"
    np.savez(tmp_path / "tokens.npz", text=make_tokens(16))
    text = f"{tmp_path}/tokens.npz:text"
    found = run("prune-model", source, dst, "--calibration", text, "--distill", 1,
                "--distill-rate", 50, "--eval", text, "--device", "cpu")  # fmt: skip
    assert found.exit_code == 0, found.output
    before, after = re.search(
        r"lost and won .* ([\d.]+) pruned, ([\d.]+) dist", found.output
    ).groups()
    assert before == after and "(none of it kept)" in found.output
    assert "distillation did not help: the pruned weights stay as they were" in found.output
    assert "to try next   a lower --distill-rate" in found.output
    assert "(none of it kept) |" in (dst / "README.md").read_text()


def test_what_is_refused_before_weights_are_read(tmp_path):
    source = make_source(tmp_path / "source")
    np.savez(tmp_path / "tokens.npz", text=make_tokens(16))
    text, dst = f"{tmp_path}/tokens.npz:text", tmp_path / "out"
    for args, match in (
        (["--calibration", text, "--distill-calibration", "self"], "distill_calibration: found"),
        (["--calibration", "self:0"], "self:0: found 0"),
        (["--calibration", text, "--distill", -1], "distill: found -1"),
        (["--calibration", text, "--distill", 1, "--distill-rate", 0], "distill_rate: found 0"),
        (["--calibration", text, "--distill", 1, "--distill-calibration", "no.txt"], "no.txt"),
        (["--calibration", text, "--calibration", text], "npz:text twice, expected each source"),
        (["--calibration", text, "--distill", 1, "--distill-calibration", text], "text twice"),
        (["--calibration", text, "--distill", 1, "--samples", 1], "expected 2 at least: one is"),
        (["--calibration", text, "--distill", 1, "--samples", 1, "--dry-run"], "2 at least"),
    ):
        found = run("prune-model", source, dst, *args)
        assert found.exit_code == 2 and match in found.output, found.output
    assert not dst.exists()
