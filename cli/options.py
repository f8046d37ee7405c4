"""Options in groups, and those of a recipe and of settings for whatever methods are known."""

import contextlib
import warnings

import click

import cuobs
from cuobs import recipe
from cuobs.config import Config, load_config

WHAT, OWN, INPUT, HOW, OUTPUT, OTHERS = (
    "What to do", "Options of methods", "Input", "How to run", "Output", "Other options"
)  # fmt: skip
# The order in which a help shows them; a command's own groups come between.
FIRST, LAST = (WHAT, INPUT), (OWN, HOW, OUTPUT, OTHERS)
NOT_GIVEN = (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)


class Option(click.Option):
    """An option that is shown under a heading, with its default in brackets."""

    def __init__(self, *args, group=OTHERS, show_default=True, **kwargs):
        super().__init__(*args, show_default=show_default, **kwargs)
        self.group = group

    def get_help_extra(self, ctx):
        """The default as it is, in words or not; limits are told where they are broken."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if "default" in extra and isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


def option(*names, **keys):
    """`click.option` with a ``group``."""
    return click.option(*names, cls=Option, **keys)


class Command(click.Command):
    """A command whose help shows its options by group."""

    def format_options(self, ctx, formatter):
        """Write a section for each group, in one order for all commands."""
        groups = {}
        for parameter in self.get_params(ctx):
            if not isinstance(parameter, click.Option):
                continue
            if record := parameter.get_help_record(ctx):
                groups.setdefault(getattr(parameter, "group", OTHERS), []).append(record)
        if list(groups) == [OTHERS]:
            groups = {"Options": groups[OTHERS]}
        own = [group for group in groups if group not in FIRST + LAST]
        for group in (*FIRST, *own, *LAST):
            if group in groups:
                with formatter.section(group):
                    formatter.write_dl(groups[group])


class RecipeCommand(Command):
    """A command that takes a recipe and settings, from options or from ``--config``.

    Its function gets them as ``config``, a `Config`. The methods are asked for when it is called,
    so that those of a plugin are among them.
    """

    def get_params(self, ctx):
        """The command's own parameters, and those of a recipe and of settings before its options.

        Raises
        ------
        ValueError
            A method has an option that the command has already.
        """
        own, added = super().get_params(ctx), self.added()
        taken = {parameter.name for parameter in own}
        for parameter in added:
            if parameter.name in taken:
                raise ValueError(
                    f"{parameter.name}: found an option of a method, but '{self.name}' has one of "
                    "this name already"
                )
        arguments = [p for p in own if isinstance(p, click.Argument)]
        return [*arguments, *added, *(p for p in own if p not in arguments)]

    def added(self):
        """The options of a recipe and of settings."""
        return [method_option(), *recipe_options(), *own_options(), *setting_options()]

    def invoke(self, ctx):
        """Call the function with what the options make of the defaults or of a file."""
        given = {parameter.name: ctx.params.pop(parameter.name) for parameter in self.added()}
        self.configure(ctx, given)
        return super().invoke(ctx)

    def configure(self, ctx, given):
        """Put the `Config` into the parameters of the function."""
        path = given.pop("config")
        config = load_config(path) if path else Config()
        given = chosen(ctx, given)
        warn_of_dropped(config.recipe, given.get("method"), path)
        ctx.params["config"] = config.replace(**given)


class ModelCommand(RecipeCommand):
    """A `RecipeCommand` for whole models, which several processes share instead of devices."""

    def added(self):
        """The options, without ``--devices``."""
        return [option for option in super().added() if option.name != "devices"]


class CompareCommand(RecipeCommand):
    """A `RecipeCommand` whose ``--method`` may be repeated.

    Its function gets the names as ``methods``, None where all are meant, and the methods' options
    as ``own``.
    """

    def added(self):
        """The options, with ``--method`` for several."""
        return [method_option(many=True), *recipe_options(), *own_options(), *setting_options()]

    def configure(self, ctx, given):
        """Methods and their options apart from the `Config` of what all of them share."""
        ctx.params["methods"] = tuple(dict.fromkeys(given.pop("methods") or ())) or None
        own = chosen(ctx, {o.name: given.pop(o.name) for o in own_options()})
        super().configure(ctx, given)
        found = ctx.params["config"].recipe
        kept = {}
        if found.method in (ctx.params["methods"] or cuobs.methods()):
            defaults = {o.name: o.default for o in found.entry.options}
            kept = {name: v for name, v in found.options.items() if v != defaults[name]}
        ctx.params["own"] = kept | own


def warn_of_dropped(filed, method, path):
    """Say which options of a file's method do not count, where another one is asked for."""
    if method in (None, filed.method):
        return
    defaults = {one.name: one.default for one in filed.entry.options}
    dropped = [name for name, value in filed.options.items() if value != defaults[name]]
    if dropped:
        warnings.warn(
            f"{path}: {', '.join(dropped)} is for {filed.method} and does not count with "
            f"--method {method}", stacklevel=2,
        )  # fmt: skip


def chosen(ctx, options):
    """Those of some options, a dict by name, that were given and not left to their defaults."""
    return {
        name: value
        for name, value in options.items()
        if ctx.get_parameter_source(name) not in NOT_GIVEN
    }


