"""Names and lists as people bring them: marks of the encoding, separators, Windows paths, names that are not UTF-8."""

import codecs
import json
import os

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import open_source
from drep_jax.errors import DataError
from drep_jax.files import utf8, write_text


def folder_of_images(root, name="birds"):
    os.makedirs(root / name, exist_ok=True)
    for i in range(20):
        Image.fromarray(np.full((4, 4, 3), 10 * i, np.uint8)).save(root / name / f"{i}.png")
    return root


def labels_of(root, content):
    (root / "list.txt").write_bytes(content)
    found = {}
    for split in ("train", "validation", "test"):
        try:
            source = open_source(f"list:{root / 'list.txt'}", split, image_size=(4, 4))
        except DataError as error:
            if "falls into" not in str(error):
                raise
            continue
        for i in range(len(source)):
            item = source[i]
            found[int(item["image"][0, 0, 0]) // 10] = source.class_names[item["label"]]
    return found


WORDS = "".join(f"birds/{i}.png {'owl' if i % 2 else 'küken'}\n" for i in range(20))
EXPECTED = {i: "owl" if i % 2 else "küken" for i in range(20)}


def table(separator, *columns):
    rows = [dict(path=f"birds/{i}.png", label=EXPECTED[i]) for i in range(20)]
    return "\n".join([separator.join(columns), *(separator.join(row[name] for name in columns) for row in rows)])


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + WORDS.encode(),
        WORDS.encode("utf-16"),
        WORDS.replace("\n", "\r\n").encode(),
        WORDS.replace("/", "\\").encode(),
        table(",", "label", "path").encode(),
        codecs.BOM_UTF8 + table(";", "path", "label").encode(),
        table(";", "label", "path").encode("utf-16"),
        table("\t", "label", "path").encode(),
        table(",", "path", "label").replace("/", "\\").encode(),
    ],
)
def test_lists_of_any_program_name_the_same_images(tmp_path, content):
    assert labels_of(folder_of_images(tmp_path), content) == EXPECTED


@pytest.mark.parametrize("content", [b"image,label\nbirds/1.png,owl\n", b"birds/1.png,owl\n"])
def test_a_table_whose_header_names_no_path_says_what_is_expected(tmp_path, content):
    with pytest.raises(DataError, match="A table needs a header that names the column path"):
        labels_of(folder_of_images(tmp_path), content)


def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"v\xf6gel")
    try:
        folder_of_images(tmp_path, name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    lists = b"".join(b"v\xf6gel/%d.png owl\n" % i for i in range(20))
    assert labels_of(tmp_path, lists) == dict.fromkeys(range(20), "owl")
    (tmp_path / "list.txt").unlink()
    source = open_source(f"folder:{tmp_path}", "train", image_size=(4, 4))
    assert source.class_names == (name,) and 10 < len(source) < 20
    # What reports and records write of them can be read again.
    assert json.loads(utf8(json.dumps({"name": name}, ensure_ascii=False)))["name"] == name
    write_text(str(tmp_path / "report.md"), name)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "v\\udcf6gel"
