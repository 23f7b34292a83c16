"""The main job: train or load a backbone, learn its denoisers, fuse, certify, compare with control arms, report.

Order of a run in a work directory, each step resumed or passed over if it is done already:
backbone → control arm (backbone trained on) → denoisers → fusion, certificate, export → evaluation → report.
"""

import contextlib
import functools
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax import closed_form, cost, evaluation, neighbours, rankings, report, scoring, weights, workdir
from drep_jax.builder import Setting, build, init_options
from drep_jax.closed_form import MOMENTS, Moments, load_moments
from drep_jax.data import unreadable
from drep_jax.data.chosen import Labelled
from drep_jax.denoise_tree import get_in
from drep_jax.denoiser import explicit_apply
from drep_jax.errors import ConfigError
from drep_jax.fusion import composed_maps, fuse_exact
from drep_jax.learners import Learned, Task, learn, train_labelled
from drep_jax.learners.base import moments_of, owner_of
from drep_jax.machine import environment
from drep_jax.output import Output, fuse_and_certify, write
from drep_jax.placebo import placebo_denoisers
from drep_jax.preflight import agree, check
from drep_jax.sites import Path
from drep_jax.tasks import Retrieval
from drep_jax.training import distributed
from drep_jax.training.logging import MetricWriter
from drep_jax.training.shared import on_primary
from drep_jax.training.stages import key_of

Tree = Any
Config = Mapping[str, Any]

FOREIGN_ONLY = ("init_format", "init_state", "init_grid", "init_allow")
"""Settings of how a foreign file of weights is read."""


def run(config: Config, directory: str) -> dict[str, Any]:
    """Runs the whole job in `directory`, or finishes one that was begun there, and returns the report.

    Of several processes each calls this; the first one writes the directory and returns the report, the others return its
    `{"certificate": {"passed": …}}` alone.
    """
    setting = build(config)
    check(config, setting)
    agree(config, setting)
    directory = os.path.abspath(directory)
    primary = distributed.primary()
    if not primary:
        config = {**config, "progress": False}
    with workdir.claimed(directory, config) if primary else contextlib.nullcontext():
        with contextlib.closing(on_primary(lambda: MetricWriter(directory, config))) as writer:
            if primary:
                unreadable.keep_records(directory, setting.parts)
            variables = make_backbone(config, setting, directory, writer)
            arms, continued = {"baseline": variables}, None
            if config["control"]["steps"]:
                continued = train_labelled(config, setting, "control", variables, directory, writer)
                arms["continued"] = continued[0]
            learned = learn_all(config, setting, variables, directory, writer, continued)
        return finish(config, setting, directory, arms, learned)


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def make_backbone(config: Config, setting: Setting, directory: str, writer: MetricWriter) -> Tree:
    """Loads the backbone's weights, or trains them from scratch."""
    path = config["backbone"]["init_from"]
    if path:
        return read_weights(config, setting, path)
    return train_labelled(config, setting, "backbone", _fresh(config, setting), directory, writer)[0]


def _fresh(config: Config, setting: Setting) -> Tree:
    return dict(jax.jit(setting.backbone.init)(key_of(config, "init"), jnp.zeros(setting.images.shape)))


def read_weights(config: Config, setting: Setting, path: str, *, allow_fused: bool = False) -> Tree:
    """Reads a backbone's variables from a file of this project or a foreign one.

    Args:
      config, setting: of the run.
      path: of the file, or of an Orbax directory.
      allow_fused: whether a file of ours may hold fused weights.
    """
    if weights.is_native(path):
        if useless := [name for name in FOREIGN_ONLY if config["backbone"][name]]:
            raise ConfigError(
                f"{path} is a file of this project, where {', '.join(f'backbone.{name}' for name in useless)} would change "
                "nothing: they are for foreign files."
            )
        variables = weights.load(path, setting.abstract, allow_fused=allow_fused)
        distributed.check_same("backbone", {path: weights.digest(variables)})
        return variables
    found = weights.load_foreign(
        path, setting.backbone, setting.abstract, fresh=lambda: _fresh(config, setting), **init_options(config)
    )
    print("\n".join(f"  {note}" for note in ("Weights read:", *found.notes)))
    distributed.check_same("backbone", {path: weights.digest(found.variables)})
    return found.variables


