"""What --require-gpu does where there is no device."""

import os
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
    how = {"cwd": Path(__file__).parent.parent, "capture_output": True, "text": True,
           "env": {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}}  # fmt: skip
    skipped = subprocess.run(command, **how)
    assert skipped.returncode == 0 and "1 skipped" in skipped.stdout
    failed = subprocess.run([*command, "--require-gpu"], **how)
    assert failed.returncode == 1 and "CuPy" in failed.stdout
