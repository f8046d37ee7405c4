"""What a method is given: the target and the damped Hessian in a pattern's own order.

Rows and columns are permuted once so that scopes lie side by side: row group by row group and
column group by column group. Factors are made on first use and shared by whoever asks next.
Targets and Hessians of extraordinary sizes are divided by a power of two, so that no square of
theirs overflows or vanishes; it changes no digit of a result.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuobs import arrays
from cuobs.hessian import damping
from cuobs.ops import factors, views
from cuobs.ops.selection import factor_scope_blocks

# Order from which a Hessian is worth being factored together by those who share the rows.
SHARED_FROM = 8192
NOT_DEFINITE = (
    "hessian: found a matrix that is not positive definite with this damping, expected a larger "
    "damp (0.01 is usual), more calibration tokens than columns, or dtype='float64'"
)
# How far the product of its factor may be away from it.
ALIKE = 1e-2
# Largest targets and mean diagonals of Hessians that are left as they are.
ORDINARY = 2.0**-16, 2.0**16


class made_once:
    """`functools.cached_property` without the lock that Python has on it before 3.12.

    Threads with a problem each may wait for each other while they make theirs.
    """

    def __init__(self, function):
        self._function, self.__doc__ = function, function.__doc__

    def __get__(self, owner, kind=None):
        if owner is None:
            return self
        value = vars(owner)[self._function.__name__] = self._function(owner)
        return value


class Pruned(NamedTuple):
    """What a method returns, in layout order.

    Attributes
    ----------
    mask : array of bool, shape (M, K)
        True = kept.
    weight : array, shape (M, K), or None
        None leaves the weights to the exact re-solve.
    cost : array, shape (M,), or None
        The damped cost of each row that the method added up.
    converged : bool
        Whether all that was solved by iteration came to its end.
    """

    mask: object
    weight: object = None
    cost: object = None
    converged: bool = True


@dataclass
class Problem:
    """One layer to prune, in layout order.

    Attributes
    ----------
    W : array, shape (M, K)
        The target in terms of `weight_unit`; dead columns are 0.
    H : array, shape (K, K)
        The damped Hessian in terms of `hessian_unit`.
    diagonal : array, shape (K,)
        The diagonal of the undamped Hessian, likewise.
    layout : Layout
    settings : Settings
    weight_unit, hessian_unit : float
        Powers of four; 1 for ordinary sizes.
    outside : int
        Bytes under the limit of the settings that the caller holds beside the problem.
    inverts : callable, optional
        Called with the problem, gives the matrix that the method will ask the `inverse` of first,
        where others share the rows: one factors that while another factors H.
    """

    W: object
    H: object
    diagonal: object
    layout: object
    settings: object
    weight_unit: float = 1.0
    hessian_unit: float = 1.0
    outside: int = 0
    inverts: Callable | None = None

    @classmethod
    def build(cls, W, H, layout, damp, settings, outside=0):
        """Permute, scale, damp, and retire dead columns.

        Parameters
        ----------
        W : array, shape (M, K)
            The target, not changed.
        H : array, shape (K, K)
            The undamped Hessian, on the same namespace and of the same dtype; not changed.
        layout : Layout
        damp : float
            λ as a share of the mean of the diagonal of H.
        settings : Settings
        outside : int
            Bytes under the limit of the settings that the caller holds.
        """
        xp = arrays.namespace(H)
        W = views.permute(W, layout).copy(order="C")
        columns = layout.column_order.ravel()
        H = H.copy() if views.ordered(columns) else H[xp.ix_(*(xp.asarray(columns),) * 2)]
        # On the host: of a vector a GPU makes in each step less than its kernel takes to compile.
        diagonal = arrays.to_numpy(H.diagonal()).copy()
        hessian_unit = _unit(float(diagonal.mean(dtype="float64")))
        if hessian_unit != 1:
            H /= hessian_unit
            diagonal /= hessian_unit
        # λ is that of the original diagonal; a dead column then stands alone with H_jj = 1.
        H.ravel()[:: len(H) + 1] += xp.asarray(damping(diagonal, damp, np.where).astype(H.dtype))
        if (dead := np.flatnonzero(diagonal == 0)).size:
            W[:, xp.asarray(dead)] = 0
        diagonal = xp.asarray(diagonal)
        weight_unit = _unit(arrays.largest(W))
        if weight_unit != 1:
            W /= weight_unit
        return cls(W, H, diagonal, layout, settings, weight_unit, hessian_unit, outside)

    def pull(self, right: Callable) -> None:
        """Raise the target by right() Hλ⁻¹.

        Parameters
        ----------
        right : callable
            Gives an array (M, K) in the weight's own order, when the factor is under way.

        Raises
        ------
        numpy.linalg.LinAlgError
            H is not positive definite.
        """
        inverse = self._inverse_beside_factor() if self.settings.shares > 1 else None
        self.R  # noqa: B018
        right = views.permute(right(), self.layout) / (self.weight_unit * self.hessian_unit)
        self.check_factored()
        right = right.astype(self.dtype, copy=False)
        if inverse is None:
            raised = factors.factor_solve(self.R, right)
        else:
            raised = factors.inverse_factor_solve(inverse, right, self.precision)
        self.W = self.W + raised * (self.diagonal != 0)

    @property
    def xp(self):
        """The namespace, numpy or cupy."""
        return arrays.namespace(self.W)

    @property
    def dtype(self):
        """The compute dtype."""
        return self.W.dtype

    @property
    def cost_unit(self):
        """What the costs of a method are in terms of."""
        return self.weight_unit**2 * self.hessian_unit

    def unscaled(self, weight: Any) -> Any:
        """Weights in terms of 1 again.

        Parameters
        ----------
        weight : array, shape (M, K)
            In terms of `weight_unit`.

        Returns
        -------
        array, shape (M, K)
        """
        return weight if self.weight_unit == 1 else weight * self.weight_unit

    @property
    def precision(self):
        """How a GPU multiplies float32: "tensor" or "fp32"."""
        return self.settings.precision

    def by_scope(self, array: Any) -> Any:
        """An array as scopes, place in the scope first: `cuobs.ops.by_scope`.

        Parameters
        ----------
        array : array, shape (M, K)
            In layout order.

        Returns
        -------
        array, shape (c, m, r, n)
            A view.
        """
        return views.by_scope(array, self.layout)

    def check_definite(self) -> None:
        """Factor H and look whether that went well; methods that multiply by it would not find out.

        Raises
        ------
        numpy.linalg.LinAlgError
            H is not positive definite.
        """
        self.R  # noqa: B018
        self.check_factored()

    def check_factored(self) -> None:
        """Look whether `R`, where it was asked for, is a factor.

        A GPU is asked here only, and not while it factors: a method launches its work meanwhile.

        Raises
        ------
        numpy.linalg.LinAlgError
            H is not positive definite.
        """
        if int(self._info[0]):
            raise np.linalg.LinAlgError(NOT_DEFINITE)

    @made_once
    def _info(self):
        return self.xp.zeros(1, np.int32)

    @made_once
    def R(self):
        """The reversed Cholesky factor: upper triangular, H = R Rᵀ.

        On a GPU anything where H is not positive definite, until `check_factored` says so.
        """
        if self._together:
            return self._factor_together()[0]
        R = factors.reversed_cholesky(self.H, self._info)
        if arrays.device_name(self.xp) == "cpu":
            self.check_factored()
        return R

    def _factor_together(self, inverted=False):
        """R, R⁻¹ where it is wanted, and the method's first inverse, by all who share the rows."""
        wanted = [(self.H, True, inverted)]
        if self.inverts is not None:
            wanted.append((self.inverts(self), False, True))
        by_rows = self.settings.by_rows
        try:
            (R, U), *first = factors.factors_by_rows(wanted, by_rows, self.precision)
        except np.linalg.LinAlgError:
            raise np.linalg.LinAlgError(NOT_DEFINITE) from None
        for _, V in first:
            gram = factors.upper_gram
            if self._shared:
                gram = functools.partial(factors.gram_by_rows, by_rows=by_rows)
            self._first = gram(V, precision=self.precision)
        _check_factor_of(self.H, R)
        return R, U

    def _inverse_beside_factor(self):
        """R⁻¹, with R made too: of several who share the rows, each solves for few of them."""
        if not self._together:
            return factors.upper_inverse(self.R, self.precision)
        self.R, inverse = self._factor_together(inverted=True)
        return inverse

    @property
    def _together(self):
        """Whether those who share the rows factor together."""
        return self._shared or self.inverts is not None

    @property
    def _shared(self):
        """Whether those who share the rows share the work on the Hessian too."""
        return self.settings.shares > 1 and len(self.H) >= SHARED_FROM

    def inverse(self, A: Any) -> Any:
        """The inverse of a symmetric positive definite matrix as large as the Hessian.

        Parameters
        ----------
        A : array, shape (K, K)

        Returns
        -------
        array, shape (K, K)

        Raises
        ------
        numpy.linalg.LinAlgError
            A is not positive definite.
        """
        first, self.inverts = vars(self).pop("_first", None), None  # what is asked now is the first
        if first is not None:
            return first
        if self._shared:
            return factors.inverse_by_rows(A, self.settings.by_rows, self.precision)
        return factors.inverse(A, self.precision)

    @made_once
    def R_inverse(self):
        """R⁻¹, upper triangular."""
        return factors.upper_inverse(self.R, self.precision)

    @made_once
    def C(self):
        """The inverse of the damped Hessian. R⁻¹ is let go of: what else needs it comes first."""
        inverse = self.R_inverse
        self.check_factored()
        del self.R_inverse
        return factors.upper_gram(inverse, self.precision)

    @made_once
    def scope_blocks(self):
        """The diagonal blocks of C, place-major: shape (c, c, n)."""
        return factor_scope_blocks(self.R_inverse, self.layout.columns)

    def free_bytes(self, held: int = 0) -> int:
        """Bytes that a method may still allocate under the limit of the settings.

        Parameters
        ----------
        held : int
            What the method holds itself beside the problem.

        Returns
        -------
        int
        """
        free = arrays.free_memory(self.xp)
        limit = self.settings.memory_limit
        if limit is None:
            return int(0.8 * free)
        # Vectors are counted with all else that is small, by `footprint`.
        arrays_made = (value for value in vars(self).values() if getattr(value, "ndim", 0) > 1)
        own = sum(value.nbytes for value in arrays_made)
        return min(free, max(limit - self.outside - own - held, 0))


def _check_factor_of(H, R):
    """Refuse a factor with rows that others have made, where it is none: targets would not tell."""
    xp = arrays.namespace(H)
    ones = xp.ones(len(H), H.dtype)
    expected = H @ ones
    away = R @ (R.T @ ones) - expected
    sums = xp.stack([(a**2).sum() for a in (away, expected, H.diagonal())])
    away, expected, diagonal = arrays.to_numpy(sums).tolist()
    if not away <= ALIKE**2 * (expected + diagonal):
        raise RuntimeError("hessian: found a factor made by several that is none of it")


def build_bytes(size):
    """Bytes that `Problem.build` takes: the Hessian again, and the target permuted and again."""
    return size.matrix + 2 * size.weight


def _unit(size):
    """A power of four near a size, 1 where it is ordinary or 0."""
    if not size or ORDINARY[0] <= size <= ORDINARY[1]:
        return 1.0
    return 4.0 ** (math.frexp(size)[1] // 2)
