"""Plugins, recipes in files, help, completion, and what the command line is made of."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from cuobs_cli import group, main
from extras import MODEL
from test_recipe import recipe

import cuobs

CLI = Path(importlib.import_module("cuobs_cli").__file__).parent


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cuobs.recipe, "_METHODS", dict(cuobs.methods()))  # plugins go again
    rng = np.random.default_rng(0)
    np.save("W.npy", rng.standard_normal((8, 32)))
    np.save("X.npy", rng.standard_normal((96, 32)))


def shell(*args, code=0, **environment):
    """The installed command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cuobs", *args], capture_output=True, text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def run(*args, code=0):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def refused(*args):
    result = run(*args, code=2)
    assert result.stdout == "" and re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


# Plugins


@pytest.mark.parametrize(("text", "said"), [
    ("x = 1", "found no METHOD in it"),
    ("x = ", "SyntaxError: "),
    ("raise KeyError('gone')", "KeyError: 'gone'"),
    ("METHOD = 3", "TypeError: method: found int, expected cuobs.Method"),
    ("import cuobs\nMETHOD = cuobs.Method('admm', 'mine', print)", "'admm', a name that is taken"),
    ("import cuobs\nMETHOD = cuobs.Method('mine', '', print, [cuobs.Option('damp', float)])",
     "found 'damp', which cuobs.prune takes already"),
    ("import cuobs\nMETHOD = cuobs.Method('mine', '', print, [cuobs.Option('group', str)])",
     "group: found an option of type str, expected int, as "),
])  # fmt: skip
def test_a_plugin_that_brings_nothing_is_refused(text, said):
    Path("mine.py").write_text(text)
    assert f"mine.py: {said}" in refused("--plugin", "mine.py", "methods") or said in refused(
        "--plugin", "mine.py", "methods"
    )
    assert "mine" not in cuobs.methods()


def test_a_plugin_has_to_be_a_file():
    assert "none.py: found no such file, expected" in refused("--plugin", "none.py", "methods")
    assert "W.npy: found no Python file" in refused("--plugin", "W.npy", "methods")


def test_plugins_may_bring_patterns_and_be_several():
    Path("a.py").write_text("import cuobs\ncuobs.register_pattern('thirds', '1:3')\n")
    Path("b.py").write_text("import cuobs\ncuobs.register_pattern('fifths', '2:5')\n")
    said = shell("--plugin", "a.py", "--plugin", "b.py", "patterns").stdout
    assert "thirds: keep 1 of 3" in said and "fifths: keep 2 of 5" in said


def test_a_plugin_is_a_module_like_any_other():
    Path("mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses, cuobs\n"
        "@dataclasses.dataclass\nclass State:\n    seen: dataclasses.InitVar[int]\n"
        "METHOD = cuobs.Method('mine', 'in a class of its own', print)\n"
    )
    assert "in a class of its own" in shell("--plugin", "mine.py", "methods").stdout


def test_an_option_that_the_command_has_already_is_named():
    Path("mine.py").write_text(
        "import cuobs\n"
        "METHOD = cuobs.Method('mine', 'mine', print, [cuobs.Option('report', int)])\n"
    )
    said = shell("--plugin", "mine.py", "prune", "W.npy", "X.npy", code=2).stderr
    assert said.startswith("Error: report: found an option of a method, but 'prune' has one")


def installed(folder, value):
    """A package that names a method as an entry point, and the environment that finds it."""
    info = Path(folder, "novel-1.0.dist-info")
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: novel\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cuobs.methods]\nnovel = {value}\n")
    Path(folder, "novel.py").write_text(recipe("method"))
    return {"PYTHONPATH": os.path.abspath(folder)}


def test_a_package_brings_a_method_by_an_entry_point():
    where = installed("site", "novel:METHOD")
    assert "activation" in shell("methods", **where).stdout.split()
    shell("prune", "W.npy", "X.npy", "--method", "activation", **where)


def test_a_package_that_fails_is_named_and_left_out():
    done = shell("methods", **installed("site", "novel:NOTHING"))
    assert "novel = novel:NOTHING can't be used" in done.stderr
    assert "admm" in done.stdout and "weakest inputs" not in done.stdout


# Recipes in files


