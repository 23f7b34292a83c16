"""Foreign files: what PyTorch wrote is read exactly, and written again with those numbers changed and nothing else."""

import json
import os
import pathlib
import struct
import tempfile
import zipfile

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from drep_jax.errors import CheckpointError
from drep_jax.weights import files
from tests.weights import pickles

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
MARK = {"rule": "ddim", "sites": ["a", "b"]}
BFLOAT = ml_dtypes.bfloat16


def numbers(*shape, dtype=np.float32):
    """The values of fixtures/make.py."""
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) / 8 - 2).astype(dtype)


FLAT = {
    "float": numbers(2, 3),
    "half": numbers(5, dtype=np.float16),
    "bfloat": numbers(2, 2, dtype=BFLOAT),
    "double": numbers(3, dtype=np.float64),
    "count": np.array(7),
    "mask": np.array([True, False, True]),
    "tied": numbers(3, 4),
    "tied_too": numbers(3, 4),
    "transposed": numbers(3, 2).T,
    "part": numbers(24)[4:12].reshape(2, 4),
    "other_part": numbers(24)[16:20],
    "parameter": numbers(2),
    "empty": np.zeros((0, 3), np.float32),
}
TENSORS = {name: FLAT[name] for name in ("float", "half", "double", "count", "transposed", "empty")}
SUFFIXES = (".pth", ".safetensors", ".npz")


