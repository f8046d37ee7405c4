"""Every method side by side on one layer: the benchmark's table."""

from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

from cuobs import arrays, footprint, recipe, sharing, validation
from cuobs.layer import check_layer, given_of, hessian_of, prune_checked
from cuobs.modules import weight_of
from cuobs.pattern import Pattern
from cuobs.recipe import SETTINGS, Recipe, Settings

__all__ = ["Row", "Table", "all_methods", "compare", "recipes_of"]

REFERENCE = "sparsegpt"
RATIO = f"/ {REFERENCE}"
HEADER = ("method", "loss %", RATIO, "sparsity %", "seconds")


class Row(NamedTuple):
    """One method of a `Table`.

    Attributes
    ----------
    method : str
    loss : float
        Relative output loss, a fraction.
    ratio : float or None
        The loss over that of SparseGPT, None where that was not run.
    sparsity : float
        Share of exact zeros.
    seconds : float
        From the Hessian on.
    """

    method: str
    loss: float
    ratio: float | None
    sparsity: float
    seconds: float


class Table(list):
    """The `Row` of each method, in the order in which they ran; ``table["admm"]`` is one of them.

    Attributes
    ----------
    pattern : Pattern
    shape : tuple of int
        Of the weight.
    """

    def __init__(self, rows, pattern, shape):
        super().__init__(rows)
        self.pattern = pattern
        self.shape = shape

    def __getitem__(self, key):
        """The row of a method by name, or by place as in any list."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        for row in self:
            if row.method == key:
                return row
        raise KeyError(f"found no row {key!r}, expected one of {', '.join(r.method for r in self)}")

    def __repr__(self):
        return self.text()

    def _repr_html_(self):
        lines = [
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
            for tag, cells in [("th", self.header()), *(("td", cells) for cells in self.cells())]
        ]
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        M, K = self.shape
        return f"<table><caption>{escape(self.pattern.label)}, {M} x {K}</caption>{rows}</table>"

    def to_pandas(self):
        """A ``pandas.DataFrame`` with the method as its index.

        Raises
        ------
        ImportError
            pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas"
            ) from None
        return pandas.DataFrame(list(self), columns=Row._fields).set_index("method")

    def header(self):
        """The names of the columns; without the ratio where there is none."""
        return [name for name in HEADER if name != RATIO or self._compared()]

    def cells(self):
        """The rows as text, one cell a column of the header."""
        found = [
            (
                row.method,
                f"{100 * row.loss:.3f}",
                "-" if row.ratio is None else f"{row.ratio:.3f}",
                f"{100 * row.sparsity:.2f}",
                f"{row.seconds:.3f}",
            )
            for row in self
        ]
        return found if self._compared() else [(*cells[:2], *cells[3:]) for cells in found]

    def _compared(self):
        """Whether any loss is set against SparseGPT's."""
        return any(row.ratio is not None for row in self)

    def text(self):
        """For a terminal."""
        return text_table(self.header(), self.cells())

    def lines(self, names):
        """The lines of `text`, the first column as wide as for a table of all these methods."""
        header = self.header()
        room = ("m" * max(map(len, names)), *[""] * (len(header) - 1))
        return text_table(header, [*self.cells(), room]).splitlines()[:-1]

    def rst(self):
        """For a document."""
        return rst_table(self.header(), self.cells())

    def json(self):
        """For a program: plain dicts and lists."""
        return {
            "pattern": str(self.pattern),
            "shape": list(self.shape),
            "rows": [row._asdict() for row in self],
        }


