"""What --require-gpu does where there is no device."""

import subprocess
import sys
from pathlib import Path

import pytest

from cuobs import arrays

TEST = "tests/ops/test_gram.py::test_mirror[cupy]"


def test_a_missing_device_fails_instead_of_skipping():
    if not arrays.cupy_fault():
        pytest.skip("a device is here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST]
    root = Path(__file__).parent.parent
    skipped = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert skipped.returncode == 0 and "1 skipped" in skipped.stdout
    failed = subprocess.run([*command, "--require-gpu"], cwd=root, capture_output=True, text=True)
    assert failed.returncode == 1 and "CuPy" in failed.stdout
