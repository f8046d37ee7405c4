import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from cuobs_cli import listing, main

import cuobs
from cuobs import files, plotting

M, K, N = 8, 32, 96
COMMAND = [sys.executable, "-c", "from cuobs_cli import main; main()"]


@pytest.fixture(autouse=True)
def _layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("W.npy", rng.standard_normal((M, K)).astype(np.float16))
    np.save("X.npy", rng.standard_normal((N, K)).astype(np.float16))


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def refused(*args):
    """What is said of a command that must fail with one sentence and write nothing."""
    before = {name: os.stat(name).st_mtime_ns for name in os.listdir(".")}
    result = run(*args, code=2)
    assert {name: os.stat(name).st_mtime_ns for name in os.listdir(".")} == before
    assert result.stdout == ""
    assert re.fullmatch(r"(Warning: [^\n]+\n)*Error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


def test_prune_is_what_cuobs_prune_does():
    result = run("prune", "W.npy", "X.npy", "--pattern", "4:8")
    W, X = np.load("W.npy"), np.load("X.npy")
    expected = cuobs.prune(W, X, pattern="4:8")
    pruned = np.load("W-pruned.npy")
    assert pruned.dtype == W.dtype
    np.testing.assert_array_equal(pruned, expected.weight)
    assert cuobs.verify(pruned, "4:8") and (pruned == 0).sum() == M * K // 2
    said = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert said["method"] == "admm, weights re-solved"
    assert said["pattern"] == "4:8: keep 2 of 4 pairs"
    assert said["loss"] == f"{expected.loss:.3%}"
    assert said["zeros"] == "50.00% of the weights"
    assert re.fullmatch(r"\d+\.\d\d s, and \d+\.\d\d s for the Hessian", said["time"])
    assert said["written"] == "W-pruned.npy"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("--method sparsegpt --refine exact", {"method": "sparsegpt", "refine": "exact"}),
        ("--method obs-split --splits 2", {"method": "obs-split", "splits": 2}),
        ("--method true-obs --group 1 --order left",
         {"method": "true-obs", "group": 1, "order": "left"}),
        ("--schedule slow --dtype float64", {"schedule": "slow", "dtype": "float64"}),
        ("--method obs-full --damp 0.5 --device cpu --precision fp32 --memory-limit 1GiB "
         "--workers 1", {"method": "obs-full", "damp": 0.5}),
    ],
)  # fmt: skip
def test_options_arrive(options, arguments):
    run("prune", "W.npy", "X.npy", *options.split(), "--report", "r.json")
    expected = cuobs.prune(np.load("W.npy"), np.load("X.npy"), **arguments)
    np.testing.assert_array_equal(np.load("W-pruned.npy"), expected.weight)
    report = json.load(open("r.json"))
    assert report["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert report["method"] == expected.method and report["refine"] == expected.refine
    assert report["options"] == expected.options


def test_mask_and_report():
    result = run("prune", "W.npy", "X.npy", "--method", "wanda", "-o", "P.npy",
                 "--mask-out", "mask.npz", "--report", "r.json")  # fmt: skip
    mask, pruned = files.load("mask.npz"), np.load("P.npy")
    assert mask.dtype == bool
    np.testing.assert_array_equal(np.where(mask, np.load("W.npy"), 0), pruned)
    report = json.load(open("r.json"))
    assert report.pop("seconds") > 0 and report.pop("hessian_seconds") > 0
    assert report.pop("loss") == pytest.approx(
        cuobs.relative_loss(np.load("W.npy"), pruned, cuobs_hessian()), rel=1e-4
    )
    assert report == {
        "cuobs": cuobs.__version__, "weight": "W.npy", "activations": "X.npy", "hessian": None,
        "written": "P.npy", "mask": "mask.npz", "shape": [M, K], "dtype": "float16",
        "method": "wanda", "pattern": str(cuobs.patterns()["2:4"]), "refine": None,
        "damp": 0.01, "options": {}, "sparsity": 0.5, "device": "cpu", "tokens": N,
        "settings": {"device": "cpu", "dtype": "float32", "precision": "tensor", "workers": None,
                     "batch_rows": None, "memory_limit": None, "devices": None},
    }  # fmt: skip
    assert result.stdout.count("written") == 3


def cuobs_hessian():
    h = cuobs.Hessian(K, device="cpu")
    h.update(np.load("X.npy"))
    return h


def test_safetensors_in_and_out():
    W = np.load("W.npy").astype(ml_dtypes.bfloat16)
    other = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file({"a.weight": W, "b.weight": other}, "m.safetensors")
    run("prune", "m.safetensors:a.weight", "X.npy", "--method", "sparsegpt")
    (item,) = safetensors.numpy.load_file("m-pruned.safetensors").items()
    assert item[0] == "a.weight"
    assert item[1].dtype == W.dtype and item[1].shape == W.shape
    expected = cuobs.prune(W.astype(np.float32), np.load("X.npy"), method="sparsegpt").weight
    np.testing.assert_array_equal(item[1], expected.astype(W.dtype))
    assert "obeys" in run("verify", "m-pruned.safetensors", "--pattern", "2:4").stdout
    assert "expected .safetensors" in refused(
        "prune", "m.safetensors:a.weight", "X.npy", "-o", "P.npy"
    )


@pytest.mark.parametrize("name", ["m.npz", "m.safetensors"])
def test_force_replaces_one_tensor_of_a_file(name):
    W, X = np.load("W.npy"), np.load("X.npy")
    files.save_arrays(name, {"up": W, "down": 2 * W, "norm": X[0]})
    before = open(name, "rb").read()
    run("prune", f"{name}:up", "X.npy", "-o", f"{name}:up", code=2)
    run("prune", "W.npy", "X.npy", "-o", name, "--force", code=2)
    assert open(name, "rb").read() == before
    run("prune", f"{name}:up", "X.npy", "--method", "wanda", "-o", f"{name}:up", "--force")
    back = files.load_arrays(name)
    assert set(back) == {"up", "down", "norm"}
    np.testing.assert_array_equal(back["up"], cuobs.prune(W, X, method="wanda").weight)
    np.testing.assert_array_equal(back["down"], 2 * W)
    np.testing.assert_array_equal(back["norm"], X[0])


def test_npz_keeps_the_name():
    np.savez("m.npz", up=np.load("W.npy"), x=np.load("X.npy"))
    run("prune", "m.npz:up", "m.npz:x", "--method", "magnitude")
    assert list(np.load("m-pruned.npz")) == ["up"]
    run("prune", "m.npz:up", "m.npz:x", "--method", "magnitude", "-o", "o.npz:down")
    assert list(np.load("o.npz")) == ["down"]


def test_hessian_of_files_and_of_parts_is_that_of_all_activations():
    X = np.load("X.npy")
    np.save("X0.npy", X[:40])
    np.savez("X1.npz", x=X[40:].reshape(2, -1, K))
    said = run("hessian", "X0.npy", "X1.npz:x", "-o", "H.npz").stdout
    assert re.search(rf"tokens +{N} from 2 files", said) and "3.0 tokens each" in said
    run("hessian", "X0.npy", "-o", "H0.npz")
    run("hessian", "X1.npz:x", "-o", "H1.npz", "--dtype", "float64")
    run("hessian", "H0.npz", "H1.npz", "-o", "H01.npz")
    run("hessian", "H0.npz", "X1.npz", "-o", "H0x.npz")
    expected = X.astype(np.float64).T @ X.astype(np.float64)
    for name in ("H.npz", "H01.npz", "H0x.npz"):
        h = cuobs.Hessian.load(name, device="cpu")
        assert h.tokens == N
        np.testing.assert_allclose(h.matrix, expected, rtol=1e-5, atol=1e-4)
    assert cuobs.Hessian.load("H01.npz", device="cpu").matrix.dtype == np.float64


def test_prune_by_hessian():
    run("hessian", "X.npy", "-o", "H.npz")
    np.save("H.npy", cuobs_hessian().matrix)
    run("prune", "W.npy", "X.npy")
    expected = np.load("W-pruned.npy")
    for hessian in ("H.npz", "H.npy"):
        run("prune", "W.npy", "--hessian", hessian, "-o", "P.npy", "--force")
        np.testing.assert_array_equal(np.load("P.npy"), expected)


def test_force_overwrites():
    for method in ("magnitude", "wanda"):
        run("prune", "W.npy", "X.npy", "--method", method, "--force")
    expected = cuobs.prune(np.load("W.npy"), np.load("X.npy"), method="wanda").weight
    np.testing.assert_array_equal(np.load("W-pruned.npy"), expected)
    run("prune", "W.npy", "X.npy", "--method", "wanda", "-o", "W.npy", "--force")
    np.testing.assert_array_equal(np.load("W.npy"), expected)


def bad_files():
    W, X = np.load("W.npy"), np.load("X.npy")
    np.save("cube.npy", W[None])
    np.save("narrow.npy", X[:, :-1])
    np.save("integer.npy", W.astype(np.int32))
    np.save("complex.npy", W.astype(np.complex64))
    np.save("none.npy", W[:0])
    np.save("odd.npy", W[:, :-1])
    np.save("object.npy", np.array([None]), allow_pickle=True)
    open("short.npy", "wb").write(open("W.npy", "rb").read()[:-2])
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        A = W.copy()
        A[3, 5] = A[4, 1] = value
        np.save(f"{name}.npy", A)
        A = X.copy()
        A[70, 9] = value
        np.save(f"X{name}.npy", A)
    np.savez("parts.npz", a=W, b=W)
    np.save("old.npy", W)
    np.save("skew.npy", X[:K])
    np.save("scalar.npy", W[0, 0])
    np.save("huge.npy", W.astype(np.float32) * np.float32(1e25))
    np.save("Xhuge.npy", X.astype(np.float32) * np.float32(1e25))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("missing.npy X.npy", r"missing\.npy: found no such file, expected"),
        ("W.npy missing.npy", r"missing\.npy: found no such file, expected"),
        ("W.npy --hessian missing.npz", r"missing\.npz: found no such file, expected"),
        ("W.npy", r"X.*hessian"),
        ("W.npy X.npy --hessian skew.npy", r"X.*hessian"),
        ("object.npy X.npy", r"object\.npy: found pickled"),
        ("short.npy X.npy", r"short\.npy: found 510 bytes .*expected 512"),
        ("W.npy short.npz", r"short\.npz: found no such file, expected"),
        ("parts.npz X.npy", r"parts\.npz: found 2 arrays \(a, b\)"),
        ("parts.npz:c X.npy", r"parts\.npz: found no array 'c'"),
        ("cube.npy X.npy", r"W: found .*expected 2"),
        ("W.npy narrow.npy", r"X: found 31 features, expected K=32"),
        ("integer.npy X.npy", r"W: found dtype int32, expected float16"),
        ("complex.npy X.npy", r"W: found dtype complex64"),
        ("W.npy integer.npy", r"X: found dtype int32"),
        ("none.npy X.npy", r"W: found shape \(0, 32\)"),
        ("W.npy none.npy", r"X: found shape \(0, 32\)"),
        ("nan.npy X.npy", r"W: found 2 .*first at \(3, 5\)"),
        ("inf.npy X.npy", r"W: found 2 .*first at \(3, 5\)"),
        ("W.npy Xnan.npy", r"X: found 1 .*first at \(70, 9\)"),
        ("W.npy Xinf.npy", r"X: found 1 .*first at \(70, 9\)"),
        ("huge.npy X.npy", r"W: found values up to .* whose squares float32 can't hold"),
        ("W.npy Xhuge.npy", r"X: found values whose squares overflow float32"),
        ("odd.npy narrow.npy", r"2:4.*does not divide.*\(8, 31\)"),
        ("W.npy --hessian skew.npy", r"hessian: found .*symmetric"),
        ("W.npy X.npy --pattern coupled-24", r"pattern: found 'coupled-24'.*nearest: coupled-2:4"),
        ("W.npy X.npy --method sparse-gpt", r"method: found 'sparse-gpt'.*nearest: sparsegpt"),
        ("W.npy X.npy --method true-obs --order gaps", r"order: found 'gaps'.*nearest: gap"),
        ("W.npy X.npy --method wanda --splits 4", r"splits: .*wanda"),
        ("W.npy X.npy --damp -1", r"damp: found -1"),
        ("W.npy X.npy --dtype float16", r"dtype: found 'float16'"),
        ("W.npy X.npy --device gpu", r"device: found 'gpu'"),
        ("W.npy X.npy --refine twice", r"refine: found 'twice'"),
        ("W.npy X.npy --memory-limit lots", r"memory_limit: found 'lots'"),
        ("W.npy X.npy -o old.npy", r"old\.npy: found an existing file.*--force"),
        ("W.npy X.npy --mask-out old.npy", r"old\.npy: found an existing file"),
        ("W.npy X.npy --report old.npy", r"old\.npy: found an existing file"),
        ("W.npy X.npy -o W.npy", r"-o: found the input W\.npy"),
        ("W.npy X.npy --report X.npy", r"--report: found the input X\.npy"),
        ("W.npy X.npy -o a.npy --mask-out ./a.npy", r"--mask-out: found \./a\.npy, which -o"),
        ("W.npy X.npy -o no/a.npy", r"no/a\.npy: found no folder no"),
        ("W.npy X.npy -o a.txt", r"a\.txt: found '\.txt', expected \.npy"),
        ("W.npy X.npy --mask-out a", r"a: found no ending, expected \.npy"),
        ("W.npy few.npy --damp 0", r"positive definite"),
        ("W.npy H.npz", r"X: found a Hessian in H\.npz, expected an array, or --hessian H\.npz"),
        ("packed.npz X.npy", r"W: found a packed weight in packed\.npz.*'cuobs unpack'"),
        ("folder X.npy", r"folder: found a folder, expected \.npy"),
        ("W.npy X.npy --pattern foo", r"pattern: found 'foo', expected .* keep=\.\.\.'$"),
        ("W.npy X.npy --order foo --method true-obs", r"order: found 'foo', expected .*shared$"),
    ],
)
def test_prune_refuses(arguments, said):
    bad_files()
    np.save("few.npy", np.load("X.npy")[: K // 2])
    cuobs_hessian().save("H.npz")
    cuobs.pack(np.zeros((M, K), np.float32)).save("packed.npz")
    os.mkdir("folder")
    assert re.search(said, refused("prune", *arguments.split()))


@pytest.mark.parametrize("option", ["-o", "--mask-out", "--report"])
def test_an_empty_output_is_refused(option):
    assert f"{option}: found an empty path" in refused("prune", "W.npy", "X.npy", option, "")


def test_endings_in_any_case_and_dots_in_folders():
    os.makedirs("v1.0")
    np.savez("v1.0/up.npz", a=np.load("W.npy"), b=np.load("W.npy"))
    os.rename("v1.0/up.npz", "v1.0/UP.NPZ")
    run("prune", "v1.0/UP.NPZ:a", "X.npy", "--method", "wanda")
    assert list(np.load("UP-pruned.NPZ")) == ["a"]
    os.rename("v1.0/UP.NPZ", "v1.0/up")
    assert "v1.0/up: found no ending" in refused("prune", "v1.0/up", "X.npy")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("compare W.npy X.npy --rst old.npy", r"old\.npy: found an existing file"),
        ("compare W.npy X.npy --report no/a", r"no/a: found no folder no"),
        ("compare W.npy X.npy --plot a.txt", r"a\.txt: found \.txt, expected \.png"),
        ("compare W.npy X.npy --method wandas", r"found 'wandas'.*nearest: wanda"),
        ("hessian X.npy narrow.npy -o H.npz", r"narrow\.npy: X: found 31 features"),
        ("hessian X.npy Xnan.npy -o H.npz", r"Xnan\.npy: X: found 1 .*first at \(70, 9\)"),
        ("hessian scalar.npy -o H.npz", r"scalar\.npy: X: found 0 dimensions"),
        ("hessian X.npy -o H.npy", r"-o: found H\.npy, expected \.npz"),
        ("hessian X.npy -o H.NPY", r"-o: found H\.NPY, expected \.npz"),
        ("hessian X.npy -o parts.npz", r"parts\.npz: found an existing file"),
        ("hessian parts.npz -o H.npz", r"parts\.npz: found 2 arrays"),
        ("hessian X.npy -o H.npz --dtype float16", r"dtype: found 'float16'"),
        ("verify W.npy --pattern 3:5", r"does not divide"),
        ("verify short.npy", r"short\.npy: found 510 bytes"),
        ("patterns 5:4", r"pattern: found '5:4'"),
    ],
)
def test_the_other_commands_refuse(arguments, said):
    bad_files()
    assert re.search(said, refused(*arguments.split()))


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"prune W.npy X.npy {option} {path}" for path in ("old.npy", "no/a.npy", "W.npy")
          for option in ("-o", "--mask-out", "--report")),
        "prune W.npy X.npy -o a.txt",
        "prune W.npy X.npy --mask-out a.txt",
        "prune half.safetensors X.npy -o a.npy",
        *(f"compare W.npy X.npy {option} {path}" for path in ("old.png", "no/a.png", "W.npy")
          for option in ("--rst", "--report", "--plot")),
        "compare W.npy X.npy --plot a.txt",
        "hessian X.npy -o old.npz",
        "hessian X.npy -o H.npy",
        "hessian X.npy narrow.npy -o H.npz",
    ],
)  # fmt: skip
def test_it_is_refused_before_any_work(arguments, monkeypatch):
    bad_files()
    open("old.png", "w").close()
    open("old.npz", "w").close()
    safetensors.numpy.save_file({"w": np.load("W.npy").astype(ml_dtypes.bfloat16)},
                                "half.safetensors")  # fmt: skip
    for owner, name in ((cuobs.Recipe, "run"), (cuobs, "compare"), (cuobs.Hessian, "update")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("work began"))
    refused(*arguments.split())


