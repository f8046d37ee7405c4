"""The gate through which arrays come and go."""

import numpy as np
import pytest
from layers import host

from cuobs import arrays

ml_dtypes = pytest.importorskip("ml_dtypes")
BFLOAT16 = np.zeros(1, ml_dtypes.bfloat16)


def floats(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


@pytest.mark.parametrize("below", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_bfloat16_and_what_lies_between(xp, below):
    """Halves go to the even one: 1 + 2⁻⁸ is 1, 1 + 3·2⁻⁸ is 1 + 2⁻⁶."""
    upper = np.arange(2**16, dtype=np.uint32)
    upper = upper[(upper & 0x7F80) != 0x7F80]  # neither infinite nor NaN
    values = floats(upper << 16 | below)
    found = host(arrays.round_to(xp.asarray(values), BFLOAT16))
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_halves_in_words(xp):
    values = xp.asarray([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), -(1 + 3 * 2**-8)], "float32")
    found = host(arrays.round_to(values, BFLOAT16))
    assert found.tolist() == [1, 1 + 2**-6, -1, -(1 + 2**-6)]


def test_rounding_leaves_its_input_alone(xp):
    values = xp.asarray(np.linspace(-3, 3, 100, dtype="float32"))
    before = values.copy()
    for like in (BFLOAT16, np.zeros(1, "float16"), np.zeros(1, "float32")):
        arrays.round_to(values, like)
        assert (values == before).all()
