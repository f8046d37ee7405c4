"""Patterns: what they compile to against brute enumeration, their text form, refusals, verify."""

import sys

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import FAR, PATTERNS, ROWS, TALL, TILE

import cuobs
from cuobs.pattern import parse


def expanded(layout):
    """(scope, block), each (M, K), of a compiled pattern."""
    M, K = layout.shape
    scope, block = np.full((M, K), -1), np.full((M, K), -1)
    for i, rows in enumerate(layout.row_order):
        for j, columns in enumerate(layout.column_order):
            scope[np.ix_(rows, columns)] = i * len(layout.column_order) + j
            block[np.ix_(rows, columns)] = layout.blocks
    return scope, block


def assert_same_partition(found, expected):
    """Equal up to the names of the parts."""
    pairs = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(found)) == len(np.unique(expected))


def assert_compiles_right(text, M, K):
    layout = parse(text).compile(M, K)
    assert layout.shape == (M, K)
    assert np.array_equal(np.sort(layout.row_order.ravel()), np.arange(M))
    assert np.array_equal(np.sort(layout.column_order.ravel()), np.arange(K))
    scope, block, keep = oracles.enumerate_view(text, M, K)
    found_scope, found_block = expanded(layout)
    assert_same_partition(found_scope, scope)
    assert np.array_equal(found_block, block)
    assert layout.keep == keep
    assert (np.diff(layout.column_order[:, 0]) > 0).all(), "scopes are not from left to right"
    assert (np.diff(layout.column_order, axis=1) > 0).all()


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(16, 48), (32, 144), (64, 96)])
def test_compiles_to_what_the_view_says(text, shape):
    assert_compiles_right(text, *shape)


def test_published_patterns_in_words():
    """Scopes and blocks of the four published patterns, written out by hand."""
    two = parse("2:4").compile(1, 8)
    assert two.column_order.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert two.blocks.tolist() == [[0, 1, 2, 3]] and two.keep == 2

    pairs = parse("4:8").compile(1, 8)
    assert pairs.column_order.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert pairs.blocks.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] and pairs.keep == 2

    coupled = parse("coupled-2:4").compile(1, 16)
    assert coupled.column_order.tolist() == [
        [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    ]
    assert coupled.blocks.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] and coupled.keep == 2

    tall = parse("block16-row8").compile(32, 16)
    assert tall.row_order.tolist() == [[r, r + 8] for r in (*range(8), *range(16, 24))]
    assert tall.column_order.tolist() == [list(range(16))]
    assert tall.blocks.tolist() == [[0] * 16, [1] * 16] and tall.keep == 1


@pytest.mark.parametrize("name, equal", [
    ("2:4", "2:4x1"), ("4:8", "2:4x2"), ("2:4", oracles.NAMED["2:4"]),
    ("4:8", oracles.NAMED["4:8"]), ("coupled-2:4", oracles.NAMED["coupled-2:4"]),
    ("block16-row8", oracles.NAMED["block16-row8"]),
    ("1:4x2", "view=(M,K):(K,1) block=(1,2) scope=(1,4) keep=1"),
    ("coupled-2:4", "view=(M, K/16, 8, 2) : (K, 16, 1, 8)  block=(1, 1, 1, 2) "
                    "scope=(1, 1, 4, 1)  keep=2"),
    ("block16-row8", "keep=1 scope=(1,1,2,1) block=(1,1,1,16) view=(M/16,8,2,K):(16*K,K,8*K,1)"),
])
def test_two_spellings_of_one_pattern(name, equal):
    assert parse(name) == parse(equal)


@pytest.mark.parametrize("text", PATTERNS)
def test_text_form_reads_back(text):
    pattern = parse(text)
    assert parse(str(pattern)) == pattern
    assert parse(pattern) is pattern
    assert str(pattern) == oracles.text_form(text)


def test_named_patterns():
    assert list(cuobs.patterns()) == ["2:4", "4:8", "coupled-2:4", "block16-row8"]
    for name, pattern in cuobs.patterns().items():
        assert pattern.name == pattern.label == name
        assert parse(name) == pattern
    cuobs.patterns().clear()
    assert cuobs.patterns()


# Refusals. Each says which argument is wrong and how.

PLAIN = " block=(1,1) scope=(1,4) keep=2"


