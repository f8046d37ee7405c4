import os
import pickle
import stat
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cuobs import files

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def W():
    return np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)


def listing():
    return sorted(os.listdir("."))


def unwritable_folder():
    if os.geteuid() == 0:
        return "/proc"  # the one folder in which root can't make a file either
    os.mkdir("locked")
    os.chmod("locked", 0o555)
    return "locked"


@pytest.mark.parametrize("dtype", FLOATS + [np.bool_])
@pytest.mark.parametrize("spec", ["a.npy", "a.npz", "a.npz:file", "a.safetensors:layers.0:w"])
def test_what_is_saved_is_loaded_bit_for_bit(spec, dtype, W):
    W = W.astype(dtype)
    if np.dtype(dtype).name == "bfloat16" and "safetensors" not in spec:
        with pytest.raises(ValueError, match=r"a.np.: found bfloat16 .* \.safetensors"):
            files.save(spec, W)
        assert listing() == []
        return
    files.save(spec, W)
    for mmap in (True, False):
        back = files.load(spec, mmap)
        assert back.dtype == W.dtype and back.shape == W.shape
        assert back.tobytes() == W.tobytes()
        assert isinstance(back, np.memmap) is mmap


def test_other_programs_files_are_read(W):
    np.save("f.npy", np.asfortranarray(W))
    np.savez("s.npz", first=W[:2], other=W)
    np.savez_compressed("c.npz", first=W[:2], other=W)
    safetensors.numpy.save_file({"x": W[:2].copy(), "y": W}, "t.safetensors")
    for spec in ("f.npy", "s.npz:other", "c.npz:other", "t.safetensors:y"):
        np.testing.assert_array_equal(files.load(spec), W)


def test_our_files_are_read_by_other_programs(W):
    files.save("a.npy", W)
    files.save("a.npz:w", W)
    files.save("a.safetensors:w", W[:, ::2])
    np.testing.assert_array_equal(np.load("a.npy"), W)
    assert list(np.load("a.npz")) == ["w"]
    np.testing.assert_array_equal(np.load("a.npz")["w"], W)
    (item,) = safetensors.numpy.load_file("a.safetensors").items()
    assert item[0] == "w"
    np.testing.assert_array_equal(item[1], W[:, ::2])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_by_name(suffix, W):
    content = {"hessian": W, "tokens": np.int64(7)}
    files.save_arrays("h" + suffix, content)
    back = files.load_arrays("h" + suffix)
    assert list(back) == list(content)
    np.testing.assert_array_equal(back["hessian"], W)
    assert int(back["tokens"]) == 7
    with pytest.raises(ValueError, match="expected .npz or .safetensors"):
        files.save_arrays("h.npy", content)


@pytest.mark.parametrize("name", ["a.npy", "s.npz", "c.npz", "a.safetensors"])
def test_a_file_cut_anywhere_is_refused_by_name(name, W):
    if name == "c.npz":
        np.savez_compressed(name, weight=W)
    else:
        files.save(name, W)
    whole = open(name, "rb").read()
    for length in range(len(whole)):
        with open(name, "wb") as f:
            f.write(whole[:length])
        with pytest.raises(ValueError, match=f"^{name}.*: found ") as caught:
            files.load(name)
        assert "\n" not in str(caught.value)


def test_damaged_compressed_data_is_refused(W):
    np.savez_compressed("c.npz", weight=W)
    data = bytearray(open("c.npz", "rb").read())
    data[100:140] = bytes(40)
    open("c.npz", "wb").write(data)
    with pytest.raises(ValueError, match="^c.npz:weight: found damaged data"):
        files.load("c.npz")