def learn_all(
    config: Config,
    setting: Setting,
    variables: Tree,
    directory: str,
    writer: MetricWriter,
    continued: tuple[Tree, float] | None = None,
) -> dict[str, Learned]:
    """Learns by every learner asked for, the exported one last; `continued` is the control arm, and its seconds."""
    began = time.perf_counter()
    moments = take_moments(config, setting, variables, directory)
    task = Task(config, setting, variables, moments, time.perf_counter() - began, directory, writer, continued)
    names = dict.fromkeys([*(name for name in config["compare"] if name != config["learner"]), config["learner"]])
    return {name: learn(name, task) for name in names}


def take_moments(config: Config, setting: Setting, variables: Tree, directory: str) -> dict[Path, Moments]:
    """Returns the moments of the sites' features over the training images, from the run's own file if it has them."""
    return moments_of(config, setting, variables, os.path.join(directory, MOMENTS))


def saved_moments(config: Config, setting: Setting, variables: Tree, directory: str) -> dict[Path, Moments]:
    """Returns the moments that a run has kept.

    Raises:
      CheckpointError: if there are none, or they are of another backbone, image size, share of the tokens or choice of sites.
    """
    path, tokens = os.path.join(directory, MOMENTS), config["denoise"]["moment_tokens"]
    owner = owner_of(setting, variables)
    return distributed.from_primary(lambda: load_moments(path, setting.sites, owner, tokens))


# ---------------------------------------------------------------------------------------------------------------------
# Fusion and what is said about it
# ---------------------------------------------------------------------------------------------------------------------


def finish(
    config: Config, setting: Setting, directory: str, arms: dict[str, Tree], learned: Mapping[str, Learned]
) -> dict[str, Any]:
    """Fuses, certifies, exports, evaluates all arms and writes the report."""
    exported = learned[config["learner"]]
    denoise, variables = exported.denoise, exported.variables or arms["baseline"]
    how: dict[str, Any] = {"rule": exported.rule, "steps": exported.steps}
    params = {"backbone": variables["params"], "denoise": denoise}
    certificate = None
    if distributed.primary():
        fused, certificate = fuse_and_certify(config, setting, variables, denoise, **how)
        write(Output(os.path.join(directory, "fused")), setting, variables, fused, {**how, "strength": 1.0})
    else:
        fused = fuse_exact(params, setting.sites, setting.schedule, **how)
    random_maps = placebo_denoisers(params, setting.sites, setting.schedule, key_of(config, "placebo"), **how)
    placebo = fuse_exact({**params, "denoise": random_maps}, setting.sites, setting.schedule, rule="affine", steps=1)
    arms = {
        "baseline": arms["baseline"],
        "placebo": {**variables, "params": placebo},
        **{name: tree for name, tree in arms.items() if name != "baseline"},
    }
    controls = [name for name in arms if name not in ("baseline", config["learner"])]
    explicit = {}
    for name, found in learned.items():
        own = found.variables or arms["baseline"]
        if found.network is not None:
            explicit[name], arms[name] = found.network, own
        elif found is exported:
            arms[name] = {**own, "params": fused}
        elif name not in arms:  # the control arm as a learner is that very arm
            other = {"backbone": own["params"], "denoise": found.denoise}
            numbers = fuse_exact(other, setting.sites, setting.schedule, rule=found.rule, steps=found.steps)
            arms[name] = {**own, "params": numbers}
    conditions = config["evaluate"]["conditions"]
    told = {"controls": controls, "resamples": config["evaluate"]["resamples"], "seed": config["seed"]}
    distributed.barrier("evaluation")
    metrics = {}
    if setting.test is not None:
        scored = scoring.score(config, setting, setting.test, arms, conditions, explicit)
        metrics = evaluation.summarize(scored.scores, **told, clusters=scored.clusters)
    fusible = {name: tree for name, tree in arms.items() if name not in explicit}  # the others need the head
    sources = {part.name: score_other(config, setting, part, fusible, told) for part in setting.others}
    described = describe_sites(setting, variables["params"], fused)
    ranked = None
    if (
        isinstance(setting.task, Retrieval)
        and setting.test is not None
        and (setting.task.shown or setting.task.attributed)
    ):
        two = {"baseline": arms["baseline"], config["learner"]: arms[config["learner"]]}
        most = sorted(described, key=lambda site: -max(site["relative_change"]))[: setting.task.attributed]
        ranked = rankings.ranked(
            config,
            setting,
            setting.task,
            setting.test,
            two,
            rankings.most_changed(metrics, config["learner"]),
            params,
            [site["path"] for site in most],
            **how,
        )
    kept = spectra(config, setting, variables, directory, params, trained=exported.variables is not None, **how)
    passed = distributed.from_primary(lambda: certificate is not None and certificate.passed)
    if certificate is None:
        return {"certificate": {"passed": passed}}
    content = {
        "schema": report.SCHEMA,
        "config": config,
        "environment": environment(),
        "sites": described,
        "coverage": vars(setting.covered),
        "learning": {name: found.section for name, found in learned.items()},
        "exported": config["learner"],
        "metrics": metrics,
        "sources": sources or None,
        "unreadable": unreadable.summary(setting.parts),
        "certificate": certificate.to_json(),
        "cost": measure_cost(config, setting, variables, fused, exported, explicit),
        "spectra": kept,
        "front": exported.choice.front() if exported.choice else None,
        "ranked": ranked,
    }
    report.write_report(content, directory)
    return content


