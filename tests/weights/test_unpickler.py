"""Pickles in PyTorch files: nothing of them runs, whatever they ask for, and no tensor leaves its storage."""

import argparse
import collections
import copyreg
import datetime
import operator
import os
import pathlib
import pickle
import sys
import time
import zipfile

import numpy as np
import pytest

from drep_jax.errors import CheckpointError
from drep_jax.weights import files
from tests.weights import pickles
from tests.weights.pickles import name, state, tensor


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture(params=["zip", "legacy"])
def wrap(request, tmp_path):
    """Puts a pickle into a file of either kind."""

    def made(program):
        return {"zip": pickles.zip_file, "legacy": pickles.legacy_file}[request.param](tmp_path / "evil.pth", program)

    return made


TOUCH = "touch FLAG"
WRITE = "open('FLAG', 'w').close()"
CALLS = {
    "os.system": lambda: Calls(os.system, TOUCH),
    "eval": lambda: Calls(eval, WRITE),
    "exec": lambda: Calls(exec, WRITE),
    "getattr": lambda: Calls(getattr, Calls(__import__, "os"), "system"),
    "getattr of an inert object": lambda: Calls(getattr, argparse.Namespace(), "__class__"),
    "open": lambda: Calls(open, "FLAG", "w"),
    "attrgetter": lambda: Calls(operator.attrgetter("system"), Calls(__import__, "os")),
    "methodcaller": lambda: Calls(operator.methodcaller("touch"), pathlib.Path("FLAG")),
    "_reconstructor": lambda: Calls(copyreg._reconstructor, argparse.Namespace, object, None),
    "Path.touch": lambda: Calls(pathlib.Path.touch, pathlib.Path("FLAG")),
    "runstring": lambda: Calls(np.testing.runstring, WRITE, {}),
    "np.load": lambda: Calls(np.load, "FLAG"),
    "f2py": lambda: Calls(np.memmap, "FLAG", "uint8", "w+", 0, 1),
    "inside an honest one": lambda: collections.OrderedDict(a=argparse.Namespace(b=[Calls(os.system, TOUCH)])),
    "as an argument": lambda: Calls(set, [Calls(os.system, TOUCH)]),
    "partial": lambda: Calls(__import__("functools").partial(os.system, TOUCH)),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("attack", CALLS)
def test_no_call_is_made(attack, protocol, wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps({"a": CALLS[attack]()}, protocol)
    with pytest.raises(CheckpointError, match=r"nothing was run|is damaged"):
        files.read(wrap(program))
    assert not os.path.exists("FLAG")


def test_the_refused_name_is_told(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Calls(os.system, TOUCH)))
    assert os.path.exists("FLAG"), "elsewhere the attack works"
    with pytest.raises(
        CheckpointError, match=r"evil.pth wants (posix|nt).system: refused; nothing was run.*state_dict\(\)"
    ):
        files.read(wrap(pickle.dumps({"a": Calls(os.system, TOUCH)}, 2)))


MODULES = {
    "GLOBAL": b"\x80\x02cthis\ns\n.",
    "GLOBAL of an attribute": b"\x80\x02ctorch\nserialization.os.system\n.",
    "STACK_GLOBAL of an attribute": b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93.",
    "an attribute of a known module": b"\x80\x04\x8c\x08argparse\x8c\x0f_sys.modules.os\x93.",
    "dunder of a known class": b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__init__\x93.",
    "any function of torch": b"\x80\x02ctorch\nload\n(U\x04FLAGtR.",
    "torch.utils": b"\x80\x02ctorch.utils.data\ndill\n.",
    "numpy's own loader": b"\x80\x02cnumpy\nload\n(U\x04FLAGtR.",
    "INST": b"\x80\x02(U\x0atouch FLAGios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nU\x0atouch FLAGo.",
    "EXT1": b"\x80\x02\x82\x01)R.",
    "EXT2": b"\x80\x02\x83\x01\x00)R.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00)R.",
    "PERSID": b"\x80\x02Pos.system\n.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "a persistent reference to something else": b"\x80\x02(U\x06moduleU\x01aU\x01bU\x01cU\x01dtQ.",
    "a storage of a class": b"\x80\x02(U\x07storage" + name("argparse", "Namespace") + b"U\x010U\x03cpuK\x06tQ.",
    "a call of an instance": b"\x80\x02" + name("argparse", "Namespace") + b")R)R.",
    "a call of a text": b"\x80\x02U\x02os)R.",
    "a call with a list": b"\x80\x02" + name("argparse", "Namespace") + b"]R.",
    "state for a name": b"\x80\x02" + name("argparse", "Namespace") + b"}b.",
    "state for a function": b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + b"N}\x86b.",
    "a function as a class": b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + b")\x81.",
    "a tensor of another function": b"\x80\x02" + name("torch._tensor", "_rebuild_from_type_v2")
    + b"(" + name("argparse", "Namespace") + name("torch", "Tensor") + b")NtR.",
    "a text in place of a storage": b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + b"(U\x01aK\x00)))tR.",
    "items for a text": b"\x80\x02U\x01aNNs.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a missing value": b"\x80\x02R.",
    "a missing mark": b"\x80\x02t.",
    "a value never stored": b"\x80\x02h\x05.",
    "no end": b"\x80\x02}",
    "a text longer than the file": b"\x80\x02\x8d" + b"\xff" * 7 + b"\x00a.",
    "bytes longer than the file": b"\x80\x02\x8e" + b"\xff" * 7 + b"\x00a.",
    "a negative length": b"\x80\x02T\xff\xff\xff\xffa.",
    "a huge integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a text that is no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a name without an end": b"\x80\x02c" + b"a" * 5000,
    "another protocol": b"\x80\x09N.",
}  # fmt: skip


@pytest.mark.parametrize("attack", MODULES)
def test_nothing_is_imported_or_made(attack, wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("this", None)
    before = set(sys.modules)
    with pytest.raises(CheckpointError, match=r"evil.pth"):
        files.read(wrap(MODULES[attack]))
    assert set(sys.modules) == before and not os.path.exists("FLAG")


class CfgNode(dict):
    """As projects copy it from yacs."""


def test_what_scripts_save_beside_their_weights_is_passed_over(tmp_path):
    cfg = CfgNode(a=CfgNode(b=1))
    cfg.frozen = True
    args = argparse.Namespace(
        where=pathlib.PurePosixPath("/x"), when=datetime.date(2020, 1, 1), some={1, 2}, few=frozenset([1])
    )
    extras = [args, cfg, np.float64(3), np.arange(4), np.dtype("f4"), collections.defaultdict(list), 1 << 70, 2.5, b"b"]
    extras += [collections.Counter("ab"), slice(1, 2), range(3), complex(1, 2), {("a", 1): 2}, [None, True, False]]
    for protocol in (2, 3, 4, 5):
        program = pickle.dumps(extras, protocol)
        start = 2 if protocol < 4 else 11
        both = b"\x80\x02}(U\x01a" + tensor() + b"U\x04rest" + program[start:-1] + b"u."
        found = files.read(pickles.zip_file(tmp_path / "a.pth", both))
        assert found.tensors["a"].shape == (2, 3) and "1 entries that are no tensors ignored" not in found.notes


def test_objects_take_any_state_and_run_none_of_it(wrap):
    program = (
        b"\x80\x02" + name("argparse", "Namespace") + b")\x81}(U\x0c__setstate__" + name("builtins", "set") + b"ub."
    )
    with pytest.raises(CheckpointError, match=r"holds no tensors|nothing uses"):
        files.read(wrap(program))
    program = (
        b"\x80\x02"
        + name("yacs.config", "CfgNode")
        + b")\x81(U\x01aK\x01u(K\x01e}b("
        + name("os.path", "Config")
        + b"}tR."
    )
    with pytest.raises(CheckpointError, match="is damaged: a call"):
        files.read(wrap(program))
    found = files.read(wrap(state(tensor(), after=b"}U\x09_metadataNsb")))
    assert list(found.tensors) == ["a"]


VIEWS = {
    "beyond the end": dict(shape=(2, 3), strides=(4, 1)),
    "from beyond the end": dict(shape=(1,), strides=(1,), offset=6),
    "before the start": dict(shape=(1,), strides=(1,), offset=-1),
    "negative stride": dict(shape=(2,), strides=(-1,), offset=3),
    "negative shape": dict(shape=(-2, -3)),
    "huge shape": dict(shape=(2**62, 2**62), strides=(0, 0)),
    "product that overflows": dict(shape=(2**32, 2**32), strides=(0, 0)),
    "huge shape of nothing": dict(shape=(2**62, 0), strides=(0, 0)),
    "huge stride": dict(shape=(2, 1), strides=(2**62, 1)),
    "huge offset": dict(offset=2**62),
    "repeated without bound": dict(shape=(2**30,), strides=(0,)),
    "too few strides": dict(strides=(1,)),
    "too many dimensions": dict(shape=(1,) * 70, strides=(1,) * 70),
    "storage of another size": dict(size=7),
    "storage of negative size": dict(size=-6),
    "storage of another type": dict(kind="DoubleStorage"),
    "storage of no type": dict(kind="Size"),
    "storage that is not there": dict(key="1"),
    "key that is a path": dict(key="../x"),
    "part beyond its storage": dict(view=b"(U\x01vK\x04K\x06t"),
    "view beyond its part": dict(view=b"(U\x01vK\x02K\x04t"),
    "part that is none": dict(view=b"(U\x01vNNt"),
}


@pytest.mark.parametrize("attack", VIEWS)
def test_no_tensor_reaches_beyond_its_storage(attack, wrap):
    with pytest.raises(CheckpointError, match=r"evil.pth"):
        files.read(wrap(state(tensor(**VIEWS[attack]))))


def test_views_within_a_storage_are_right(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    storages = (("0", 4, numbers.tobytes()),)
    part = tensor(shape=(2,), strides=(2,), offset=1, view=b"(U\x01vK\x02K\x04t")
    repeated = tensor(shape=(2, 3), strides=(0, 1), offset=2)
    path = pickles.legacy_file(tmp_path / "views.pth", state(tensor(), part, repeated), storages)
    found = files.read(path).tensors
    np.testing.assert_array_equal(found["a"], numbers.reshape(2, 3))
    np.testing.assert_array_equal(found["b"], numbers[[3, 5]])
    np.testing.assert_array_equal(found["c"], [[2, 3, 4], [2, 3, 4]])
    with pytest.raises(CheckpointError, match="changes to them differ"):
        source = files.read(path)
        files.write_changed(source, str(tmp_path / "out.pth"), {"c": np.arange(6.0).reshape(2, 3)}, {})


def nested_tuples(depth):
    return b"\x80\x02)" + b"2\x86" * depth + b"."


def nested_lists(depth):
    return b"\x80\x02]" + b"".join(b"q\x00](h\x00h\x00e" for _ in range(depth)) + b"."


BOMBS = {
    "a key that takes for ever to hash": b"\x80\x02}" + nested_tuples(200)[2:-1] + b"Ns.",
    "a name that takes for ever to print": b"\x80\x02}U\x01a" + nested_tuples(200)[2:-1] + b"s.",
    "lists in lists": nested_lists(60),
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a huge place in the memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "deep marks": b"\x80\x02" + b"(" * 100_000,
}


@pytest.mark.parametrize("attack", BOMBS)
def test_small_files_stay_small(attack, wrap):
    path = wrap(BOMBS[attack])
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"evil.pth"):
        files.read(path)
    assert time.process_time() - start < 5


def test_lists_of_storages_are_checked(tmp_path):
    path = tmp_path / "evil.pth"
    for storages in (
        (),
        (("1", 4, bytes(24)),),
        (("0", 4, bytes(24)),) * 2,
        (("0", 4, bytes(20)),),
        (("0", 8, bytes(24)),),
    ):
        with pytest.raises(CheckpointError, match=r"evil.pth is (damaged|incomplete)"):
            files.read(pickles.legacy_file(path, state(tensor()), storages))
    nested = nested_tuples(200)
    for keys in (nested, b"\x80\x02]" + nested[2:-1] + b"a.", b"\x80\x02K\x01."):
        path.write_bytes(pickles.LEGACY_START + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + state(tensor()) + keys)
        with pytest.raises(CheckpointError, match=r"evil.pth is damaged"):
            files.read(str(path))


def test_compressed_storages_are_refused(tmp_path):
    path = pickles.zip_file(tmp_path / "bomb.pth", state(tensor()), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="'a/data/0' is compressed or encrypted"):
        files.read(path)


def test_other_zip_archives_in_the_same_dress_are_refused(tmp_path):
    path = pickles.zip_file(tmp_path / "a.pth", state(tensor()), order=b"middle")
    with pytest.raises(CheckpointError, match="byte order"):
        files.read(path)
    path = pickles.zip_file(tmp_path / "script.pth", state(tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        files.read(path)
    path = pickles.zip_file(tmp_path / "double.pth", state(tensor()))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(24))
    with pytest.raises(CheckpointError, match="two records"):
        files.read(path)


def test_python_2_is_read(tmp_path):
    """Its pickles have byte texts and its own names of builtins."""
    program = b"\x80\x02}(U\x05fc\xe9.w" + tensor() + b"U\x01s" + name("__builtin__", "set") + b"]\x85Ru."
    assert list(files.read(pickles.zip_file(tmp_path / "a.pth", program)).tensors) == ["fcé.w"]


def test_the_history_beside_the_weights_of_a_training_file_is_passed_over(wrap):
    """mmengine's, which is data and methods of its own class by name; no other class gives an attribute."""
    owner = name("mmengine.logging.history_buffer", "HistoryBuffer")
    least = name("__builtin__", "getattr") + owner + b"U\x03min\x86R"
    history = owner + b")R}(U\x03min" + least + b"U\x05stepsK\x05ub"
    program = b"\x80\x02}(U\x0astate_dict}U\x01a" + tensor() + b"sU\x0bmessage_hub" + history + b"u."
    read = files.read(wrap(program))
    assert list(read.tensors) == ["a"] and read.tensors["a"].shape == (2, 3)
    other = program.replace(least, name("__builtin__", "getattr") + name("torch", "Tensor") + b"U\x03min\x86R")
    with pytest.raises(CheckpointError, match=r"wants builtins.getattr: refused; nothing was run"):
        files.read(wrap(other))
