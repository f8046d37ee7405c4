"""The Hessian of a layer's output error, XᵀX, from calibration activations in pieces."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuobs import arrays, validation
from cuobs.activations import are_batches, check_batches, check_matrix, join
from cuobs.ops.gram import add_gram

# Bytes of one piece of X: in the compute dtype on the CPU, small beside any memory and large beside
# a cache; on its way to a GPU; and where it lies on the GPU as it is, as large as fills the device.
PIECE = 128 * 2**20
COPIED_PIECE = 256 * 2**20
RESIDENT_PIECE = 2**30
# Rows of a piece at least, however little memory there is.
LEAST_ROWS = 64


class Hessian:
    """The undamped Hessian H = XᵀX, accumulated in pieces.

    Parameters
    ----------
    K : int
        Input features of the layer.
    dtype : {"float32", "float64"}
        What the sum is held and accumulated in; half precision is widened first.
    device : {"auto", "cpu", "cuda"}
        Where the sum is held and computed; "auto" takes the GPU where there is one.
    precision : {"tensor", "fp32"}
        Whether a GPU may multiply in float16 (where X is) or tf32 for a sum in float32.

    Attributes
    ----------
    matrix : array, shape (K, K)
        The sum so far. An update replaces it by another array.
    tokens : int or None
        Rows of X seen so far; None where a file that was loaded does not say.

    Examples
    --------
    >>> import numpy as np
    >>> import cuobs
    >>> X = np.random.default_rng(0).standard_normal((6, 2))
    >>> h = cuobs.Hessian(2, dtype="float64")
    >>> h.update(X[:4])
    >>> h.update(X[4:])
    >>> bool(np.allclose(h.matrix, X.T @ X))
    True
    """

    def __init__(
        self,
        K: int,
        dtype: str = "float32",
        device: str = "auto",
        precision: str = "tensor",
    ):
        self._K = validation.integer("K", K)
        validation.name_of("dtype", dtype, ("float32", "float64"))
        validation.name_of("precision", precision, ("tensor", "fp32"))
        self._dtype = np.dtype(dtype)
        self._xp = arrays.choose(device)
        self._precision = precision
        # Sum and tokens are replaced in one assignment: no interrupt comes between them.
        self._state = None, 0

    @property
    def K(self):
        """Input features."""
        return self._K

    @property
    def matrix(self):
        """The sum so far, shape (K, K)."""
        matrix, tokens = self._state
        if matrix is None:
            matrix = self._zeros()
            self._state = matrix, tokens
        return matrix

    @property
    def held(self):
        """The array of the sum, None before anything was added."""
        return self._state[0]

    @property
    def tokens(self):
        """Rows of X seen so far; None where a file that was loaded does not say."""
        return self._state[1]

    def __repr__(self):
        tokens = "unknown" if self.tokens is None else self.tokens
        device = arrays.device_name(self._xp)
        return f"Hessian(K={self.K}, tokens={tokens}, {self._dtype} on {device})"

    def _zeros(self):
        return self._xp.zeros((self._K, self._K), self._dtype)

    def update(
        self, X: Any, progress: Callable | None = None, room: int | None = None
    ) -> None:
        """Add activations, reading them in pieces.

        Whatever stops it, an exception of ``progress`` or Ctrl-C among them, leaves the sum as it
        was.

        Parameters
        ----------
        X : array, shape (..., K), or batches of them
            A list, or anything that gives one batch after the other, such as a generator or a
            DataLoader.
        progress : callable, optional
            Called with (done, total) tokens, where the total is known.
        room : int, optional
            Bytes that a piece of X may take on its way, where that is less than it would.

        Raises
        ------
        ValueError
            X has other features, is empty, or holds NaN, infinity or numbers whose squares the
            dtype can't hold.
        TypeError
            X is no array of floats, nor batches of them.
        """
        with arrays.stream_of(X, self):
            if are_batches(X):
                matrices, count = check_batches(X, self.K)
                pieces, X = join(matrices, self._xp, self._rows_of_piece(room=room)), None
            else:
                X = check_matrix(X, self.K)
                count = len(X)
                pieces = arrays.pieces(X, self._xp, self._rows_of_piece(X, room))
            total, tokens, size = self._sum(pieces, count, progress, again=X is not None)
            largest = self._add_held(total)
            if not math.isfinite(largest):
                self._refuse_overflow(() if X is None else X)
            if largest < least_square(self._dtype) and size:
                raise _too_small("X", size, "whose squares", self._dtype)
            self._replace(total, tokens)

    def _sum(self, pieces, count, progress, again):
        """XᵀX of pieces, their rows, and the largest magnitude of those with tiny squares.

        ``again`` says whether what is not finite can be looked for afterwards.
        """
        total, done, size = self._zeros(), 0, 0.0
        least, tiny = least_square(self._dtype), True
        with np.errstate(over="ignore", invalid="ignore"):
            for piece in pieces:
                add_gram(piece, total, self._precision)
                if tiny or not again:  # else a GPU is not waited for
                    largest = largest_square(total)
                    tiny = tiny and largest < least
                    if tiny:
                        size = max(size, arrays.largest(piece))
                    if not (again or math.isfinite(largest)):
                        self._refuse_overflow(piece, done)
                done += len(piece)
                if progress and count:
                    progress(done, count)
        if not done:
            raise ValueError("X: found no batches, expected at least one")
        return total, done, size

    def _refuse_overflow(self, X=(), offset=0):
        """Say what is not finite in a matrix (tokens, K), or that squares are not."""
        rows = self._rows_of_piece()
        for start in range(0, len(X), rows):
            validation.all_finite("X", X[start : start + rows], offset=offset + start)
        raise ValueError(
            f"X: found values whose squares overflow {self._dtype}, expected smaller ones"
        )

    def _add_held(self, part):
        """Add what is held to a part, which is overwritten; the largest square of the sum."""
        held = self._state[0]
        if held is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                part += held
        return largest_square(part)

    def _replace(self, total, tokens):
        before = self._state[1]
        self._state = total, None if None in (before, tokens) else before + tokens

    def _rows_of_piece(self, X=None, room=None):
        own, item = self._dtype.itemsize, self._dtype.itemsize if X is None else X.dtype.itemsize
        if arrays.device_name(self._xp) == "cpu":
            size, item = PIECE, own
        else:
            resident = X is not None and not isinstance(X, np.ndarray)
            size = RESIDENT_PIECE if resident else COPIED_PIECE
        rows = max(1, size // (self.K * item))
        each = row_bytes(X, self.K, self._dtype, arrays.device_name(self._xp))
        return rows if room is None or not each else max(1, min(rows, room // each))

    def merge(self, other: "Hessian") -> "Hessian":
        """Add another part, such as one from another machine.

        Parameters
        ----------
        other : Hessian
            Of as many input features.

        Returns
        -------
        Hessian
            This one.

        Raises
        ------
        ValueError
            It has other features, or the sum overflows; this one is as it was.
        TypeError
            It is no Hessian.
        """
        if not isinstance(other, Hessian):
            raise TypeError(f"other: found {type(other).__name__}, expected a Hessian")
        if other.K != self.K:
            raise ValueError(f"other: found K={other.K}, expected K={self.K}")
        with arrays.stream_of(self, other), np.errstate(over="ignore"):
            total = self._xp.array(arrays.asarray(other.matrix, self._xp), self._dtype)
            largest = self._add_held(total)
        if not math.isfinite(largest):
            raise ValueError(
                f"other: found a sum that overflows {self._dtype} with this one, expected parts of "
                "smaller activations"
            )
        self._replace(total, other.tokens)
        return self

    def save(self, path: str, force: bool = False) -> None:
        """Write the sum and the number of tokens to an .npz file, whole or not at all.

        Parameters
        ----------
        path : str
        force : bool
            Overwrite an existing file.

        Raises
        ------
        FileExistsError
            The file exists, and `force` is not given.
        """
        from cuobs import files

        content = {"hessian": arrays.to_numpy(self.matrix)}
        if self.tokens is not None:
            content["tokens"] = np.int64(self.tokens)
        files.save_arrays(path, content, force=force)

    @classmethod
    def load(cls, path: str, device: str = "auto") -> "Hessian":
        """Read what `save` wrote.

        Parameters
        ----------
        path : str
        device : {"auto", "cpu", "cuda"}
            Where the sum is held.

        Returns
        -------
        Hessian

        Raises
        ------
        ValueError
            The file is damaged or holds something else.
        """
        from cuobs import files

        content = files.load_arrays(path)
        if "hessian" not in content:
            raise ValueError(
                f"{path}: found the arrays {', '.join(content) or 'none'}, expected 'hessian' "
                "as cuobs hessian writes it"
            )
        with validation.naming(path):
            H = validation.matrix("hessian", content["hessian"])
            tokens = _check_tokens(content.get("tokens"))
            dtype = "float64" if H.dtype == np.float64 else "float32"
            self = cls(len(H), dtype=dtype, device=device)
            check_symmetric(H, self.K)
        self._state = self._xp.array(arrays.asarray(H, self._xp), dtype), tokens
        return self


def row_bytes(X, K, dtype, device):
    """Bytes that a row of activations takes on its way into a sum; batches where X is None."""
    own = np.dtype(dtype).itemsize
    if X is None:
        # As they come, of a dtype that is not known yet, joined, and again in that of the sum.
        return K * (8 + own)
    # What is no array is refused when it is read.
    item = getattr(X.dtype, "itemsize", own)
    widened = own * (arrays.dtype_of(X) != np.dtype(dtype).name)
    # Two buffers take turns on the way to a GPU.
    copied = 2 * item * (device != "cpu" and isinstance(X, np.ndarray))
    return K * (widened + copied)


def sum_bytes(matrix, row, device):
    """Bytes that a sum takes to make: itself, on the CPU what is added to it, and some rows."""
    return matrix * (2 if device == "cpu" else 1) + LEAST_ROWS * row


def _check_tokens(array):
    """The number of tokens in a file, None where it has none."""
    if array is None:
        return None
    if array.size != 1 or array.dtype.kind not in "iu" or int(array.reshape(())) < 0:
        raise ValueError(
            f"tokens: found {np.array2string(array, threshold=4)} of {array.dtype}, expected a "
            "whole number that is not negative"
        )
    return int(array.reshape(()))


def check_symmetric(H, K):
    """A Hessian as a matrix (K, K) that is symmetric and has no negative diagonal."""
    H = validation.matrix("hessian", H, (K, K))
    xp = arrays.namespace(H)
    diagonal = arrays.to_numpy(H.diagonal())
    largest = float(np.abs(diagonal).max())
    # Rounding in another program's product; a matrix of something else fails by far more.
    tolerance = 1e-2 if H.dtype.itemsize < 4 else 1e-4
    probe = xp.asarray(np.random.default_rng(0).standard_normal(K), xp.result_type(H, "float32"))
    difference = H @ probe - probe @ H
    if float(xp.abs(difference).max()) > tolerance * largest * K**0.5:
        raise ValueError("hessian: found a matrix that is not symmetric, expected XᵀX")
    if float(diagonal.min()) < 0:
        raise ValueError("hessian: found a negative diagonal element, expected XᵀX")
    return H


def check_fits(shape, found):
    """Refuse activations of a shape that does not fit a weight (M, K) whose transpose they do, or
    that fits when they are transposed themselves."""
    M, K = shape
    if len(found) < 2 or found[-1] == K:
        return
    if len(found) == 2 and found[0] == K:
        raise ValueError(
            f"X: found shape {tuple(found)}, expected (tokens, {K}) for W of {M} x {K}: its "
            "transpose fits"
        )
    if found[-1] == M:
        raise ValueError(
            f"W: found shape ({M}, {K}), expected (outputs, {M}) for X of {M} features: its "
            "transpose fits"
        )


def warn_of_swapped(tokens, shape):
    """Warn of activations of fewer rows than a weight of a shape (M, K), which may be one."""
    M, K = shape
    if tokens < M:
        validation.warn(
            f"X: found {tokens} rows and W {M}, both of {K} columns; where they are swapped, give "
            "the weight first"
        )


def warn_of_few(tokens, K, name):
    """Warn of fewer tokens than there are columns, in an argument of this name."""
    if tokens and tokens < K:
        validation.warn(
            f"{name}: found {tokens} tokens for {K} columns, expected several for each: the loss "
            "on other tokens will be higher by far"
        )


def damping(diagonal, damp, where=None):
    """What is added to the diagonal of a Hessian.

    Parameters
    ----------
    diagonal : array or tensor, shape (K,)
        Undamped.
    damp : float
        λ as a share of its mean, which counts as 1 where it is 0.
    where : callable, optional
        ``where`` of its library: a column without inputs then stands alone, with 1 in place of λ.

    Returns
    -------
    array or tensor of float64
        λ, or one number for each column where ``where`` is given.
    """
    mean = diagonal.mean(dtype=float)
    lam = damp * (mean + (mean == 0))
    return lam if where is None else where(diagonal == 0, 1.0, lam)


def check_held(H, dtype, name="hessian"):
    """Refuse a Hessian of nothing, and one whose diagonal a compute dtype can't hold."""
    largest = largest_square(H)
    if not largest:
        raise ValueError(
            f"{name}: found nothing but zeros, or no token, expected inputs that the layer is given"
        )
    if largest > float(np.finfo(dtype).max):
        raise ValueError(
            f"{name}: found values up to {largest:.3g}, more than {dtype} can hold, expected "
            "smaller ones or dtype='float64'"
        )
    if largest < least_square(dtype):
        raise _too_small(name, largest, "which", dtype)


def largest_square(H):
    """The largest element of a Hessian's diagonal, NaN if there is one."""
    return float(arrays.to_numpy(H.diagonal()).max())


def least_square(dtype):
    """How large the largest square has to be for those eps² times as large to keep their digits."""
    limits = np.finfo(dtype)
    return float(limits.tiny) / float(limits.eps) ** 2


def _too_small(name, size, what, dtype):
    wider = " or dtype='float64'" if np.dtype(dtype) != np.float64 else ""
    return ValueError(
        f"{name}: found values up to {size:.3g}, {what} {dtype} can't hold with all digits, "
        f"expected larger ones{wider}"
    )
