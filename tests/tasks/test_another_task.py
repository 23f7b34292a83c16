"""Another task is a file and a line: this file is the task, and `TASKS` gets the line; the whole job runs by it."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drep_jax import report, weights
from drep_jax.data.collate import read
from drep_jax.data.corruptions import corrupt
from drep_jax.jobs import evaluate, train
from drep_jax.jobs.fuse import load_run
from drep_jax.tasks import TASKS, Task
from tests.command import call, same_bits
from tests.tiny_config import get_config

QUADRANTS = 4
BITS = np.arange(QUADRANTS, dtype=np.int32)[None]


def iou(statistics, weights):
    """Returns the mean over the quadrants of Σ w·intersection / Σ w·union: no mean over the items."""
    counts = np.tensordot(weights, np.asarray(statistics["counts"], np.float64), axes=1)
    both, either = counts[..., 0], counts[..., 1]
    return np.mean(np.where(either > 0, both / np.maximum(either, 1), 1.0), axis=-1)  # nothing lit is nothing missed


@dataclasses.dataclass(frozen=True)
class Quadrants(Task):
    """A mask of four quadrants an image: those are lit that are 1 in the digit written in binary."""

    name: ClassVar[str] = "quadrants"
    metrics: ClassVar[Mapping[str, Any]] = MappingProxyType({"mIoU": iou})
    criterion: ClassVar[str] = "mIoU"

    def loss(self, outputs, batch, smoothing, extra):
        losses = optax.sigmoid_binary_cross_entropy(outputs[:, :QUADRANTS], mask_of(batch).astype(jnp.float32))
        return jnp.mean(losses), {"lit": jnp.mean(outputs[:, :QUADRANTS] > 0)}

    def statistics(self, outputs, batch):
        lit, right = outputs[:, :QUADRANTS] > 0, mask_of(batch)
        return {"counts": jnp.stack([lit & right, lit | right], axis=-1).astype(jnp.int32)}

    def pseudo_labels(self, outputs):
        return {"label": jnp.sum((outputs[:, :QUADRANTS] > 0) * 2**BITS, axis=-1)}

    def examples(self, exhibit):
        before, after = (np.asarray(exhibit.statistics[arm]["counts"]).sum(axis=1) for arm in exhibit.arms)
        assert exhibit.picture(0).shape == (8, 8, 3)
        return {"quadrants": {"changed": int(np.sum((before != after).any(axis=-1))), "of": len(before)}}


def mask_of(batch):
    return (batch["label"][:, None] >> BITS) & 1 == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole tiny job by that task, from training the backbone to the report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "quadrants", lambda config: Quadrants())
        config = get_config()
        config.task, config.learner, config.compare = "quadrants", "closed_form", ("measured",)
        config.noise = "gaussian:60"
        config.model.depth = 1
        config.control.steps = 3
        config.backbone.steps = 60
        config.measured.update({"images": 64, "vectors": 20})
        config.select.update({"images": 96, "strengths": (0.0, 1.0)})
        config = config.to_dict()
        directory = str(tmp_path_factory.mktemp("quadrants") / "run")
        yield config, directory, train.run(config, directory)


def test_the_job_is_done_by_its_metric(run):
    _, directory, content = run
    report.validate(report.plain(content))
    assert content["certificate"]["passed"] and list(content["metrics"]) == ["clean", "gaussian:60"]
    assert content["learning"]["measured"]["chosen"]["criterion"] == "mIoU"
    assert content["quadrants"]["of"] == 600 and content["items"]["are"] == "test images"
    for entry in content["metrics"].values():
        assert entry["n"] == 600 and entry["mcnemar"] == {}
        assert set(entry["control"]) == {"placebo", "continued"} and set(entry["denoised"]) == {
            "closed_form",
            "measured",
        }
        for pair, difference in entry["difference"].items():
            low, high = entry["interval"][pair]["mIoU"]
            assert (low <= difference["mIoU"] <= high and low < high) or not difference["mIoU"]
    page = "".join(pathlib.Path(directory, f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    assert page.count("mIoU") > 2 and "acc@1" not in page
    lines = pathlib.Path(directory, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert any("lit" in json.loads(line) for line in lines)


def test_values_are_those_of_a_loop_over_the_images(run):
    config, directory, content = run
    job, variables, _ = load_run(directory)
    setup = job.setup
    fused = weights.load(os.path.join(directory, "fused", "fused.safetensors"), setup.abstract, allow_fused=True)
    batch = read(setup.test, np.arange(len(setup.test)))
    apply = jax.jit(setup.backbone.apply)
    for condition, entry in content["metrics"].items():
        seen = setup.inputs({**batch, "image": corrupt(batch["image"], batch["index"], condition, config["seed"])})
        for values, network in ((entry["baseline"], variables), (entry["denoised"]["closed_form"], fused)):
            both, either = np.zeros(QUADRANTS), np.zeros(QUADRANTS)
            for logits, label in zip(np.asarray(apply(network, seen)), batch["label"], strict=True):
                for quadrant in range(QUADRANTS):
                    lit, right = logits[quadrant] > 0, bool(int(label) >> quadrant & 1)
                    both[quadrant] += lit and right
                    either[quadrant] += lit or right
            assert values["mIoU"] == pytest.approx(100 * np.mean(both / either), abs=0.3)  # a logit near 0 may differ
    assert content["metrics"]["clean"]["baseline"]["mIoU"] > 15  # it is no blank
    assert not same_bits(fused, variables)


def test_further_jobs_take_it_too(run, tmp_path):
    config, directory, content = run
    again, _ = evaluate.evaluate(config, directory)
    for condition, entry in content["metrics"].items():
        for arm, values in entry["denoised"].items():
            assert again["metrics"][condition]["denoised"][arm] == pytest.approx(values)
    options = ["--sweep", "--sweep_images=48", "--rule=wiener:0.1", "--strength=0.5"]
    ended = call("fuse.py", f"--workdir={directory}", f"--out={tmp_path}", *options)
    assert ended.status == 0 and "by mIoU (%)" in ended.output and "PASSED" in ended.output, ended
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert points[0]["agreement"]["clean"] == 100.0 and points[1]["agreement"]["clean"] < 100.0


def test_items_are_images_unless_a_task_says_so():
    statistics = {"counts": np.ones((2, 4, 2))}
    items = Quadrants().items(statistics, None, np.arange(2), "an arm")
    assert items.statistics is statistics and items.clusters is None
