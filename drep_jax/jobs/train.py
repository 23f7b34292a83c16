"""The main job: train or load a backbone, learn its denoisers, fuse, certify, compare with control arms, report.

Order of a run in a work directory, each step resumed or passed over if it is done already:
backbone → control arm (backbone trained on) → denoisers → fusion, certificate, export → evaluation → report.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

from drep_jax import report
from drep_jax.core.fusion import fuse_exact
from drep_jax.data import unreadable
from drep_jax.data.datasets import Labelled
from drep_jax.evaluation import knn, rankings, scoring, summary
from drep_jax.evaluation.placebo import placebo_denoisers
from drep_jax.jobs.checks import agree, check
from drep_jax.jobs.findings import describe_sites, measure_cost, spectra
from drep_jax.learners import Learned, Task, learn, train_labelled
from drep_jax.parallel import processes
from drep_jax.parallel.processes import on_primary
from drep_jax.run import workdir
from drep_jax.run.backbone import fresh_variables, read_weights
from drep_jax.run.environment import environment
from drep_jax.run.export import Output, fuse_and_certify, write
from drep_jax.run.moments import take_moments
from drep_jax.run.setup import Setting, build
from drep_jax.run.stages import key_of
from drep_jax.tasks import Retrieval
from drep_jax.training.logging import MetricWriter
from drep_jax.typing import Config, Tree


def run(config: Config, directory: str) -> dict[str, Any]:
    """Runs the whole job in `directory`, or finishes one that was begun there, and returns the report.

    Of several processes each calls this; the first one writes the directory and returns the report, the others return its
    `{"certificate": {"passed": …}}` alone.
    """
    setting = build(config)
    check(config, setting)
    agree(config, setting)
    directory = os.path.abspath(directory)
    primary = processes.primary()
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
    return train_labelled(config, setting, "backbone", fresh_variables(config, setting), directory, writer)[0]


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
    if processes.primary():
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
    processes.barrier("evaluation")
    metrics = {}
    if setting.test is not None:
        scored = scoring.score(config, setting, setting.test, arms, conditions, explicit)
        metrics = summary.summarize(scored.scores, **told, clusters=scored.clusters)
    fusible = {name: tree for name, tree in arms.items() if name not in explicit}  # the others need the head
    sources = {part.name: score_other(config, setting, part, fusible, told) for part in setting.others}
    described = describe_sites(setting, variables["params"], fused)
    ranked = None
    if (
        isinstance(setting.task, Retrieval)
        and setting.test is not None
        and (setting.task.examples or setting.task.attributed)
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
    passed = processes.from_primary(lambda: certificate is not None and certificate.passed)
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
        scored = scoring.Scored(knn.score_by_neighbors(setting.headless, arms, part, conditions, **how), None)
        size = len(part.gallery)
    return {"gallery": size, "metrics": summary.summarize(scored.scores, **told, clusters=scored.clusters)}
