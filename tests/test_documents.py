"""Every snippet of README.rst and docs/ runs as it stands.

Python blocks of a page run one after the other in one namespace, as a reader would type them, in a
folder that holds the files that they name. Commands run with the names that the pages use.
"""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from cuobs_cli import main
from extras import MODEL

ROOT = Path(__file__).parents[1]
PAGES = ["README.rst", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.rst"))]
# Pages whose snippets need the extra ``model``.
MODEL_PAGES = ("docs/models.rst", "docs/packed.rst")
# Commands that need a GPU, or take longer than a test may.
NOT_RUN = re.compile(r"cuobs (speedup|compare examples)|self:1024|--devices")
# Commands that write the folder that they name last.
WRITES = ("prune-model", "rotate", "pack-model", "unpack-model")


def blocks(page, kind):
    """The literal blocks of a page: of Python or TOML, or those after ``::``."""
    text = (ROOT / page).read_text()
    start = rf"\.\. code-block:: {kind}\n" if kind != "shell" else r"[^\n]*(?<!code-block)::\n"
    for match in re.finditer(start + r"(?:\s*\n)((?:[ ]+[^\n]*\n|\s*\n)+)", text):
        lines = match[1].rstrip().splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        yield "\n".join(line[indent:] for line in lines)


def commands(page):
    """The commands of cuobs in the literal blocks of a page, lines that go on joined."""
    for block in blocks(page, "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("cuobs "):
                yield line.partition("  # ")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the pages name: a third of the example layer, a small part, a recipe."""
    monkeypatch.chdir(tmp_path)
    layer = ROOT / "examples" / "smollm2"
    (tmp_path / "examples" / "smollm2").mkdir(parents=True)
    for name, rows, few in ("W", 192, 16), ("X", 4096, 512):
        array = np.load(layer / f"{name}.npy", mmap_mode="r")
        np.save(f"examples/smollm2/{name}.npy", array[:rows, :512])
        np.save(f"{name}.npy", array[:few, :64])
    (tmp_path / "recipe.toml").write_text(next(blocks("docs/howto.rst", "toml")))
    return tmp_path


@pytest.fixture
def model_folder(folder):
    """The same with a tiny model in SRC, texts, and windows of tokens."""
    from small_models import make_source, make_tokens

    make_source(folder / "SRC")
    words = " ".join(f"w{n}" for n in make_tokens(40, 64).ravel())
    for name in ("text.txt", "other.txt"):
        (folder / name).write_text(words)
    np.savez("tokens.npz", calibration=make_tokens(), evaluation=make_tokens(seed=1))
    return folder


def enter(page, request):
    """The folder of a page; skips where it needs an extra that is not installed."""
    if page in MODEL_PAGES and not MODEL:
        pytest.skip("the extra 'model' is not installed")
    return request.getfixturevalue("model_folder" if page in MODEL_PAGES else "folder")


def with_blocks(kind):
    """Pages that hold some; contributing.rst is followed word for word by test_recipe.py."""
    for page in PAGES:
        if any(kind(page)) and "contributing" not in page:
            needs = page in MODEL_PAGES or any("import torch" in block for block in kind(page))
            yield pytest.param(page, marks=[pytest.mark.model] if needs else [])


@pytest.mark.parametrize("page", list(with_blocks(lambda page: blocks(page, "python"))))
def test_python(page, request):
    enter(page, request)
    scope = {}
    for block in blocks(page, "python"):
        if "import torch" in block and not MODEL:
            continue
        exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize("page", list(with_blocks(commands)))
def test_commands(page, request):
    folder = enter(page, request)
    for line in commands(page):
        words = shlex.split(line)[1:]
        if NOT_RUN.search(line) or "SRC" in words and page not in MODEL_PAGES:
            continue
        for path in folder.glob("W-pruned*"):
            path.unlink()
        if words[0] in WRITES and "--resume" not in words:
            shutil.rmtree(folder / words[2], ignore_errors=True)
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_example_of_the_command_line_runs_twice_in_a_row(folder):
    text = (ROOT / "examples" / "command_line.sh").read_text().replace('"$layer/', '"')
    lines = [line for line in text.splitlines() if line.startswith("cuobs ")]
    for line in [*lines, *lines]:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize(("page", "module"), [
    ("cuobs", "cuobs"), ("cuobs", "cuobs.comparing"), ("cuobs", "cuobs.collecting"),
    ("files", "cuobs.config"), ("files", "cuobs.files"), ("files", "cuobs.plotting"),
    pytest.param("models", "cuobs.models", marks=pytest.mark.model),
    pytest.param("torch", "cuobs.torch", marks=pytest.mark.model),
])  # fmt: skip
def test_the_reference_lists_what_is_public(page, module):
    if module in ("cuobs.models", "cuobs.torch") and not MODEL:
        pytest.skip("the extra 'model' is not installed")
    public = set(importlib.import_module(module).__all__) - {"all_methods", "recipes_of"}
    text = (ROOT / "docs" / "api" / f"{page}.rst").read_text()
    assert public <= set(re.findall(r"^   (?:\w+\.)*(\w+)$", text, re.MULTILINE))


def test_the_design_page_lists_what_is_there():
    """Every file of cuobs/ and of cuobs/models/, every package, and nothing else."""
    listed, above = set(), {}
    for line in next(blocks("docs/design.rst", "shell")).splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folder = above[indent - 2] if indent else ""
        above[indent] = folder + name
        beside = above[indent] if name.endswith("/") else folder
        listed |= {above[indent], *(beside + more for more in re.findall(r"; (\w+\.py)", line))}
    assert not {path for path in listed if not (ROOT / path).exists()}
    files = {*(ROOT / "cuobs").glob("*.py"), *(ROOT / "cuobs/models").glob("[!_]*.py")}
    there = {path.relative_to(ROOT).as_posix() for path in files}
    packages = {path.parent for path in (ROOT / "cuobs").rglob("__init__.py")}
    there |= {f"{path.relative_to(ROOT).as_posix()}/" for path in packages}
    assert not there - listed - {"cuobs/algorithms/cuda/"}