def test_a_config_is_what_its_options_say():
    Path("r.toml").write_text(
        "[recipe]\npattern = '4:8'\nmethod = 'true-obs'\norder = 'left'\ndamp = 0.1\n"
        "[settings]\ndtype = 'float64'\n"
    )
    run("prune", "W.npy", "X.npy", "--config", "r.toml", "-o", "a.npy")
    run("prune", "W.npy", "X.npy", "--pattern", "4:8", "--method", "true-obs", "--order", "left",
        "--damp", "0.1", "--dtype", "float64", "-o", "b.npy")  # fmt: skip
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    # What is given goes before the file, a default does not; another method leaves its options.
    said = run("prune", "W.npy", "X.npy", "--config", "r.toml", "--pattern", "2:4", "--method",
               "wanda", "--report", "r.json", "-o", "c.npy").stderr  # fmt: skip
    assert "Warning: r.toml: order is for true-obs and does not count with --method wanda" in said
    report = json.load(open("r.json"))
    assert report["method"] == "wanda" and report["options"] == {} and report["damp"] == 0.1
    assert report["pattern"] == str(cuobs.patterns()["2:4"])
    assert report["settings"]["dtype"] == "float64"


def test_compare_takes_a_config_and_gives_options_to_those_that_take_them():
    Path("r.toml").write_text("[recipe]\nmethod = 'true-obs'\norder = 'shared'\ndamp = 0.1\n")
    run("compare", "W.npy", "X.npy", "--config", "r.toml", "--report", "t.json",
        "--method", "wanda", "--method", "obs-ordered", "--method", "true-obs")  # fmt: skip
    rows = {row["method"]: row["loss"] for row in json.load(open("t.json"))["rows"]}
    W, X = np.load("W.npy"), np.load("X.npy")
    assert rows["true-obs"] == cuobs.prune(W, X, method="true-obs", order="shared", damp=0.1).loss
    assert rows["obs-ordered"] == cuobs.prune(W, X, method="obs-ordered", damp=0.1).loss
    # The options are those of its own method, which is not asked for here.
    run("compare", "W.npy", "X.npy", "--config", "r.toml", "--method", "wanda")


@pytest.mark.parametrize(("text", "said"), [
    ("[recipe]\npatern = '2:4'", "r.toml: recipe: found 'patern'.*nearest: pattern"),
    ("[layers]\nskip = ['lm_head']", "skip: found lm_head, expected such entries with prune-model"),
    ("[layers]\n'*.up' = {damp = 1}", r"layers: found \*.up, expected such entries"),
    ("[model]\ntune = 3", "model: found tune, expected such entries"),
])
@pytest.mark.parametrize("command", ["prune", "compare"])
def test_a_config_that_does_not_fit_is_refused(command, text, said):
    Path("r.toml").write_text(text)
    assert re.search(said, refused(command, "W.npy", "X.npy", "--config", "r.toml"))


def test_a_config_that_is_not_there_is_refused():
    said = refused("prune", "W.npy", "X.npy", "--config", "none.toml")
    assert "none.toml: found no such file, expected a recipe" in said


@pytest.mark.parametrize("command", ["prune missing.npy X.npy", "compare missing.npy X.npy",
                                     "prune-model missing out --calibration none.txt"])
@pytest.mark.parametrize(("option", "said"), [
    ("--method sparse-gpt", "found 'sparse-gpt'.*nearest: sparsegpt"),
    ("--pattern 4:9x", "pattern: found '4:9x'"),
    ("--damp 1e37", r"damp: found 1e\+37, expected a number from 0 to 1e\+06"),
    (f"--damp 1{'0' * 400}", "damp: found inf"),
    ("--workers 0", "workers: found 0"),
    ("--memory-limit 8", "memory_limit: found '8', which is 8 bytes"),
    ("--order up", "order: found 'up'"),
])  # fmt: skip
def test_a_wrong_word_is_found_before_anything_is_read(command, option, said):
    """Nothing that is named exists: the word was looked at first, and PyTorch never."""
    done = refused(*command.split(), *option.split())
    assert re.search(said, done)


