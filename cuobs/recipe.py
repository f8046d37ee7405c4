"""What to do to a layer and how: methods with their options, recipes and settings.

A `Recipe` says what is computed and needs no weight; `Settings` say how it runs, and nothing but
rounding depends on them.
"""

import dataclasses
import difflib
import importlib
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cuobs import arrays, layer, validation
from cuobs.ops.checks import PRECISIONS
from cuobs.pattern import Pattern, parse
from cuobs.sharing import numbers_of

__all__ = [
    "DAMP",
    "KEYS",
    "REFINE",
    "SETTINGS",
    "SETTING_OPTIONS",
    "Method",
    "Option",
    "Recipe",
    "Settings",
    "method_options",
    "methods",
    "register_method",
]

DTYPES = ("float32", "float64")
# A smaller limit is a size without its unit.
LEAST_MEMORY = 2**16


@dataclass(frozen=True)
class Option:
    """An option of a method.

    Parameters
    ----------
    name : str
        Of the keyword argument, in Python and, with dashes, on the command line.
    type : {int, float, str}
        An int is positive, a float finite.
    choices : tuple of str
        What a str may be.
    default : optional
        None where the method finds one itself.
    help : str
        One sentence that fits every method which takes an option of this name.
    computed : str
        What a default of None comes to, in words.

    Examples
    --------
    >>> import cuobs
    >>> cuobs.Option("passes", int, default=3, help="Sweeps over the columns.").check(2)
    2
    """

    name: str
    type: type = str
    choices: tuple = ()
    default: object = None
    help: str = ""
    computed: str = ""

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name: found {self.name!r}, expected a Python name for an option")
        if self.type not in (int, float, str):
            raise TypeError(f"{self.name}: found type {self.type!r}, expected int, float or str")
        object.__setattr__(self, "choices", tuple(self.choices))
        if self.default is not None:
            self.check(self.default)

    def check(self, value: Any) -> Any:
        """The value as the method takes it.

        Parameters
        ----------
        value
            Of the option's type, or what can stand for it.

        Returns
        -------
        int, float or str

        Raises
        ------
        ValueError, TypeError
            It is not of the type or not among the choices.
        """
        if self.type is int:
            return validation.integer(self.name, value)
        if self.type is float:
            return validation.number(self.name, value)
        if self.choices:
            validation.name_of(self.name, value, self.choices)
        elif not isinstance(value, str):
            raise TypeError(f"{self.name}: found {type(value).__name__}, expected a text")
        return value


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Parameters
    ----------
    name : str
    summary : str
        A few words for the list of methods.
    function : callable
        Called with a `Problem` and every option by name; returns `Pruned`.
    options : tuple of Option
    resolves : bool
        Whether the method always leaves its weights to the exact re-solve.
    memory : callable, optional
        Called with a `cuobs.footprint.Size` and every option by name; returns the
        `cuobs.footprint.Memory` that the function takes, for which a ``memory_limit`` is refused
        before any work. Without it a weight and a mask are counted.
    by_row : bool or callable
        Whether processes and devices may share the rows: each row is pruned without a look at
        others, or what is added up over all of them goes through `Settings.over_all_rows`. Where
        options decide it, a function that is called with every option by name.
    operations : (float, float), optional
        Of a weight with M rows and K columns, in terms of K³ and of M K², an exact re-solve of
        `resolves` included: by them the time of a whole model is predicted, and they say on how
        many devices it pays to share the rows. Without them it does on any number, and (2, 4) is
        predicted by.
    inverts : callable, optional
        Called with a `Problem` and every option by name; returns the matrix whose inverse the
        function asks the problem for first, and never another before it. Several processes make it
        while they factor H.
    held : (float, float)
        Matrices of float32 like the Hessian and like the weight that pruning in a whole model
        holds at its peak, all copies among them: by them its memory is predicted.

    Examples
    --------
    >>> import cuobs
    >>> [option.name for option in cuobs.methods()["true-obs"].options]
    ['group', 'order']
    """

    name: str
    summary: str
    function: object
    options: tuple = ()
    resolves: bool = False
    memory: object = None
    by_row: object = False
    operations: tuple | None = None
    held: tuple = (8, 8)
    inverts: object = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: found {self.name!r}, expected a name for a method")
        if not callable(self.function):
            raise TypeError(f"function: found {self.function!r}, expected a function")
        if self.memory is not None and not callable(self.memory):
            raise TypeError(f"memory: found {self.memory!r}, expected a function")
        if self.inverts is not None and not callable(self.inverts):
            raise TypeError(f"inverts: found {self.inverts!r}, expected a function")
        if not isinstance(self.by_row, bool) and not callable(self.by_row):
            raise TypeError(f"by_row: found {self.by_row!r}, expected True, False or a function")
        for name in ("operations", "held"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _two_numbers(name, value))
        object.__setattr__(self, "options", tuple(self.options))
        for option in self.options:
            if not isinstance(option, Option):
                raise TypeError(f"options: found {option!r}, expected cuobs.Option")
            if option.name in RESERVED:
                raise ValueError(
                    f"options: found {option.name!r}, which cuobs.prune takes already, expected "
                    "another name"
                )

    def fill(self, given: Mapping) -> dict:
        """All options: those given, checked, and the defaults of the others.

        Parameters
        ----------
        given : dict
            By name; a None is the default.

        Returns
        -------
        dict
            By name.

        Raises
        ------
        ValueError
            A value is wrong, or the option is another method's.
        TypeError
            No method has such an option.
        """
        known = {option.name: option for option in self.options}
        for name, value in given.items():
            if name not in known and name not in method_options():
                nearest = difflib.get_close_matches(name, [*RESERVED, *known], 1, cutoff=0.0)
                raise TypeError(f"{name}: found an unknown argument (nearest: {nearest[0]})")
            if name not in known:
                takes = " and ".join(known) or "no options"
                raise ValueError(f"{name}: found {value!r}, but {self.name} takes {takes}")
        filled = {}
        for name, option in known.items():
            value = given.get(name)
            filled[name] = option.default if value is None else option.check(value)
        return filled


def _two_numbers(name, value):
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: found {value!r}, expected two numbers")
    return tuple(validation.number(name, v, 0) for v in value)


ENTRY_POINTS = "cuobs.methods"
_METHODS, _loaded, _LOADING = {}, set(), threading.RLock()


def methods() -> dict:
    """The methods: those of cuobs, those registered, those that packages bring.

    A package brings one by an entry point of the group ``cuobs.methods`` that is a `Method`.

    Returns
    -------
    dict of str to Method
        By name.
    """
    # They register themselves; again where that was interrupted.
    importlib.import_module("cuobs.algorithms")
    with _LOADING:
        if ENTRY_POINTS not in _loaded:
            # Noted first: a package may ask for the methods while it is loaded.
            _loaded.add(ENTRY_POINTS)
            _load_entry_points()
    return dict(_METHODS)


def _load_entry_points():
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINTS):
        try:
            register_method(point.load())
        except Exception as error:
            warnings.warn(
                f"{ENTRY_POINTS}: found that {point.name} = {point.value} can't be used ({error}), "
                "expected a cuobs.Method",
                stacklevel=3,
            )


def register_method(method: Method, replace: bool = False) -> None:
    """Make a method known by its name, in `prune`, `compare`, whole models and the command line.

    Parameters
    ----------
    method : Method
    replace : bool
        Whether it may take the place of another method of its name.

    Raises
    ------
    ValueError
        The name is another method's already.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method: found {type(method).__name__}, expected cuobs.Method")
    if not replace and _METHODS.get(method.name, method) != method:
        raise ValueError(
            f"method: found {method.name!r}, a name that is taken, expected another or replace=True"
        )
    others = (m for m in _METHODS.values() if m.name != method.name)
    types = {o.name: (o.type, m.name) for m in others for o in m.options}
    for option in method.options:
        expected, other = types.get(option.name, (option.type, ""))
        if option.type is not expected:
            raise ValueError(
                f"{option.name}: found an option of type {option.type.__name__}, expected "
                f"{expected.__name__}, as {other} has it"
            )
    _METHODS[method.name] = method


