"""Side information: values that training never saw are refused by name, or told as the setting says."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from configs.default import get_default
from drep_jax.data.datasets import Images
from drep_jax.data.npz_source import ArraySource
from drep_jax.errors import ConfigError, DataError
from drep_jax.jobs import evaluate
from drep_jax.run.side import check_seen, side_information
from drep_jax.tasks import make_task
from tests.setups import make_setup


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.mean(axis=(1, 2)))


def source_of(cameras, views=None, name="mine", known=0):
    source = ArraySource(name, np.zeros((len(cameras), 4, 4, 3), np.uint8), None, None, None)
    source.table = {"camera": np.array(cameras), "view": np.array(views or [0] * len(cameras))}
    source.cameras, source.views = known, 0
    return source


def images_of(train, test, held_out=(0,)):
    held = source_of(list(held_out), name="held")
    return Images(source_of(train, name="train"), held, None, source_of(test, name="test"), ())


def task_of(side="camera", **options):
    config = get_default()
    config.task = "retrieval"
    config.retrieval.update({"side": side, **options})
    return make_task(config.to_dict())


def checked(task, images):
    side, told = side_information(task, images)
    parts = {part: getattr(images, part) for part in ("train", "held_out", "test")}
    return side, told, check_seen(task, make_setup(Nothing(), np.zeros((1, 4, 4, 3), np.float32), side=side, **parts))


def test_values_that_training_saw_are_told_as_they_are():
    assert side_information(task_of(), images_of([0, 1, 2], [2, 1])) == ((("camera", 3),), ())
    assert side_information(task_of(""), images_of([0], [4])) == ((), ())
    larger = Images(source_of([0, 1], known=6), source_of([1]), None, source_of([0]), ())
    assert side_information(task_of(), larger) == ((("camera", 6),), ()), "of the whole set"


@pytest.mark.parametrize(
    ("test", "held_out", "where"), [([2, 1, 2], [0], "2 of 3 test"), ([1], [3, 0], "1 of 2 held-out")]
)
def test_values_that_training_never_saw_are_refused_with_the_ways_out(test, held_out, where):
    with pytest.raises(
        DataError, match=rf"{where} images .*no training image has it.*retrieval\.unseen=drop.*map:VALUE"
    ):
        checked(task_of(), images_of([0, 1], test, held_out))


def test_they_are_dropped_mapped_or_kept():
    images = images_of([0, 2], [1, 3, 2])
    side, told, notes = checked(task_of(unseen="drop"), images)
    assert (side, told) == ((("camera", 4),), ((0, -1, 2, -1),))
    assert notes == [
        "2 of 3 test images have a camera that the backbone does not know (camera 1, 3; no training image has it): "
        "retrieval.unseen=drop."
    ]
    assert checked(task_of(), images_of([0, 1], [1, 0]))[-1] == []
    assert side_information(task_of(unseen="map:2"), images) == ((("camera", 4),), ((0, 2, 2, 2),))
    assert side_information(task_of(unseen="keep"), images) == ((("camera", 4),), ())
    with pytest.raises(ConfigError, match="map:1: the backbone knows no camera 1"):
        side_information(task_of(unseen="map:1"), images)


def test_cameras_of_another_set_are_all_unknown():
    images = images_of([0, 1], [1, 3])
    with pytest.raises(DataError, match=r"2 of 2 test images .*camera 1, 3; the backbone was trained on another set"):
        checked(task_of(side_values=(2,)), images)
    assert side_information(task_of(side_values=(2,), unseen="drop"), images) == ((("camera", 2),), ((-1,) * 4,))
    assert side_information(task_of(side_values=(2,), unseen="map:1"), images) == ((("camera", 2),), ((1,) * 4,))
    with pytest.raises(DataError, match="camera 3 is beyond the 2 that the backbone knows"):
        checked(task_of(side_values=(2,), unseen="keep"), images)


@pytest.mark.parametrize(
    "options", [{"unseen": "mean"}, {"unseen": "map:x"}, {"side_values": (2, 3)}, {"side_values": (0,)}]
)
def test_settings_that_cannot_be(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        task_of(**options)


def test_the_plane_holds_what_is_told():
    side, batch = (("camera", 3), ("view", 2)), {"camera": np.array([0, 1, 2]), "view": np.array([1, 0, 1])}
    batch["image"] = np.zeros((3, 4, 4, 3), np.uint8)
    plain = make_setup(Nothing(), np.zeros((1, 4, 4, 3), np.float32), side=side)
    assert np.array_equal(plain.inputs(batch)[:, 0, 0, 3], [1, 2, 5])
    told = dataclasses.replace(plain, side_tables=((0, 2, -1), (0, 1)))
    assert np.array_equal(
        told.inputs(batch)[..., 3], np.broadcast_to(jnp.reshape(jnp.array([1, 4, -1]), (3, 1, 1)), (3, 4, 4))
    )


def test_an_evaluation_elsewhere_knows_the_cameras_of_its_run(monkeypatch):
    config = get_default()
    config.task = "retrieval"
    config.retrieval.side = "camera"
    saved = config.to_dict()
    saved["data"]["source"] = "market1501:DIR"
    monkeypatch.setattr(evaluate, "_config_there", lambda directory: saved)
    monkeypatch.setattr(
        evaluate, "build", lambda config: dataclasses.make_dataclass("Known", ["side"])((("camera", 6),))
    )
    there = {**saved, "data": {**saved["data"], "source": "duke:DIR"}}
    assert evaluate._with_side(saved, "run") is saved
    assert evaluate._with_side(there, "run")["retrieval"]["side_values"] == (6,)

    def gone(config):
        raise DataError("There is no directory DIR.")

    monkeypatch.setattr(evaluate, "build", gone)
    with pytest.raises(ConfigError, match=r"There is no directory DIR\..*--config\.retrieval\.side_values="):
        evaluate._with_side(there, "run")
