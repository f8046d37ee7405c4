"""The Hessian: pieces, files, parts, and what is refused."""

import numpy as np
import pytest

import cuobs
from cuobs import hessian


def activations(tokens, K, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal((tokens, K)).astype(dtype)


def test_sum_of_pieces(xp):
    X = activations(50, 8)
    h = cuobs.Hessian(8, dtype="float64", device="cpu" if xp is np else "cuda")
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
    h = cuobs.Hessian(8, dtype="float64")
    h.update(np.load(tmp_path / "X.npy", mmap_mode="r"), progress=lambda *at: seen.append(at))
    np.testing.assert_allclose(h.matrix, X.T @ X, rtol=0, atol=1e-12)
    assert (h.matrix == h.matrix.T).all()
    assert seen == [(min(n, 50), 50) for n in range(3, 52, 3)]


def test_leading_dimensions():
    X = activations(24, 4)
    plain, batched = cuobs.Hessian(4, dtype="float64"), cuobs.Hessian(4, dtype="float64")
    plain.update(X)
    batched.update(X.reshape(2, 3, 4, 4))
    np.testing.assert_array_equal(plain.matrix, batched.matrix)
    assert plain.tokens == batched.tokens == 24


@pytest.mark.parametrize("held", ["float32", "float64"])
def test_half_precision_is_widened(xp, held):
    """A square of 300 does not fit float16, nor does its sum keep single ones beside it."""
    X = np.ones((101, 2), "float16")
    X[:100, 0] = 300
    h = cuobs.Hessian(2, dtype=held, device="cpu" if xp is np else "cuda")
    h.update(xp.asarray(X))
    assert h.matrix.dtype == held
    assert h.matrix.tolist() == [[100 * 300**2 + 1, 100 * 300 + 1], [100 * 300 + 1, 101]]


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    X = activations(20, 4).astype(ml_dtypes.bfloat16)
    h = cuobs.Hessian(4)
    h.update(X)
    wide = X.astype("float32")
    np.testing.assert_allclose(h.matrix, wide.T @ wide, rtol=1e-5)


def test_float32_by_default():
    h = cuobs.Hessian(4)
    h.update(activations(5, 4))
    assert h.matrix.dtype == np.float32


def test_parts_add_up():
    X = activations(30, 4)
    whole, left, right = (cuobs.Hessian(4, dtype="float64") for _ in range(3))
    whole.update(X)
    left.update(X[:10])
    right.update(X[10:])
    assert left.merge(right) is left
    np.testing.assert_allclose(left.matrix, whole.matrix, rtol=0, atol=1e-12)
    assert left.tokens == 30 and right.tokens == 20
    single = cuobs.Hessian(4)
    single.update(X)
    single.merge(right)
    assert single.matrix.dtype == np.float32 and single.tokens == 50


def test_merge_refuses():
    h = cuobs.Hessian(4)
    with pytest.raises(ValueError, match="K=5.*K=4"):
        h.merge(cuobs.Hessian(5))
    with pytest.raises(TypeError, match="ndarray"):
        h.merge(np.eye(4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saved_and_loaded(tmp_path, dtype):
    h = cuobs.Hessian(4, dtype=dtype)
    h.update(activations(30, 4))
    path = tmp_path / "H.npz"
    h.save(path)
    back = cuobs.Hessian.load(path)
    np.testing.assert_array_equal(back.matrix, h.matrix)
    assert (back.tokens, back.matrix.dtype) == (30, dtype)
    with pytest.raises(FileExistsError):
        h.save(path)
    h.update(activations(3, 4))
    h.save(path, force=True)
    assert cuobs.Hessian.load(path).tokens == 33
    assert [p.name for p in tmp_path.iterdir()] == ["H.npz"]


def test_loading_refuses(tmp_path):
    np.savez(tmp_path / "other.npz", weight=np.eye(4))
    with pytest.raises(ValueError, match="weight.*hessian"):
        cuobs.Hessian.load(tmp_path / "other.npz")
    np.savez(tmp_path / "bent.npz", hessian=np.triu(np.ones((4, 4))), tokens=3)
    with pytest.raises(ValueError, match="symmetric"):
        cuobs.Hessian.load(tmp_path / "bent.npz")
    np.savez(tmp_path / "flat.npz", hessian=np.ones((3, 4)), tokens=3)
    with pytest.raises(ValueError, match="hessian"):
        cuobs.Hessian.load(tmp_path / "flat.npz")
    with pytest.raises(FileNotFoundError):
        cuobs.Hessian.load(tmp_path / "none.npz")


def test_broken_activations_change_nothing(monkeypatch):
    """How many, and where the first one is, even in a later piece."""
    monkeypatch.setattr(hessian, "PIECE", 8 * 4 * 4)
    for before in (0, 12):
        h = cuobs.Hessian(4)
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
    h = cuobs.Hessian(2)
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
    h, X = cuobs.Hessian(4, dtype="float64"), activations(before + 40, 4)
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


def test_memory_that_runs_out_changes_nothing(monkeypatch):
    h, X = cuobs.Hessian(4, dtype="float64"), activations(40, 4)
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
    h, other = cuobs.Hessian(2), cuobs.Hessian(2)
    h.update(X)
    other.update(X)
    held = h.matrix.copy()
    with pytest.raises(ValueError, match="X: found values whose squares overflow float32"):
        h.update(X)
    with pytest.raises(ValueError, match="other: found a sum that overflows float32"):
        h.merge(other)
    wide = cuobs.Hessian(2, dtype="float64")
    wide.update(np.full((1, 2), 1e30))
    with pytest.raises(ValueError, match="other: found a sum that overflows float32"):
        h.merge(wide)
    np.testing.assert_array_equal(h.matrix, held)
    assert h.tokens == other.tokens == wide.tokens == 1


def test_a_part_stays_as_it_is_when_the_other_goes_on():
    left, right = cuobs.Hessian(4, dtype="float64"), cuobs.Hessian(4, dtype="float64")
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
    h = cuobs.Hessian.load(tmp_path / "H.npz")
    assert h.tokens is None
    broken = X.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"X: found 1 .*\(3, 1\)"):
        h.update(broken)
    np.testing.assert_array_equal(h.matrix, X.T @ X)
    h.update(X)
    np.testing.assert_allclose(h.matrix, 2 * X.T @ X, rtol=1e-14)
    known = cuobs.Hessian(4)
    known.update(X)
    assert h.tokens is None and known.merge(h).tokens is None
    known.save(tmp_path / "again.npz")
    assert cuobs.Hessian.load(tmp_path / "again.npz").tokens is None


@pytest.mark.parametrize("tokens", [-5, 2.5, np.nan, True, "nine", [1, 2], [], 1 + 2j])
def test_tokens_of_a_file_refused(tmp_path, tokens):
    np.savez(tmp_path / "H.npz", hessian=np.eye(4), tokens=tokens)
    with pytest.raises(ValueError, match="H.npz: tokens: found .*whole number"):
        cuobs.Hessian.load(tmp_path / "H.npz")


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
])
def test_activations_refused(X, error, words):
    h = cuobs.Hessian(4)
    with pytest.raises(error, match=words) as raised:
        h.update(X)
    assert str(raised.value).startswith("X: found")
    assert h.tokens == 0


@pytest.mark.parametrize("K", [0, -3, 2.0, None, True])
def test_sizes_refused(K):
    with pytest.raises(ValueError, match="K: found"):
        cuobs.Hessian(K)


def test_dtype_refused():
    with pytest.raises(ValueError, match="float16.*float32"):
        cuobs.Hessian(4, dtype="float16")
