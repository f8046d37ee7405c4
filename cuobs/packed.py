"""A weight that holds only what a pattern keeps, and multiplies as it is."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuobs import files, ops
from cuobs.arrays import choose, namespace, receive, stream_of
from cuobs.modules import weight_of
from cuobs.ops.packed import VERSION
from cuobs.pattern import Pattern, parse, verify

# The arrays of a file; the header is JSON, as bytes.
HEADER, VALUES, INDEX = "packed", "values", "index"


def pack(W: Any, pattern: str | Pattern = "2:4") -> "Packed":
    """Pack a weight that obeys a pattern.

    Parameters
    ----------
    W : array, shape (M, K), or a linear layer
        Of NumPy, CuPy or PyTorch, in floating point; zeros where it is pruned.
    pattern : str or Pattern
        See `patterns`; its scopes may have up to 128 masks.

    Returns
    -------
    Packed
        Of arrays of the same kind, on the same device and in the same dtype.

    Raises
    ------
    ValueError
        The weight breaks the pattern, or the pattern has too many masks.

    Examples
    --------
    >>> import numpy as np
    >>> import cuobs
    >>> W = np.zeros((16, 64), np.float16)
    >>> W[:, ::2] = np.arange(32)
    >>> packed = cuobs.pack(W, "2:4")
    >>> packed.nbytes / W.nbytes
    0.5625
    >>> bool((packed.unpack() == W).all())
    True
    >>> (packed @ np.ones(64, np.float16))[:3]
    array([496., 496., 496.], dtype=float16)
    """
    pattern, W = parse(pattern), weight_of(W, "W")
    if _is_tensor(W):
        from cuobs.torch.packed import pack_tensor

        return Packed(*pack_tensor(W, pattern, "W"), pattern, tuple(W.shape))
    W = receive(W, "W")
    if W.ndim != 2:
        raise ValueError(f"W: found {W.ndim} dimensions, expected 2 (rows, columns)")
    if W.dtype.kind != "f" and W.dtype.name != "bfloat16":
        raise TypeError(f"W: found {W.dtype}, expected floating point")
    layout = pattern.compile(*W.shape)
    with stream_of(W):
        try:
            values, index = ops.pack(W.view(f"u{W.dtype.itemsize}"), layout)
        except ValueError:
            check_obeys(W, pattern, "W")
            raise
    return Packed(values.view(W.dtype), index, pattern, W.shape)


def check_obeys(W, pattern, name="W"):
    """Refuse a weight that breaks a pattern, with what `verify` finds."""
    found = verify(W, pattern)
    if not found:
        row, column = found.first
        raise ValueError(
            f"{name}: found that it breaks {parse(pattern).label} in {found.broken} of "
            f"{found.scopes} scopes, the first at row {row}, column {column}; expected a weight "
            "that obeys it"
        )


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight; made by `pack`.

    Attributes
    ----------
    values : array, shape (tile rows, tile columns, loads, 32, 8)
        The kept values, in the order that the documentation draws.
    index : array of int32, shape (tile rows, groups of tile columns, words, 32)
        The number of each scope's mask.
    pattern : Pattern
    shape : tuple of int
        (M, K) of the weight.

    Methods
    -------
    packed @ x
        The product with x of shape (K,) or (K, n), an array of the same kind.
    """

    values: np.ndarray
    index: np.ndarray
    pattern: Pattern
    shape: tuple
    # NumPy leaves ``x @ packed`` to Python then, which says that there is no such product.
    __array_ufunc__ = None

    def __post_init__(self):
        form = ops.tiling(self.layout)
        for name in ("values", "index"):
            found, expected = tuple(getattr(self, name).shape), getattr(form, f"{name}_shape")
            if found != expected:
                raise ValueError(
                    f"{name}: found the shape {found}, expected {expected} for "
                    f"{self.pattern.label} and a weight of shape {tuple(self.shape)}"
                )

    def __repr__(self):
        return (
            f"Packed({self.pattern.label}, {self.shape[0]} x {self.shape[1]}, {self.dtype}, "
            f"{self.nbytes} bytes)"
        )

    @property
    def layout(self):
        """The pattern compiled for the weight."""
        return self.pattern.compile(*self.shape)

    @property
    def dtype(self):
        """Of the weight."""
        return self.values.dtype

    @property
    def nbytes(self):
        """Bytes of values and index."""
        return self.values.nbytes + self.index.nbytes

    def unpack(self) -> Any:
        """The dense weight (M, K)."""
        if _is_tensor(self.values):
            from cuobs.torch.packed import pattern_text, unpack_tensor

            return unpack_tensor(self.values, self.index, pattern_text(self.pattern), *self.shape)
        with stream_of(self.values):
            return ops.unpack(self.values, self.index, self.layout)

    def __matmul__(self, x):
        self._check_factor(x)
        columns = x.T if x.ndim == 2 else x[None]
        if _is_tensor(self.values):
            from cuobs.torch.packed import packed_linear, pattern_text

            out = packed_linear(columns, self.values, self.index, None,
                                pattern_text(self.pattern), *self.shape)  # fmt: skip
        else:
            with stream_of(self.values):
                out = ops.packed_matmul(self.values, self.index, self.layout, columns)
        return out.T if x.ndim == 2 else out[0]

    def _check_factor(self, x):
        """Refuse what can't be multiplied: another kind of array, or another shape."""
        if not _is_alike(x, self.values):
            raise TypeError(
                f"x: found {type(x).__name__}, expected an array of the weight's kind, "
                f"{type(self.values).__name__}"
            )
        K = self.shape[1]
        if x.ndim not in (1, 2) or x.shape[0] != K:
            fits = ": its transpose fits" if x.ndim == 2 and x.shape[1] == K else ""
            raise ValueError(
                f"x: found the shape {tuple(x.shape)}, expected ({K},) or ({K}, n){fits}"
            )

    def save(self, path: str, force: bool = False) -> None:
        """Write a .npz or .safetensors file, whole or not at all.

        Parameters
        ----------
        path : str
            bfloat16 needs .safetensors.
        force : bool
            Overwrite an existing file.
        """
        header = {
            "version": VERSION, "pattern": str(self.pattern), "name": self.pattern.name,
            "shape": [int(n) for n in self.shape],
        }  # fmt: skip
        values, index = (_to_host(array) for array in (self.values, self.index))
        files.save_arrays(path, {
            HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8),
            VALUES: values, INDEX: index,
        }, force)  # fmt: skip

    @classmethod
    def load(cls, path: str, device: str = "cpu"):
        """Read what `save` has written.

        Parameters
        ----------
        path : str
        device : {"cpu", "cuda", "auto"}
            NumPy or CuPy arrays.

        Raises
        ------
        ValueError
            The file holds no packed weight, or one of a later version.
        """
        found = files.load_arrays(path)
        missing = {HEADER, VALUES, INDEX} - found.keys()
        if missing:
            raise ValueError(
                f"{path}: found no {min(missing)} in it, expected a packed weight of cuobs"
            )
        header = _header(path, found[HEADER])
        pattern = parse(header["pattern"])
        if header["name"]:
            pattern = Pattern(pattern.view, pattern.block, pattern.scope, pattern.keep,
                              header["name"])  # fmt: skip
        xp = choose(device)
        values, index = found[VALUES], found[INDEX]
        return cls(xp.asarray(values), xp.asarray(index), pattern, tuple(header["shape"]))


def _header(path, array):
    try:
        header = json.loads(bytes(np.asarray(array)))
        version = header["version"]
        complete = {"pattern", "name", "shape"} <= header.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"{path}: found a damaged header, expected a packed weight of cuobs")
    if version != VERSION:
        raise ValueError(
            f"{path}: found a packed weight of version {version}, expected {VERSION}"
        )
    return header


def _to_host(array):
    if _is_tensor(array):
        from cuobs.arrays import tensor_view

        return tensor_view(array.cpu())
    return array if isinstance(array, np.ndarray) else array.get()


def _is_tensor(array):
    return type(array).__module__.partition(".")[0] == "torch"


def _is_alike(x, values):
    """Whether x is an array of the kind that the values are."""
    if _is_tensor(values) or _is_tensor(x):
        return _is_tensor(values) and _is_tensor(x)
    return hasattr(x, "dtype") and namespace(x) is namespace(values)
