"""What to do to a whole model: valid, and checked, without one."""

import dataclasses
import fnmatch
import numbers
import re
from dataclasses import dataclass, field

from cuobs import validation
from cuobs.models.targets import TARGETS
from cuobs.recipe import SETTINGS, Recipe, Settings, method_options


@dataclass(frozen=True)
class ModelRecipe:
    """What is done to the linears of a model.

    Parameters
    ----------
    recipe : Recipe
        For every linear.
    layers : dict
        By a glob of names, such as "*.down_proj", what is different there: keys of a recipe or of
        its method's options. Where several match, later ones have the last word.
    skip : str or list of str, optional
        Linears that stay as they are: a regular expression that is found in their names, or globs.
    target : {"mixed", "pruned", "dense"}
    dense_share, residual_share : float or (float, float), optional
        Of a mixed target, 0.5 by default; a pair goes evenly from the first block to the last.
    drop_first_token : bool
        Leave the first token of each window out of the sums.
    tune : int
        Passes of gradient descent over a pruned block's kept weights.
    tune_rate : float
        Their learning rate at the start.

    Raises
    ------
    ValueError, TypeError
        A value is wrong.
    """

    recipe: Recipe = field(default_factory=Recipe)
    layers: dict = field(default_factory=dict, hash=False)
    skip: object = None
    target: str = "mixed"
    dense_share: tuple = None
    residual_share: tuple = None
    drop_first_token: bool = True
    tune: int = 0
    tune_rate: float = 3e-4

    def __post_init__(self):
        validation.integer("tune", self.tune, low=0)
        rate = self.tune_rate
        if not isinstance(rate, numbers.Real) or not 0 < rate < float("inf"):
            raise ValueError(f"tune_rate: found {rate!r}, expected a positive number")
        shares = _shares(self.target, self.dense_share, self.residual_share)
        _check_skip(self.skip)
        for glob, changes in self.layers.items():
            with validation.naming(f"layers, {glob}"):
                self.recipe.replace(**changes)
        for name, value in zip(("dense_share", "residual_share"), shares, strict=True):
            object.__setattr__(self, name, value)

    @property
    def follows(self):
        """Whether the dense model's hidden states are wanted beside those of the pruned one."""
        return self.target != "pruned" or self.tune > 0

    def of(self, name):
        """The `Recipe` of a linear."""
        changes = {}
        for glob, own in self.layers.items():
            if fnmatch.fnmatchcase(name, glob):
                changes.update(own)
        return self.recipe.replace(**changes) if changes else self.recipe

    def skips(self, name):
        """Whether a linear stays as it is."""
        if not self.skip:
            return False
        if isinstance(self.skip, str):
            return re.search(self.skip, name) is not None
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.skip)

    def shares(self, depth):
        """The dense and the residual share at a depth from 0, the first block, to 1."""
        return [a + (b - a) * depth for a, b in (self.dense_share, self.residual_share)]

    def unknown(self, names):
        """Refuse a glob or an expression that fits none of the linears of a model."""
        globs = [("layers", glob) for glob in self.layers]
        if isinstance(self.skip, list | tuple):
            globs += [("skip", glob) for glob in self.skip]
        for key, glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise ValueError(
                    f"{key}: found no linear whose name {glob!r} fits, expected one as {names[0]}"
                )
        if isinstance(self.skip, str) and self.skip and not any(map(self.skips, names)):
            raise ValueError(
                f"skip: found no linear in whose name {self.skip!r} is, expected part of one as "
                f"{names[0]}"
            )

    def described(self):
        """The recipe as plain values, for a report."""
        recipe = self.recipe
        return {
            "pattern": recipe.pattern.label,
            "pattern_view": str(recipe.pattern),
            "method": recipe.method,
            **recipe.options,
            "refine": recipe.refine,
            "damp": recipe.damp,
            **{
                f.name: getattr(self, f.name)
                for f in dataclasses.fields(self)
                if f.name != "recipe"
            },
        }


# Keys of a `ModelRecipe` beside those of its recipe.
KEYS = tuple(f.name for f in dataclasses.fields(ModelRecipe) if f.name != "recipe")


def read_arguments(given):
    """A `ModelRecipe` and `Settings` from keyword arguments; those that are None are left out.

    Raises
    ------
    TypeError
        An argument is unknown.
    """
    given = {key: value for key, value in given.items() if value is not None}
    options = method_options()
    recipe = {k: given[k] for k in ("pattern", "method", "refine", "damp") if k in given}
    known = (*KEYS, "pattern", "method", "refine", "damp", *SETTINGS, *options)
    for key in given:
        if key not in known:
            raise TypeError(
                f"{key}: found an unknown argument, expected one of {', '.join(known)}"
            )
    own = {key: value for key, value in given.items() if key in options}
    whole = {key: value for key, value in given.items() if key in KEYS}
    settings = {key: value for key, value in given.items() if key in SETTINGS}
    return ModelRecipe(Recipe(options=own, **recipe), **whole), Settings(**settings)


def _shares(target, dense_share, residual_share):
    """The shares as pairs (first block, last block)."""
    validation.name_of("target", target, TARGETS)
    pairs = []
    given = {"dense_share": dense_share, "residual_share": residual_share}
    for (name, value), fixed in zip(given.items(), TARGETS[target] or (None, None), strict=True):
        if fixed is not None and value not in (None, (fixed, fixed)):
            raise ValueError(
                f"{name}: found {value!r} with target={target!r}, expected it with 'mixed' alone"
            )
        value = fixed if fixed is not None else 0.5 if value is None else value
        pair = value if isinstance(value, tuple | list) else (value, value)
        try:
            pair = tuple(float(v) for v in pair)
        except (TypeError, ValueError):
            pair = ()
        if len(pair) != 2 or not all(0 <= v <= 2 for v in pair):
            raise ValueError(f"{name}: found {value!r}, expected a share from 0 to 2, or two")
        pairs.append(pair)
    return pairs


def _check_skip(skip):
    if isinstance(skip, list | tuple) and all(isinstance(glob, str) for glob in skip):
        return
    if skip is not None and not isinstance(skip, str):
        raise TypeError(
            f"skip: found {type(skip).__name__}, expected a regular expression or a list of globs"
        )
    try:
        re.compile(skip or "")
    except re.error as error:
        raise ValueError(f"skip: found {skip!r}, no regular expression ({error})") from None
