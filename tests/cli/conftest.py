"""The command line is tested as it is installed, whole models where the extra ``model`` is."""

import importlib.util

import pytest
from extras import MODEL

if importlib.util.find_spec("cuobs_cli") is None:
    raise pytest.UsageError(
        "tests/cli: found no package cuobs_cli, expected cuobs to be installed: pip install -e ."
    )
if not MODEL:
    collect_ignore_glob = ["test_models_*.py", "test_view.py"]