def test_a_folder_that_cannot_be_written_is_refused():
    folder = "/proc"  # where root can't make a file either
    if os.geteuid():
        folder = "locked"
        os.mkdir(folder)
        os.chmod(folder, 0o555)
    assert f"{folder}/P.npy: found that it can't be written" in refused(
        "prune", "W.npy", "X.npy", "-o", f"{folder}/P.npy"
    )


def test_a_result_that_cannot_be_written_leaves_nothing(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "W-pruned.npy: found that it can't be written (No space left" in refused(
        "prune", "W.npy", "X.npy", "--method", "wanda"
    )


def test_verify():
    cuobs.pack(np.zeros((M, K), np.float32)).save("packed.npz")
    assert "W: found a packed weight in packed.npz" in refused("verify", "packed.npz")
    assert run("verify", "W.npy", code=1).stdout == (
        "W.npy breaks 2:4 (keep 2 of 4) in 64 of 64 scopes; the first begins at row 0, column 0\n"
    )
    W = np.zeros((16, 32))
    W[1, 16:20] = [1, 0, 2, 3]
    np.save("V.npy", W)
    assert "in 1 of 128 scopes; the first begins at row 1, column 16" in run(
        "verify", "V.npy", "--pattern", "2:4", code=1
    ).stdout
    assert run("verify", "V.npy", "--pattern", "block16-row8").stdout == (
        "V.npy obeys block16-row8 (keep 1 of 2 blocks of 16) in 16 scopes\n"
    )
    found = json.loads(run("verify", "V.npy", "--pattern", "2:4", "--json", code=1).stdout)
    assert found == {"weight": "V.npy", "pattern": "2:4", "obeys": False, "scopes": 128,
                     "broken": 1, "first": [1, 16]}  # fmt: skip
    found = json.loads(run("verify", "V.npy", "--pattern", "block16-row8", "--json").stdout)
    assert found["obeys"] and found["scopes"] == 16 and found["first"] is None


def test_compare(monkeypatch):
    titles, draw = [], plotting.pareto
    monkeypatch.setattr(plotting, "pareto", lambda *args: titles.append(args[3]) or draw(*args))
    result = run("compare", "W.npy", "X.npy", "--pattern", "4:8", "--rst", "t.rst", "--report",
                 "t.json", "--plot", "p.png")  # fmt: skip
    weight, inputs, *lines = result.stdout.splitlines()
    assert weight.split(maxsplit=1) == ["weight", f"{M} x {K}"]
    assert inputs.split(maxsplit=1) == ["inputs", f"{N} x {K}, 3.0 tokens a column"]
    names = list(cuobs.methods())
    assert [line.split()[0] for line in lines[2 : 2 + len(names)]] == names
    table = json.load(open("t.json"))
    for line, row in zip(lines[2:], table["rows"], strict=False):
        assert line.split()[:3] == [row["method"], f"{100 * row['loss']:.3f}",
                                    f"{row['ratio']:.3f}"]  # fmt: skip
    rst = open("t.rst").read().splitlines()
    assert rst[1] == lines[0] and rst[3:-1] == lines[2 : 2 + len(names)]
    assert open("p.png", "rb").read(4) == b"\x89PNG"
    device = cuobs.arrays.device_name(cuobs.arrays.choose("auto"))
    assert titles == [f"W.npy ({M} x {K}), 4:8, on {device}"]
    some = run("compare", "W.npy", "X.npy", "--method", "wanda", "--method", "admm").stdout
    assert [line.split()[0] for line in some.splitlines()[4:]] == ["wanda", "admm"]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("2:4", ["row 0   a b c d"]),
        ("4:8", ["row 0   a a b b c c d d"]),
        ("1:2x3", ["row 0   a a a b b b"]),
        ("coupled-2:4", ["row 0   a b c d . . . . a b c d"]),
        ("block16-row8",
         ["row 0   " + " ".join("a" * 16), "  (7 rows between)", "row 8   " + " ".join("b" * 16)]),
        ("view=(M/2,2,K):(2K,K,1) block=(1,1,2) scope=(1,2,2) keep=1",
         ["row 0   a a b b", "row 1   c c d d"]),
        ("1:2x40", ["row 0   " + " ".join("a" * 32) + " ..."]),
    ],
)  # fmt: skip
def test_drawings(name, lines):
    assert listing.drawing(cuobs.pattern.parse(name)) == lines
    assert "\n".join("    " + line for line in lines) in run("patterns", name).stdout


