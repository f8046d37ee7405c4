import io
import os
import pickle
import resource
import stat
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    with pytest.raises(FileNotFoundError, match=r"^W\.npy: found no such file, expected \.npy"):
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
    message = r"pip install '\.\[safetensors\]'"
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


# One array of a file of several


def several(name, W):
    """A file of odd arrays beside W, and what it holds."""
    content = {
        "flags": np.array([True, False, True]),
        "layers.0.up": W,
        "half": W[:3].astype(np.float16),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 4), np.float32),
    }
    if name.endswith(".npz"):
        np.savez_compressed(name, **content)
    else:
        content["short"] = W[:1].astype(ml_dtypes.bfloat16)
        safetensors.numpy.save_file(content, name, {"format": "pt", "note": "keep \u00fc"})
    return content


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize("key, value", [
    ("layers.0.up", np.full((6, 8), 3, np.float32)), ("layers.0.up", np.ones((3, 5), np.float64)),
    ("flags", np.ones(7, bool)), ("new", np.full((2, 2), 7, np.float16)),
    ("half", np.asfortranarray(np.arange(12, dtype=">f4").reshape(3, 4))),
])  # fmt: skip
def test_a_key_names_the_one_array_that_is_replaced(name, key, value, W):
    content = several(name, W)
    before = open(name, "rb").read()
    with pytest.raises(FileExistsError):
        files.save(f"{name}:{key}", value)
    assert open(name, "rb").read() == before
    files.save(f"{name}:{key}", value, force=True)
    back = dict(np.load(name)) if name.endswith(".npz") else safetensors.numpy.load_file(name)
    assert set(back) == {*content, key}
    for each, expected in {**content, key: value}.items():
        assert back[each].shape == np.shape(expected)
        assert back[each].dtype.newbyteorder("=") == np.asarray(expected).dtype.newbyteorder("=")
        np.testing.assert_array_equal(back[each], expected)
        np.testing.assert_array_equal(files.load(f"{name}:{each}"), expected)
    if name.endswith(".safetensors"):
        with safetensors.safe_open(name, "numpy") as f:
            assert f.metadata() == {"format": "pt", "note": "keep \u00fc"}
    assert listing() == [name]


