"""What can be known before weights are read is said before PyTorch is imported."""

import json
import subprocess
import sys

import numpy as np
import pytest
from extras import MODEL
from small_models import make_tokens

import cuobs
from cuobs.arrays import count_devices

pytestmark = pytest.mark.skipif(not MODEL, reason="needs the extra model")

CHILD = """
import json, sys
from click.testing import CliRunner
from cuobs_cli import main

for line in sys.stdin:
    result = CliRunner().invoke(main, json.loads(line))
    heavy = sorted({"torch", "transformers"} & sys.modules.keys())
    print(json.dumps([result.exit_code, result.output, heavy]), flush=True)
"""


@pytest.fixture
def run(tmp_path):
    """Run commands where an import of PyTorch or transformers is an error."""
    stubs = tmp_path / "stubs"
    for name in ("torch", "transformers"):
        (stubs / name).mkdir(parents=True)
        (stubs / name / "__init__.py").write_text("raise AssertionError('it was imported')")

    def run(commands):
        text = "".join(json.dumps([str(a) for a in args]) + "\n" for args in commands)
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(stubs)!r})\n{CHILD}"],
            input=text, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_before_torch_is_imported(run, source, tmp_path):
    from cuobs.models.recipe import read_arguments

    np.savez(
        tmp_path / "t.npz", t=make_tokens(8), big=np.full((2, 8), 97), long=make_tokens(2, 70)
    )
    (tmp_path / "long.txt").write_text("w3 " * 200)
    np.save(tmp_path / "short.npy", np.ones((8, 9), bool))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "a.jsonl").write_text('{"text": "w3"}\n{"text"\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    tokens = f"{tmp_path / 't.npz'}:t"
    plain = ["prune-model", source, tmp_path / "out", "--calibration", tokens]
    cases = {
        "found no array 'none' among 3": ["--calibration", f"{tmp_path / 't.npz'}:none"],
        "found 97 to 97, expected 0 to 96": ["--calibration", f"{tmp_path / 't.npz'}:big"],
        "expected at least 25": ["--sequence-length", 25],
        "pattern: found '3:2'": ["--pattern", "3:2"],
        "nearest: admm": ["--method", "admn"],
        "order: found": ["--method", "true-obs", "--order", "zz"],
        "skip: found '('": ["--skip", "("],
        "dense_share: found (3.0": ["--dense-share", "3,4"],
        "dense_share: found 2.0, expected a share from 0 to 1": ["--dense-share", 2],
        "residual_share: found 3.0, expected a share from 0 to 2": ["--residual-share", 3],
        "self:x: found 'x', expected a number of windows": ["--calibration", "self:x"],
        "damp: found": ["--damp", -1],
        "device: found 'tpu'": ["--device", "tpu"],
        "none.txt: found no such file": ["--calibration", "none.txt"],
        "is no UTF-8 text": ["--eval", tmp_path / "bad.txt"],
        "found no JSON in line 2": ["--calibration", tmp_path / "a.jsonl"],
        "found shape (8, 9), expected (8, 24)": ["--attention-mask", tmp_path / "short.npy"],
        "shard_size: found 'big'": ["--shard-size", "big"],
        "loss.jpg": ["--plot", "loss.jpg"],
    }
    commands = {match: [*plain, *change] for match, change in cases.items()}
    commands |= {
        "found files, expected a new or empty": [*plain[:2], tmp_path / "full", *plain[3:]],
        "found the source itself": [*plain[:2], source, *plain[3:]],
        "found no such folder": ["prune-model", tmp_path / "none", *plain[2:]],
        "found no weights": ["prune-model", tmp_path / "config", *plain[2:]],
        "expected a text": ["eval-model", source, "--text", "none.txt"],
        "found no such file, expected an": ["rotate", source, tmp_path / "out", "--calibration",
                                            tokens, "--attention-mask", "none.npy"],
        "steps: found -1": ["rotate", source, tmp_path / "out", "--calibration", tokens,
                            "--steps", -1],
        "found no array 'x'": ["eval-model", source, "--text", f"{tmp_path / 't.npz'}:x"],
        "found windows of 65, expected at most 64": [
            "eval-model", source, "--text", tmp_path / "long.txt", "--sequence-length", 65
        ],
        "windows of 70, expected at most 64": [*plain[:4], f"{tmp_path / 't.npz'}:long"],
        "none: found no such file, expected a weight, or the": ["verify", tmp_path / "none"],
        "none: found no such folder, expected a folder that": ["report", tmp_path / "none"],
        "none: found no such folder, expected a checkpoint's": ["speedup", tmp_path / "none"],
        "config.json, expected a checkpoint's folder or": ["speedup", tmp_path / "full"],
        "--compile: found it without --generate": ["speedup", source, "--compile"],
        "--sequences: found it without": ["speedup", source, "--sequences", 2],
        "--batch: found it with --generate": ["speedup", source, "--generate", "--batch", 2],
        "batches: found 0": ["speedup", "64x64", "--batch", 0],
        "found the source itself, expected one": ["pack-model", source, source],
        "full: found files": ["pack-model", source, tmp_path / "full"],
        "found no packed model": ["unpack-model", source, tmp_path / "out"],
        "pattern: found '9:5'": ["pack-model", source, tmp_path / "out", "--pattern", "9:5"],
        "shard_size: found '5ZB'": ["pack-model", source, tmp_path / "out", "--shard-size", "5ZB"],
        "windows: found 0": ["write-calibration", source, "-o", tmp_path / "w", "--windows", 0],
        "tune_rate: found it without tune": [*plain, "--tune-rate", 1],
        "rotate_permute: found it without rotate": [*plain, "--rotate-permute"],
        "distill_rate: found it without distill": [*plain, "--distill-rate", 1],
        "--plot: found it with --dry-run": [*plain, "--dry-run", "--plot", "a.png"],
        "since distill needs the whole model in memory": [
            *plain, "--distill", 1, "--host-memory", "1KB", "--dry-run"
        ],
    }
    began = read_arguments({"method": "wanda"}).described()
    (tmp_path / "began").mkdir()
    (tmp_path / "began" / "cuobs_incomplete.json").write_text(
        json.dumps({"cuobs": cuobs.__version__, **began})
    )
    commands["resume: found method='admm', expected 'wanda' as"] = [
        *plain[:2], tmp_path / "began", *plain[3:], "--resume"
    ]  # fmt: skip
    commands["found no such file, expected a text"] = [
        *plain[:2], tmp_path / "began", "--resume", "--method", "wanda", "--calibration", "no.txt"
    ]  # fmt: skip
    if not count_devices():
        commands["found no CUDA device, expected one: packed"] = ["speedup", "64x64"]
        commands["device: found no CUDA device"] = ["speedup", source, "--generate"]
    for match, (code, output, heavy) in zip(commands, run(commands.values()), strict=True):
        assert (code, heavy) == (2, []), (match, output)
        assert match.lower() in output.lower()
        assert output.startswith(("Error: ", "Usage: "))
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_refused(run, source, tmp_path):
    np.savez(tmp_path / "t.npz", t=make_tokens(8))
    command = ["prune-model", source, tmp_path / "out", "--calibration", f"{tmp_path / 't.npz'}:t"]
    shard = sorted(source.glob("model-*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    ((code, output, heavy),) = run([command])
    assert (code, heavy) == (2, []) and "is truncated" in output
    shard.write_bytes(whole)
    (source / "hf_quant_config.json").write_text("{}")
    ((code, output, heavy),) = run([command])
    assert (code, heavy) == (2, []) and "hf_quant_config.json" in output


def test_a_pattern_that_speedup_does_not_know(run):
    (code, said, heavy), = run([["speedup", "64x64", "--pattern", "zz"]])
    assert code == 2 and "pattern: found 'zz'" in said and not heavy
