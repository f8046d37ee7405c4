"""Fixtures: the array namespaces, and the example layer."""

from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from cuobs import arrays

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2"


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """Threads of BLAS only wait for each other on matrices as small as most of these."""
    with threadpool_limits(1):
        yield


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """The test's body runs on NumPy and, where a CUDA device is found, on CuPy."""
    if request.param == "numpy":
        return np
    if fault := arrays.cupy_fault():
        pytest.skip(fault)
    import cupy

    return cupy


@pytest.fixture(scope="session")
def example():
    """W (576, 1536) and X (4096, 1536) of the example layer, float16, memory-mapped."""
    return np.load(EXAMPLE / "W.npy", mmap_mode="r"), np.load(EXAMPLE / "X.npy", mmap_mode="r")


@pytest.fixture
def source(tmp_path):
    """A checkpoint's folder in several shards, with a tokenizer and files of its own."""
    from small_models import make_source

    return make_source(tmp_path / "source")


def pytest_configure(config):
    # A division by zero or an overflow inside a method is a bug even where the result is right.
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning")