def test_nothing_is_unpickled():
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("sprung",)

    with open("raw.npy", "wb") as f:
        pickle.dump(Trap(), f)
    np.save("object.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez("object.npz", a=np.array([Trap()], dtype=object))
    np.savez_compressed("packed.npz", a=np.array([Trap()], dtype=object))
    for name in ("raw.npy", "object.npy", "object.npz", "packed.npz"):
        with pytest.raises(ValueError, match=f"^{name}.*: found .*pickle"):
            files.load(name)
    assert "sprung" not in listing()


def test_an_array_has_to_be_named_among_several(W):
    np.savez("a.npz", up_proj=W, down_proj=W)
    np.savez("none.npz")
    with pytest.raises(ValueError, match=r"found 2 arrays \(up_proj, down_proj\).*a.npz:NAME"):
        files.load("a.npz")
    with pytest.raises(ValueError, match=r"no array 'down' among 2 \(nearest: down_proj\)"):
        files.load("a.npz:down")
    with pytest.raises(ValueError, match="found no arrays"):
        files.load("none.npz")


def test_what_is_no_array_file_is_refused(W):
    os.mkdir("folder.npy")
    with pytest.raises(FileNotFoundError, match=r"^W\.npy: no such file"):
        files.load("W.npy")
    with pytest.raises(OSError, match=r"^folder\.npy: found something that is not a file"):
        files.load("folder.npy")
    with pytest.raises(ValueError, match=r"^W\.pt: found '\.pt', expected \.npy, \.npz or"):
        files.load("W.pt")
    with pytest.raises(ValueError, match=r"^W: found no ending, expected \.npy"):
        files.save("W", W)
    assert listing() == ["folder.npy"]


def test_unknown_safetensors_dtype_is_refused():
    header = b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    with open("f8.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(TypeError, match="f8.safetensors:w: found dtype F8_E4M3"):
        files.load("f8.safetensors")


def test_without_the_extra_it_is_said_what_to_install(monkeypatch, W):
    files.save("a.safetensors", W)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    message = r"pip install 'cuobs\[safetensors\]'"
    with pytest.raises(ImportError, match=message):
        files.load("a.safetensors")
    with pytest.raises(ImportError, match=message):
        files.check_format("b.safetensors", W.dtype)


def test_output_is_checked_before_work(W):
    files.save("old.npy", W)
    os.mkdir("folder")
    locked = unwritable_folder()
    for path, error, message in [
        ("old.npy", FileExistsError, "existing file, expected a new path or force"),
        ("missing/a.npy", FileNotFoundError, "found no folder missing"),
        ("old.npy/a.npy", NotADirectoryError, "old.npy is not a folder"),
        ("folder", OSError, "not a file"),
        (f"{locked}/a.npy", OSError, "can't be written"),
    ]:
        with pytest.raises(error, match=f"^{path}: .*{message}"):
            files.check_output(path)
    with pytest.raises(OSError, match="not a file"):
        files.check_output(os.devnull, force=True)  # a rename would replace the device
    files.check_output("old.npy", force=True)
    files.check_output("new.npz:key")
    assert set(listing()) - {"locked"} == {"folder", "old.npy"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
def test_whatever_interrupts_writing_leaves_the_old_file_alone(error):
    files.write_text("report", "old")
    with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
        with files.replacing("report", force=True) as f:
            f.write(b"half of the ne")
            f.flush()
            raise error
    if isinstance(error, OSError):
        assert str(caught.value) == "report: found that it can't be written (No space left)"
    assert listing() == ["report"]
    assert open("report").read() == "old"


def test_the_file_is_absent_until_it_is_whole():
    with files.replacing("a") as f:
        f.write(b"x")
        assert not os.path.exists("a")
    assert open("a").read() == "x" and listing() == ["a"]


def test_a_file_that_appears_meanwhile_is_not_overwritten():
    with pytest.raises(FileExistsError, match="^a: found a file that appeared meanwhile"):
        with files.replacing("a") as f:
            f.write(b"ours")
            open("a", "w").write("theirs")
    assert open("a").read() == "theirs" and listing() == ["a"]


def test_force_replaces_the_file_and_not_the_link_to_it():
    files.write_text("target", "old")
    os.symlink("target", "link")
    files.write_text("link", "new", force=True)
    assert os.path.islink("link") and open("target").read() == "new"


def test_a_new_file_has_the_permissions_of_any_new_file(W):
    open("plain", "w").close()
    files.save("a.npy", W)
    assert stat.S_IMODE(os.stat("a.npy").st_mode) == stat.S_IMODE(os.stat("plain").st_mode)


def test_a_mapped_weight_can_be_overwritten_by_its_own_result(W):
    files.save("W.npy", W)
    mapped = files.load("W.npy")
    files.save("W.npy", np.zeros_like(W), force=True)
    np.testing.assert_array_equal(mapped, W)
    assert not files.load("W.npy").any()
