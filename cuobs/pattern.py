"""Sparsity patterns: strided views of a weight, their text form, and whether a weight obeys one.

A pattern says which elements of a weight are kept or pruned together (blocks) and which blocks
compete with each other (scopes). It is written on a strided view of the row-major weight and
compiled once, for a given shape, into a `Layout` that every method works on.
"""

import dataclasses
import math
import numbers
import re
from dataclasses import dataclass, field
from typing import Any

from cuobs import validation
from cuobs.arrays import FLOATS, dtype_of, namespace, receive
from cuobs.layout import Layout, compile_layout
from cuobs.modules import weight_of
from cuobs.ops.selection import block_sums
from cuobs.ops.views import by_scope, permute


def _items(text):
    return [item.strip() for item in text.split(",") if item.strip()]


_SYMBOL = re.compile(r"([0-9]{0,9})\*?([MK]?)(?:/(0*[1-9][0-9]{0,8}))?")


def _symbol(value):
    """Check one size or stride and give it as an int or as a canonical string."""
    match = _SYMBOL.fullmatch(str(value).replace(" ", ""))
    if isinstance(value, bool) or not match or not (match[1] or match[2]):
        raise ValueError(
            f"view: found {value!r}, expected an integer, or M or K with one factor or divisor"
        )
    return int(match[1]) if not match[2] and not match[3] else match[0].replace("*", "")


def _evaluate(value, sizes):
    """A size or stride as an integer, None where a division leaves a rest."""
    factor, symbol, divisor = _SYMBOL.fullmatch(str(value)).groups()
    number = int(factor or 1) * sizes.get(symbol, 1)
    quotient, rest = divmod(number, int(divisor or 1))
    return None if rest else quotient


@dataclass(frozen=True)
class View:
    """A strided view of a row-major (M, K) weight.

    Parameters
    ----------
    shape, strides : tuple of int or str
        Sizes and strides, in elements. A string may use the symbols M and K with one integer
        factor or divisor: ``"K/16"``, ``"16K"``, ``"M"``.
    """

    shape: tuple
    strides: tuple

    def __post_init__(self):
        for name in ("shape", "strides"):
            object.__setattr__(self, name, tuple(_symbol(v) for v in getattr(self, name)))
        if len(self.shape) != len(self.strides):
            raise ValueError(
                f"view: found {len(self.shape)} sizes and {len(self.strides)} strides, "
                "expected as many of one as of the other"
            )

    @classmethod
    def parse(cls, text: str) -> "View":
        """Read the text form ``(M,K/16,8,2):(K,16,1,8)``.

        Parameters
        ----------
        text : str

        Returns
        -------
        View

        Raises
        ------
        ValueError
            It is no such text.
        """
        match = re.fullmatch(r"\s*\(([^()]*)\)\s*:\s*\(([^()]*)\)\s*", text)
        if not match:
            raise ValueError(f"view: found {text!r}, expected a form like '(M,K):(K,1)'")
        return cls(*(tuple(_items(part)) for part in match.groups()))

    def __str__(self):
        return f"({','.join(map(str, self.shape))}):({','.join(map(str, self.strides))})"

    def sizes(self, M: int, K: int) -> tuple:
        """Its sizes and strides on a weight.

        Parameters
        ----------
        M, K : int
            Shape of the weight.

        Returns
        -------
        shape, strides : list of (int or None)
            None for one that leaves a rest.
        """
        known = {"M": M, "K": K}
        return tuple([_evaluate(v, known) for v in values] for values in (self.shape, self.strides))


