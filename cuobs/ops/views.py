"""A weight in a pattern's own order, where scopes lie side by side, and as scopes."""

from typing import Any

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops.checks import shaped


def permute(array: Any, layout: Any) -> Any:
    """An (M, K) array into layout order: row group by row group, column group by column group.

    Parameters
    ----------
    array : array, shape (M, K)
    layout : Layout
        Of `Pattern.compile`.

    Returns
    -------
    array, shape (M, K)
        The array itself where its order is the layout's.
    """
    shaped("array", array, layout.shape)
    return _taken(array, *_orders(layout))


def permute_back(array: Any, layout: Any) -> Any:
    """An (M, K) array out of layout order: the inverse of `permute`.

    Parameters
    ----------
    array : array, shape (M, K)
    layout : Layout

    Returns
    -------
    array, shape (M, K)
        The array itself where its order is the layout's.
    """
    shaped("array", array, layout.shape)
    return _taken(array, *map(np.argsort, _orders(layout)))


def _orders(layout):
    return layout.row_order.ravel(), layout.column_order.ravel()


def _taken(array, rows, columns):
    for axis, order in enumerate((rows, columns)):
        if not ordered(order):
            array = array.take(namespace(array).asarray(order), axis=axis)
    return array


def by_scope(array: Any, layout: Any) -> Any:
    """A view (c, m, r, n) of an (M, K) array in layout order: place in the scope first.

    Parameters
    ----------
    array : array, shape (M, K)
    layout : Layout
        Of m row groups of r rows and n column groups of c columns.

    Returns
    -------
    array, shape (c, m, r, n)
    """
    shaped("array", array, layout.shape)
    shape = layout.row_groups, layout.rows, layout.column_groups, layout.columns
    return array.reshape(shape).transpose(3, 0, 1, 2)


def ordered(order):
    """Whether places ascend, so that nothing has to move."""
    return bool((order[1:] > order[:-1]).all())
