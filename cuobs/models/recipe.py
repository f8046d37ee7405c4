"""What to do to a whole model: valid, and checked, without one."""

import dataclasses
import fnmatch
import re
from dataclasses import dataclass, field

from cuobs import validation
from cuobs.config import Config
from cuobs.model_choices import ROTATION_STEPS, ROTATION_WINDOWS, SCORES, TARGETS
from cuobs.recipe import KEYS as RECIPE
from cuobs.recipe import SETTINGS, Recipe, Settings, method_options


@dataclass(frozen=True)
class ModelRecipe:
    """What is done to the linears of a model.

    Parameters
    ----------
    config : Config
        The recipe of every linear, what is different for some of them, globs of names of those
        that stay as they are, and how to run.
    target : {"mixed", "pruned", "dense"}
    dense_share, residual_share : float or (float, float), optional
        Of a mixed target, 0.5 by default; a pair goes evenly from the first block to the last.
    drop_first_token : bool
        Leave the first token of each window out of the sums.
    tune : int
        Passes of gradient descent over a pruned block's kept weights.
    tune_rate : float
        Their learning rate at the start.
    distill : int
        Passes in which all kept weights learn together after the last block.
    distill_rate : float
        Their learning rate.
    rotate : bool
        Give the model another basis first, see `cuobs.models.rotate`.
    rotate_steps, rotate_score, rotate_permute
        ``steps``, ``score`` and ``permute`` of that.

    Raises
    ------
    ValueError, TypeError
        A value is wrong.
    """

    config: Config = field(default_factory=Config)
    target: str = "mixed"
    dense_share: tuple = None
    residual_share: tuple = None
    drop_first_token: bool = True
    tune: int = 0
    tune_rate: float = 3e-4
    distill: int = 0
    distill_rate: float = 3e-4
    rotate: bool = False
    rotate_steps: int = ROTATION_STEPS
    rotate_score: str = SCORES[0]
    rotate_permute: bool = True

    def __post_init__(self):
        for name in ("tune", "distill"):
            validation.integer(name, getattr(self, name), low=0)
        for name in ("tune_rate", "distill_rate"):
            validation.positive(name, getattr(self, name))
        for name in ("drop_first_token", "rotate", "rotate_permute"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: found {value!r}, expected true or false")
        validation.integer("rotate_steps", self.rotate_steps, low=0)
        validation.name_of("rotate_score", self.rotate_score, SCORES)
        _check_globs(self.config.skip)
        shares = _shares(self.target, self.dense_share, self.residual_share)
        for name, value in zip(("dense_share", "residual_share"), shares, strict=True):
            object.__setattr__(self, name, value)

    @property
    def follows(self):
        """Whether the dense model's hidden states are wanted beside those of the pruned one."""
        return self.target != "pruned" or self.tune > 0

    @property
    def rotation(self):
        """How a rotation is learned, a `RotationRecipe`."""
        return RotationRecipe(
            steps=self.rotate_steps, score=self.rotate_score, permute=self.rotate_permute,
            damp=self.config.recipe.damp,
        )  # fmt: skip

    def of(self, name):
        """The `Recipe` of a linear, None where it stays as it is."""
        return self.config.recipe_for(name)

    def shares(self, depth):
        """The dense and the residual share at a depth from 0, the first block, to 1."""
        return [a + (b - a) * depth for a, b in (self.dense_share, self.residual_share)]

    def check_names(self, names):
        """Refuse a glob that fits none of the linears of a model."""
        entries = {"layers": self.config.layers, "skip": self.config.skip}
        for key, glob in ((key, glob) for key, globs in entries.items() for glob in globs):
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                wider = f"*{glob.strip('*')}*"
                within = any(fnmatch.fnmatchcase(name, wider) for name in names)
                raise ValueError(
                    f"{key}: found no linear whose name {glob!r} fits, expected one as {names[0]}"
                    + (f"; {wider!r} fits names that have it within" if within else "")
                )

    def as_config(self):
        """The same as a `Config` that a file may hold."""
        model = {key: getattr(self, key) for key in KEYS}
        return dataclasses.replace(
            self.config, model={key: value for key, value in model.items() if value is not None}
        )

    def described(self):
        """The recipe as plain values, for a report."""
        recipe, config = self.config.recipe, self.config
        return {
            "pattern": recipe.pattern.label,
            "pattern_view": str(recipe.pattern),
            "method": recipe.method,
            **recipe.options,
            "refine": recipe.refine,
            "damp": recipe.damp,
            "dtype": config.settings.dtype,
            "precision": config.settings.precision,
            "layers": {glob: dict(changes) for glob, changes in config.layers.items()},
            **{key: getattr(self, key) for key in KEYS},
            "skip": list(config.skip) or None,
        }


# Beyond the dense model's outputs there is nothing to aim at.
LARGEST_SHARES = {"dense_share": 1, "residual_share": 2}
# Keys of a `ModelRecipe` beside its config.
KEYS = tuple(f.name for f in dataclasses.fields(ModelRecipe) if f.name != "config")


@dataclass(frozen=True)
class RotationRecipe:
    """How a rotation is learned; see `cuobs.models.rotate`.

    Raises
    ------
    ValueError, TypeError
        A value is wrong.
    """

    steps: int = ROTATION_STEPS
    rate: float = 3e-3
    windows: int = ROTATION_WINDOWS
    score: str = SCORES[0]
    permute: bool = True
    damp: float = Recipe.damp

    def __post_init__(self):
        validation.integer("steps", self.steps, low=0)
        validation.integer("windows", self.windows)
        validation.name_of("score", self.score, SCORES)
        validation.damping(self.damp)
        validation.positive("rate", self.rate)
        if not isinstance(self.permute, bool):
            raise TypeError(f"permute: found {self.permute!r}, expected true or false")

    @property
    def compensated(self):
        """Whether the score of a weight is w² / C_jj, and not w² H_jj."""
        return self.score == "compensated"


def read_arguments(given):
    """A `ModelRecipe` from keyword arguments, those that are None left out.

    They are those of `ModelRecipe`, of its recipe and its method, and of `Settings`; and
    ``layers`` and ``skip``.

    Raises
    ------
    TypeError
        An argument is unknown.
    """
    given = {key: value for key, value in given.items() if value is not None}
    known = (*RECIPE, "layers", "skip", *method_options(), *SETTINGS, *KEYS)
    for key in given:
        if key not in known:
            raise TypeError(
                f"{key}: found an unknown argument, expected one of {', '.join(known)}"
            )
    if "devices" in given:
        raise ValueError(
            f"devices: found {given['devices']!r}, expected it for a single layer: torchrun "
            "--nproc-per-node N shares a model out"
        )
    layers, globs = given.pop("layers", {}), given.pop("skip", ())
    globs = (globs,) if isinstance(globs, str) else globs
    if not isinstance(globs, list | tuple):
        raise TypeError(f"skip: found {type(globs).__name__}, expected a glob or a list of them")
    own, recipe, settings, whole = (
        {key: given[key] for key in keys if key in given}
        for keys in (method_options(), RECIPE, SETTINGS, KEYS)
    )
    config = Config(Recipe(options=own, **recipe), Settings(**settings), layers, globs)
    return ModelRecipe(config, **whole)


def _shares(target, dense_share, residual_share):
    """The shares as pairs (first block, last block)."""
    validation.name_of("target", target, TARGETS)
    pairs = []
    given = {"dense_share": dense_share, "residual_share": residual_share}
    for (name, value), fixed in zip(given.items(), TARGETS[target] or (None, None), strict=True):
        value = tuple(value) if isinstance(value, list) else value
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
        most = LARGEST_SHARES[name]
        if len(pair) != 2 or not all(0 <= v <= most for v in pair):
            raise ValueError(f"{name}: found {value!r}, expected a share from 0 to {most}, or two")
        pairs.append(pair)
    return pairs


def _check_globs(globs):
    for glob in globs:
        if re.search(r"[\\^$(){}|+]", glob):
            raise ValueError(
                f"skip: found {validation.shown(glob)}, a regular expression, expected a glob for "
                "the whole name, as '*.k_proj', or a list of them"
            )
