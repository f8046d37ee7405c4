"""Recipes in TOML files: what to do, how, and what some layers of a model get instead.

::

    [recipe]
    pattern = "2:4"
    method = "true-obs"
    group = 8

    [settings]
    memory_limit = "8GiB"

    [layers]
    skip = ["lm_head", "*.layers.0.*"]
    "*.down_proj" = {pattern = "4:8"}

    [model]
    target = "mixed"
    tune = 4
"""

import dataclasses
import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

from cuobs import validation
from cuobs.pattern import Pattern, parse
from cuobs.recipe import KEYS, SETTINGS, Recipe, Settings, method_options

__all__ = ["Config", "load_config", "to_toml"]

TABLES = ("recipe", "settings", "layers", "model")


@dataclass(frozen=True)
class Config:
    """A recipe, how to run it, and what single layers of a model get instead.

    Parameters
    ----------
    recipe : Recipe
    settings : Settings
    layers : dict
        Glob of names of layers to the keys of the recipe that differ there.
    skip : tuple of str
        Globs of names of layers that stay as they are.
    model : dict
        What whole models have beside: arguments of `cuobs.models.prune_model` by name, which are
        checked there.

    Examples
    --------
    >>> from cuobs.config import Config
    >>> config = Config(layers={"*.down_proj": {"pattern": "4:8"}}, skip=("lm_head",))
    >>> config.recipe_for("model.layers.3.mlp.down_proj").pattern.name
    '4:8'
    >>> config.recipe_for("lm_head") is None
    True
    """

    recipe: Recipe = field(default_factory=Recipe)
    settings: Settings = field(default_factory=Settings)
    layers: dict = field(default_factory=dict)
    skip: tuple = ()
    model: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "skip", tuple(self.skip))
        for glob in self.skip:
            if not isinstance(glob, str):
                raise TypeError(f"skip: found {glob!r}, expected names of layers, such as '*.0.*'")
        for glob, changes in self.layers.items():
            with validation.naming(f"layers.{json.dumps(glob)}"):
                self.recipe.replace(**_recipe_keys(changes))

    def replace(self, **changes: Any) -> "Config":
        """The same with some keys of its recipe and of its settings changed."""
        names = (*SETTINGS, "progress")
        settings = {name: changes.pop(name) for name in names if name in changes}
        return dataclasses.replace(
            self,
            recipe=self.recipe.replace(**changes),
            settings=dataclasses.replace(self.settings, **settings),
        )

    def recipe_for(self, name: str) -> Recipe | None:
        """The recipe of a layer of this name, where later globs go before earlier ones; None where
        it is skipped."""
        if any(fnmatchcase(name, glob) for glob in self.skip):
            return None
        recipe = self.recipe
        for glob, changes in self.layers.items():
            if fnmatchcase(name, glob):
                recipe = recipe.replace(**changes)
        return recipe


def load_config(path: str | PathLike) -> Config:
    """Read a TOML file; a `Config`.

    Parameters
    ----------
    path : path
        Tables ``[recipe]`` (the keys of `Recipe`, a method's options among them), ``[settings]``
        (those of `Settings`), ``[layers]`` and ``[model]`` (see `Config`), each of them optional.
        In ``[layers]`` a glob of names of layers has a table of the keys of the recipe that differ
        there, and ``skip`` is a list of such globs.

    Raises
    ------
    ValueError, TypeError
        It is no TOML, holds an unknown key or a wrong value; the message begins with the path.
    OSError
    """
    with validation.naming(path):
        tables = _read(path)
        for name, table in tables.items():
            validation.name_of("table", name, TABLES)
            if not isinstance(table, dict):
                raise TypeError(f"{name}: found {table!r}, expected a table [{name}]")
        settings, layers = tables.get("settings", {}), dict(tables.get("layers", {}))
        for key in settings:
            validation.name_of("settings", key, SETTINGS)
        skip = layers.pop("skip", [])
        if not isinstance(skip, list):
            raise TypeError(f"skip: found {skip!r}, expected a list of names of layers")
        return Config(
            Recipe().replace(**_recipe_keys(tables.get("recipe", {}))),
            Settings(**settings),
            layers,
            skip,
            tables.get("model", {}),
        )


def to_toml(config: Config) -> str:
    """A `Config` as the text that `load_config` reads.

    Examples
    --------
    >>> from cuobs.config import Config, to_toml
    >>> print(to_toml(Config()).splitlines()[1])
    pattern = "2:4"
    """
    recipe, settings = config.recipe, config.settings
    own = {key: getattr(recipe, key) for key in KEYS} | recipe.options
    lines = ["[recipe]", *_lines(own), "", "[settings]"]
    lines += _lines({key: getattr(settings, key) for key in SETTINGS})
    if config.layers or config.skip:
        lines += ["", "[layers]", *_lines({"skip": list(config.skip)} if config.skip else {})]
        for glob, changes in config.layers.items():
            lines.append(f"{_value(glob)} = {{{', '.join(_lines(changes))}}}")
    if config.model:
        lines += ["", "[model]", *_lines(config.model)]
    return "\n".join(lines) + "\n"


def _read(path):
    try:
        import tomllib
    except ModuleNotFoundError:  # before Python 3.11
        import tomli as tomllib
    validation.existing_file(path, "a recipe in TOML")
    with open(path, "rb") as f:
        try:
            return tomllib.load(f)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"found no TOML ({error}), expected a recipe") from None


def _recipe_keys(table):
    """A table, where all its keys are a recipe's."""
    if not isinstance(table, dict):
        raise TypeError(f"found {table!r}, expected a table of keys of a recipe")
    for key in table:
        validation.name_of("recipe", key, [*KEYS, *method_options()])
    return table


def _lines(table):
    return [f"{key} = {_value(value)}" for key, value in table.items() if value is not None]


def _value(value):
    if isinstance(value, Pattern):
        value = value.label if _is_named(value) else str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, which wants one more.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _is_named(pattern):
    try:
        return parse(pattern.label) == pattern
    except ValueError:
        return False
