"""The Hessian: pieces, files, parts, and what is refused."""

import tracemalloc
import warnings
from functools import partial

import numpy as np
import pytest

import cuobs
from cuobs import hessian

Hessian = partial(cuobs.Hessian, device="cpu")
load = partial(cuobs.Hessian.load, device="cpu")


def activations(tokens, K, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal((tokens, K)).astype(dtype)


def test_sum_of_pieces(xp):
    X = activations(50, 8)
    h = Hessian(8, dtype="float64", device="cpu" if xp is np else "cuda")
    for start in range(0, 50, 7):
        assert h.update(xp.asarray(X[start : start + 7])) is None
    assert type(h.matrix) is xp.ndarray
    matrix = h.matrix if xp is np else h.matrix.get()
    np.testing.assert_allclose(matrix, X.T @ X, rtol=0, atol=1e-12)
    assert (h.K, h.tokens, h.matrix.dtype) == (8, 50, np.float64)


def test_a_large_x_is_read_in_pieces(monkeypatch, tmp_path):
    """Memory-mapped, in pieces of three rows, the last one shorter; the result is symmetric."""
    monkeypatch.setattr(hessian, "PIECE", 3 * 8 * 8)
    X = activations(50, 8)
    np.save(tmp_path / "X.npy", X)
    seen = []
    h = Hessian(8, dtype="float64")
    h.update(np.load(tmp_path / "X.npy", mmap_mode="r"), progress=lambda *at: seen.append(at))
    np.testing.assert_allclose(h.matrix, X.T @ X, rtol=0, atol=1e-12)
    assert (h.matrix == h.matrix.T).all()
    assert seen == [(min(n, 50), 50) for n in range(3, 52, 3)]


def test_leading_dimensions():
    X = activations(24, 4)
    plain, batched = Hessian(4, dtype="float64"), Hessian(4, dtype="float64")
    plain.update(X)
    batched.update(X.reshape(2, 3, 4, 4))
    np.testing.assert_array_equal(plain.matrix, batched.matrix)
    assert plain.tokens == batched.tokens == 24


@pytest.mark.parametrize("held", ["float32", "float64"])
def test_half_precision_is_widened(xp, held):
    """A square of 300 does not fit float16, nor does its sum keep single ones beside it."""
    X = np.ones((101, 2), "float16")
    X[:100, 0] = 300
    h = Hessian(2, dtype=held, device="cpu" if xp is np else "cuda")
    h.update(xp.asarray(X))
    assert h.matrix.dtype == held
    assert h.matrix.tolist() == [[100 * 300**2 + 1, 100 * 300 + 1], [100 * 300 + 1, 101]]


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    X = activations(20, 4).astype(ml_dtypes.bfloat16)
    h = Hessian(4)
    h.update(X)
    wide = X.astype("float32")
    np.testing.assert_allclose(h.matrix, wide.T @ wide, rtol=1e-5)


def test_float32_by_default():
    h = Hessian(4)
    h.update(activations(5, 4))
    assert h.matrix.dtype == np.float32


def test_parts_add_up():
    X = activations(30, 4)
    whole, left, right = (Hessian(4, dtype="float64") for _ in range(3))
    whole.update(X)
    left.update(X[:10])
    right.update(X[10:])
    assert left.merge(right) is left
    np.testing.assert_allclose(left.matrix, whole.matrix, rtol=0, atol=1e-12)
    assert left.tokens == 30 and right.tokens == 20
    single = Hessian(4)
    single.update(X)
    single.merge(right)
    assert single.matrix.dtype == np.float32 and single.tokens == 50


def test_merge_refuses():
    h = Hessian(4)
    with pytest.raises(ValueError, match="K=5.*K=4"):
        h.merge(Hessian(5))
    with pytest.raises(TypeError, match="ndarray"):
        h.merge(np.eye(4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saved_and_loaded(tmp_path, dtype):
    h = Hessian(4, dtype=dtype)
    h.update(activations(30, 4))
    path = tmp_path / "H.npz"
    h.save(path)
    back = load(path)
    np.testing.assert_array_equal(back.matrix, h.matrix)
    assert (back.tokens, back.matrix.dtype) == (30, dtype)
    with pytest.raises(FileExistsError):
        h.save(path)
    h.update(activations(3, 4))
    h.save(path, force=True)
    assert load(path).tokens == 33
    assert [p.name for p in tmp_path.iterdir()] == ["H.npz"]


def test_loading_refuses(tmp_path):
    np.savez(tmp_path / "other.npz", weight=np.eye(4))
    with pytest.raises(ValueError, match="weight.*hessian"):
        load(tmp_path / "other.npz")
    np.savez(tmp_path / "bent.npz", hessian=np.triu(np.ones((4, 4))), tokens=3)
    with pytest.raises(ValueError, match="symmetric"):
        load(tmp_path / "bent.npz")
    np.savez(tmp_path / "flat.npz", hessian=np.ones((3, 4)), tokens=3)
    with pytest.raises(ValueError, match="hessian"):
        load(tmp_path / "flat.npz")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")


def test_broken_activations_change_nothing(monkeypatch):
    """How many, and where the first one is, even in a later piece."""
    monkeypatch.setattr(hessian, "PIECE", 8 * 4 * 4)
    for before in (0, 12):
        h = Hessian(4)
        if before:
            h.update(activations(before, 4))
        matrix = h.matrix.copy()
        X = activations(40, 4)
        X[21, 2] = np.nan
        X[22, 1] = np.inf
        with pytest.raises(ValueError, match=r"X: found 2 .*\(21, 2\)"):
            h.update(X)
        np.testing.assert_array_equal(h.matrix, matrix)
        assert h.tokens == before


def test_overflow_is_said():
    h = Hessian(2)
    with pytest.raises(ValueError, match="overflow"):
        h.update(np.full((3, 2), 1e30))
    assert h.tokens == 0 and not h.matrix.any()


class Failing:
    """A progress callback that raises after so many calls."""

    def __init__(self, error, calls):
        self.error, self.calls = error, calls

    def __call__(self, done, total):
        self.calls -= 1
        if self.calls < 0:
            raise self.error


@pytest.mark.parametrize("before", [0, 12])
@pytest.mark.parametrize("calls", [0, 2, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interrupted_update_changes_nothing(monkeypatch, error, calls, before):
    """After the first piece, in the middle, at the end; then all of it counts once."""
    monkeypatch.setattr(hessian, "PIECE", 8 * 4 * 8)
    h, X = Hessian(4, dtype="float64"), activations(before + 40, 4)
    if before:
        h.update(X[:before])
    held = h.matrix.copy()
    with pytest.raises(error):
        h.update(X[before:], progress=Failing(error, calls))
    np.testing.assert_array_equal(h.matrix, held)
    assert h.tokens == before
    h.update(X[before:])
    np.testing.assert_allclose(h.matrix, X.T @ X, rtol=0, atol=1e-12)
    assert h.tokens == len(X)


@pytest.mark.parametrize("form", [lambda X: X, lambda X: [X[:50], X[50:]]])
def test_the_first_update_holds_one_sum(form):
    """The sum itself and the product that is added to it; no zeros beside them."""
    K, size = 700, 700 * 700 * 8
    X = form(activations(100, K))
    tracemalloc.start()
    try:
        h = Hessian(K, dtype="float64")
        h.update(X)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size
        other = Hessian(K, dtype="float64").merge(h)
        assert tracemalloc.get_traced_memory()[0] < 2.5 * size
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(other.matrix, h.matrix)


def test_memory_that_runs_out_changes_nothing(monkeypatch):
    h, X = Hessian(4, dtype="float64"), activations(40, 4)
    h.update(X)
    held, product = h.matrix.copy(), hessian.add_gram
    monkeypatch.setattr(hessian, "PIECE", 8 * 4 * 8)
    left = [1, 1]

    def failing(piece, out, half):
        product(piece, out, half)
        left.pop() if left else (_ for _ in ()).throw(MemoryError())

    monkeypatch.setattr(hessian, "add_gram", failing)
    with pytest.raises(MemoryError):
        h.update(X)
    np.testing.assert_array_equal(h.matrix, held)
    assert h.tokens == 40


def test_sums_that_overflow_together_are_refused():
    """Each part is finite, their sum is not: it is said, and both stay as they are."""
    X = np.full((1, 2), 1.5e19, "float32")
    h, other = Hessian(2), Hessian(2)
    h.update(X)
    other.update(X)
    held = h.matrix.copy()
    with pytest.raises(ValueError, match="X: found values whose squares overflow float32"):
        h.update(X)
    with pytest.raises(ValueError, match="other: found a sum that overflows float32"):
        h.merge(other)
    wide = Hessian(2, dtype="float64")
    wide.update(np.full((1, 2), 1e30))
    with pytest.raises(ValueError, match="other: found a sum that overflows float32"):
        h.merge(wide)
    np.testing.assert_array_equal(h.matrix, held)
    assert h.tokens == other.tokens == wide.tokens == 1


def test_a_part_stays_as_it_is_when_the_other_goes_on():
    left, right = Hessian(4, dtype="float64"), Hessian(4, dtype="float64")
    right.update(activations(9, 4))
    held = right.matrix.copy()
    left.merge(right)
    left.update(activations(5, 4, seed=1))
    np.testing.assert_array_equal(right.matrix, held)
    left.merge(left)
    assert left.tokens == 28


def test_a_file_without_tokens(tmp_path):
    """What another program wrote: the sum counts, how many tokens it is of stays unknown."""
    X = activations(9, 4)
    np.savez(tmp_path / "H.npz", hessian=X.T @ X)
    h = load(tmp_path / "H.npz")
    assert h.tokens is None
    broken = X.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"X: found 1 .*\(3, 1\)"):
        h.update(broken)
    np.testing.assert_array_equal(h.matrix, X.T @ X)
    h.update(X)
    np.testing.assert_allclose(h.matrix, 2 * X.T @ X, rtol=1e-14)
    known = Hessian(4)
    known.update(X)
    assert h.tokens is None and known.merge(h).tokens is None
    known.save(tmp_path / "again.npz")
    assert load(tmp_path / "again.npz").tokens is None


@pytest.mark.parametrize("tokens", [-5, 2.5, np.nan, True, "nine", [1, 2], [], 1 + 2j])
def test_tokens_of_a_file_refused(tmp_path, tokens):
    np.savez(tmp_path / "H.npz", hessian=np.eye(4), tokens=tokens)
    with pytest.raises(ValueError, match="H.npz: tokens: found .*whole number"):
        load(tmp_path / "H.npz")


@pytest.mark.parametrize("X, error, words", [
    (np.ones((3, 5)), ValueError, "5 features.*K=4"),
    (np.ones(4), ValueError, "1 dimension"),
    (np.ones((0, 4)), ValueError, "at least one"),
    (np.ones((2, 0, 4)), ValueError, "at least one"),
    (np.ones((3, 4), int), TypeError, "int64"),
    (np.ones((3, 4), complex), TypeError, "complex128"),
    (np.ones((3, 4), bool), TypeError, "bool"),
    ("X.npy", TypeError, "str"),
    (None, TypeError, "NoneType"),
    ({"input_ids": np.ones((3, 4))}, TypeError, "dict"),
    ({1.0, 2.0}, TypeError, "set"),
    (b"1234", TypeError, "bytes"),
    (np.ma.masked_greater(np.ones((3, 4)), 0), ValueError, "12 masked"),
])
def test_activations_refused(X, error, words):
    h = Hessian(4)
    with pytest.raises(error, match=words) as raised:
        h.update(X)
    assert str(raised.value).startswith("X: found")
    assert h.tokens == 0


@pytest.mark.parametrize("K", [0, -3, 2.0, None, True])
def test_sizes_refused(K):
    with pytest.raises(ValueError, match="K: found"):
        Hessian(K)


def test_dtype_refused():
    with pytest.raises(ValueError, match="float16.*float32"):
        Hessian(4, dtype="float16")


# Batches


def parts_of(X):
    """X in batches of unequal length, some with leading dimensions."""
    return [X[:7], X[7:8], X[8:20].reshape(3, 4, -1), X[20:]]


FORMS = {
    "list": list, "tuple": tuple, "generator": iter,
    "map": lambda parts: map(lambda part: part[:], parts),
    "as a hook gives them": lambda parts: [(part,) for part in parts],
    "as a data set gives them": lambda parts: ([part] for part in parts),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
def test_batches_are_the_array_in_parts(xp, monkeypatch, form, rows):
    """The same bits: they are put together in pieces of the same size."""
    monkeypatch.setattr(hessian, "PIECE", rows * 4 * 8)
    monkeypatch.setattr(hessian, "COPIED_PIECE", rows * 4 * 8)
    monkeypatch.setattr(hessian, "RESIDENT_PIECE", rows * 4 * 8)
    X = activations(40, 4)
    device = "cpu" if xp is np else "cuda"
    whole, parts = (cuobs.Hessian(4, dtype="float64", device=device) for _ in range(2))
    whole.update(xp.asarray(X))
    parts.update(form([xp.asarray(part) for part in parts_of(X)]))
    assert (whole.matrix == parts.matrix).all() and parts.tokens == 40


def test_batches_of_a_list_report_how_far_they_are(monkeypatch):
    monkeypatch.setattr(hessian, "PIECE", 16 * 4 * 8)
    seen, X = [], activations(40, 4)
    h = Hessian(4, dtype="float64")
    h.update(parts_of(X), progress=lambda *at: seen.append(at))
    assert seen == [(16, 40), (32, 40), (40, 40)]
    h.update(iter(parts_of(X)), progress=lambda *at: seen.append(at))
    assert len(seen) == 3 and h.tokens == 80


@pytest.mark.parametrize("form", [list, iter])
@pytest.mark.parametrize("wrong, error, words", [
    (np.ones((2, 5)), ValueError, r"X\[4\]: found 5 features"),
    (np.ones((2, 4), int), TypeError, r"X\[4\]: found dtype int64"),
    (np.ones((0, 4)), ValueError, r"X\[4\]: found shape \(0, 4\)"),
    (np.full((2, 4), np.nan), ValueError, r"X: found 8 elements .* first at \(40, 0\)"),
    (np.full((2, 4), 1e200), ValueError, "X: found values whose squares overflow float64"),
])
def test_a_wrong_batch_changes_nothing(form, wrong, error, words):
    h, X = Hessian(4, dtype="float64"), activations(40, 4)
    h.update(X)
    held = h.matrix.copy()
    with pytest.raises(error, match=words):
        h.update(form([*parts_of(X), wrong]))
    np.testing.assert_array_equal(h.matrix, held)
    assert h.tokens == 40


def test_what_a_generator_raises_changes_nothing():
    h, X = Hessian(4), activations(40, 4)

    def failing():
        yield X
        raise KeyError("the data set's own")

    with pytest.raises(KeyError):
        h.update(failing())
    assert h.tokens == 0 and not h.matrix.any()


def test_no_batches():
    for empty in (iter([]), map(np.ones, [])):
        with pytest.raises(ValueError, match="X: found no batches, expected at least one"):
            Hessian(4).update(empty)
    with pytest.raises(ValueError, match="X: found 1 dimension"):
        Hessian(4).update([])


@pytest.mark.parametrize("batch", [{"ids": np.ones((2, 4))}, "text", [np.ones((2, 4))] * 2, 3.0])
def test_batches_that_are_none(batch):
    with pytest.raises((TypeError, ValueError), match=r"X\[1\]: found "):
        Hessian(4).update(iter([np.ones((2, 4)), batch]))


def test_a_list_of_rows_is_one_array():
    X = activations(10, 4)
    rows, whole = Hessian(4, dtype="float64"), Hessian(4, dtype="float64")
    rows.update(list(X))
    whole.update(X)
    rows.update(X.tolist())
    np.testing.assert_array_equal(rows.matrix, 2 * whole.matrix)


@pytest.mark.parametrize("tokens, rows, words", [
    (20, 8, ["20 tokens for 32 columns"]), (20, 24, ["swapped", "20 tokens for 32 columns"]),
    (40, 44, ["found 40 rows and W 44, both of 32 columns; where they are swapped"]), (40, 40, []),
])
def test_few_tokens_are_warned_of_once(tokens, rows, words):
    """At the line that called, whichever function it was."""
    W, X = activations(rows, 32), activations(tokens, 32)
    h = Hessian(32, dtype="float64")
    h.update(X)
    for call in (
        lambda **data: cuobs.prune(W, method="wanda", device="cpu", **data),
        lambda **data: cuobs.compare(W, methods=["wanda", "magnitude"], device="cpu", **data),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(X=X)
        assert len(caught) == len(words)
        for warning, said in zip(caught, words, strict=True):
            assert said in str(warning.message) and warning.filename == __file__
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(hessian=h)
        assert [str(w.message).partition(",")[0] for w in caught] == (
            ["hessian: found 20 tokens for 32 columns"] if tokens == 20 else []
        )


def test_swapped_arrays_are_told_before_the_work():
    W, X = activations(44, 32), activations(40, 32)

    def progress(done, total):
        raise KeyboardInterrupt

    for data in (X, [X[:20], X[20:]]):
        with pytest.warns(UserWarning, match="swapped"), pytest.raises(KeyboardInterrupt):
            cuobs.prune(W, data, device="cpu", progress=progress)


@pytest.mark.parametrize("call", [cuobs.prune, cuobs.compare])
@pytest.mark.parametrize("W, X, said", [
    ((8, 32), (32, 96), r"X: found shape \(32, 96\), expected \(tokens, 32\) for W of 8 x 32"),
    ((32, 8), (96, 32), r"W: found shape \(32, 8\), expected \(outputs, 32\) for X of 32 feat"),
    ((32, 8), (3, 5, 32), r"W: found shape \(32, 8\)"),
    ((8, 32), (96, 31), r"X: found 31 features, expected K=32"),
])  # fmt: skip
def test_what_lies_on_its_side_is_named(call, W, X, said):
    with pytest.raises(ValueError, match=said):
        call(np.ones(W), np.ones(X), device="cpu")


def test_the_tokens_are_told():
    W, X = activations(8, 4), activations(20, 4)
    h = Hessian(4)
    h.update(X)
    for data, tokens in (
        ({"X": X}, 20), ({"X": iter([X, X])}, 40),
        ({"hessian": h}, 20), ({"hessian": X.T @ X}, None),
    ):
        assert cuobs.prune(W, **data, device="cpu", method="wanda").tokens == tokens
