"""Files appear whole or not at all, whatever goes wrong while they are written."""

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import drep_jax
from drep_jax.files import replacing, temporary_of, whole, write_bytes, write_json, write_text
from tests.command import files_of_at_most

WRITERS = {
    "bytes": lambda path, text: write_bytes(path, text.encode()),
    "text": write_text,
    "json": lambda path, text: write_json(path, text),
}


def fail_inside(path, error):
    with whole(path) as file:
        file.write("half of it")
        file.flush()
        assert not os.path.exists(path) or pathlib.Path(path).read_text() == "earlier"
        raise error


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_is_there_and_nothing_else(kind, tmp_path):
    path = tmp_path / "file"
    for text in ("first, not ASCII: ᾱ β λ\n", "second"):
        WRITERS[kind](str(path), text)
        content = path.read_text(encoding="utf-8")
        assert (json.loads(content) if kind == "json" else content) == text
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("bad value"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("earlier", [True, False])
def test_after_an_exception_inside_the_earlier_file_is_there_and_nothing_else(error, earlier, tmp_path):
    path = tmp_path / "file"
    if earlier:
        path.write_text("earlier")
    with pytest.raises(type(error)) as raised:
        fail_inside(str(path), error)
    assert raised.value is error
    assert os.listdir(tmp_path) == (["file"] if earlier else [])
    assert not earlier or path.read_text() == "earlier"


def test_a_value_that_json_has_no_form_for_leaves_the_earlier_file(tmp_path):
    write_json(str(tmp_path / "file"), {"a": 1})
    with pytest.raises(TypeError):
        write_json(str(tmp_path / "file"), {"a": 2, "b": object()})
    assert os.listdir(tmp_path) == ["file"] and json.loads((tmp_path / "file").read_text()) == {"a": 1}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_earlier_file(kind, tmp_path):
    path = tmp_path / "file"
    path.write_text("earlier")
    with files_of_at_most(10_000), pytest.raises(OSError, match="File too large") as raised:
        WRITERS[kind](str(path), "x" * 100_000)
    assert raised.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "earlier"


def test_a_place_that_does_not_exist_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(str(tmp_path / "no" / "file"), "x")
    with pytest.raises(FileNotFoundError), replacing(str(tmp_path / "file")):
        pass  # nothing was written
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    path = str(tmp_path / "file")
    write_text(path, "earlier")
    program = (
        "import os, signal, sys\nfrom drep_jax.files import whole\n"
        "with whole(sys.argv[1]) as file:\n"
        "    file.write('half')\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = pathlib.Path(drep_jax.__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", program, path], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert pathlib.Path(path).read_text() == "earlier"
    assert pathlib.Path(temporary_of(path)).read_text() == "half"
    write_text(path, "later")
    assert os.listdir(tmp_path) == ["file"] and pathlib.Path(path).read_text() == "later"


@pytest.mark.parametrize("fails", [False, True])
def test_directories_are_replaced_whole(fails, tmp_path):
    place = tmp_path / "folder"
    for folder, name in ((place, "earlier"), (tmp_path / "folder.tmp", "left by a killed process")):
        folder.mkdir()
        (folder / name).write_text(name)
    try:
        with replacing(str(place), directory=True) as temporary:
            assert not os.path.exists(temporary)
            os.mkdir(temporary)
            pathlib.Path(temporary, "new").write_text("new")
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(place) == ["earlier" if fails else "new"]


def test_no_other_module_renames_files_into_place():
    package = pathlib.Path(drep_jax.__file__).parent
    pattern = re.compile(
        r"os\.(replace|rename)\(|\.tmp\b(?!\"\))"
    )  # a suffix may be looked at, as `removesuffix(".tmp")`
    users = {path.name for path in package.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))}
    assert users == {"files.py"}
