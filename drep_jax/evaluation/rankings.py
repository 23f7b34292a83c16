"""What denoising did to single rankings: queries with what is found for them, and how much each site alone does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.core.fusion import fuse_exact
from drep_jax.core.sites import Site
from drep_jax.data import Source
from drep_jax.data.collate import read
from drep_jax.data.corruptions import corrupt
from drep_jax.data.metadata import protocol_of, table_of
from drep_jax.evaluation import scoring
from drep_jax.evaluation.summary import arms_of
from drep_jax.metrics.retrieval import examples
from drep_jax.metrics.retrieval.evaluate import Result
from drep_jax.run.setup import Setting
from drep_jax.tasks import Retrieval
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Config, Tree


def most_changed(metrics: Mapping[str, Any], arm: str) -> str:
    """Returns the condition under which an arm's first metric differs most from the baseline's."""

    def change(condition: str) -> float:
        scores = arms_of(metrics[condition])
        metric = next(iter(scores["baseline"]))
        return abs(scores[arm][metric] - scores["baseline"][metric])

    return max(metrics, key=change)


def ranked(
    config: Config,
    setting: Setting,
    task: Retrieval,
    source: Source,
    arms: Mapping[str, Tree],
    condition: str,
    params: Tree,
    sites: Sequence[str],
    *,
    rule: str,
    steps: int,
) -> dict[str, Any]:
    """Returns the report's `ranked`: examples of what two arms find, and what each of some sites does by itself.

    Args:
      config, setting, task: of the run.
      source: test images.
      arms: the unchanged backbone, then the denoised one.
      condition: under which.
      params: backbone and denoisers, before fusion.
      sites: names of those whose own effect is measured, each fused alone.
      rule, steps: of fusion.
    """
    baseline, denoised = arms
    own = arms[denoised]  # whose backbone may have been trained, too
    alone = {site.name: _alone(params, setting, site, rule, steps) for site in setting.sites if site.name in sites}
    trees = {"unfused": params["backbone"], **alone} if alone else {}
    # All in one pass over the images, which for a large gallery takes longer to read than to look at.
    networks = {**arms, **{f"site {name}": {**own, "params": tree} for name, tree in trees.items()}}
    index, rows = scoring.features(config, setting, source, networks, condition)
    table = table_of(source, index)
    results = {name: scoring.ranked(task, source, index, found) for name, found in rows.items()}

    def picture(row: int) -> np.ndarray:
        batch = read(source, index[row : row + 1])
        role = table["query" if task.corrupted == "query" else "gallery"][row]
        if task.corrupted != "both" and not role:
            return batch["image"][0]
        return np.rint(corrupt(batch["image"], batch["index"], condition, config["seed"])[0])

    found = examples.ranked(
        {name: rows[name] for name in (baseline, denoised)},
        {name: results[name] for name in (baseline, denoised)},
        table,
        protocol_of(source),
        picture,
        condition=condition,
        metric=task.metric,
        branches=task.branches,
        each=task.examples,
        seed=config["seed"],
    )
    found["sites"] = [{"path": name, **_effect(results[f"site {name}"], results["site unfused"])} for name in alone]
    return found


def _alone(params: Tree, setting: Setting, site: Site, rule: str, steps: int) -> Tree:
    """Returns the backbone with one site fused."""
    own = {**params, "denoise": set_in({}, site.path, get_in(params["denoise"], site.path))}
    return fuse_exact(own, (site,), setting.schedule, rule=rule, steps=steps)


def _effect(after: Result, before: Result) -> dict[str, Any]:
    """Returns how rankings differ: mean change, and how many queries gained and lost."""
    change = after.scores["mAP"] - before.scores["mAP"]
    return {
        "mAP": 100.0 * float(np.mean(change)),
        "gained": int(np.sum(change > 0)),
        "lost": int(np.sum(change < 0)),
        "queries": len(change),
    }