def method_option(many=False):
    """``--method``, of those known by now."""
    names = list(cuobs.methods())
    if many:
        return Option(
            ["--method", "methods"], type=Name(names), multiple=True, metavar="M", group=WHAT,
            show_default="all", help="One of " + ", ".join(names) + "; may be repeated.",
        )  # fmt: skip
    return Option(
        ["--method"], type=Name(names), default=cuobs.Recipe.method, metavar="M", group=WHAT,
        help="One of " + ", ".join(names) + ".",
    )  # fmt: skip


def recipe_options():
    """The keys of a recipe that all methods share, and the file that holds one."""
    return [
        Option(["--pattern"], **_pattern()),
        of(recipe.REFINE, WHAT),
        of(recipe.DAMP, WHAT),
        Option(
            ["--config"], type=click.Path(), metavar="F.toml", group=WHAT,
            help="A recipe in TOML; options that are given go before it.",
        ),
    ]


def own_options():
    """The options of all methods, one of each name."""
    return [of(_together(pairs), OWN) for pairs in recipe.method_options().values()]


def setting_options():
    """The settings."""
    return [of(one, HOW) for one in recipe.SETTING_OPTIONS]


def of(one, group):
    """The option of the command line for one of cuobs."""
    return Option([_flag(one)], group=group, **_keys(one))


def setting(name, **keys):
    """The decorator that gives a command one of the settings as an option."""
    (found,) = (one for one in recipe.SETTING_OPTIONS if one.name == name)
    return option(_flag(found), **{"group": HOW, **_keys(found), **keys})


class Output(click.Path):
    """A file to write; an option in its place means that its name was left out."""

    def convert(self, value, param, ctx):
        """The name, where it is none of an option."""
        if ctx is not None and any(value in other.opts for other in ctx.command.params):
            self.fail(f"found the option {value}, expected a file to write", param, ctx)
        return super().convert(value, param, ctx)


def pattern(command):
    """The decorator that gives a command ``--pattern``, where it takes no recipe."""
    return option("--pattern", **_pattern())(command)


def force(command):
    """The decorator that gives a command ``--force``."""
    return option("--force", is_flag=True, group=OUTPUT, help="Overwrite what exists.")(command)


def quiet(command):
    """The decorator that gives a command ``--quiet``."""
    return option("--quiet", is_flag=True, group=OUTPUT, help="Print nothing but errors.")(command)


def as_json(command):
    """The decorator that gives a command ``--json``, as ``as_json``."""
    return option("--json", "as_json", is_flag=True, group=OUTPUT,
                  help="Print the result as JSON and nothing else.")(command)  # fmt: skip


def output(*names, **keys):
    """The decorator for a file to write."""
    return option(*names, group=OUTPUT, type=Output(), **keys)


def _flag(one):
    return "--" + one.name.replace("_", "-")


def _keys(one):
    text = "SIZE" if one.name == "memory_limit" else "TEXT"
    metavars = {int: "N", float: "NUMBER", str: None if one.choices else text}
    types = {int: Integer(), float: Number(), str: Name(one.choices) if one.choices else None}
    return {
        "type": types[one.type],
        "metavar": metavars[one.type],
        "default": one.default,
        "show_default": one.computed or True,
        "help": one.help,
    }


def _pattern():
    names = ", ".join(cuobs.patterns())
    return {
        "type": PatternName(),
        "default": cuobs.Recipe.pattern,
        "metavar": "P",
        "group": WHAT,
        "help": f"A name ({names}), n:m, n:mxb, or the text form 'view=... block=... scope=... "
        "keep=...'; see 'cuobs patterns'.",
    }


def _together(pairs):
    """One option that stands for those of one name of several methods."""
    options = [one for _, one in pairs]
    default, computed = options[0].default, options[0].computed
    if any(one.default != default for one in options):
        default = None
        computed = ", ".join(f"{one.default} for {method.name}" for method, one in pairs)
    return cuobs.Option(
        options[0].name,
        options[0].type,
        tuple(dict.fromkeys(choice for one in options for choice in one.choices)),
        default,
        " ".join(dict.fromkeys(one.help for one in options)),
        computed,
    )


class Name(click.Choice):
    """One of some names; another is refused in the words of cuobs."""

    def convert(self, value, param, ctx):
        """The name as it is."""
        return cuobs.Option(param.name, str, self.choices).check(value)


class Integer(click.IntRange):
    """A positive integer; another value is refused in the words of cuobs."""

    def __init__(self):
        super().__init__(min=1)

    def convert(self, value, param, ctx):
        """The integer."""
        return _converted(int, value, param)


class Number(click.types.FloatParamType):
    """A number; anything else is refused in the words of cuobs."""

    def convert(self, value, param, ctx):
        """The number."""
        return _converted(float, value, param)


def _converted(kind, value, param):
    with contextlib.suppress(ValueError):
        value = kind(value)
    return cuobs.Option(param.name, kind).check(value)


class PatternName(click.ParamType):
    """A pattern in any of its forms; completion knows the named ones."""

    name = "pattern"

    def convert(self, value, param, ctx):
        """The `Pattern`."""
        return cuobs.pattern.parse(value)

    def shell_complete(self, ctx, param, incomplete):
        """The names that begin like this."""
        return [
            click.shell_completion.CompletionItem(name)
            for name in cuobs.patterns()
            if name.startswith(incomplete)
        ]