def test_tensors_of_unknown_dtypes_are_kept():
    """float8, and elements of half a byte: only their bytes are copied."""
    header = (
        b'{"a":{"dtype":"F8_E4M3","shape":[5],"data_offsets":[0,5]},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[5,13]}}'
    )
    with open("a.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header + bytes([1, 2, 3, 4, 5]) + bytes(8))
    files.save("a.safetensors:w", np.full(3, 1.5, np.float32), force=True)
    data = open("a.safetensors", "rb").read()
    assert data.endswith(np.full(3, 1.5, "<f4").tobytes() + bytes([1, 2, 3, 4, 5]))
    assert (len(data) - 17) % 8 == 0 and b"F8_E4M3" in data
    np.testing.assert_array_equal(files.load("a.safetensors:w"), [1.5] * 3)


def test_a_large_file_is_copied_in_pieces(monkeypatch, W):
    from cuobs import containers

    several("a.safetensors", W)
    several("a.npz", W)
    monkeypatch.setattr(containers, "PIECE", 7)
    for name in ("a.safetensors", "a.npz"):
        files.save(f"{name}:half", W, force=True)
        np.testing.assert_array_equal(files.load(f"{name}:layers.0.up"), W)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_without_a_key_a_file_of_several_is_not_replaced(name, W):
    several(name, W)
    before = open(name, "rb").read()
    with pytest.raises(FileExistsError, match=f"^{name}: found . arrays in it, .*{name}:NAME"):
        files.save(name, W, force=True)
    assert open(name, "rb").read() == before
    files.save("one" + name, W)
    files.save("one" + name, 2 * W, force=True)
    np.testing.assert_array_equal(files.load("one" + name), 2 * W)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_what_interrupts_a_replacement_leaves_all_of_it(name, W, monkeypatch):
    from cuobs import containers

    several(name, W)
    before = open(name, "rb").read()
    where = "_write_member" if name.endswith(".npz") else "_write_entries"

    def failing(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(containers, where, failing)
    with pytest.raises(KeyboardInterrupt):
        files.save(f"{name}:half", W, force=True)
    assert open(name, "rb").read() == before and listing() == [name]


def test_a_damaged_file_is_not_written_again(W):
    several("a.npz", W)
    data = bytearray(open("a.npz", "rb").read())
    data[60:80] = bytes(20)
    open("a.npz", "wb").write(data)
    with pytest.raises(ValueError, match="^a.npz: found "):
        files.save("a.npz:half", W, force=True)
    assert open("a.npz", "rb").read() == data and listing() == ["a.npz"]


def test_the_name_that_safetensors_keeps_for_itself(W):
    for save in (files.save, files.check_format):
        with pytest.raises(ValueError, match="^a.safetensors: found the name __metadata__"):
            save("a.safetensors:__metadata__", W if save is files.save else W.dtype)
    with pytest.raises(ValueError, match="__metadata__"):
        files.save_arrays("a.safetensors", {"__metadata__": W})
    assert listing() == []


# Damage


def npy(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def test_a_stored_member_shorter_than_its_header_says(W):
    with zipfile.ZipFile("short.npz", "w") as archive:
        archive.writestr("w.npy", npy(W)[:-100])
        archive.writestr("other.npy", npy(W))
    with pytest.raises(ValueError, match=r"^short.npz:w: found \d+ bytes of data \(truncated\)"):
        files.load("short.npz:w")
    np.testing.assert_array_equal(files.load("short.npz:other"), W)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_found_by_its_checksum(save, W):
    W = np.tile(W, (30, 3))
    save("a.npz", w=W)
    data = bytearray(open("a.npz", "rb").read())
    data[len(data) // 2] ^= 0x40
    open("a.npz", "wb").write(data)
    with pytest.raises(ValueError, match="^a.npz:w: found damaged data"):
        files.load("a.npz")


@pytest.mark.parametrize("header", [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-6, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (6, -8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 8), ",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (6L, '''",
    "  {'descr'\n'<f4'\n   'x", "[" * 900, "-" * 3000, "{'descr': '<q9'}", "0xZ", "\0", "",
    "{'descr': {1}, 'fortran_order': False, 'shape': (6, 8)}",
    "{'descr': ('<f4', 10**99), 'fortran_order': False, 'shape': (6, 8)}",
])
def test_damaged_headers(header):
    text = header.encode().ljust(118) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4 * 48)
    open("a.npy", "wb").write(data)
    with zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", data)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=f"^{name}.*: found a broken or truncated .npy header"):
            files.load(name)


@pytest.mark.parametrize("place, value, words", [
    (8, 99, "can't be unpacked"), (6, 1, "can't be unpacked.*encrypted"), (8, 14, "damaged|can't"),
])
def test_members_packed_in_ways_that_are_not_known(place, value, words, W):
    """The method and the flags of a member, in its own header and in the directory."""
    np.savez("a.npz", w=W)
    data = bytearray(open("a.npz", "rb").read())
    data[place] = value
    data[data.index(b"PK\x01\x02") + place + 2] = value
    open("a.npz", "wb").write(data)
    with pytest.raises(ValueError, match=f"^a.npz:w: found .*({words})") as caught:
        files.load("a.npz")
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.npy", "s.npz", "c.npz", "a.safetensors"]),
       damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_anywhere(name, damage, W):
    """A value or one sentence, whatever the bytes are; in an archive never a wrong value."""
    if name == "c.npz":
        np.savez_compressed(name, weight=W)
    else:
        files.save(name, W, force=True)
    data = bytearray(open(name, "rb").read())
    for place, flip in damage:
        data[int(place * len(data))] ^= flip
    open(name, "wb").write(data)
    try:
        array = files.load(name)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(name) and "\n" not in str(error)
    else:
        if name.endswith(".npz") and array.shape == W.shape and array.dtype == W.dtype:
            np.testing.assert_array_equal(array, W)


@pytest.mark.parametrize("spec", ["a.npy", "a.npz", "a.safetensors", "old.npz:w",
                                  "old.safetensors:w"])
def test_a_full_disk_is_named_with_its_reason(spec):
    W = np.zeros((600, 700))
    if spec.startswith("old"):
        files.save(spec.replace(":w", ":other"), np.zeros(3))
    before = listing()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            files.save(spec, W, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = spec.partition(":")[0]
    assert str(caught.value) == f"{path}: found that it can't be written (File too large)"
    assert listing() == before
