"""What tests of ops share: patterns compiled for few scopes, matrices, comparisons."""

import numpy as np
import oracles
import pytest
from layers import FAR, ROWS, TALL, TILE, host

from cuobs.layout import Layout
from cuobs.pattern import parse, patterns

PATTERNS = ("2:4", "4:8", "coupled-2:4", "block16-row8", "1:4", "2:3", "4:8x1", "8:16", "1:2",
            "16:20", TILE, FAR, ROWS, TALL)
PAIRS = "view=(M/2,2,K/2,2):(2K,K,2,1) block=(1,1,1,2) scope=(1,2,2,1) keep=1"
# What each kernel is compared with its twin on.
EVERY = pytest.mark.parametrize(
    "pattern",
    (*patterns(), "1:2", "1:4", "3:4", "2:3", "5:6", "4:8x1", "2:4x3", "8:16", TILE, FAR, ROWS,
     TALL, PAIRS),
)
# Row groups and scopes: one of each, fewer and more than a warp, a warp and one, several blocks.
SHAPE = pytest.mark.parametrize("m, n", [(1, 1), (1, 40), (33, 1), (5, 7), (37, 33), (9, 130)])
# What a kernel may differ from its twin, as a share of the largest entry.
TOLERANCE = {"float16": 5e-3, "float32": 2e-4, "float64": 1e-10}
SINGLE = pytest.mark.parametrize("dtype", ["float32", "float64"])


def definite(rng, *shape):
    """Symmetric positive definite matrices (..., n, n), well conditioned."""
    A = rng.standard_normal((*shape, 2 * shape[-1]))
    return A @ np.swapaxes(A, -1, -2) / shape[-1]


def compiled(text, columns=3):
    """A pattern compiled for a few scopes, with the references' form of it."""
    M = {"block16-row8": 16}.get(text, 8)
    c = parse(text).compile(16, 240).columns
    K = {FAR: 4 * columns, "coupled-2:4": 16 * columns}.get(text, c * columns)
    return parse(text).compile(M, K), oracles.scopes(text, M, K)


def by_scope(array, layout):
    """(c, m, r, n) of an (M, K) array in layout order."""
    shape = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    return array.reshape(shape).transpose(3, 0, 1, 2)


def layout_of(pattern, m, n):
    """A pattern compiled, for any number of row groups and of scopes."""
    blocks, keep = scope_of(pattern)
    r, c = blocks.shape
    return Layout(np.arange(m * r).reshape(m, r), np.arange(n * c).reshape(n, c), blocks, keep)


def scope_of(pattern):
    for K in (240, 252, 256):
        try:
            layout = parse(pattern).compile(32, K)
        except ValueError:
            continue
        return layout.blocks, layout.keep
    raise AssertionError(pattern)


def place_major(blocks):
    """(..., c, c) to (c, c, ...)."""
    return np.ascontiguousarray(np.moveaxis(blocks, (-2, -1), (0, 1)))


def near(found, expected, dtype, single=2e-4, double=1e-10):
    """Equal to a share of the largest entry."""
    found = host(found)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    tolerance = {"float32": single, "float64": double}[str(dtype)]
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


def near_largest(found, expected, tolerance=0.0):
    """Equal to a share of the largest entry."""
    found = host(found).astype(np.float64)
    assert found.shape == expected.shape
    largest = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


def wider(xp, array, left, right):
    """The array as columns of a wider one, whose other elements are NaN (or True)."""
    M, n = array.shape
    whole = xp.full((M, left + n + right), np.nan if array.dtype.kind == "f" else True, array.dtype)
    whole[:, left : left + n] = xp.asarray(array)
    return whole, whole[:, left : left + n]


def untouched(whole, left, right):
    whole = host(whole)
    beside = np.concatenate([whole[:, :left], whole[:, whole.shape[1] - right :]], axis=1)
    return (np.isnan(beside) if beside.dtype.kind == "f" else beside).all()
