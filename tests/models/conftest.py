"""Fixtures of the model tests.

Where the extra ``model`` is not installed these tests are not collected: they have a step of
their own in CI.
"""

import importlib.util

import pytest
from small_models import FAMILIES, make_source, make_tokens

NEEDED = ("torch", "transformers", "safetensors")

if not all(importlib.util.find_spec(name) for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/models/" in item.path.as_posix():
            item.add_marker(pytest.mark.model)


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family's name."""
    return request.param


@pytest.fixture
def tokens():
    """Calibration windows, shape (8, 24)."""
    return make_tokens()


@pytest.fixture
def source(tmp_path):
    """A checkpoint's folder in several shards, with a tokenizer and files of its own."""
    return make_source(tmp_path / "source")


