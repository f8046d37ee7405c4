"""Fixtures of the model tests.

Where the extra ``model`` is not installed these tests are not collected: they have a step of
their own in CI.
"""

import pytest
from extras import MODEL

if not MODEL:
    collect_ignore_glob = ["test_*.py"]
else:
    from small_models import FAMILIES, make_tokens


@pytest.fixture(params=FAMILIES if MODEL else ())
def family(request):
    """Each family's name."""
    return request.param


@pytest.fixture
def tokens():
    """Calibration windows, shape (8, 24)."""
    return make_tokens()
