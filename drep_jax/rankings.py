"""What denoising did to single rankings: queries with what is found for them, and how much each site alone does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax import scoring
from drep_jax.builder import Setting
from drep_jax.data import Source
from drep_jax.data.corruptions import corrupt
from drep_jax.data.reading import read
from drep_jax.data.tables import protocol_of, table_of
from drep_jax.denoise_tree import get_in, set_in
from drep_jax.fusion import fuse_exact
from drep_jax.retrieval import examples
from drep_jax.retrieval.evaluate import Result
from drep_jax.sites import Site
from drep_jax.tasks import Retrieval

Tree = Any
Config = Mapping[str, Any]


def most_changed(metrics: Mapping[str, Any], arm: str) -> str:
    """Returns the condition under which an arm's first metric differs most from the baseline's."""

    def change(condition: str) -> float:
        entry = metrics[condition]
        metric = next(iter(entry["baseline"]))
        return abs({**entry["control"], **entry["denoised"]}[arm][metric] - entry["baseline"][metric])

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
    index, rows = scoring.features(config, setting, source, arms, condition)
    table = {name: column[index] for name, column in table_of(source).items()}
    results = {arm: scoring.ranked(task, source, index, own) for arm, own in rows.items()}

    def picture(row: int) -> np.ndarray:
        batch = read(source, index[row : row + 1])
        role = table["query" if task.noisy == "query" else "gallery"][row]
        if task.noisy != "both" and not role:
            return batch["image"][0]
        return np.rint(corrupt(batch["image"], batch["index"], condition, config["seed"])[0])

    how = {"metric": task.metric, "branches": 2 if task.views else 1, "seed": config["seed"]}
    found = examples.ranked(
        rows, results, table, protocol_of(source), picture, condition=condition, each=task.shown, **how
    )
    own = list(arms.values())[-1]  # whose backbone may have been trained, too
    alone = {site.name: _alone(params, setting, site, rule, steps) for site in setting.sites if site.name in sites}
    networks = {"unfused": params["backbone"], **alone} if alone else {}
    rankings = {
        name: _ranking(config, setting, task, source, {**own, "params": tree}, condition, index)
        for name, tree in networks.items()
    }
    found["sites"] = [{"path": name, **_effect(rankings[name], rankings["unfused"])} for name in alone]
    return found


def _alone(params: Tree, setting: Setting, site: Site, rule: str, steps: int) -> Tree:
    """Returns the backbone with one site fused."""
    own = {**params, "denoise": set_in({}, site.path, get_in(params["denoise"], site.path))}
    return fuse_exact(own, (site,), setting.schedule, rule=rule, steps=steps)


def _ranking(
    config: Config,
    setting: Setting,
    task: Retrieval,
    source: Source,
    variables: Tree,
    condition: str,
    index: np.ndarray,
) -> Result:
    """Returns how well a network ranks."""
    _, rows = scoring.features(config, setting, source, {"alone": variables}, condition)
    return scoring.ranked(task, source, index, rows["alone"])


def _effect(after: Result, before: Result) -> dict[str, Any]:
    """Returns how rankings differ: mean change, and how many queries gained and lost."""
    change = after.scores["mAP"] - before.scores["mAP"]
    return {
        "mAP": 100.0 * float(np.mean(change)),
        "gained": int(np.sum(change > 0)),
        "lost": int(np.sum(change < 0)),
        "queries": len(change),
    }
