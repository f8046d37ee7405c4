"""Token windows from texts and from files."""

import numpy as np
import pytest
from small_models import make_source

from cuobs.models import load_tokens, tokenize
from cuobs.models.loading import load_tokenizer


@pytest.fixture
def tokenizer(source):
    return load_tokenizer(source)


def write(path, count):
    path.write_text(" ".join(f"w{i % 90 + 3}" for i in range(count)))
    return path


def test_windows_do_not_overlap_and_the_tail_is_dropped(tokenizer, tmp_path):
    windows = tokenize(write(tmp_path / "t.txt", 107), tokenizer, 10)
    np.testing.assert_array_equal(windows.ravel(), np.arange(100) % 90 + 3)
    assert windows.shape == (10, 10)


def test_draw_is_by_the_seed_and_in_order(tokenizer, tmp_path):
    path = write(tmp_path / "t.txt", 90)
    a = tokenize(path, tokenizer, 5, samples=6, seed=1)
    assert a.shape == (6, 5)
    np.testing.assert_array_equal(a, tokenize(path, tokenizer, 5, samples=6, seed=1))
    assert (a != tokenize(path, tokenizer, 5, samples=6, seed=2)).any()
    assert (np.diff(a[:, 0]) > 0).all()


def test_fewer_windows_than_samples(tokenizer, tmp_path):
    assert len(tokenize(write(tmp_path / "t.txt", 35), tokenizer, 10, samples=128)) == 3


def test_bad_texts(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="found 5 tokens, expected at least one window"):
        tokenize(write(tmp_path / "t.txt", 5), tokenizer, 10)
    with pytest.raises(FileNotFoundError, match="no such file"):
        tokenize(tmp_path / "none.txt", tokenizer, 10)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        tokenize(tmp_path / "b.txt", tokenizer, 10)


def test_no_tokenizer(tmp_path):
    source = make_source(tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="found no tokenizer"):
        load_tokenizer(source)


def test_tokens_from_the_front(tmp_path):
    array = np.arange(60, dtype=np.uint16).reshape(6, 10)
    np.savez(tmp_path / "t.npz", a=array, b=array + 1)
    found = load_tokens(f"{tmp_path / 't.npz'}:b", 4, 8)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, array[:4, :8] + 1)


def test_bad_tokens(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros((2, 3)))
    with pytest.raises(TypeError, match="float64, expected integers"):
        load_tokens(tmp_path / "f.npy")
    np.save(tmp_path / "v.npy", np.zeros(3, int))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        load_tokens(tmp_path / "v.npy")
    np.save(tmp_path / "s.npy", np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="windows of 3 tokens, expected at least 4"):
        load_tokens(tmp_path / "s.npy", length=4)
