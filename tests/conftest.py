"""Fixtures: the array namespaces, and the example layer."""

import gc
import os
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
from extras import COMMAND_LINE
from threadpoolctl import threadpool_limits

from cuobs import arrays

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "smollm2"
# Where whole models, or the lack of PyTorch in what is imported, are tested.
MODEL_TESTS = ("models/", "pytorch/", "cli/test_models_", "cli/test_view", "cli/test_early_")
# Files that take longest: where each goes to one process as a whole, they go first.
LONGEST = (
    "algorithms/test_figures.py", "models/test_ranks.py", "models/test_prune_model.py",
    "algorithms/test_methods.py", "test_memory_limit.py", "models/test_model_folders.py",
)  # fmt: skip
FEW_PROCESSES = 4


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Signals reach processes that tests start, also where pytest runs in the background."""
    for which, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL),
    ):  # fmt: skip
        if signal.getsignal(which) is signal.SIG_IGN:
            signal.signal(which, handler)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """Threads of BLAS only wait for each other on matrices as small as most of these.

    Processes that tests start begin with one as well.
    """
    with threadpool_limits(1), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cut():
    """Nobody waits until what tests write is on the disk; what can't be is still a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu", action="store_true",
        help="fail where a test needs a CUDA device and none is found, instead of skipping it",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (fault := arrays.cupy_fault()):
        if item.config.getoption("--require-gpu"):
            pytest.fail(fault, pytrace=False)
        pytest.skip(fault)


@pytest.fixture
def cp():
    """CuPy, where a CUDA device is found."""
    if fault := arrays.cupy_fault():
        pytest.skip(fault)
    import cupy

    return cupy


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """The test's body runs on NumPy and, where a CUDA device is found, on CuPy."""
    return np if request.param == "numpy" else request.getfixturevalue("cp")


@pytest.fixture
def rng(request):
    """Numbers of each test's own, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def close(dtype):
    """Compare to a share of the largest entry that suits the dtype."""
    tolerance = {"float32": 2e-4, "float64": 1e-11}[dtype]

    def compare(found, expected):
        found, expected = arrays.to_numpy(found), np.asarray(expected)
        assert found.shape == expected.shape
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max())
        )

    return compare


@pytest.fixture(scope="session")
def example():
    """W (576, 1536) and X (4096, 1536) of the example layer, float16, memory-mapped."""
    return np.load(EXAMPLE / "W.npy", mmap_mode="r"), np.load(EXAMPLE / "X.npy", mmap_mode="r")


@pytest.fixture(scope="session")
def made_source(tmp_path_factory):
    """What each test has a copy of."""
    from small_models import make_source

    return make_source(tmp_path_factory.mktemp("made") / "source")


@pytest.fixture
def source(made_source, tmp_path):
    """A checkpoint's folder in several shards, with a tokenizer and files of its own."""
    return shutil.copytree(made_source, tmp_path / "source")


def pytest_configure(config):
    share_cores()
    keep_files_whole(config.option)
    # A division by zero or an overflow inside a method is a bug even where the result is right.
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning")


def share_cores():
    """Each worker of pytest-xdist keeps to its own cores.

    Threads of small products that wander between cores wait for each other longer than they
    compute. What workers do is tested by options, whatever the number of cores.
    """
    worker, count = (os.environ.get(f"PYTEST_XDIST_WORKER{end}", "") for end in ("", "_COUNT"))
    if worker and hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: int(count)]
        if mine:
            os.sched_setaffinity(0, mine)


def keep_files_whole(option):
    """Let each of a few workers of pytest-xdist have whole files: their tests share what is made.
    """
    if getattr(option, "dist", "no") == "load" and len(option.tx) <= FEW_PROCESSES:
        option.dist, option.loadscopereorder = "loadfile", False


def pytest_collection_finish():
    """What was imported is there to stay: no search for garbage looks at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_collection_modifyitems(items):
    for item in items:
        if inside(item).startswith(MODEL_TESTS):
            item.add_marker(pytest.mark.model)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: inside(item) not in LONGEST)


def inside(item):
    """The path of a test's file in this folder."""
    return item.path.relative_to(TESTS).as_posix() if TESTS in item.path.parents else ""


def pytest_ignore_collect(collection_path):
    """Without the package cuobs_cli, leave out what tests it."""
    if not COMMAND_LINE and {TESTS / "cli", TESTS / "test_documents.py"} & {
        collection_path, *collection_path.parents
    }:  # fmt: skip
        return True


def pytest_terminal_summary(terminalreporter):
    if not COMMAND_LINE:
        terminalreporter.write_line(
            "tests of the command line: found no package cuobs_cli, expected cuobs to be "
            "installed: pip install -e ."
        )