@pytest.mark.parametrize("text, words", [
    ("view=(M,K):(K,2)" + PLAIN, "outside"),
    ("view=(M,K/2):(K,1)" + PLAIN, "leaves elements out"),
    ("view=(M,K/2):(K,2)" + PLAIN, "leaves elements out"),
    ("view=(M,K/4,4):(K,4,2) block=(1,1,1) scope=(1,1,4) keep=2", "outside"),
    ("view=(M/2,K):(K,1)" + PLAIN, "leaves elements out"),
    ("view=(M,K,2):(K,1,1) block=(1,1,1) scope=(1,4,1) keep=2", "outside|overlaps"),
    ("view=(M,K/4,4):(K,2,1) block=(1,1,1) scope=(1,1,4) keep=2", "overlaps"),
    ("view=(M,K):(1,1)" + PLAIN, "overlaps"),
    ("view=(M,K,4):(K,1,0) block=(1,1,1) scope=(1,1,4) keep=2", "overlaps"),
    ("view=(M,K/7,7):(K,7,1) block=(1,1,1) scope=(1,1,7) keep=2", "does not divide"),
    ("2:5", "does not divide"),
    ("2:4x3", "does not divide"),
    ("view=(M/3,3,K):(3K,K,1) block=(1,1,1) scope=(1,3,1) keep=2", "does not divide"),
])
def test_views_refused_with_the_reason(text, words):
    """On a weight of shape (16, 32)."""
    with pytest.raises(ValueError, match=words) as error:
        parse(text).compile(16, 32)
    assert str(error.value).startswith("pattern")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern, shape, expected", [
    ("2:4", (16, 30), r"2:4, which .* shape \(16, 30\), expected multiples of \(1, 4\)"),
    ("block16-row8", (24, 40), r"block16-row8, which .*, expected multiples of \(16, 16\)"),
    ("view=(M,5):(K,1) block=(1,1) scope=(1,3) keep=2", (4, 5), r"expected what view=\(M,5\)"),
])
def test_a_shape_that_a_pattern_does_not_divide(pattern, shape, expected):
    with pytest.raises(ValueError, match="^pattern: found " + f".*{expected}"):
        parse(pattern).compile(*shape)


def test_views_over_the_ends_of_rows_by_hand():
    """On a weight of shape (6, 16), whose view has rows of 24 or of 32 elements."""
    with pytest.raises(ValueError, match="not rows times columns"):
        parse("view=(4,24):(24,1) block=(1,1) scope=(1,24) keep=2").compile(6, 16)
    assert_compiles_right("view=(4,24):(24,1) block=(1,2) scope=(1,4) keep=2", 6, 16)
    assert_compiles_right("view=(3,32):(32,1) block=(1,2) scope=(1,16) keep=2", 6, 16)


@pytest.mark.parametrize("text, words", [
    ("4:9:2", "4:9:2"),
    ("couple-2:4", "nearest: coupled-2:4"),
    ("block16", "nearest: block16-row8"),
    ("", "expected"),
    ("4:4", "pattern: found '4:4'"),
    ("0:4", "pattern: found '0:4'"),
    ("5:4", "pattern: found '5:4'"),
    ("2:4x0", "pattern: found '2:4x0'"),
    ("view=(M,K):(K,1) block=(1,1) scope=(1,4)", "keep"),
    ("view=(M,K):(K,1) block=(1) scope=(1,4) keep=2", "block"),
    ("view=(M,K):(K,1) block=(1,1) scope=(1,4,1) keep=2", "scope"),
    ("view=(M,K):(K,1) block=(1,1) scope=(1,4) keep=4", "keep"),
    ("view=(M,K):(K,1) block=(1,1) scope=(1,-4) keep=2", "scope"),
    ("view=(M,K):(K,1) block=(1,1) scope=(1,4) keep=two", "keep"),
    ("view=(M,K):(K) block=(1,1) scope=(1,4) keep=2", "view"),
    ("view=(M,N):(K,1) block=(1,1) scope=(1,4) keep=2", "'N'"),
    ("view=(M,K-1):(K,1) block=(1,1) scope=(1,4) keep=2", "K-1"),
    ("view=(M,K) block=(1,1) scope=(1,4) keep=2", "view"),
    ("view=(M,K):(K,1) block=(1,1) scope=(1,4) keep=2 keep=3", "keep"),
])
def test_texts_refused(text, words):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, 4, ["2:4"]])
def test_pattern_of_a_wrong_type(value):
    with pytest.raises(TypeError, match="pattern"):
        parse(value)


# Random views


@st.composite
def mixed_radix(draw, total):
    """Sizes and strides of a view that covers 0..total-1 once, smallest stride first."""
    dimensions, stride = [], 1
    while stride < total:
        rest = total // stride
        size = draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        dimensions.append((size, stride))
        stride *= size
    return dimensions


@st.composite
def split_dimension(draw, size):
    """size = outer * scope * block."""
    scope = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0 and d <= 6]))
    rest = size // scope
    return scope, draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))