def score_other(
    config: Config, setting: Setting, part: Labelled, arms: Mapping[str, Tree], told: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the report's metrics of a further source: by its own queries, or by nearest neighbours in its gallery."""
    conditions = config["evaluate"]["conditions"]
    if part.gallery is None:
        scored, size = scoring.score(config, setting, part.test, arms, conditions), None
    else:
        how = scoring.options(config, setting)
        scored = scoring.Scored(neighbours.score_arms(setting.headless, arms, part, conditions, **how), None)
        size = len(part.gallery)
    return {"gallery": size, "metrics": evaluation.summarize(scored.scores, **told, clusters=scored.clusters)}


def spectra(
    config: Config,
    setting: Setting,
    variables: Tree,
    directory: str,
    params: Tree,
    *,
    trained: bool,
    rule: str,
    steps: int,
) -> dict[str, Any]:
    """Returns the report's `spectra`: how much of each principal axis of a site's features its denoiser keeps.

    Moments of a backbone that was `trained` beside its denoisers are taken anew, and kept apart from the run's.
    """
    path = os.path.join(directory, "trained_moments.npz" if trained else MOMENTS)
    moments = moments_of(config, setting, variables, path)
    maps = composed_maps(params, setting.sites, setting.schedule, rule=rule, steps=steps)
    return {
        site.name: closed_form.spectrum(
            moments[site.path], np.eye(site.width) + np.swapaxes(np.asarray(maps[site.path]["matrix"]), -1, -2)
        )
        for site in setting.sites
    }


def describe_sites(setting: Setting, before: Tree, after: Tree) -> list[dict[str, Any]]:
    """Returns the report's list of sites with the relative change ‖W' − W‖ / ‖W‖ of each (largest over its layers)."""
    rows = []
    for site in setting.sites:
        changes = []
        for layer in site.layers:
            old, new = (np.asarray(get_in(tree, layer.path)["kernel"], np.float64) for tree in (before, after))
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
    config: Config,
    setting: Setting,
    variables: Tree,
    fused: Tree,
    learned: Learned,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Measures FLOPs and interleaved latency of baseline, fused and explicit network, and of others, on one batch."""
    batch = config["evaluate"]["latency_batch"]
    images = jax.random.normal(jax.random.key(0), (batch, *setting.images.shape[1:]))
    backbone = setting.backbone
    plain = jax.jit(lambda v, x: backbone.apply(v, x))
    explicit = jax.jit(
        lambda v, d, x: explicit_apply(
            backbone, v, d, setting.sites, setting.schedule, x, rule=learned.rule, steps=learned.steps
        )
    )
    after = jax.device_put({**variables, "params": fused})
    before, denoise = jax.device_put(dict(variables)), jax.device_put(learned.denoise)
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
