"""Token windows from texts and from files."""

import json
import sys

import numpy as np
import pytest
from small_models import make_source

from cuobs.models import load_tokens, tokenize
from cuobs.models.checkpoints.loading import load_tokenizer


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


@pytest.mark.parametrize("known", [0, 4, 5])
def test_a_text_that_the_tokenizer_does_not_know(tokenizer, tmp_path, known):
    (tmp_path / "t.txt").write_text(" ".join(["w3"] * known + ["eine"] * (10 - known)))
    if known < 5:
        share = "100%" if known == 0 else "60%"
        with pytest.raises(ValueError, match=f"{share} of its tokens are <unk>, .*tokenizer"):
            tokenize(tmp_path / "t.txt", tokenizer, 10)
    else:
        assert (tokenize(tmp_path / "t.txt", tokenizer, 10) == 0).sum() == 5


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


def test_folders_of_texts(tokenizer, tmp_path):
    texts = tmp_path / "texts"
    (texts / "b").mkdir(parents=True)
    (texts / "a.txt").write_text("w3 w4 w5")
    (texts / "b" / "c.MD").write_text("w6 w7 w8")
    (texts / "z.rst").write_text("w9 w10")
    (texts / "model.py").write_text("w90")
    (texts / ".hidden.txt").write_text("w91")
    found = tokenize(texts, tokenizer, 4)
    np.testing.assert_array_equal(found, [[3, 4, 5, 9], [10, 6, 7, 8]])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: found no .txt"):
        tokenize(tmp_path / "none", tokenizer, 4)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return str(path)


def test_fields_of_lines_of_json(tokenizer, tmp_path):
    rows = [{"id": 1, "text": "w3 w4", "prose": "w13"}, {"text": "w5 w6", "prose": "w14", "id": 2}]
    path = lines(tmp_path / "a.jsonl", rows)
    np.testing.assert_array_equal(tokenize(path, tokenizer, 4), [[3, 4, 5, 6]])
    np.testing.assert_array_equal(tokenize(f"{path}:prose", tokenizer, 2), [[13, 14]])
    for spec, match in (
        (f"{path}:none", "found no field 'none' among id, text, prose"),
        (f"{path}:id", "found int in 'id' of row 1, expected a list of messages"),
        (lines(tmp_path / "b.jsonl", [{"x": "w3"}]), "none of the fields messages, conversations"),
        (lines(tmp_path / "c.jsonl", [{"text": "w3"}, {"text": None}]), "found NoneType in 'text'"),
        (lines(tmp_path / "d.jsonl", []), "found no rows"),
        (lines(tmp_path / "e.jsonl", [[1]]), "found no object in line 1"),
    ):
        with pytest.raises(ValueError, match=match):
            tokenize(spec, tokenizer, 2)


def test_conversations_by_the_chat_template(tokenizer, tmp_path):
    chats = [
        [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}],
        [{"role": "user", "content": "w6"}],
    ]
    path = lines(tmp_path / "a.jsonl", [{"text": "w90", "messages": chat} for chat in chats])
    with pytest.raises(ValueError, match="a.jsonl: found conversations, but .* no chat template"):
        tokenize(path, tokenizer, 2)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w80 ' if m.role == 'user' else 'w81 ' }}{{ m.content }} "
        "{% endfor %}"
    )
    expected = [[80, 3, 81, 4], [5, 80, 6, 0]]
    rows = lines(tmp_path / "b.jsonl", [{"messages": chat} for chat in [*chats, [
        {"role": "user", "content": "x"}]]])  # fmt: skip
    found = tokenize(rows, tokenizer, 4).ravel()
    np.testing.assert_array_equal(found[:7], np.ravel(expected)[:7])
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="chat template refuses .*no system"):
        tokenize(path, tokenizer, 4)


def test_data_sets_in_the_cache(tokenizer, monkeypatch):
    """The package is asked for what it has, and for nothing else."""
    constants = pytest.importorskip("huggingface_hub").constants
    asked = []

    class Config:
        HF_DATASETS_OFFLINE = False

    class Package:
        config = Config

        @staticmethod
        def load_dataset(name, config, split):
            asked.append((name, config, split))
            assert constants.HF_HUB_OFFLINE and Config.HF_DATASETS_OFFLINE
            if name == "me/none":
                raise ConnectionError("offline\nmore")
            return [{"text": "w3 w4"}, {"text": "w5"}]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "datasets", Package)
    np.testing.assert_array_equal(tokenize("dataset:me/a", tokenizer, 3), [[3, 4, 5]])
    tokenize("dataset:me/a,raw:test:text", tokenizer, 3)
    assert asked == [("me/a", None, "train"), ("me/a", "raw", "test")]
    assert not constants.HF_HUB_OFFLINE and not Config.HF_DATASETS_OFFLINE
    with pytest.raises(ValueError, match="no such data set in the cache .offline., expected one"):
        tokenize("dataset:me/none", tokenizer, 3)
    with pytest.raises(ValueError, match="found no field 'x'"):
        tokenize("dataset:me/a:train:x", tokenizer, 3)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        tokenize("dataset:me/a", tokenizer, 3)