@st.composite
def views(draw, aligned=True):
    """(text, M, K) of a random view that covers a random weight once.

    Aligned views are rows times columns; others run over the ends of rows as they like.
    """
    M, K = draw(st.sampled_from([1, 2, 4, 6, 8, 12])), draw(st.sampled_from([4, 8, 12, 16, 24]))
    if aligned:
        dimensions = draw(mixed_radix(K))
        dimensions += [(size, stride * K) for size, stride in draw(mixed_radix(M))]
    else:
        dimensions = draw(mixed_radix(M * K))
    dimensions = draw(st.permutations(dimensions))
    splits = [draw(split_dimension(size)) for size, _ in dimensions]
    count = int(np.prod([s for s, _ in splits]))
    if not 2 <= count <= 8:
        splits[0] = (2, 1) if dimensions[0][0] % 2 == 0 else (dimensions[0][0], 1)
        splits[1:] = [(1, b) for _, b in splits[1:]]
        count = splits[0][0]
    if count < 2:
        return "2:4", M, K
    keep = draw(st.integers(1, count - 1))
    tuples = [",".join(map(str, t)) for t in
              (*zip(*dimensions, strict=True), [b for _, b in splits], [s for s, _ in splits])]
    text = "view=({}):({}) block=({}) scope=({})".format(*tuples)
    return f"{text} keep={keep}", M, K


@settings(max_examples=300, deadline=None)
@given(views())
def test_random_views_compile(view):
    assert_compiles_right(*view)


@settings(max_examples=300, deadline=None)
@given(views(aligned=False))
def test_views_over_the_ends_of_rows(view):
    """Compiled where the scopes are rows times columns with one block map, refused elsewhere."""
    text, M, K = view
    try:
        oracles.scopes(text, M, K)
    except (AssertionError, ValueError):
        with pytest.raises(ValueError, match="not rows times columns"):
            parse(text).compile(M, K)
    else:
        assert_compiles_right(text, M, K)


@settings(max_examples=300, deadline=None)
@given(views(), st.data())
def test_a_changed_stride_is_noticed(view, data):
    """Change one stride: refused just where brute enumeration finds no cover."""
    text, M, K = view
    shape, strides = (part.strip("()").split(",") for part in
                      text.split(" ")[0].removeprefix("view=").split(":")) if "=" in text else (
                          [str(M), str(K)], [str(K), "1"])
    changed = list(strides)
    which = data.draw(st.integers(0, len(strides) - 1))
    changed[which] = str(data.draw(st.integers(0, 2 * int(strides[which]) + 1)))
    broken = f"view=({','.join(shape)}):({','.join(changed)}) " + (
        text.partition(" ")[2] or "block=(1,1) scope=(1,4) keep=2")
    positions = sum(
        np.arange(int(n)).reshape(-1, *[1] * (len(shape) - 1 - k)) * int(s)
        for k, (n, s) in enumerate(zip(shape, changed, strict=True))
    ).ravel()
    if np.array_equal(np.sort(positions), np.arange(M * K)):
        parse(broken).compile(M, K)
        return
    with pytest.raises(ValueError) as error:
        parse(broken).compile(M, K)
    said = str(error.value)
    if "overlaps" in said:
        assert len(np.unique(positions)) < len(positions)
    elif "leaves elements out" in said:
        assert len(np.setdiff1d(np.arange(M * K), positions))
    else:
        assert "outside" in said and positions.max() >= M * K


# verify


def obeying(rng, text, M, K):
    """A weight that obeys the pattern, with nonzeros in every kept element."""
    score = rng.random((M, K))
    mask = oracles.separable(score, oracles.scopes(text, M, K))
    return (0.5 + rng.random((M, K))) * mask, mask


def broken_scopes(W, text):
    scope, block, keep = oracles.enumerate_view(text, *W.shape)
    used = np.zeros((scope.max() + 1, block.max() + 1), bool)
    used[scope[W != 0], block[W != 0]] = True
    broken = np.flatnonzero(used.sum(1) > keep)
    firsts = sorted((int(r.min()), int(c.min())) for r, c in
                    (np.nonzero(scope == b) for b in broken))
    return len(broken), scope.max() + 1, firsts[0] if firsts else None