def test_patterns_and_methods_are_all_listed():
    said = run("patterns").stdout
    for name, pattern in cuobs.patterns().items():
        assert f"{name}: keep {pattern.keep} of " in said and f"  {pattern}\n" in said
    said = run("methods").stdout
    for name, method in cuobs.methods().items():
        assert re.search(rf"^{name} +{re.escape(method.summary)}$", said, re.MULTILINE)
    assert "--order gap, left" in said


def test_a_new_method_and_a_new_pattern_need_no_change_here(monkeypatch):
    recipe, pattern = sys.modules["cuobs.recipe"], sys.modules["cuobs.pattern"]
    new = dataclasses.replace(cuobs.methods()["wanda"], name="novel", summary="brand new")
    monkeypatch.setitem(recipe._METHODS, "novel", new)
    monkeypatch.setitem(pattern._NAMED, "thirds", cuobs.Pattern(scope=(1, 8), keep=3,
                                                                name="thirds"))  # fmt: skip
    run("prune", "W.npy", "X.npy", "--method", "novel", "--pattern", "thirds")
    assert cuobs.verify(np.load("W-pruned.npy"), "thirds")
    assert "brand new" in run("methods").stdout
    assert "thirds: keep 3 of 8" in run("patterns").stdout
    assert "novel" in run("compare", "W.npy", "X.npy").stdout


