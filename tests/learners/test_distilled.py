"""Distillation: what is trained, what stays to the bit, its batches, resuming, and what is refused."""

import dataclasses
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from drep_jax import learners, report
from drep_jax.core.fusion import fuse_exact
from drep_jax.data.augment import Augmentation
from drep_jax.data.loader import training_batches
from drep_jax.errors import ConfigError, DrepError
from drep_jax.jobs import checks, fuse, train
from drep_jax.learners.distilled import PairsInOne, with_corrupted
from drep_jax.run.checkpoints import last_saved
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import CLOCK, MetricWriter, read_metrics
from tests.command import largest_difference, same_bits
from tests.jobs.test_train import restored
from tests.tiny_config import get_config

STEPS = 24


def configured(finished, **changes):
    """The tiny job from the finished run's backbone: distillation from the measured solution, and of the backbone."""
    config = get_config()
    config.backbone.init_from = finished.backbone
    config.learner, config.compare, config.noise = "distilled", ("measured", "distilled_backbone"), "gaussian:80"
    config.control.steps = 0
    config.evaluate.conditions = ("clean",)
    config.measured.update({"images": 64, "vectors": 20})
    config.select.update(
        {"images": 96, "conditions": ("gaussian:60",), "strengths": (0.0, 1.0), "max_clean_loss": 100.0}
    )
    config.distilled.update({"steps": STEPS, "batch_size": 32, "learning_rate": 1e-2, "init_from": "measured"})
    config.update_from_flattened_dict(changes)
    return config.to_dict()


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    config = configured(finished)
    directory = str(tmp_path_factory.mktemp("distilled") / "run")
    return config, directory, train.run(config, directory)


def arrays(tree):
    return jax.tree_util.tree_map(np.asarray, tree)


def log_of(directory, stage):
    lines = [line for line in read_metrics(os.path.join(directory, "metrics.jsonl")) if line["stage"] == stage]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def test_one_subtree_moves_and_the_teacher_stands(run, finished):
    _, directory, content = run
    report.validate(report.plain(content))
    assert content["exported"] == "distilled" and content["certificate"]["passed"]
    backbone = arrays(finished.variables["params"])
    start = arrays(last_saved(Run(run[0], finished.setup, directory), "measured").denoise)
    by_denoisers, by_backbone = (
        arrays(restored(directory, stage)) for stage in ("distillation", "backbone_distillation")
    )
    assert same_bits(by_denoisers["backbone"], backbone) and set(by_denoisers) == {"backbone", "denoise"}
    assert 1e-3 < largest_difference(by_denoisers["denoise"], start) < 1  # from the measured solution, not from zero
    assert same_bits(by_backbone["teacher"], backbone) and set(by_backbone) == {"backbone", "teacher"}
    fused = fuse_exact({"backbone": backbone, "denoise": start}, finished.setup.sites, finished.setup.schedule,
                       rule="affine", steps=1)  # fmt: skip
    assert 1e-3 < largest_difference(by_backbone["backbone"], fused) < 1
    for stage in ("distillation", "backbone_distillation"):
        first, *_, last = (line["loss"] for line in log_of(directory, stage))
        assert last < 0.9 * first, stage


def test_it_is_an_arm_with_its_own_choice_and_can_be_fused_again(run, tmp_path):
    from drep_jax.run.export import Output

    _, directory, content = run
    section = content["learning"]["distilled"]
    assert section["steps"] == STEPS and section["chosen"]["criterion"] == "accuracy" and section["loss"]
    assert content["learning"]["distilled_backbone"]["steps"] == STEPS
    assert set(content["metrics"]["clean"]["denoised"]) == {"measured", "distilled_backbone", "distilled"}
    assert {point["label"] for point in content["front"]["points"]} == {"backbone", "distilled"}
    certificate, _ = fuse.fuse_run(directory, Output(str(tmp_path / "again")))
    one, other = (path / "fused.safetensors" for path in (pathlib.Path(directory, "fused"), tmp_path / "again"))
    assert certificate.passed and one.read_bytes() == other.read_bytes()


