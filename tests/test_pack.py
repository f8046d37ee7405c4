"""`cuobs.pack`: a weight in, its product, files."""

import json

import numpy as np
import pytest

import cuobs
from cuobs.packed import HEADER


def weight(M=24, K=96, dtype=np.float32, seed=0):
    """A weight that obeys 2:4."""
    W = np.random.default_rng(seed).standard_normal((M, K)).astype(dtype)
    np.put_along_axis(W.reshape(M, -1, 4), np.abs(W.reshape(M, -1, 4)).argsort(2)[..., :2], 0, 2)
    return W


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pack_multiply_unpack(xp, dtype):
    W = xp.asarray(weight(dtype=dtype))
    packed = cuobs.pack(W, "2:4")
    assert packed.dtype == W.dtype and packed.shape == W.shape
    assert packed.nbytes == packed.values.nbytes + packed.index.nbytes
    assert bool((packed.unpack() == W).all())
    for x in (xp.ones(96, dtype), xp.asarray(weight(5, 96, dtype)).T, xp.ones((96, 0), dtype)):
        found = packed @ x
        assert found.dtype == W.dtype and found.shape == (24, *x.shape[1:])
        expected = W.astype(np.float64) @ x.astype(np.float64)
        xp.testing.assert_allclose(found, expected, rtol=5e-3, atol=3e-2)


def test_a_weight_that_breaks_the_pattern():
    W = weight()
    W[3, 8:12] = 1
    with pytest.raises(ValueError, match="breaks 2:4 in 1 of 576 scopes, the first at row 3, "
                                         "column 8"):  # fmt: skip
        cuobs.pack(W, "2:4")


@pytest.mark.parametrize("W, message", [
    (np.ones(4), "found 1 dimensions, expected 2"),
    (np.ones((4, 6)), "does not divide"),
])  # fmt: skip
def test_refused_shapes(W, message):
    with pytest.raises(ValueError, match=message):
        cuobs.pack(W)
    with pytest.raises(TypeError, match="expected floating point"):
        cuobs.pack(np.ones((4, 8), int))


def test_refused_inputs():
    packed = cuobs.pack(weight())
    with pytest.raises(ValueError, match=r"x: found the shape \(95,\), expected \(96,\)"):
        packed @ np.ones(95)
    with pytest.raises(ValueError, match=r"\(5, 96\), expected .*: its transpose fits"):
        packed @ np.ones((5, 96), np.float32)
    with pytest.raises(TypeError, match="x: found list, expected an array of the weight's kind"):
        packed @ [1.0] * 96
    with pytest.raises(TypeError, match="unsupported operand"):
        np.ones((5, 24), np.float32) @ packed
    with pytest.raises(ValueError, match=r"values: found the shape .* expected"):
        cuobs.Packed(packed.values[:1], packed.index, packed.pattern, packed.shape)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
@pytest.mark.parametrize("pattern", ["2:4", cuobs.Pattern(scope=(1, 8), keep=4)])
def test_files(tmp_path, name, pattern):
    W = weight()
    path = str(tmp_path / name)
    packed = cuobs.pack(W, pattern)
    packed.save(path)
    with pytest.raises(FileExistsError):
        packed.save(path)
    found = cuobs.Packed.load(path)
    assert found.pattern == packed.pattern and found.pattern.name == packed.pattern.name
    assert np.array_equal(found.unpack(), W)


def test_files_that_are_no_packed_weights(tmp_path):
    path = str(tmp_path / "w.npz")
    packed = cuobs.pack(weight())
    np.savez(path, values=packed.values, index=packed.index)
    with pytest.raises(ValueError, match="found no packed in it"):
        cuobs.Packed.load(path)
    for header, message in (
        (b"{", "damaged header"), (b'{"version": 1}', "damaged header"),
        (json.dumps({"version": 2, "pattern": "2:4", "name": "", "shape": [24, 96]}).encode(),
         "packed weight of version 2, expected 1"),
    ):  # fmt: skip
        header = np.frombuffer(header, np.uint8)
        np.savez(path, **{HEADER: header}, values=packed.values, index=packed.index)
        with pytest.raises(ValueError, match=message):
            cuobs.Packed.load(path)


def test_not_a_number_stays_in_its_column():
    W = weight()
    x = np.ones((96, 3), np.float32)
    x[5, 1] = np.nan
    found = cuobs.pack(W) @ x
    np.testing.assert_allclose(found[:, [0, 2]], W @ x[:, [0, 2]], rtol=1e-4, atol=1e-5)
    assert np.isnan(found[:, 1][W[:, 5] != 0]).all()
