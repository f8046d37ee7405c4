"""Recipes in files: what is read is what was written, and a mistake is named."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import cuobs
from cuobs.config import Config, load_config, to_toml

EXAMPLE = """
[recipe]
pattern = [4, 8]
method = "true-obs"
group = 8
damp = 0.1

[settings]
dtype = "float64"
memory_limit = "8GiB"

[layers]
skip = ["lm_head", "*.layers.0.*"]
"*.down_proj" = {pattern = "4:8", damp = 1}
"*.3.*" = {method = "wanda"}
"""


def read(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_config(path)


def test_a_file_says_what_to_do_and_how(tmp_path):
    config = read(tmp_path, EXAMPLE)
    options = {"group": 8, "order": "gap"}
    assert config.recipe == cuobs.Recipe("4:8", "true-obs", options, damp=0.1)
    assert config.settings == cuobs.Settings(dtype="float64", memory_limit=2**33)
    assert config.skip == ("lm_head", "*.layers.0.*")


def test_layers_by_glob(tmp_path):
    config = read(tmp_path, EXAMPLE)
    assert config.recipe_for("model.layers.1.mlp.up_proj") is config.recipe
    assert config.recipe_for("lm_head") is None
    assert config.recipe_for("model.layers.0.mlp.down_proj") is None
    down = config.recipe_for("model.layers.1.mlp.down_proj")
    assert down == config.recipe.replace(pattern="4:8", damp=1)
    assert down.options == {"group": 8, "order": "gap"}
    # A later glob goes before an earlier one, and another method begins at its defaults.
    both = config.recipe_for("model.layers.3.mlp.down_proj")
    assert both == cuobs.Recipe("4:8", "wanda", damp=1.0)


def test_nothing_in_a_file_is_the_defaults(tmp_path):
    assert read(tmp_path, "") == Config(cuobs.Recipe(), cuobs.Settings(), {}, (), {})


def test_what_whole_models_have_beside_is_read(tmp_path):
    read_model = read(tmp_path, "[model]\ntarget = 'mixed'\ndense_share = [0.25, 0.75]\n").model
    assert read_model == {"target": "mixed", "dense_share": [0.25, 0.75]}


@pytest.mark.parametrize(("text", "error", "said"), [
    ("recipe", ValueError, "found no TOML .*end of document"),
    ("[recipes]", ValueError, "table: found 'recipes'.*nearest: recipe"),
    ("recipe = 3", TypeError, "recipe: found 3, expected a table"),
    ("[recipe]\npatern = '2:4'", ValueError, "recipe: found 'patern'.*nearest: pattern"),
    ("[recipe]\nworkers = 3", ValueError, "recipe: found 'workers'"),
    ("[recipe]\npattern = '5:4'", ValueError, "pattern: found '5:4'"),
    ("[recipe]\nmethod = 'admn'", ValueError, "method: found 'admn'.*nearest: admm"),
    ("[recipe]\nsplits = 3", ValueError, "splits: found 3, but admm takes schedule"),
    ("[recipe]\ndamp = inf", ValueError, "damp: found inf"),
    ("[settings]\nprogress = true", ValueError, "settings: found 'progress'"),
    ("[settings]\nworkers = 0", ValueError, "workers: found 0"),
    ("[settings]\ndtype = 3", TypeError, "dtype: found int"),
    ("[layers]\nskip = '*'", TypeError, "skip: found '\\*', expected a list"),
    ("[layers]\nskip = [3]", TypeError, "skip: found 3, expected names"),
    ("[layers]\n'*.up' = '2:4'", TypeError, r'layers."\*.up": found \'2:4\', expected a table'),
    ("[layers]\n'*.up' = {keep = 2}", ValueError, r'layers."\*.up": recipe: found \'keep\''),
    ("[layers]\n'*.up' = {splits = 2}", ValueError, r'layers."\*.up": splits: .*admm'),
])
def test_a_mistake_is_named(tmp_path, text, error, said):
    with pytest.raises(error, match=said) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "recipe.toml: "))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = " + b"[" * 10**5])
def test_what_is_no_toml_is_refused(tmp_path, content):
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(ValueError, match="recipe.toml: found no TOML"):
        load_config(tmp_path / "recipe.toml")


def keys_of(name):
    """Keys of a recipe with this method, and of one of its options."""
    method = cuobs.methods()[name]
    values = {"splits": st.integers(1, 99), "group": st.integers(1, 99)}
    options = {
        o.name: st.none() | (st.sampled_from(o.choices) if o.choices else values[o.name])
        for o in method.options
    }
    return st.fixed_dictionaries({
        "pattern": st.sampled_from(
            [*cuobs.patterns(), "1:4", "2:4x3", str(cuobs.patterns()["4:8"])]
        ),
        "method": st.just(name),
        "refine": st.sampled_from([None, "exact"]),
        "damp": st.floats(0, 1e6) | st.integers(0, 9),
        **options,
    })  # fmt: skip


KEYS = st.sampled_from(list(cuobs.methods())).flatmap(keys_of)
SETTINGS = st.fixed_dictionaries({
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "precision": st.sampled_from(["tensor", "fp32"]),
    "workers": st.none() | st.integers(1, 99),
    "memory_limit": st.none() | st.integers(2**30, 2**40),
    "devices": st.none() | st.sampled_from(["all", "2", "0,3"]),
})  # fmt: skip
GLOBS = st.text(st.characters(codec="utf-8"))
WHOLE = st.booleans() | st.integers() | GLOBS


@settings(max_examples=50, deadline=None)
@given(
    KEYS,
    SETTINGS,
    st.dictionaries(GLOBS.filter(lambda glob: glob != "skip"), KEYS, max_size=2),
    st.lists(GLOBS, max_size=2),
    st.dictionaries(st.sampled_from(["target", "tune", "skip"]), WHOLE),
)
def test_a_file_that_was_written_reads_as_it_was(tmp_path_factory, keys, how, layers, skip, whole):
    layers = {
        glob: {k: v for k, v in changes.items() if v is not None}
        for glob, changes in layers.items()
    }
    config = Config(cuobs.Recipe().replace(**keys), cuobs.Settings(**how), layers, skip, whole)
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(path) == config