def test_a_stopped_stage_is_resumed_bit_by_bit(run, finished, tmp_path):
    config, directory, _ = run
    copied = shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(copied / "checkpoints" / "distillation" / str(STEPS))  # as if it had stopped at step 20
    shutil.rmtree(copied / "checkpoints" / "distilled")
    writer = MetricWriter(str(copied))
    resumed = Run(config, finished.setup, str(copied), writer)
    learned = learners.learn("distilled", learners.LearnerInputs(resumed, finished.variables))
    writer.close()
    _, _, denoise = fuse.load_run(directory)
    assert same_bits(arrays(learned.denoisers.tree), arrays(denoise))
    assert log_of(str(copied), "distillation") == log_of(directory, "distillation")


def test_noise_is_that_of_the_position_and_some_images_stay_clean(finished):
    config = configured(finished, **{"noise": "gaussian:20..80", "distilled.clean_share": 0.25})
    add = with_corrupted(config)
    images = np.full((64, 8, 8, 3), 128, np.uint8)
    whole = add({"image": images}, 100)["corrupted"]
    part = add({"image": images[:8]}, 116)["corrupted"]
    assert np.array_equal(part, whole[16:24]) and whole.dtype == np.float32
    clean = np.array([np.array_equal(image, images[0]) for image in whole])
    assert 4 < clean.sum() < 32
    spread = whole[~clean].std(axis=(1, 2, 3))
    assert 10 < spread.min() < spread.max() < 90
    assert len({image.tobytes() for image in whole}) == (~clean).sum() + 1  # the same image, other noise each time


def test_pairs_move_as_one():
    rng = np.random.default_rng(0)

    class Pairs:
        name, note, num_classes = "pairs:here", None, None

        def __len__(self):
            return 8

        def __getitem__(self, index):
            clean = np.full((6, 6, 3), 10 * index, np.uint8) + np.arange(6, dtype=np.uint8)[:, None]
            return {"clean": clean, "corrupted": clean + np.uint8(7)}

    config = {"noise": "pairs:here", "seed": 0, "distilled": {"clean_share": 0.0}}
    batch = next(
        training_batches(PairsInOne(Pairs()), 8, seed=int(rng.integers(9)), augmentation=Augmentation(True, 2))
    )
    batch = with_corrupted(config)(batch, 0)
    assert batch["image"].shape == batch["corrupted"].shape == (8, 6, 6, 3)
    difference = batch["corrupted"] - batch["image"]
    assert set(np.unique(difference)) == {0.0, 7.0}  # what a shift brings in is 0 in both
    assert not np.array_equal(batch["image"][0], np.sort(batch["image"][0], axis=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distilled.steps": 0}, r"distilled\.steps=N"),
        ({"distilled.clean_share": 1.0}, r"clean_share=1\.0"),
        ({"distilled.init_from": "wiener"}, r'init_from="wiener" must be "measured"'),
        ({"compare": ("distilled_backbone", "measured")}, "has to come before it"),
        ({"compare": ()}, "has to come before it"),
        ({"denoise.rank": 2}, r'Learner "(distilled|measured)" gives full matrices'),
        ({"control.steps": 8, "control.batch_size": 32}, "with another budget it is no control"),
        ({"distilled.batch_size": 12}, "multiple of 8"),
        ({"distilled.learning_rate": 1e-3, "distilled.warmup": STEPS}, "distilled: warmup"),
        ({"distilled.compute": "float16"}, "distilled.compute='float16'"),
        ({"noise": "gaussian:0"}, "changes no image"),
    ],
)
def test_what_makes_no_sense_is_refused(finished, changes, message):
    config = configured(finished, **changes)
    with pytest.raises(DrepError, match=message):
        checks.check(config, finished.setup if "denoise.rank" not in changes else build(config))


def test_pairs_that_cannot_make_a_batch_are_refused(finished, tmp_path):
    from PIL import Image

    for side in ("clean", "corrupted"):
        os.makedirs(tmp_path / side)
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)).save(tmp_path / side / f"{number}.png")
    changes = {"noise": f"pairs:{tmp_path}"}
    with pytest.raises(DrepError, match="has 3 pairs, fewer than one batch"):
        checks.check(configured(finished, **changes), finished.setup)
    with pytest.raises(ConfigError, match=r"data\.erase=0\.5 would treat the two images of a pair differently"):
        checks.check(configured(finished, **changes, **{"data.erase": 0.5}), finished.setup)


def test_the_starting_point_has_to_be_there(finished, tmp_path):
    run = dataclasses.replace(finished.run, config=configured(finished), directory=str(tmp_path))
    with pytest.raises(ConfigError, match="has to come before it in this run"):
        learners.learn("distilled", learners.LearnerInputs(run, finished.variables))