def test_info_without_cupy(monkeypatch):
    from cuobs import arrays

    monkeypatch.setitem(sys.modules, "cupy", None)
    arrays.cupy_fault.cache_clear()
    said = run("info").stdout.splitlines()
    arrays.cupy_fault.cache_clear()
    assert f"numpy        {np.__version__}" in said
    (device,) = (line for line in said if line.startswith("device"))
    assert "CuPy is not installed: pip install '.[cuda" in device
    assert "kernels      not tried without a device" in said


class FakeCupy:
    """A CuPy with one device and a compiler that says what it is told to."""

    __version__ = "14.0.1"

    def __init__(self, fault):
        self.cuda, self.runtime, self.fault = self, self, fault

    def getDeviceCount(self):
        return 1

    def getDevice(self):
        return 0

    def getDeviceProperties(self, device):
        return {"name": b"Test GPU"}

    def memGetInfo(self):
        return 3 * 2**30, 8 * 2**30

    def RawKernel(self, code, name):
        assert name in code
        return self

    def compile(self):
        if self.fault:
            raise RuntimeError(self.fault)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", "compile"),
        ("\nprobe.cu(2): cannot open source file\nmore",
         "do not compile (probe.cu(2): cannot open source file): pip install"),
    ],
)  # fmt: skip
def test_info_with_a_device(fault, said, monkeypatch):
    from cuobs import arrays

    monkeypatch.setattr(arrays, "find_cupy", lambda: FakeCupy(fault))
    monkeypatch.setattr(arrays, "cupy_fault", lambda: "")
    lines = run("info").stdout.splitlines()
    assert "device       Test GPU, 3.0 of 8.0 GiB free, CuPy 14.0.1" in lines
    assert lines[-1].startswith(f"kernels      {said}")
    assert (lines[-1] == "kernels      compile") is (not fault)


