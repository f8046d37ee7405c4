"""What several GPUs take on paper: bytes as the code sends them, and the table of the documents."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cuobs.ops import factors

ROOT = Path(__file__).parent.parent
# perf is no package that is installed.
scaling = SimpleNamespace(**runpy.run_path(str(ROOT / "perf" / "scaling.py")))


@pytest.mark.parametrize("K", [56, 57, 16, 33])
@pytest.mark.parametrize("inverted", [False, True])
def test_bytes_of_factors_are_those_that_are_gathered(monkeypatch, K, inverted):
    monkeypatch.setattr(factors, "LEAF_OF_ONE", 16)
    sizes = []

    def by_rows(function, rows):
        made = function(slice(0, rows))
        sizes.append(made.nbytes)
        return made

    H = np.eye(K, dtype=np.float32)
    if inverted:
        factors.inverse_by_rows(H, by_rows)
        assert sum(sizes) == scaling.bytes_of_factor(K, 16) + H.nbytes
    else:
        factors.factor_by_rows(H, by_rows)
        assert sum(sizes) == scaling.bytes_of_factor(K, 16, inverted=False)


@pytest.mark.parametrize("K", [56, 57, 16])
def test_bytes_of_factors_side_by_side(monkeypatch, K):
    monkeypatch.setattr(factors, "LEAF", 16)
    sizes = []

    def by_rows(function, rows):
        sizes.append(function(slice(0, rows)))
        return sizes[-1]

    H = np.eye(K, dtype=np.float32)
    factors.factors_by_rows([(H, True, True), (2 * H, False, True)], by_rows)
    assert sum(made.nbytes for made in sizes) == scaling.bytes_of_pair(K, 16)


def test_bytes_of_sums_are_those_that_are_added_up():
    torch = pytest.importorskip("torch")
    from cuobs.models.pruning.targets import Moments

    groups, width = ((6, 9, False), (5, 3, True)), 7
    found = 0
    for K, _, writes in groups:
        moments = Moments()
        streams = (torch.ones(4, width),) * 2 if writes else ()
        moments.update(torch.ones(4, K), torch.zeros(4, K), *streams)
        found += sum(total.nbytes for total in moments.sums())
    assert found == scaling.bytes_of_sums(groups, width)


def test_time_goes_where_the_formula_says():
    one, many = (scaling.seconds(scaling.Case("", n)) for n in (1, 10**9))
    assert sum(one.values()) == pytest.approx(
        scaling.WINDOWS + scaling.ROWS + scaling.EACH + scaling.LEAVES + scaling.PRODUCTS
    )
    left = {name: s for name, s in many.items() if not name.startswith("links") and s > 1e-6}
    assert left == pytest.approx({"factors": scaling.LEAVES, "not divided": scaling.EACH})
    links = 2 * scaling.bytes_of_sums() / min(scaling.SUMS, 8 * scaling.ADAPTER)
    assert many["links: sums"] == pytest.approx(links)


def test_the_documents_hold_the_table():
    assert scaling.table() in (ROOT / "docs" / "models.rst").read_text()
