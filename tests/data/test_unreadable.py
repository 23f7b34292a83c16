"""Unreadable images: counted, named and skipped up to the limit, then refused with the list."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import open_source
from drep_jax.data.augment import Augmentation
from drep_jax.data.loader import evaluation_batches, read_images, read_labels, training_batches
from drep_jax.data.merged import MergedSource
from drep_jax.data.unreadable import keep_records, summary, tolerating
from drep_jax.errors import ConfigError, DataError, UnreadableError

BAD = (0, 7, 8, 19)


@pytest.fixture
def folder(tmp_path):
    for name in ("train", "validation", "test"):
        for label in ("a", "b"):
            (tmp_path / "set" / name / label).mkdir(parents=True)
        for i in range(20):
            path = tmp_path / "set" / name / "ab"[i // 10] / f"{i:02}.png"
            Image.fromarray(np.full((8, 9, 3), 10 * i + 1, np.uint8)).save(path)
            if name == "train" and i in BAD:
                path.write_bytes(path.read_bytes()[:50])
    return tmp_path / "set"


def opened(folder, allowed, split="train"):
    return tolerating(open_source(f"folder:{folder}", split, image_size=(8, 8)), allowed)


def take(source, count, **options):
    return list(itertools.islice(training_batches(source, 8, seed=1, **options), count))


@pytest.mark.parametrize("scale", [(), (0.5, 1.0)])
def test_the_next_readable_image_stands_in_whatever_the_threads_and_the_start(folder, scale):
    augmentation = Augmentation(flip=True, crop_scale=scale)
    whole = take(opened(folder, 4), 10, num_threads=0, augmentation=augmentation)
    clean = take(open_source(f"folder:{folder}", "test", image_size=(8, 8)), 10, augmentation=augmentation)
    following = {0: 1, 7: 9, 8: 9, 19: 1}
    for batch, wanted in zip(whole, clean, strict=True):
        assert batch["index"].tolist() == [following.get(i, i) for i in wanted["index"].tolist()]
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 10 * batch["index"] + 1)
        np.testing.assert_array_equal(batch["label"], batch["index"] // 10)
    late = take(opened(folder, 4), 4, start_step=6, num_threads=3, augmentation=augmentation)
    for one, other in zip(late, whole[6:], strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("shards", [1, 2])
def test_evaluation_masks_them_out(folder, shards):
    source = opened(folder, 0.2)
    batches = [
        batch for i in range(shards) for batch in evaluation_batches(source, 4, shard=(i, shards), num_threads=2)
    ]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    good = sorted(set(range(20)) - set(BAD))
    assert sorted(joined["index"][joined["mask"]]) == good and joined["mask"].sum() == 16
    np.testing.assert_array_equal(joined["image"][joined["mask"]][:, 0, 0, 0], 10 * joined["index"][joined["mask"]] + 1)
    assert (joined["index"][~joined["mask"]] == -1).all() and not joined["image"][~joined["mask"]].any()
    assert not joined["label"][~joined["mask"]].any()
    counts = summary({"train": source, "test": None})["train"]
    assert counts["count"] == 4 and counts["limit"] == 4 and counts["images"] == 20
    assert sorted(counts["first"]) == [str(folder / "train" / "ab"[i // 10] / f"{i:02}.png") for i in BAD]
    index = np.array([6, 7, 8])
    assert read_images(source, index)[:, 0, 0, 0].tolist() == [61, 91, 91] and read_labels(source, index).tolist() == [
        0,
        0,
        0,
    ]


def test_one_too_many_is_refused_with_the_list(folder):
    for allowed in (3, 0.19):
        with pytest.raises(DataError) as caught:
            take(opened(folder, allowed), 3, num_threads=2)
        message = str(caught.value)
        assert "4 of the 20 images" in message and "more than the 3 that data.max_unreadable allows" in message
        assert all(f"{i:02}.png" in message for i in BAD)
    with pytest.raises(UnreadableError, match=r"Cannot read the image .*\.png"):
        take(opened(folder, 0), 3)
    assert summary({"train": opened(folder, 0)}) is None


@pytest.mark.parametrize("allowed", [-1, 1.5, float("nan"), "many"])
def test_a_limit_that_is_none_is_refused(folder, allowed):
    with pytest.raises(ConfigError, match="max_unreadable"):
        opened(folder, allowed)


def test_a_resumed_run_knows_what_it_has_passed_over(folder, tmp_path):
    first = opened(folder, 4)
    keep_records(str(tmp_path), {"train": first, "test": None})
    take(first, 1, num_threads=0)
    seen = summary({"train": first})["train"]
    lines = [line for line in (tmp_path / "unreadable.jsonl").read_text().splitlines() if line]
    assert 0 < seen["count"] == len(lines) and json.loads(lines[0])["part"] == "train"
    with open(tmp_path / "unreadable.jsonl", "a") as file:
        file.write('{"part": "tra')  # killed while writing
    again = opened(folder, 4)
    keep_records(str(tmp_path), {"train": again})
    assert summary({"train": again})["train"] == seen
    take(again, 3)
    assert summary({"train": again})["train"]["count"] == 4
    other = opened(folder, 4)
    keep_records(str(tmp_path), {"validation": other})
    assert summary({"validation": other})["validation"]["count"] == 0


def test_merged_sources_skip_too_and_a_source_of_ruins_is_refused(folder):
    parts = [open_source(f"folder:{folder}", split, image_size=(8, 8)) for split in ("train", "test")]
    merged = tolerating(MergedSource(parts, [1, 1]), 4)
    batches = list(evaluation_batches(merged, 8))
    assert sum(batch["mask"].sum() for batch in batches) == 36
    assert len(summary({"train": merged})["train"]["first"]) == 4
    for path in (folder / "train").glob("*/*.png"):
        path.write_bytes(b"ruin")
    with pytest.raises(DataError, match="None of the 20 images"):
        take(opened(folder, 20), 1, num_threads=0)