def test_quiet_and_json():
    assert run("prune", "W.npy", "X.npy", "--quiet").output == ""
    result = run("prune", "W.npy", "X.npy", "--force", "--json")
    found = json.loads(result.stdout)
    W, X = np.load("W.npy"), np.load("X.npy")
    assert found["shape"] == [M, K] and found["written"] == "W-pruned.npy"
    assert found["loss"] == pytest.approx(cuobs.prune(W, X).loss)
    words = ("compare", "W.npy", "X.npy", "--method", "wanda", "--method", "magnitude", "--json")
    found = json.loads(run(*words, "--report", "t.json").stdout)
    assert [row["method"] for row in found["rows"]] == ["wanda", "magnitude"]
    assert found == json.load(open("t.json"))
    assert found["rows"][0]["loss"] == pytest.approx(cuobs.prune(W, X, method="wanda").loss)


def start(*args, **kwargs):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*COMMAND, *args], env=environment, **kwargs)


def test_a_pipe_gets_the_result_and_nothing_else():
    with start("prune", "W.npy", "X.npy", "--method", "true-obs",
               stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        out, err = process.communicate()
    assert process.returncode == 0 and err == b""
    assert b"\r" not in out and b"\x1b" not in out and b"W-pruned.npy" in out


def on_terminal(*args):
    master, slave = pty.openpty()
    with start(*args, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        seen, out = rest_of(master), process.stdout.read()
    os.close(master)
    return process.returncode, out, seen


def rest_of(terminal):
    """What is still written to a terminal until the program ends."""
    seen = b""
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    return seen


def test_a_terminal_gets_progress():
    rng = np.random.default_rng(1)
    np.save("big.npy", rng.standard_normal((64, K)))
    code, out, seen = on_terminal("prune", "big.npy", "X.npy", "--method", "true-obs",
                                  "--group", "1", "--workers", "1")  # fmt: skip
    assert code == 0 and b"\x1b" not in out
    plain = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen)
    assert re.search(rb"true-obs [^\r]*\d+%[^\r]* left", plain)
    assert seen.endswith(b"\x1b[2K")


def test_ctrl_c_leaves_nothing():
    rng = np.random.default_rng(1)
    np.save("W1.npy", rng.standard_normal((2048, 512)).astype(np.float32))
    np.save("X1.npy", rng.standard_normal((1024, 512)).astype(np.float32))
    before = sorted(os.listdir("."))
    master, slave = pty.openpty()
    with start("prune", "W1.npy", "X1.npy", "--method", "true-obs", "--group", "1",
               stdout=subprocess.PIPE, stderr=slave) as process:  # fmt: skip
        os.close(slave)
        seen = b""
        while b"%" not in seen:  # it is at work
            seen += os.read(master, 4096)
        process.send_signal(signal.SIGINT)
        # A terminal that nobody reads makes its writers wait.
        seen += rest_of(master)
        assert process.wait(60) == 130
        assert process.stdout.read() == b""
    os.close(master)
    assert b"Stopped." in seen and b"Traceback" not in seen
    assert sorted(os.listdir(".")) == before


SLOW_WRITE = """
import sys, time
import cuobs_cli as cli
from cuobs import containers
write = containers.write_npy
def slow(f, array):
    write(f, array)
    f.flush()
    print("half", flush=True)
    time.sleep(60)
containers.write_npy = slow
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_writing_the_old_file_is_whole(stop):
    old = open("W.npy", "rb").read()
    before = sorted(os.listdir("."))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE, "prune", "W.npy", "X.npy", "--method", "wanda",
         "-o", "W.npy", "--force"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"half\n"
        process.send_signal(stop)
        process.wait(60)
    assert open("W.npy", "rb").read() == old
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_leave_no_temporary_file_either(stop):
    before = sorted(os.listdir("."))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE, "prune", "W.npy", "X.npy", "--method", "wanda"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"half\n"
        process.send_signal(stop)
        assert process.wait(60) == 128 + stop
        assert process.stderr.read() == b"Stopped.\n"
    assert sorted(os.listdir(".")) == before


def test_shapes_and_tokens_are_told_and_few_are_warned_of():
    said = run("prune", "W.npy", "X.npy", "--method", "wanda", "-o", "a.npy")
    assert re.search(rf"weight +{M} x {K}\ninputs +{N} x {K}, 3.0 tokens a column\n", said.stdout)
    assert said.stderr == ""
    run("hessian", "X.npy", "-o", "H.npz")
    said = run("prune", "W.npy", "--hessian", "H.npz", "--method", "wanda", "-o", "b.npy").stdout
    assert f"{K} columns, 3.0 tokens a column\n" in said
    np.save("H.npy", cuobs_hessian().matrix)
    said = run("prune", "W.npy", "--hessian", "H.npy", "--method", "wanda", "-o", "c.npy").stdout
    assert re.search(rf"inputs +{K} columns\n", said)
    said = run("prune", "X.npy", "W.npy", "--method", "wanda", "-o", "d.npy").stderr
    assert said.splitlines() == [
        f"Warning: X: found {M} rows and W {N}, both of {K} columns; where they are swapped, give "
        "the weight first",
        f"Warning: X: found {M} tokens for {K} columns, expected several for each: the loss on "
        "other tokens will be higher by far",
    ]


def test_inputs_are_looked_at_before_outputs():
    """One who names a wrong file is not told first that the right one's result is there."""
    for name in ("W-pruned.npy", "none-pruned.npy", "a.npz", "none-mask.png", "a.json"):
        open(name, "w").close()
    for command in (
        "prune W.npy none.npy", "prune none.npy X.npy", "prune W.npy --hessian none.npz",
        "compare W.npy none.npy --report a.json", "hessian X.npy none.npy -o a.npz",
        "pack none.npy -o a.npz", "unpack none.npz -o a.npz", "plot mask none.npy",
    ):  # fmt: skip
        assert re.match(r"Error: none\.np[yz]: found no such file", refused(*command.split()))
    assert "found neither" in refused("prune", "W.npy")
    assert "W-pruned.npy: found an existing file" in refused("prune", "W.npy", "X.npy")


def test_the_output_is_called_by_the_weight():
    os.mkdir("deeper")
    np.savez("deeper/down.npz", a=np.load("W.npy"))
    said = run("prune", "deeper/down.npz:a", "X.npy", "--method", "wanda").stdout
    assert said.splitlines()[-1] == "written  down-pruned.npz:a"
    assert list(np.load("down-pruned.npz")) == ["a"]
    assert "NAME-pruned.npy here" in " ".join(run("prune", "--help").stdout.split())


def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with start("methods", stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert process.stderr.read() == b""


def test_the_activations_are_never_in_memory_whole():
    K, size = 32, 2**29
    np.save("W1.npy", np.random.default_rng(0).standard_normal((4, K)).astype(np.float16))
    # a file with a hole: it takes no space on the disk
    X = np.lib.format.open_memmap("X1.npy", "w+", np.float16, (size // (2 * K), K))
    X[: 2 * K] = np.random.default_rng(1).standard_normal((2 * K, K))
    del X
    code = (
        "import resource; import cuobs_cli\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({size}, {size}))\n"
        "cuobs_cli.main('prune W1.npy X1.npy --method sparsegpt --workers 1'.split())"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert cuobs.verify(np.load("W1-pruned.npy"), "2:4")