@pytest.mark.model
def test_a_wrong_word_needs_no_torch():
    code = (
        "import sys\nfrom cuobs_cli import main\n"
        "for line in sys.argv[1:]:\n"
        "    try:\n        main(line.split())\n"
        "    except SystemExit:\n        pass\n"
        "    print(*{m.partition('.')[0] for m in sys.modules})"
    )
    commands = [
        "prune-model a b --calibration c --method adm",
        "prune-model a b --calibration c --pattern 5:4", "prune --help", "--help", "methods",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True)
    loaded = [set(line.split()) for line in done.stdout.splitlines() if "click" in line.split()]
    assert len(loaded) == len(commands)
    for names in loaded:
        assert "cuobs" in names
        assert not names & {"torch", "transformers", "matplotlib", "cupy", "safetensors", "rich"}


# compare, row by row


STOPPED = """
import os, signal, sys
import cuobs
from cuobs_cli import main
method = cuobs.methods()["obs-local"]
def stop(problem):
    os.kill(os.getpid(), signal.SIGINT)
cuobs.recipe._METHODS["obs-local"] = cuobs.Method("obs-local", "stops", stop)
main(sys.argv[1:])
"""


def test_ctrl_c_keeps_the_rows_that_were_found():
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, "compare", "W.npy", "X.npy", "--report", "t.json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 130 and done.stderr == "Stopped.\n"
    lines = done.stdout.splitlines()[2:]
    assert [line.split()[0] for line in lines[2:]] == ["magnitude", "wanda", "sparsegpt", "written"]
    rows = json.load(open("t.json"))["rows"]
    assert [row["method"] for row in rows] == ["magnitude", "wanda", "sparsegpt"]
    assert rows[2]["ratio"] == 1.0 and lines[2].split()[2] == f"{rows[0]['ratio']:.3f}"


def test_rows_come_as_they_are_found(monkeypatch):
    """Each in its place, as soon as those before it are there; SparseGPT's ratio to all of them."""
    said, ran = [], []
    monkeypatch.setattr("cuobs_cli.compare.click.echo", lambda text="", **_: said.append(text))
    wanda = cuobs.methods()["wanda"].function

    def watched(problem):
        ran.append(len(said))
        return wanda(problem)

    monkeypatch.setitem(cuobs.recipe._METHODS, "wanda", cuobs.Method("wanda", "watched", watched))
    run("compare", "W.npy", "X.npy", "--method", "magnitude", "--method", "wanda", "--method",
        "sparsegpt", "--method", "wanda")  # fmt: skip
    assert ran == [4]  # both shapes, the header and magnitude were there before wanda ran
    assert [line.split()[0] for line in said[3:]] == ["magnitude", "wanda", "sparsegpt"]


# Help and completion


def test_help_shows_options_by_group_and_defaults_in_one_way():
    said = run("prune", "--help").output
    places = [said.index(f"\n{name}:\n") for name in
              ("What to do", "Options of methods", "How to run", "Output", "Other options")]
    assert places == sorted(places)
    words = " ".join(said.split())
    for method in cuobs.methods().values():
        assert method.name in words
        for option in method.options:
            assert "--" + option.name in words and option.help in words
    assert "[default: a tenth of them]" in words and "[default: 0.01]" in words
    assert "[default: largest for obs-ordered, gap for true-obs]" in words
    for name in group.COMMANDS:
        said = run(name, "--help").output
        words = " ".join(said.split())
        assert not re.search(r"\. \[(?!default: [^(\]]+\]|required\])", words), said
        assert not re.search(r"\b(INTEGER|RANGE|FLOAT|BOOLEAN)\b|…|\.\.\.$", words), said
        others = said.partition("\nOther options:\n")[2]
        assert not others or others.split("--")[1:] == ["help  Show this message and exit.\n"]


def test_devices_share_layers_and_processes_models():
    for name, there in ("prune", True), ("compare", True), ("prune-model", False):
        assert ("--devices" in run(name, "--help").output) == there


def test_the_help_shows_every_command_once_by_what_it_is_for():
    said = run("--help").output
    assert all(f"\n{title}:\n" in said for title in group.SECTIONS)
    for name in group.COMMANDS:
        assert len(re.findall(rf"^  {name}  +\w", said, re.MULTILINE)) == 1
    assert max(map(len, said.splitlines())) <= 80 and "..." not in said.partition("A layer")[2]
    assert "..." not in run("plot", "--help").output.partition("Commands")[2]


