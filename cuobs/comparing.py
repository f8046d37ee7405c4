"""Every method side by side on one layer: the benchmark's table."""

from inspect import signature
from typing import NamedTuple

from cuobs import arrays, validation
from cuobs.algorithms import methods as known_methods
from cuobs.pattern import parse
from cuobs.pruning import hessian_of, prepare, prune

REFERENCE = "sparsegpt"
HEADER = ("method", "loss %", f"/ {REFERENCE}", "sparsity %", "seconds")


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
    """The `Row` of each method, in the order in which they ran.

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

    def cells(self):
        """The rows as text, one cell a column of the header."""
        return [
            (
                row.method,
                f"{100 * row.loss:.3f}",
                "-" if row.ratio is None else f"{row.ratio:.3f}",
                f"{100 * row.sparsity:.2f}",
                f"{row.seconds:.3f}",
            )
            for row in self
        ]

    def text(self):
        """For a terminal."""
        return text_table(HEADER, self.cells())

    def rst(self):
        """For a document."""
        return rst_table(HEADER, self.cells())

    def json(self):
        """For a program: plain dicts and lists."""
        return {
            "pattern": str(self.pattern),
            "shape": list(self.shape),
            "rows": [row._asdict() for row in self],
        }


def compare(
    W, X=None, *, hessian=None, pattern="2:4", methods=None, refine=None, progress=None,
    starting=None, **options,
):  # fmt: skip
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
        All of `cuobs.methods` unless given.
    refine : None or "exact"
    progress : callable, optional
        Called with (done, total) of the method that runs.
    starting : callable, optional
        Called with the name of each method before it runs.
    **options
        Of `cuobs.prune`. A method's own option goes to the methods that take it, and an order to
        those that know it.

    Returns
    -------
    Table

    Raises
    ------
    ValueError, TypeError
        As `cuobs.prune`, and for an option that none of the methods takes.
    """
    known = known_methods()
    if methods is None:
        methods = known
    names = [methods] if isinstance(methods, str) else list(methods)
    if not names:
        raise ValueError("methods: found none, expected at least one name")
    for name in names:
        validation.name_of("methods", name, known)
    chosen = {name: dict(options) for name in names}
    own_options = {option for method in known.values() for option in method.options}
    for option in options:
        if option == "method" or option not in signature(prune).parameters:
            raise TypeError(f"{option}: found an option that cuobs.compare does not take")
    for option in own_options & set(options):
        takers = [name for name in names if option in known[name].options]
        if not takers:
            raise ValueError(f"{option}: found it given, but none of {', '.join(names)} takes it")
        for name in set(names) - set(takers):
            del chosen[name][option]
    if (order := options.get("order")) is not None:
        takers = [name for name in names if known[name].orders]
        validation.name_of("order", order, sorted({o for n in takers for o in known[n].orders}))
        for name in takers:
            if order not in known[name].orders:
                del chosen[name]["order"]
    pattern = parse(pattern)
    plans = {}
    with arrays.stream_of(W, X, hessian):
        for name in names:
            own = {key: chosen[name].pop(key) for key in own_options & set(chosen[name])}
            plans[name] = prepare(
                W, pattern, name, refine=refine, progress=progress, options=own, **chosen[name]
            )
        plan = plans[names[0]]
        H = hessian_of(plan.layout.shape[1], X, hessian, plan.dtype, plan.xp, plan.settings)
        rows = []
        for name, plan in plans.items():
            if starting:
                starting(name)
            result = plan.run(H)
            rows.append(Row(name, result.loss, None, result.sparsity, result.seconds))
    losses = {row.method: row.loss for row in rows}
    if reference := losses.get(REFERENCE):
        rows = [row._replace(ratio=row.loss / reference) for row in rows]
    return Table(rows, pattern, plan.layout.shape)


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
