"""Findings on a finished run for its report: sites, spectra, example images, cost."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from drep_jax.core import closed_form
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import composed_maps, fuse_variables_exact
from drep_jax.core.matrix_form import part_of
from drep_jax.core.moments import Moments
from drep_jax.data import Source
from drep_jax.data.collate import read
from drep_jax.data.corruptions import corrupt
from drep_jax.evaluation import cost
from drep_jax.evaluation.arms import Network, Scored, one_image, score_arms
from drep_jax.learners import Learned
from drep_jax.run.moments import MOMENTS, kept_moments, moments_of
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.tasks import Exhibit
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Path, Tree


def spectra(job: Run, variables: Tree, learned: Learned) -> dict[str, Any] | None:
    """Returns the report's `spectra`: the gain of each site's denoiser along principal axes.

    They need the moments of the features. Only with `evaluate.spectra` are moments computed for
    this alone. Otherwise the result is None if no learner needed the moments, or if the backbone
    was trained together with its denoisers, since the run's moments do not describe the trained
    backbone.
    """
    trained = learned.variables is not None
    moments: Mapping[Path, Moments] | None
    if job.config["evaluate"]["spectra"]:
        path = os.path.join(job.directory, "trained_moments.npz" if trained else MOMENTS)
        moments = moments_of(job, variables, path)
    elif trained or (moments := kept_moments(job, variables)) is None:
        return None
    sites, schedule = job.setup.sites, job.setup.schedule
    maps = composed_maps({"denoise": learned.denoisers}, sites, schedule)
    return {
        site.name: closed_form.spectrum(
            moments[site.path], np.eye(site.width) + np.swapaxes(np.asarray(maps[site.path]["matrix"]), -1, -2)
        )
        for site in sites
    }


def exhibit_of(
    job: Run,
    source: Source,
    arms: Mapping[str, Tree],
    condition: str,
    scored: Scored,
    variables: Tree,
    fused: Tree,
    learned: Learned,
) -> Exhibit:
    """Returns the material for the task's examples of test images.

    Args:
      job: the run.
      source: its test images.
      arms: name ↦ variables of the unchanged backbone, then of the exported network.
      condition: the condition under which they differ most.
      scored: their statistics under this condition.
      variables: the backbone before fusion.
      fused: its fused variables.
      learned: the result of the exported learner.
    """
    config, setup = job.config, job.setup
    described = describe_sites(setup, variables["params"], fused["params"])
    order = sorted(described, key=lambda site: -max(site["relative_change"]))
    by_name = {site.name: site for site in setup.sites}
    corrupted = setup.task.corrupted_rows(source)

    def look(networks: Mapping[str, Tree]) -> dict[str, Tree]:
        options = {
            "batch_size": config["evaluate"]["batch_size"],
            "seed": config["seed"],
            "progress": config["progress"],
        }
        ((_, result),) = score_arms(setup, networks, source, (condition,), **options)
        return result.statistics

    def picture(index: int) -> np.ndarray:
        batch = read(source, np.array([index]), sizes=setup.sizes)
        if corrupted is not None and not corrupted[index]:
            return batch["image"][0]
        return np.rint(corrupt(batch["image"], batch["index"], condition, config["seed"], batch.get("size"))[0])

    def outputs(index: int) -> tuple[dict[str, np.ndarray], dict[str, Tree]]:
        batch = one_image(setup, source, index)
        seen = corrupt(batch["image"], batch["index"], condition, config["seed"], batch.get("size"))
        seen = batch["image"] if corrupted is not None and not corrupted[index] else seen
        columns = {name: column for name, column in batch.items() if name != "image"}
        known = {name: column for name, column in columns.items() if column.ndim < 3}
        images = setup.inputs({**known, "image": seen})
        return columns, {arm: predicted(variables, images, known) for arm, variables in arms.items()}

    @jax.jit
    def predicted(variables: Tree, images: Any, columns: Tree) -> Tree:
        return setup.task.predict(setup.backbone, variables, images, columns)

    def alone(name: str | None) -> Tree:
        if name is None:
            return variables
        site = by_name[name]
        tree = set_in({}, site.path, get_in(learned.denoisers.tree, site.path))
        one_site = dataclasses.replace(learned.denoisers, tree=tree)
        return fuse_variables_exact(variables, one_site, (site,), setup.schedule)

    return Exhibit(
        source=source,
        condition=condition,
        arms=arms,
        index=scored.index,
        statistics={arm: scored.statistics[arm] for arm in arms},
        look=look,
        picture=picture,
        outputs=outputs,
        sites=[site["path"] for site in order],
        alone=alone,
        seed=config["seed"],
    )


def describe_sites(setup: Setup, before: Tree, after: Tree) -> list[dict[str, Any]]:
    """Returns the report's list of sites, with changes ‖W' − W‖ / ‖W‖ (maximum over layers).

    Args:
      setup: of the run.
      before, after: parameters before and after fusion.
    """
    rows = []
    for site in setup.sites:
        changes = []
        for layer in site.layers:
            old, new = (
                part_of(layer, np.asarray(get_in(tree, layer.path)["kernel"], np.float64)) for tree in (before, after)
            )
            old, new = (leaf.reshape(site.stack or 1, -1) for leaf in (old, new))
            changes.append(np.linalg.norm(new - old, axis=1) / np.linalg.norm(old, axis=1))
        rows.append(
            {
                "path": site.name,
                "layers": [layer.name for layer in site.layers],
                "kind": site.kind,
                "width": site.width,
                "groups": site.groups,
                "bias": site.bias,
                "t": [*site.times],
                "relative_change": [float(value) for value in np.max(changes, axis=0)],
            }
        )
    return rows


def measure_cost(
    job: Run, variables: Tree, fused: Tree, learned: Learned, others: Mapping[str, Network]
) -> dict[str, Any]:
    """Returns the report's `cost`: FLOPs and interleaved latency of all networks on one batch.

    Args:
      job: the run.
      variables: the backbone before fusion.
      fused: its fused variables.
      learned: the result of the exported learner, whose explicit path is measured, too.
      others: further networks by name.
    """
    config, setup = job.config, job.setup
    batch = config["evaluate"]["latency_batch"]
    images = jax.random.normal(jax.random.key(0), (batch, *setup.images.shape[1:]))
    backbone = setup.backbone
    plain = jax.jit(lambda v, x: backbone.apply(v, x))
    explicit = jax.jit(lambda v, d, x: explicit_apply(backbone, v, d, setup.sites, setup.schedule, x))
    after = jax.device_put(dict(fused))
    before, denoise = jax.device_put(dict(variables)), jax.device_put(learned.denoisers)
    compiled = {name: jax.jit(network) for name, network in others.items()}
    times = cost.interleaved(
        {
            "baseline": lambda: plain(before, images),
            "fused": lambda: plain(after, images),
            "explicit": lambda: explicit(before, denoise, images),
            **{name: functools.partial(network, before, images) for name, network in compiled.items()},
        },
        rounds=config["latency_rounds"],
    )
    flops = {
        "baseline": cost.flops(plain, before, images),
        "fused": cost.flops(plain, after, images),
        "explicit": cost.flops(explicit, before, denoise, images),
        **{name: cost.flops(network, before, images) for name, network in compiled.items()},
    }
    count = {
        name: sum(leaf.size for leaf in jax.tree_util.tree_leaves(tree))
        for name, tree in {"backbone": variables["params"], "denoise": denoise}.items()
    }
    return {
        "flops": flops,
        "flop_ratio": {name: flops[name] / flops["baseline"] for name in flops if name != "baseline"},
        "latency_ms": {name: 1e3 * float(np.median(values)) for name, values in times.items()},
        "latency_ratio": {name: r for name, r in cost.ratios(times, "baseline").items() if name != "baseline"},
        "parameters": count,
        "batch": batch,
    }