def compare(
    W: Any,
    X: Any = None,
    *,
    hessian: Any = None,
    pattern: str | Pattern = "2:4",
    methods: list | str | None = None,
    refine: str | None = None,
    damp: float = 0.01,
    target: Any = None,
    progress: Callable | None = None,
    starting: Callable | None = None,
    finished: Callable | None = None,
    **options: Any,
) -> Table:
    """Prune one layer by several methods and set what they lose and take side by side.

    Parameters
    ----------
    W : array, shape (M, K)
    X : array, shape (..., K), optional
        Activations. Their Hessian is computed once.
    hessian : array, shape (K, K), or Hessian, optional
        In place of X.
    pattern : str or Pattern
    methods : list of str or str, optional
        All of `cuobs.methods` unless given; where several devices share the rows, those that allow
        it, and a warning names the others.
    refine : None or "exact"
    damp : float
    target : array, shape (M, K), optional
    progress : callable, optional
        Called with (done, total) of the method that runs.
    starting : callable, optional
        Called with the name of each method before it runs.
    finished : callable, optional
        Called with the `Table` of the methods that ran, after each.
    **options
        Of `cuobs.Settings` and of the methods. A method's own option goes to the methods that take
        it, and a choice that not all of them know to those that do.

    Returns
    -------
    Table

    Raises
    ------
    ValueError, TypeError
        As `cuobs.prune`, and for an option that none of the methods takes.
    """
    settings = Settings(
        **{key: options.pop(key) for key in SETTINGS if key in options}, progress=progress
    )
    common = {"pattern": pattern, "refine": refine, "damp": damp}
    if methods is None:
        methods = all_methods(options, settings, **common)
    try:
        names = [methods] if isinstance(methods, str) else list(methods)
    except TypeError:
        found = type(methods).__name__
        raise TypeError(f"methods: found {found}, expected a name or several") from None
    recipes = recipes_of(names, options, **common)
    pattern = recipes[names[0]].pattern
    with sharing.first(settings), arrays.stream_of(weight_of(W, "W"), X, hessian):
        layer = check_layer(W, target, settings.dtype)
        shape = layer.weight.shape
        pattern.compile(*shape)
        for own in recipes.values():
            sharing.check(own, settings, shape)
        xp = settings.namespace(layer.W)
        given = given_of(layer, X, hessian, settings, xp)
        room = footprint.check(recipes.values(), settings, shape, xp, given)
        H, _ = hessian_of(layer, X, hessian, settings, xp, room)
        done = {}
        # The others' ratios are known at once where the reference is the first to run.
        for name in sorted(recipes, key=lambda name: name != REFERENCE):
            if starting:
                starting(name)
            result = prune_checked(recipes[name], settings, layer, H, given)
            done[name] = Row(name, result.loss, None, result.sparsity, result.seconds)
            table = Table(_with_ratios([done[n] for n in names if n in done]), pattern, shape)
            if finished:
                finished(table)
    return table


def all_methods(options, settings, **common):
    """The names of all methods, of those alone whose rows the devices of settings can share.

    Parameters
    ----------
    options : dict
        As of `recipes_of`.
    settings : Settings
    **common
        As of `recipes_of`.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError, TypeError
        As `recipes_of`, and for devices that are not there.
    """
    recipes = recipes_of(list(recipe.methods()), options, **common)
    if settings.devices is None or len(sharing.places(settings)) == 1:
        return list(recipes)
    if left := [name for name, own in recipes.items() if not own.by_row]:
        validation.warn(
            f"devices: found {', '.join(left)} among all methods, left out: several devices can't "
            "share the rows"
        )
    return [name for name in recipes if name not in left]


def recipes_of(names, options, **common):
    """A `Recipe` for each method of these names, each with those options that it takes.

    Parameters
    ----------
    names : list of str
    options : dict
        Options of any of the methods; a None is left out.
    **common
        What all recipes share.

    Raises
    ------
    ValueError, TypeError
        A name is unknown, or none of the methods takes an option or its value.
    """
    if not names:
        raise ValueError("methods: found none, expected at least one name")
    known = recipe.methods()
    for name in names:
        validation.name_of("methods", name, known)
    every = recipe.method_options()
    own = {name: {} for name in names}
    for option, value in options.items():
        if option not in every:
            raise TypeError(f"{option}: found an option that cuobs.compare does not take")
        if value is None:
            continue
        takers = {m.name: o for m, o in every[option] if m.name in own}
        if not takers:
            raise ValueError(f"{option}: found it given, but none of {', '.join(names)} takes it")
        for name in _takers_of(value, takers):
            own[name][option] = value
    return {name: Recipe(method=name, options=own[name], **common) for name in names}


def _takers_of(value, takers):
    """The names of the methods, of those in a dict of their options, that know a value."""
    choices = {choice for option in takers.values() for choice in option.choices}
    if not choices:
        return takers
    option = next(iter(takers.values())).name
    validation.name_of(option, value, sorted(choices))
    return [name for name, option in takers.items() if value in option.choices]


def _with_ratios(rows):
    losses = {row.method: row.loss for row in rows}
    if reference := losses.get(REFERENCE):
        return [row._replace(ratio=row.loss / reference) for row in rows]
    return rows


def text_table(header, rows):
    """Lines of cells under a header, the first column to the left and the others to the right."""
    lines, rule = _aligned(header, rows)
    return "\n".join([lines[0], rule, *lines[1:]])


def rst_table(header, rows):
    """The same as a table of reStructuredText."""
    lines, rule = _aligned(header, rows)
    rule = rule.replace("-", "=")
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def _aligned(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        first, *others = zip(cells, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]))
    return lines, "  ".join("-" * width for width in widths)