@dataclass(frozen=True)
class Pattern:
    """Which blocks of a weight compete, and how many of them each scope keeps.

    Parameters
    ----------
    view : View or str
        How the weight is looked at, ``"(M,K):(K,1)"`` for the weight as it is.
    block : tuple of int
        View elements along each dimension that are kept or pruned as one.
    scope : tuple of int
        Blocks along each dimension that compete with each other.
    keep : int
        Blocks that each scope keeps.
    name : str, optional
        A short name to print.

    Examples
    --------
    >>> from cuobs import Pattern
    >>> pairs = Pattern(view="(M,K):(K,1)", block=(1, 2), scope=(1, 4), keep=2)
    >>> print(pairs)
    view=(M,K):(K,1) block=(1,2) scope=(1,4) keep=2
    >>> layout = pairs.compile(2, 16)
    >>> layout.column_order
    array([[ 0,  1,  2,  3,  4,  5,  6,  7],
           [ 8,  9, 10, 11, 12, 13, 14, 15]])
    >>> layout.blocks
    array([[0, 0, 1, 1, 2, 2, 3, 3]])
    """

    view: View = "(M,K):(K,1)"
    block: tuple = (1, 1)
    scope: tuple = (1, 4)
    keep: int = 2
    name: str = field(default="", compare=False)

    def __post_init__(self):
        if isinstance(self.view, str):
            object.__setattr__(self, "view", View.parse(self.view))
        rank = len(self.view.shape)
        for name in ("block", "scope"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != rank or not all(isinstance(v, int) and v > 0 for v in value):
                raise ValueError(
                    f"{name}: found {value}, expected {rank} positive integers, one for each "
                    "dimension of the view"
                )
        if not (isinstance(self.keep, int) and 0 < self.keep < math.prod(self.scope)):
            raise ValueError(
                f"keep: found {self.keep}, expected an integer from 1 to "
                f"{math.prod(self.scope) - 1}, as a scope holds {math.prod(self.scope)} blocks"
            )

    def __str__(self):
        block, scope = (f"({','.join(map(str, v))})" for v in (self.block, self.scope))
        return f"view={self.view} block={block} scope={scope} keep={self.keep}"

    @property
    def label(self):
        """The name, or the text form where there is none."""
        return self.name or str(self)

    @property
    def keeps(self):
        """What is kept, in words that can't be read the other way round: keep 2 of 4."""
        blocks, elements = math.prod(self.scope), math.prod(self.block)
        what = {1: "", 2: " pairs"}.get(elements, f" blocks of {elements}")
        return f"keep {self.keep} of {blocks}{what}"

    def smallest(self) -> tuple:
        """Shape (M, K) of the smallest weight that the view divides."""
        sizes = {"M": 1, "K": 1}
        for size, block, scope in zip(self.view.shape, self.block, self.scope, strict=True):
            if found := re.fullmatch(r"\d*([MK])(?:/(\d+))?", str(size)):
                symbol, divisor = found.groups()
                sizes[symbol] = math.lcm(sizes[symbol], int(divisor or 1) * block * scope)
        return sizes["M"], sizes["K"]

    def compile(self, M: int, K: int) -> Layout:
        """Reduce the view to row groups, column groups and one block map.

        Parameters
        ----------
        M, K : int
            Shape of the weight.

        Returns
        -------
        Layout

        Raises
        ------
        ValueError
            The view does not divide the weight, leaves elements out, overlaps itself, or has no
            such form.
        """
        return compile_layout(self, int(M), int(K))


@dataclass(frozen=True)
class Verification:
    """What `verify` found; true where the weight obeys the pattern.

    Attributes
    ----------
    broken : int
        Scopes that keep more blocks than the pattern allows.
    scopes : int
        Scopes in all.
    first : tuple of int or None
        Row and column of the first element of the first broken scope.
    """

    broken: int
    scopes: int
    first: tuple | None

    def __bool__(self):
        return self.broken == 0


def verify(W: Any, pattern: str | Pattern) -> Verification:
    """Say whether a weight obeys a pattern.

    Parameters
    ----------
    W : array, shape (M, K), or a linear layer
    pattern : str or Pattern

    Returns
    -------
    Verification

    Examples
    --------
    >>> import numpy as np
    >>> import cuobs
    >>> bool(cuobs.verify(np.array([[1.0, 0.0, 0.0, 2.0]]), "2:4"))
    True
    >>> cuobs.verify(np.array([[1.0, 0.0, 3.0, 2.0]]), "2:4")
    Verification(broken=1, scopes=1, first=(0, 0))
    """
    W = receive(weight_of(W, "W"), "W")
    xp = namespace(W)
    if dtype_of(W) not in FLOATS and W.dtype.kind not in "iub":
        raise TypeError(f"W: found dtype {W.dtype}, expected numbers")
    if W.ndim != 2:
        raise ValueError(f"W: found {W.ndim} dimensions, expected 2 (rows, columns)")
    layout = parse(pattern).compile(*W.shape)
    # Sums of bool are whether any is true.
    used = block_sums(by_scope(permute(W != 0, layout), layout), layout)
    kept = used.sum(0)
    if int(kept.max()) <= layout.keep:
        return Verification(0, kept.size, None)
    broken = xp.argwhere(kept > layout.keep)
    row, column = (int(v) for v in broken[0])
    first = int(layout.row_order[row, 0]), int(layout.column_order[column, 0])
    return Verification(len(broken), kept.size, first)


_N_M = re.compile(r"([0-9]{1,9}):([0-9]{1,9})(?:x([0-9]{1,9}))?")
_NAMED = {
    "2:4": Pattern(scope=(1, 4), keep=2, name="2:4"),
    "4:8": Pattern(block=(1, 2), scope=(1, 4), keep=2, name="4:8"),
    "coupled-2:4": Pattern(
        "(M,K/16,8,2):(K,16,1,8)", (1, 1, 1, 2), (1, 1, 4, 1), keep=2, name="coupled-2:4"
    ),
    "block16-row8": Pattern(
        "(M/16,8,2,K):(16K,K,8K,1)", (1, 1, 1, 16), (1, 1, 2, 1), keep=1, name="block16-row8"
    ),
}


def patterns() -> dict:
    """The named patterns. ``n:m`` and ``n:mxb`` are understood besides these.

    Returns
    -------
    dict of str to Pattern
        By name, those of `register_pattern` too.
    """
    return dict(_NAMED)


def register_pattern(name: str, pattern: str | Pattern, replace: bool = False) -> Pattern:
    """Make a pattern known by a name, wherever a pattern is named.

    Parameters
    ----------
    name : str
    pattern : str or Pattern
    replace : bool
        Whether it may take the place of another pattern of its name.

    Returns
    -------
    Pattern
        The pattern, with its name.

    Raises
    ------
    ValueError
        The name is another pattern's, or a text that is read as a pattern.

    Examples
    --------
    >>> import cuobs
    >>> thirds = cuobs.Pattern(scope=(1, 3), keep=1)
    >>> cuobs.register_pattern("thirds", thirds)  # doctest: +SKIP
    """
    if not isinstance(name, str) or not name.strip() or "=" in name:
        raise ValueError(f"name: found {name!r}, expected a name for a pattern")
    named = dataclasses.replace(parse(pattern), name=name)
    known = _NAMED.get(name)
    if known is None and _N_M.fullmatch(name):
        known = parse(name)
    if not replace and known not in (None, named):
        raise ValueError(
            f"name: found {name!r}, which means {known}, expected another name or replace=True"
        )
    _NAMED[name] = named
    return named


def parse(text):
    """Read a pattern from its name, from ``n:m`` or ``n:mxb``, or from its text form.

    Parameters
    ----------
    text : str, Pattern or (int, int)
        A pair (n, m) is read as the text ``n:m``.

    Returns
    -------
    Pattern

    Examples
    --------
    >>> from cuobs.pattern import parse
    >>> print(parse("4:8x1"))
    view=(M,K):(K,1) block=(1,1) scope=(1,8) keep=4
    """
    if isinstance(text, Pattern):
        return text
    if isinstance(text, tuple | list) and len(text) == 2 and all(_is_int(v) for v in text):
        text = f"{text[0]}:{text[1]}"
    if not isinstance(text, str):
        found = type(text).__name__
        raise TypeError(f"pattern: found {found}, expected a name, (n, m) or a Pattern")
    if text in _NAMED:
        return _NAMED[text]
    if match := _N_M.fullmatch(text):
        keep, blocks, width = (int(g or 1) for g in match.groups())
        if not (0 < keep < blocks and width):
            raise ValueError(
                f"pattern: found {text!r}, expected n:m or n:mxb where 0 < n < m and 0 < b"
            )
        return Pattern(block=(1, width), scope=(1, blocks), keep=keep, name=text)
    if "=" in text:
        return _parse_fields(text)
    raise ValueError(
        f"pattern: found {text!r}, expected one of {', '.join(_NAMED)}, n:m, n:mxb or "
        f"'view=... block=... scope=... keep=...'{validation.nearest(text, _NAMED)}"
    )


def _is_int(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _parse_fields(text):
    found = re.findall(r"(\w+)=(\S+)", re.sub(r"\s*([,:()])\s*(?![a-z]+=)", r"\1", text))
    names = sorted(name for name, _ in found)
    if names != ["block", "keep", "scope", "view"]:
        raise ValueError(
            f"pattern: found the fields {', '.join(names) or 'none'}, expected "
            "view, block, scope and keep, each once"
        )
    found = dict(found)
    sizes = {}
    for name in ("block", "scope", "keep"):
        items = _items(found[name].strip("()"))
        if not items or not all(re.fullmatch("[0-9]{1,9}", item) for item in items):
            raise ValueError(f"{name}: found {found[name]!r}, expected positive integers")
        sizes[name] = tuple(map(int, items))
    if len(sizes["keep"]) != 1:
        raise ValueError(f"keep: found {found['keep']!r}, expected one integer")
    return Pattern(found["view"], sizes["block"], sizes["scope"], sizes["keep"][0])