@pytest.mark.parametrize(("words", "said"), [
    ("compare W.npy X.npy --report --json", "'--report': found the option --json, expected a file"),
    ("compare W.npy X.npy --rst --force", "'--rst': found the option --force, expected a file"),
    ("prune W.npy X.npy -o --quiet", "'-o' / '--out': found the option --quiet, expected a file"),
])  # fmt: skip
def test_an_option_is_no_file_to_write(words, said):
    before = os.listdir(".")
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2 and said in result.stderr and os.listdir(".") == before


@pytest.mark.parametrize(("word", "said"), [
    ("prun", "No such command 'prun'. Did you mean 'prune'?"),
    ("prune_model", "No such command 'prune_model'. Did you mean 'prune-model'?"),
    ("xyz", "No such command 'xyz'.\n"),
])  # fmt: skip
def test_a_command_that_there_is_not_names_the_nearest(word, said):
    result = CliRunner().invoke(main, [word, "W.npy"])
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize(("words", "expected"), [
    ("cuobs pru", {"prune", "prune-model"}),
    ("cuobs prune --method obs-", {"obs-local", "obs-full", "obs-split", "obs-interleaved",
                                   "obs-ordered"}),
    ("cuobs prune --pattern block", {"block16-row8"}),
    ("cuobs prune --dtype f", {"float32", "float64"}),
    ("cuobs prune --spl", {"--splits"}),
    ("cuobs --plugin mine.py prune --method nov", {"novel"}),
])  # fmt: skip
def test_completion_knows_names(words, expected):
    Path("mine.py").write_text("import cuobs\nMETHOD = cuobs.Method('novel', 'new', print)\n")
    done = completed(words)
    assert {line.split(",")[1] for line in done} == expected


@pytest.mark.parametrize("words", ["cuobs prune W", "cuobs prune W.npy X",
                                   "cuobs prune --config r", "cuobs verify W"])
def test_completion_does_not_hide_files(words):
    assert completed(words) == [f"file,{words.split()[-1]}"]


def completed(words):
    environment = {"_CUOBS_COMPLETE": "bash_complete", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
    result = CliRunner().invoke(main, prog_name="cuobs", env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


# What it is made of


def test_it_runs_as_a_module():
    assert shell("--version").stdout == f"cuobs, version {cuobs.__version__}\n"
    assert "Error: method: found 'adm'" in shell("prune", "W.npy", "--method", "adm", code=2).stderr


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_it_needs_no_extra_to_be_imported(path):
    """What `cuobs.models` and `cuobs.torch` need may be missing where a single layer is pruned."""
    for node in ast.parse(path.read_text()).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [n for n in names if n.startswith(("cuobs.models", "cuobs.torch", "torch"))]


@pytest.mark.model
@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_it_imports_public_names_alone(path):
    """A name of cuobs that the command line takes stands in the __all__ of its module."""
    if "cuobs.models" in path.read_text() and not MODEL:
        pytest.skip("the extra 'model' is not installed")
    tree, modules = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "cuobs":
            for alias in node.names:
                if is_module(node.module, alias.name):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:
                    assert alias.name in importlib.import_module(node.module).__all__
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if owner := modules.get(node.value.id):
                assert node.attr in importlib.import_module(owner).__all__, f"{owner}.{node.attr}"


def is_module(package, name):
    try:
        return importlib.util.find_spec(f"{package}.{name}") is not None
    except ModuleNotFoundError:  # the package is a module
        return False


STOP = """
import os, signal, sys

class Stop:
    def find_spec(self, name, *_):
        if name == os.environ["STOP"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Stop())
"""


@pytest.mark.parametrize("command", [
    ["-m", "cuobs", "methods"], ["-c", "from cuobs_cli import main\nmain(['methods'])"],
])  # fmt: skip
@pytest.mark.parametrize("name", ["numpy", "click", "scipy", "cuobs.arrays", "cuobs_cli.listing"])
def test_a_stop_while_it_is_imported_is_told_in_a_word(command, name):
    Path("sitecustomize.py").write_text(STOP)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "STOP": name},
    )  # fmt: skip
    assert done.returncode == 130 and done.stderr == "Stopped.\n" and done.stdout == ""


def test_importing_cuobs_alone_takes_no_time():
    """What `python -m cuobs` does before its first line, where nothing could catch a Ctrl-C."""
    code = "import sys\nbefore = set(sys.modules)\nimport cuobs\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["cuobs"]
