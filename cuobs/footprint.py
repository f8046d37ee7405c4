"""What pruning a layer holds at its most, known before it starts, and the refusal of less.

A method declares its own part by a function beside it, ``Method(..., memory=function)``. Here are
the parts that all methods share: the Hessian, the problem, the exact re-solve, and what measures
the result. They count every array that a call makes, none that it was given; on a GPU also what
CUDA and its libraries take.
"""

import math
from typing import NamedTuple

import numpy as np

from cuobs import arrays, batches, hessian, loss, problem, refine
from cuobs.layout import Layout
from cuobs.ops import views

# Objects of Python, and arrays of the length of a row or a column: for each call, row and column.
SMALL, SMALL_EACH = 2**15, 128
# Elements that NumPy copies where it writes to a slice.
BUFFER = 2**14


class Size(NamedTuple):
    """What the memory of a method depends on.

    Attributes
    ----------
    layout : Layout
    itemsize : int
        Bytes of a number in the compute dtype.
    device : {"cpu", "cuda"}
    precision : {"tensor", "fp32"}
    """

    layout: Layout
    itemsize: int
    device: str = "cpu"
    precision: str = "tensor"

    @property
    def weight(self):
        """Bytes of an array like the weight."""
        return self.mask * self.itemsize

    @property
    def mask(self):
        """Bytes of a mask of it."""
        return math.prod(self.layout.shape)

    @property
    def matrix(self):
        """Bytes of an array like the Hessian."""
        return self.layout.shape[1] ** 2 * self.itemsize

    @property
    def product(self):
        """Bytes of a product that is added to an array like the weight: a GPU adds it in place."""
        return self.weight if self.device == "cpu" else 0

    def operand(self, array):
        """Bytes of an array of so many in half precision, where tensor cores take it so."""
        halved = self.device == "cuda" and self.precision == "tensor" and self.itemsize == 4
        return array // 2 if halved else 0


class Memory(NamedTuple):
    """What a method holds beside the problem's own weight and Hessian.

    Attributes
    ----------
    most : int
        Bytes at its peak: factors, mask and weights among them.
    kept : int
        Bytes of factors that the problem still holds at its end.
    """

    most: int
    kept: int = 0


class Given(NamedTuple):
    """What of a layer is there before it is pruned.

    Attributes
    ----------
    dtype : str
        Of the weight, and of the pruned one.
    converts : bool
        Whether the weight is of another dtype or elsewhere.
    makes_hessian : bool
        Whether the Hessian is made by the call: summed, converted or moved.
    sums : bool
        Whether it is made of activations.
    row : int
        Bytes that a row of activations takes on its way into the sum.
    widened : int
        Bytes of activations that have to be widened as a whole.
    outside : int
        Bytes that the call makes beside, and holds from its beginning to its end.
    """

    dtype: str
    converts: bool = False
    makes_hessian: bool = False
    sums: bool = False
    row: int = 0
    widened: int = 0
    outside: int = 0

    def held(self, size):
        """Bytes that the call holds while a method works."""
        return self.outside + self.makes_hessian * size.matrix


def check(recipes, settings, shape, xp, given):
    """Refuse a limit in which a weight of a shape (M, K) can't be pruned by each of the recipes.

    Returns
    -------
    int or None
        Bytes that activations may take on their way into the Hessian under the limit.

    Raises
    ------
    ValueError
        Says how much is needed.
    """
    limit = settings.memory_limit
    if limit is None:
        return None
    for recipe in recipes:
        size = size_of(recipe, settings, shape, xp)
        least = needed(recipe, size, given)
        if limit < least:
            raise ValueError(
                f"memory_limit: found {arrays.size_text(limit)}, expected at least "
                f"{arrays.size_text(least, up=True)}, which {recipe.method} needs for W "
                f"{shape[0]} x {shape[1]} in {settings.dtype}"
            )
    sums = hessian.sum_bytes(size.matrix, 0, size.device)
    return limit - given.outside - given.widened - sums - small(size)


def size_of(recipe, settings, shape, xp):
    """The `Size` of a recipe for a weight of a shape (M, K)."""
    itemsize = np.dtype(settings.dtype).itemsize
    layout = recipe.pattern.compile(*shape)
    return Size(layout, itemsize, arrays.device_name(xp), settings.precision)


def needed(recipe, size, given):
    """Bytes that `check` asks for."""
    work = max(
        problem.build_bytes(size) + given.converts * size.weight,
        size.weight + size.matrix + _method(recipe, size),
    )
    summing = given.outside + given.widened + hessian.sum_bytes(size.matrix, given.row, size.device)
    most = max(
        summing if given.sums else 0,
        given.held(size) + work,
        given.held(size) + _result(size, given),
    )
    return most + small(size)


def small(size):
    """Bytes of what has the length of a row or column, and on a GPU of CUDA's own."""
    libraries = batches.GPU_LIBRARIES if size.device == "cuda" else 0
    vectors = SMALL_EACH * sum(size.layout.shape) + BUFFER * size.itemsize
    return SMALL + vectors + libraries


def _method(recipe, size):
    """Of a method and, where the recipe says so, of the exact re-solve after it."""
    own = recipe.entry.memory
    most, kept = own(size, **recipe.options) if own else (size.weight + size.mask, 0)
    if not recipe.exact:
        return most
    if not kept:
        # The factor that tells whether the Hessian is positive definite.
        most, kept = most + size.matrix, size.matrix
    return max(most, kept + size.mask + size.weight + refine.resolve_bytes(size))


def _result(size, given):
    """Of putting weights and mask in their own order, of rounding and of measuring them."""
    half = given.dtype == "bfloat16"
    # Its values are held in float32, and rounded by a copy and what is added to it.
    weight = size.mask * (4 if half else np.dtype(given.dtype).itemsize)
    moved = sum(not views.ordered(order.ravel()) for order in (
        size.layout.row_order, size.layout.column_order
    ))  # fmt: skip
    ordering = size.weight * (1 + max(1, moved)) + 2 * size.mask
    measuring = weight + size.mask + loss.loss_bytes(size)
    rounding = 2 * size.weight + size.mask + (1 + half) * given.converts * weight
    return max(ordering, rounding, measuring + 2 * given.converts * size.weight)