def method_options():
    """Every option of any method: name to the methods that take it, as (Method, Option) pairs."""
    found = {}
    for method in methods().values():
        for option in method.options:
            found.setdefault(option.name, []).append((method, option))
    return found


def _memory_limit(value):
    """Bytes from a number or a text, refused where no computation fits them."""
    found = arrays.parse_size(value)
    if found < LEAST_MEMORY:
        raise ValueError(
            f"memory_limit: found {value!r}, which is {arrays.size_text(found)}, expected at least "
            f"{arrays.size_text(LEAST_MEMORY)}, such as '8GiB'"
        )
    return found


def _devices(value):
    """Devices as a text, refused where it names none whatever there is."""
    numbers_of(value, 1)
    return str(value)


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what to compute: nothing but rounding depends on it.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        "auto" takes the GPU where there is one.
    dtype : {"float32", "float64"}
        The compute precision.
    precision : {"tensor", "fp32"}
        Whether products in float32 may run on tensor cores (tf32, float16); float64 never does.
    workers : int, optional
        Threads that share the rows on the CPU; one for each core by default.
    batch_rows : int, optional
        Rows in a batch; sized from the free memory by default.
    memory_limit : int or str, optional
        Bytes, or a size like "8GiB", for all that a call makes beside what it was given.
    progress : callable, optional
        Called with (done, total) as the work goes.
    devices : str or int, optional
        GPUs of this host that share the rows of a weight: "all", how many, or which ("0,2").
    others : object, optional
        Those who have the other rows of a weight, where some are at hand: with a ``size``, a
        ``total`` and a ``by_rows``.

    Examples
    --------
    >>> import cuobs
    >>> cuobs.Settings(memory_limit="8GiB").memory_limit
    8589934592
    """

    device: str = "auto"
    dtype: str = "float32"
    precision: str = "tensor"
    workers: int | None = None
    batch_rows: int | None = None
    memory_limit: int | None = None
    progress: object = field(default=None, compare=False)
    devices: str | None = None
    others: object = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        for option in SETTING_OPTIONS:
            value = getattr(self, option.name)
            if value is None and option.default is None:
                continue
            check = {"memory_limit": _memory_limit, "devices": _devices}.get(
                option.name, option.check
            )
            object.__setattr__(self, option.name, check(value))

    def report(self, done: int, total: int) -> None:
        """Tell the caller how far the work is.

        Parameters
        ----------
        done, total : int
            What ``progress`` is called with.
        """
        if self.progress:
            self.progress(done, total)

    def over_all_rows(self, number: float) -> float:
        """The sum over all rows of a number that is one over those at hand.

        Parameters
        ----------
        number : int or float
            Over the rows of the problem, which may be a share of the weight's.

        Returns
        -------
        int or float
        """
        return number if self.others is None else self.others.total(number)

    @property
    def shares(self):
        """How many have rows of the weight, each its own."""
        return 1 if self.others is None else self.others.size

    def by_rows(self, function: Callable, rows: int) -> Any:
        """An array of so many rows, some of them made by each of those who share the weight's.

        Parameters
        ----------
        function : callable
            Gives the rows of a slice.
        rows : int

        Returns
        -------
        array
        """
        if self.others is None:
            return function(slice(0, rows))
        return self.others.by_rows(function, rows)

    def namespace(self, *given: Any) -> Any:
        """The namespace to compute on.

        Parameters
        ----------
        *given : array
            Where one lies on a GPU, "auto" takes it.

        Returns
        -------
        module
            numpy or cupy.

        Raises
        ------
        ValueError
            "cuda", and no device is found.
        """
        return arrays.choose(self.device, *given)


@dataclass(frozen=True)
class Recipe:
    """What to do to a weight: valid, and checked, without one.

    Parameters
    ----------
    pattern : str or Pattern
        A name, ``n:m``, ``n:mxb`` or the text form; see `cuobs.patterns`.
    method : str
        See `cuobs.methods`.
    options : dict
        The method's own; those not given are filled in with their defaults.
    refine : {None, "exact"}
        "exact" solves the weights again for the mask.
    damp : float
        λ as a share of the mean of the Hessian's diagonal.

    Raises
    ------
    ValueError, TypeError
        A name or a value is wrong, or an option does not belong to the method.

    Examples
    --------
    >>> import cuobs
    >>> recipe = cuobs.Recipe("4:8", "true-obs", {"group": 4})
    >>> recipe.options
    {'group': 4, 'order': 'gap'}
    >>> recipe.replace(order="left", damp=0.1).options
    {'group': 4, 'order': 'left'}
    """

    pattern: Pattern = "2:4"
    method: str = "admm"
    options: dict = field(default_factory=dict, hash=False)
    refine: str | None = None
    damp: float = 0.01

    def __post_init__(self):
        validation.name_of("method", self.method, methods())
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options: found {type(self.options).__name__}, expected a dict")
        if self.refine is not None:
            REFINE.check(self.refine)
        for name, value in (
            ("pattern", parse(self.pattern)),
            ("options", self.entry.fill(self.options)),
            ("damp", validation.damping(self.damp)),
        ):
            object.__setattr__(self, name, value)

    @property
    def entry(self):
        """The `Method` of this name."""
        return methods()[self.method]

    @property
    def exact(self):
        """Whether the weights are solved again for the mask."""
        return self.refine == "exact" or self.entry.resolves

    @property
    def by_row(self):
        """Whether processes and devices may share the rows of a weight; see `Method`."""
        found = self.entry.by_row
        return bool(found(**self.options)) if callable(found) else found

    def replace(self, **changes: Any) -> "Recipe":
        """The same with some keys changed; a method's options are keys like any other.

        With another method, its options begin at their defaults.
        """
        own = {name: changes.pop(name) for name in KEYS if name in changes}
        kept = {} if own.get("method", self.method) != self.method else self.options
        return dataclasses.replace(self, **own, options={**kept, **changes})

    def run(
        self,
        W: Any,
        H: Any = None,
        settings: Settings | None = None,
        *,
        X: Any = None,
        target: Any = None,
    ) -> Any:
        """Prune a weight.

        Parameters
        ----------
        W : array, shape (M, K)
        H : array, shape (K, K), or Hessian, optional
            XᵀX, undamped.
        settings : Settings, optional
        X : array, shape (..., K), optional
            Activations, in place of H.
        target : array, shape (M, K), optional
            As in `cuobs.prune`.

        Returns
        -------
        Result
        """
        return layer.prune_layer(self, settings or Settings(), W, X, H, target)


REFINE = Option(
    "refine", str, ("exact",), Recipe.refine,
    "Solve the weights again for the mask; some methods always do.", "none",
)  # fmt: skip
DAMP = Option(
    "damp", float, (), Recipe.damp, "Damping, as a share of the mean of the Hessian's diagonal."
)
SETTING_OPTIONS = (
    Option("device", str, arrays.DEVICES, Settings.device,
           "auto takes the GPU where there is one."),
    Option("dtype", str, DTYPES, Settings.dtype, "Compute precision."),
    Option("precision", str, PRECISIONS, Settings.precision,
           "Whether float32 may use tensor cores."),
    Option("workers", int, (), Settings.workers, "Threads on the CPU.", "one a core"),
    Option("batch_rows", int, (), Settings.batch_rows, "Rows in a batch.", "by the free memory"),
    Option("memory_limit", str, (), Settings.memory_limit,
           "What the computation may hold, such as 8GiB.", "the free memory"),
    Option("devices", str, (), Settings.devices,
           "GPUs that share a layer's rows: all, how many, or which (0,2).", "one"),
)  # fmt: skip
# Keys of a recipe beside a method's options, and those of the settings that a file may hold.
KEYS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name != "options")
SETTINGS = tuple(option.name for option in SETTING_OPTIONS)
# What `cuobs.prune` takes, which no option of a method may be called.
RESERVED = frozenset({*KEYS, *SETTINGS, "W", "X", "hessian", "target", "options", "progress"})