@pytest.mark.parametrize("text", PATTERNS)
def test_verify_finds_planted_violations(xp, text):
    rng = np.random.default_rng(7)
    M, K = 32, 144
    W, mask = obeying(rng, text, M, K)
    found = cuobs.verify(xp.asarray(W), text)
    assert found and found.broken == 0 and found.first is None
    scope = oracles.enumerate_view(text, M, K)[0]
    assert found.scopes == scope.max() + 1
    for count in (1, 5):
        broken = W.copy()
        planted = rng.permutation(scope.max() + 1)[:count]
        for s in planted:
            rows, columns = np.nonzero((scope == s) & ~mask)
            k = rng.integers(len(rows))
            broken[rows[k], columns[k]] = 1e-30
        found = cuobs.verify(xp.asarray(broken), text)
        assert not found
        assert (found.broken, found.scopes, found.first) == broken_scopes(broken, text)
        assert found.broken == count
    full = cuobs.verify(xp.ones((M, K)), text)
    assert full.broken == full.scopes and full.first == (0, 0)
    assert cuobs.verify(xp.zeros((M, K)), text)


@settings(max_examples=100, deadline=None)
@given(views(), st.integers(0, 2**31), st.floats(0, 1))
def test_verify_counts_as_brute_force_does(view, seed, density):
    text, M, K = view
    W = np.random.default_rng(seed).random((M, K)) * (
        np.random.default_rng(seed + 1).random((M, K)) < density)
    found = cuobs.verify(W, text)
    assert (found.broken, found.scopes, found.first) == broken_scopes(W, text)


def test_verify_wants_a_matrix_that_the_pattern_divides():
    with pytest.raises(ValueError, match="W"):
        cuobs.verify(np.ones(8), "2:4")
    with pytest.raises(ValueError, match="divide"):
        cuobs.verify(np.ones((4, 6)), "2:4")


def test_patterns_that_scopes_of_several_rows_share():
    """The user patterns of these tests are what their names say."""
    assert parse(TILE).compile(2, 4).blocks.shape == (2, 4)
    assert parse(FAR).compile(1, 16).column_order[0].tolist() == [0, 4, 8, 12]
    assert parse(TALL).compile(4, 8).blocks.tolist() == [[0], [1], [2], [3]]
    assert parse(ROWS).compile(4, 2).blocks.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_a_pair_is_read_as_its_text():
    assert parse((2, 4)) == parse([2, 4]) == parse("2:4")
    assert parse((1, 4)) == parse("1:4")
    assert parse((np.int64(4), 8)) == parse("4:8")
    for pair in ((4, 2), (0, 4), (-1, 4)):
        with pytest.raises(ValueError, match=f"pattern: found '{pair[0]}:{pair[1]}'"):
            parse(pair)
    for other in ((2,), (2, 4, 8), (2.0, 4), (True, 2), 24):
        with pytest.raises(TypeError, match=r"pattern: found .*expected a name, \(n, m\) or a"):
            parse(other)


@pytest.mark.parametrize("view", [
    "(M,K/0):(K,1)", "(M,K):(K/00,1)", "(M,K/²):(K,1)", f"(M,K/{'9' * 5000}):(K,1)",
    f"({'9' * 5000}M,K):(K,1)", "(M,K/-2):(K,1)", "(M,K//2):(K,1)",
])
def test_views_that_mean_nothing_are_refused(view):
    with pytest.raises(ValueError, match="^view: found .*expected an integer, or M or K"):
        parse(f"view={view} block=(1,1) scope=(1,4) keep=2")


@pytest.mark.parametrize("text", [
    f"{'1' * 5000}:{'2' * 5000}", "1²:4", "view=(M,K):(K,1) block=(1,1) scope=(1,4) keep=²",
    f"view=(M,K):(K,1) block=(1,1) scope=(1,{'4' * 5000}) keep=2",
])
def test_numbers_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="^(pattern|keep|scope): found "):
        parse(text)


def test_a_pattern_of_ones_own_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(sys.modules["cuobs.pattern"], "_NAMED", cuobs.patterns())
    thirds = cuobs.register_pattern("thirds", cuobs.Pattern(scope=(1, 3), keep=1))
    assert parse("thirds") == thirds and thirds.label == "thirds"
    assert list(cuobs.patterns())[-1] == "thirds"
    assert cuobs.register_pattern("thirds", "1:3") == thirds  # the same again
    for name, pattern in (("thirds", "2:3"), ("2:4", "1:4"), ("3:8", "2:4"), ("a=b", "2:4"),
                          ("", "2:4")):  # fmt: skip
        with pytest.raises(ValueError, match="^name: found "):
            cuobs.register_pattern(name, pattern)
    assert cuobs.register_pattern("thirds", "2:3", replace=True).keep == 2


def test_layouts_are_shared_and_can_not_be_written_to():
    layout = parse("2:4").compile(2, 8)
    assert layout is parse("2:4").compile(2, 8)
    for array in (layout.row_order, layout.column_order, layout.blocks, layout.candidates,
                  layout.candidate_blocks):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