def same(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape
    assert np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def same_all(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        same(found[name], array)


def a_file(suffix, folder, tensors=TENSORS):
    """A file of every kind, made by others where they are at hand."""
    path = str(folder / f"weights{suffix}")
    if suffix == ".npz":
        np.savez(path, **tensors)
    elif suffix == ".npz compressed":
        path = str(folder / "compressed.npz")
        np.savez_compressed(path, **tensors)
    elif suffix == ".safetensors":
        safetensors.numpy.save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, path, {"format": "pt"})
    elif suffix in ("zip", "legacy"):
        path = str(FIXTURES / f"flat_{suffix}.pth")
    return path


KINDS = ("zip", "legacy", ".safetensors", ".npz", ".npz compressed")


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_what_pytorch_wrote_is_read_exactly(kind):
    found = files.read(str(FIXTURES / f"flat_{kind}.pth"))
    assert found.kind == f"pth ({kind})" and found.fused is None
    same_all(found.tensors, FLAT)
    assert found.stored == {name: name for name in FLAT}
    assert all(array.flags.aligned and not array.flags.writeable for array in found.tensors.values())
    assert any("bfloat16 (4 numbers), float16 (5 numbers), float32" in line for line in found.notes)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_training_checkpoint(kind):
    path = str(FIXTURES / f"wrapped_{kind}.pth")
    found = files.read(path)
    same_all(found.tensors, {"fc.weight": -numbers(2, 2, dtype=np.float16), "fc.bias": -numbers(2, dtype=np.float16)})
    assert found.stored["fc.bias"] == "model_ema/module.fc.bias"
    assert found.notes == (
        'state under "model_ema" (also there: "model")',
        'tensors beside it: "optimizer"',
        'prefix "module." taken off',
        "1 entries that are no tensors ignored",
        "float16 weights",
    )
    same(files.read(path, state="model").tensors["fc.bias"], numbers(2, dtype=np.float16))
    step = files.read(path, state="[0]").tensors
    same(step["exp_avg"], np.full((2, 2), 0.1, np.float32))
    with pytest.raises(CheckpointError, match=r'has no state "modl". Did you mean "model"'):
        files.read(path, state="modl")


def test_big_endian():
    found = files.read(str(FIXTURES / "big_endian.pth"))
    same_all(found.tensors, {"a": numbers(2, 3), "b": numbers(3, 2).T})


@pytest.mark.parametrize("dtype", [np.int64, np.float16, BFLOAT])
def test_other_big_endian_numbers(dtype, tmp_path):
    kind = {np.int64: "LongStorage", np.float16: "HalfStorage", BFLOAT: "BFloat16Storage"}[dtype]
    values = np.arange(-3, 3).reshape(2, 3).astype(dtype)
    size = values.dtype.itemsize
    data = b"".join(values.tobytes()[i : i + size][::-1] for i in range(0, values.nbytes, size))
    program = pickles.state(pickles.tensor(kind=kind))
    source = files.read(pickles.zip_file(tmp_path / "big.pth", program, (("0", data),), b"big"))
    same(source.tensors["a"], values)
    files.write_changed(source, str(tmp_path / "out.pth"), {"a": values * 2}, MARK)
    same(files.read(str(tmp_path / "out.pth")).tensors["a"], (values * 2).astype(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_file_again(kind, tmp_path):
    path, target = a_file(kind, tmp_path), tmp_path / f"out{pathlib.Path(a_file(kind, tmp_path)).suffix}"
    source = files.read(path)
    before = pathlib.Path(path).read_bytes()
    files.write_changed(source, str(target), {}, MARK)
    again = files.read(str(target))
    same_all(again.tensors, source.tensors)
    assert (again.kind, again.stored, again.fused) == (source.kind, source.stored, MARK)
    assert pathlib.Path(path).read_bytes() == before and not os.path.exists(f"{target}.tmp")
    files.write_changed(again, str(tmp_path / f"third{target.suffix}"), {}, {"rule": "other"})  # a mark is replaced
    third = files.read(str(tmp_path / f"third{target.suffix}"))
    same_all(third.tensors, source.tensors)
    assert third.fused == {"rule": "other"}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_changed_changes(kind, tmp_path):
    source = files.read(a_file(kind, tmp_path))
    target = str(tmp_path / f"out{pathlib.Path(source.path).suffix}")
    changed = {"half": np.linspace(-1, 1, 5), "float": np.full((2, 3), 1 / 3), "transposed": numbers(2, 3) * 3}
    changed["count"] = np.int64(11)
    files.write_changed(source, target, changed, MARK)
    found = files.read(target)
    expected = {name: changed.get(name, array).astype(array.dtype) for name, array in source.tensors.items()}
    same_all(found.tensors, expected)
    assert not np.array_equal(found.tensors["float"], source.tensors["float"]) and found.fused == MARK


def records_of(path):
    """{name: (bytes, offset of the data, compression)} of a zip archive, its checksums verified."""
    raw = pathlib.Path(path).read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        found = {}
        for info in archive.infolist():
            lengths = struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30])
            found[info.filename] = (archive.read(info), info.header_offset + 30 + sum(lengths), info.compress_type)
        return found


def test_records_of_an_archive_keep_their_bytes_and_places(tmp_path):
    source = files.read(str(FIXTURES / "wrapped_zip.pth"), state="model")
    target = tmp_path / "out.pth"
    files.write_changed(source, str(target), {"fc.bias": np.float64([5, 6])}, MARK)
    old, new = records_of(source.path), records_of(target)
    mark = new.pop("wrapped_zip/drep_jax.json")
    assert json.loads(mark[0]) == {"fused": MARK} and list(old) == list(new)
    differing = [name for name in old if old[name] != new[name]]
    assert len(differing) == 1 and new[differing[0]][0] == np.float16([5, 6]).tobytes()
    assert new[differing[0]][1] == old[differing[0]][1] and new[differing[0]][1] % 64 == 0
    # The checksum is right in the directory, verified above, and where PyTorch writes it, behind the data.
    end = new[differing[0]][1] + 4
    assert target.read_bytes()[end : end + 8] == b"PK\x07\x08" + struct.pack("<I", zipfile.crc32(np.float16([5, 6])))


def test_a_legacy_file_differs_in_the_changed_bytes_only(tmp_path):
    source = files.read(str(FIXTURES / "wrapped_legacy.pth"), state="model")
    files.write_changed(source, str(tmp_path / "out.pth"), {"fc.bias": np.float64([5, 6])}, MARK)
    old, new = pathlib.Path(source.path).read_bytes(), (tmp_path / "out.pth").read_bytes()
    at = new.index(np.float16([5, 6]).tobytes())
    assert (
        new[:at] == old[:at] and new[at + 4 : len(old)] == old[at + 4 :] and json.dumps({"fused": MARK}).encode() in new
    )


def test_safetensors_keep_their_order_and_metadata(tmp_path):
    source = files.read(a_file(".safetensors", tmp_path))
    files.write_changed(source, str(tmp_path / "out.safetensors"), {"float": np.zeros((2, 3))}, MARK)

    def header(path):
        raw = pathlib.Path(path).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert length % 8 == 0
        return json.loads(raw[8 : 8 + length])

    old, new = header(source.path), header(tmp_path / "out.safetensors")
    assert json.loads(new["__metadata__"].pop("drep_jax")) == {"fused": MARK}
    assert list(new.items()) == list(old.items()) and old["__metadata__"] == {"format": "pt"}
    loaded = safetensors.numpy.load_file(str(tmp_path / "out.safetensors"))
    assert not loaded["float"].any() and loaded["half"].tobytes() == FLAT["half"].tobytes()


@pytest.mark.parametrize("kind", [".npz", ".npz compressed"])
def test_npz_members_stay_as_they_were(kind, tmp_path):
    tensors = {**TENSORS, "big": numbers(3).astype(">f4"), "objects": np.array([None, "a"]), "b/c": numbers(2)}
    source = files.read(a_file(kind, tmp_path, tensors))
    assert "objects" not in source.tensors and "1 entries that are no tensors ignored" in source.notes
    same(source.tensors["big"], numbers(3))
    files.write_changed(source, str(tmp_path / "out.npz"), {"big": numbers(3) + 1, "transposed": np.ones((2, 3))}, MARK)
    old, new = records_of(source.path), records_of(tmp_path / "out.npz")
    assert list(old) == list(new)
    for name in old:
        assert (old[name][0] == new[name][0]) == (name not in ("big.npy", "transposed.npy")), name
        assert old[name][2] == new[name][2]
    with np.load(tmp_path / "out.npz") as loaded:
        assert loaded["big"].dtype == ">f4" and np.array_equal(loaded["big"], numbers(3) + 1)
        assert loaded["transposed"].flags.f_contiguous and (loaded["transposed"] == 1).all()


def test_npz_of_bfloat16(tmp_path):
    np.savez(tmp_path / "a.npz", w=numbers(2, 2, dtype=BFLOAT))
    found = files.read(str(tmp_path / "a.npz"))
    same(found.tensors["w"], numbers(2, 2, dtype=BFLOAT))
    assert any("taken for bfloat16" in line for line in found.notes)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pt", ".bin", ".th"])
def test_new_files(suffix, tmp_path):
    path = str(tmp_path / f"new{suffix}")
    tensors = {**TENSORS, "scalar": np.float32(3.5), "mask": FLAT["mask"]}
    if suffix != ".npz":
        tensors["bfloat"] = FLAT["bfloat"]
    files.create(path, tensors, MARK)
    found = files.read(path)
    assert found.fused == MARK and found.kind == {".safetensors": "safetensors", ".npz": "npz"}.get(suffix, "pth (zip)")
    assert found.tensors.keys() == tensors.keys() and os.listdir(tmp_path) == [f"new{suffix}"]
    for name, array in tensors.items():
        same(found.tensors[name], np.asarray(array))
    if suffix == ".safetensors":
        loaded = safetensors.numpy.load_file(path)
        assert all(np.array_equal(loaded[name], array) for name, array in tensors.items())
    elif suffix == ".npz":
        with np.load(path) as loaded:
            assert loaded.files == list(tensors) and np.array_equal(loaded["transposed"], FLAT["transposed"])
    else:
        places = records_of(path)
        assert all(place % 64 == 0 for name, (_, place, _) in places.items() if "/data/" in name)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
class TestTied:
    def write(self, kind, tmp_path, changed):
        source = files.read(str(FIXTURES / f"flat_{kind}.pth"))
        files.write_changed(source, str(tmp_path / "out.pth"), changed, MARK)
        return files.read(str(tmp_path / "out.pth")).tensors

    def test_both_or_none(self, kind, tmp_path):
        ones = np.ones((3, 4))
        found = self.write(kind, tmp_path, {"tied": ones, "tied_too": ones})
        same_all(found, {**FLAT, "tied": np.float32(ones), "tied_too": np.float32(ones)})
        with pytest.raises(CheckpointError, match=r'"tied_too" shares its numbers with "tied".*Change all of them'):
            self.write(kind, tmp_path, {"tied": ones * 2})
        with pytest.raises(CheckpointError, match=r'"tied", "tied_too" share numbers.*differ'):
            self.write(kind, tmp_path, {"tied": ones, "tied_too": ones * 2})
        assert os.listdir(tmp_path) == ["out.pth"]

    def test_no_change_is_no_conflict(self, kind, tmp_path):
        same_all(self.write(kind, tmp_path, {"tied": FLAT["tied"]}), FLAT)

    def test_parts_of_one_storage_are_apart(self, kind, tmp_path):
        same_all(self.write(kind, tmp_path, {"part": np.ones((2, 4))}), {**FLAT, "part": np.ones((2, 4), np.float32)})


def test_tensors_of_another_entry_are_not_changed_by_the_way(tmp_path):
    """Two entries of a wrapper, and an object that is not looked into, on one storage."""
    one = pickles.tensor()
    for rest in (
        b"U\x05other}U\x01w" + one + b"su.",
        b"U\x04args" + pickles.name("argparse", "Namespace") + one + b"\x85Ru.",
    ):
        path = pickles.zip_file(tmp_path / "two.pth", b"\x80\x02}(U\x05model}U\x01w" + one + b"s" + rest)
        source = files.read(path)
        assert list(source.tensors) == ["w"]
        with pytest.raises(CheckpointError, match=r'("other/w"|an object .*) shares its numbers with "model/w"'):
            files.write_changed(source, str(tmp_path / "out.pth"), {"w": np.ones((2, 3))}, MARK)
        assert not os.path.exists(tmp_path / "out.pth")


BAD = {
    "unknown": ({"flaot": np.zeros((2, 3))}, 'no tensor "flaot". Did you mean "float"'),
    "shape": ({"float": np.zeros((3, 2))}, r'"float" has shape \(2, 3\) in .*, not \(3, 2\)'),
    "integers for floats": ({"float": np.zeros((2, 3), int)}, '"float" is float32 in .*; int64 would not be'),
    "floats for integers": ({"count": np.float32(1)}, '"count" is int64 in .*; float32 would not be'),
    "too large": (
        {"half": np.float32([0, 0, 1e6, 0, np.nan])},
        r'"half" is float16 .* too large for that \(up to 1e\+06\)',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_changes_that_cannot_be(case, tmp_path):
    changed, message = BAD[case]
    source = files.read(str(FIXTURES / "flat_zip.pth"))
    with pytest.raises(CheckpointError, match=message):
        files.write_changed(source, str(tmp_path / "out.pth"), changed, MARK)
    assert not os.listdir(tmp_path)


def test_paths_that_cannot_be(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    files.create(str(path), TENSORS, {})
    before = path.read_bytes()
    source = files.read(str(path))
    (tmp_path / "link.pth").symlink_to(path)
    os.link(path, tmp_path / "hard.pth.tmp")
    for target in ("a.pth", "link.pth", "hard.pth"):
        with pytest.raises(CheckpointError, match=r"choose another name"):
            files.write_changed(source, str(tmp_path / target), {}, MARK)
    with pytest.raises(CheckpointError, match=r"would be a pth \(zip\) file"):
        files.write_changed(source, str(tmp_path / "b.safetensors"), {}, MARK)
    with pytest.raises(CheckpointError, match=r"Cannot write .*No such file"):
        files.write_changed(source, str(tmp_path / "none" / "b.pth"), {}, MARK)
    with pytest.raises(CheckpointError, match=r"Cannot write .*No such file"):
        files.create(str(tmp_path / "none" / "b.pth"), TENSORS, MARK)
    with pytest.raises(CheckpointError, match=r"suffix of a new file must be one of \.safetensors"):
        files.create(str(tmp_path / "b.ckpt"), TENSORS, MARK)
    with pytest.raises(CheckpointError, match=r"no tensors"):
        files.create(str(tmp_path / "b.pth"), {}, MARK)
    for suffix in SUFFIXES:
        with pytest.raises(CheckpointError, match=r'"a" is '):
            files.create(str(tmp_path / f"b{suffix}"), {"a": np.array(["text"])}, MARK)
    with pytest.raises(CheckpointError, match=r"cannot hold"):
        files.create(str(tmp_path / "b.npz"), {"a": FLAT["bfloat"]}, MARK)
    with pytest.raises(CheckpointError, match=r"room for 65535"):
        files.create(str(tmp_path / "b.npz"), TENSORS, {"much": "x" * 70_000})
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.pth", "hard.pth.tmp", "link.pth"]


def test_an_old_file_stays_if_writing_fails(tmp_path, monkeypatch):
    source = files.read(str(FIXTURES / "flat_zip.pth"))
    target = tmp_path / "out.pth"
    target.write_text("old")

    def wrong(contents, path, blocks, mark):
        files.torch_file.rewrite_zip(contents, path, (), mark)

    monkeypatch.setitem(files.REWRITE, "pth (zip)", wrong)
    with pytest.raises(CheckpointError, match=r'"float" in .*out.pth.tmp did not come back as it was written'):
        files.write_changed(source, str(target), {"float": np.zeros((2, 3))}, MARK)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["out.pth"]


def test_a_file_that_was_replaced_meanwhile(tmp_path):
    path = str(tmp_path / "a.pth")
    files.create(path, TENSORS, {})
    source = files.read(path)
    files.create(path, {**TENSORS, "float": numbers(2, 3) + 1}, {})
    with pytest.raises(CheckpointError, match=r"did not come back|changed since"):
        files.write_changed(source, str(tmp_path / "b.pth"), {}, MARK)
    files.create(path, {"other": numbers(2)}, {})
    with pytest.raises(CheckpointError, match=r"has changed since it was read"):
        files.write_changed(source, str(tmp_path / "b.pth"), {}, MARK)
    same(source.tensors["float"], numbers(2, 3))


UNKNOWN = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "page": (b"<!DOCTYPE html>", "web page"),
    "tar": (bytes(257) + b"ustar", r"tar archive, as PyTorch before 0\.1\.10"),
    "npy": (b"\x93NUMPY\x01\x00", "a single .npy array"),
    "pickle": (b"\x80\x04}.", "a plain pickle"),
    "hdf5": (b"\x89HDF\r\n", "an HDF5 file"),
    "noise": (b"abcdefghij", "begins with b'abcdefgh'"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_files_are_named(kind, tmp_path):
    data, message = UNKNOWN[kind]
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=rf"{message}.*Known kinds: safetensors, pth \(zip\), pth \(legacy\), npz"
    ):
        files.read(str(path))


def test_what_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(CheckpointError, match=f"Cannot read the weights {path}"):
            files.read(str(path))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("text", "text")
    with pytest.raises(CheckpointError, match=r"a zip archive without data.pkl or .npy"):
        files.read(str(tmp_path / "a.zip"))


@pytest.mark.parametrize("kind", KINDS)
def test_incomplete_files(kind, tmp_path):
    whole = pathlib.Path(a_file(kind, tmp_path)).read_bytes()
    for length in {len(whole) * i // 40 for i in range(1, 40)} | {len(whole) - 1, len(whole) - 30}:
        path = tmp_path / "cut.bin"
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut.bin.*(incomplete|damaged|bytes|begins)"):
            files.read(str(path))
    (tmp_path / "cut.bin").write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=str(len(whole) - 5)):
        files.read(str(tmp_path / "cut.bin"))


def safetensors_file(path, header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


def entry(first=0, last=24, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


HEADERS = {
    "no JSON": (b"{ab}", "no JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no JSON"),
    "a name twice": (b'{"a":{},"a":{}}', "a name twice"),
    "no entry": ({"a": 1}, '"a" lacks'),
    "text offsets": ({"a": {"dtype": "F32", "shape": [6], "data_offsets": ["0", "24"]}}, '"a" lacks'),
    "true as a size": ({"a": {"dtype": "F32", "shape": [6, True], "data_offsets": [0, 24]}}, '"a" lacks'),
    "unknown dtype": ({"a": entry(dtype="F4")}, "dtype 'F4'; known: F64"),
    "other size": ({"a": entry(shape=(2, 2))}, "has 24 bytes for shape"),
    "too large": ({"a": entry(shape=(2, 4))}, "does not lie within"),
    "beyond the end": ({"a": entry(0, 96, (24,))}, 'incomplete: "a" ends at byte'),
    "negative": ({"a": entry(-24, 0)}, '"a" lacks'),
    "overlap": ({"a": entry(), "b": entry()}, "overlap or leave gaps"),
    "gap": ({"a": entry(4, 24, (5,))}, "overlap or leave gaps"),
    "rest": ({"a": entry(0, 20, (5,))}, "its tensors end at byte"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, "metadata are no texts"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_safetensors_that_cannot_be(case, tmp_path):
    header, message = HEADERS[case]
    with pytest.raises(CheckpointError, match=message):
        files.read(safetensors_file(tmp_path / "a.safetensors", header))


def npz_file(path, header, data=bytes(24), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        text = header.encode()
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return str(path)


NPY = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n"
NPY_HEADERS = {
    "shape": (NPY.replace("(2, 3)", "(2, 4)"), "does not lie within"),
    "short": (NPY.replace("(2, 3)", "(2, 2)"), "has 24 bytes for shape"),
    "negative": (NPY.replace("(2, 3)", "(-2, 3)"), "none of NumPy's"),
    "huge": (NPY.replace("(2, 3)", f"({10**17}, 0)"), "does not lie within"),
    "code": (NPY.replace("(2, 3)", "(__import__('os').system('touch FLAG'), 3)"), "none of NumPy's"),
    "no order": (NPY.replace("False", "None"), "none of NumPy's"),
    "nothing": ("", "none of NumPy's"),
    "objects": (NPY.replace("<f4", "|O"), "holds no tensors"),
    "fields": (NPY.replace("'<f4'", "[('a', '<f4')]"), "holds no tensors"),
}


@pytest.mark.parametrize("case", NPY_HEADERS)
def test_npy_headers_that_cannot_be(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, message = NPY_HEADERS[case]
    with pytest.raises(CheckpointError, match=message):
        files.read(npz_file(tmp_path / "a.npz", header))
    assert not os.path.exists("FLAG")


def test_npz_files_that_expand_too_much(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(300 * 2**20))
    with pytest.raises(CheckpointError, match=r"would expand to 314572800: refused"):
        files.read(str(tmp_path / "bomb.npz"))
    raw = bytearray(pathlib.Path(npz_file(tmp_path / "lie.npz", NPY, compression=zipfile.ZIP_DEFLATED)).read_bytes())
    size = struct.pack("<I", len(NPY) + 34)
    raw[raw.rindex(size) : raw.rindex(size) + 4] = struct.pack("<I", 20)  # the directory says less than there is
    (tmp_path / "lie.npz").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"length or checksum"):
        files.read(str(tmp_path / "lie.npz"))


def test_checksums_are_compared(tmp_path):
    raw = bytearray((FIXTURES / "flat_zip.pth").read_bytes())
    raw[raw.index(FLAT["double"].tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"a.pth is damaged: the checksum of its block"):
        files.read(str(tmp_path / "a.pth"))


def test_a_mark_that_is_damaged(tmp_path):
    path = safetensors_file(tmp_path / "a.safetensors", {"__metadata__": {"drep_jax": "{"}, "a": entry()})
    with pytest.raises(CheckpointError, match=r"mark of this project that is no JSON"):
        files.read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind):
    """Whatever bytes change: tensors, or a CheckpointError, and never anything else."""
    with tempfile.TemporaryDirectory() as folder:
        marked = os.path.join(
            folder, f"marked{'.npz' if kind.startswith('.npz') else kind if kind[0] == '.' else '.pth'}"
        )
        files.write_changed(files.read(a_file(kind, pathlib.Path(folder))), marked, {}, MARK)
        whole = pathlib.Path(marked).read_bytes()
        path = pathlib.Path(folder, "fuzzed")
        # Where a file says what it is, rather than in the numbers: its texts, or its first and last thousand bytes.
        places = st.integers(0, len(whole) - 1) | st.integers(0, min(600, len(whole) - 1))

        @hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
        @hypothesis.given(
            st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4), st.integers(-40, 40)
        )
        def fuzz(flips, cut):
            data = bytearray(whole)
            for place, value in flips:
                data[place] = value
            path.write_bytes(data[: len(data) + cut] if cut < 0 else data + bytes(cut // 8))
            try:
                found = files.read(str(path))
            except CheckpointError as error:
                assert "fuzzed" in str(error)
            else:
                assert found.tensors and all(isinstance(array.sum(), np.generic) for array in found.tensors.values())

        fuzz()
