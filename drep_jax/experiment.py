"""The main job: train or load a backbone, learn its denoisers, fuse, certify, compare with control arms, report.

Order of a run in a work directory, each step resumed or passed over if it is done already:
backbone → control arm (backbone trained on) → denoisers → fusion, certificate, export → evaluation → report.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax import closed_form, cost, evaluation, neighbours, report, weights, workdir
from drep_jax.builder import Setting, build, init_options
from drep_jax.closed_form import MOMENTS, Moments, load_moments
from drep_jax.data import Source, unreadable
from drep_jax.data.corruptions import parse_spec
from drep_jax.denoise_tree import get_in, site_steps
from drep_jax.denoiser import LOSSES, explicit_apply
from drep_jax.errors import ConfigError, DataError, lookup
from drep_jax.fusion import composed_maps, fuse_exact
from drep_jax.learners import LEARNERS, Learned, Task, check_labelled, check_measuring, learn, train_labelled
from drep_jax.learners.base import moments_of, owner_of
from drep_jax.machine import environment
from drep_jax.objectives import check_computing
from drep_jax.output import Output, fuse_and_certify, write
from drep_jax.placebo import placebo_denoisers
from drep_jax.recipes import check_grid
from drep_jax.sites import Path
from drep_jax.tasks import classification
from drep_jax.training import distributed, parallel
from drep_jax.training.logging import MetricWriter, check_wandb
from drep_jax.training.profile import parse_profile
from drep_jax.training.shared import on_primary
from drep_jax.training.stages import STAGES, batch_size_of, key_of, optimizer_of, section_of, training_steps

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


def check(config: Config, setting: Setting) -> None:
    """Refuses what a later stage could not use, before hours are spent on the earlier ones and before anything is written.

    Raises:
      DrepError: its subclasses name the setting.
    """
    denoise, evaluate = config["denoise"], config["evaluate"]
    for name in ("log_every", "checkpoint_every", "latency_rounds"):
        _at_least_one(name, config[name])
    for name in ("certificate_images", "latency_batch"):
        _at_least_one(f"evaluate.{name}", evaluate[name])
    for learner in (config["learner"], *config["compare"]):
        lookup(LEARNERS, learner, "learner")
    check_measuring(config)
    check_grid(config["sweep"], setting.schedule)
    lookup(LOSSES, denoise["loss"], "loss")
    parse_profile(config["profile"], "")
    check_wandb(config["wandb"])
    for name in ("tokens", "moment_tokens"):
        if not 0.0 < denoise[name] <= 1.0:
            raise ConfigError(f"denoise.{name}={denoise[name]} is a share of the feature vectors and lies in (0, 1].")
    site_steps(setting.sites, setting.schedule, denoise["rule"], denoise["steps"])
    if not config["backbone"]["init_from"] and not config["backbone"]["steps"]:
        raise ConfigError(
            "There is no backbone: give trained weights with --config.backbone.init_from=FILE, or train one from labelled "
            "images with --config.backbone.steps=N."
        )
    check_labelled(config, setting)
    asked = (config["learner"], *config["compare"])
    for stage in STAGES:
        if stage == "backbone" and config["backbone"]["init_from"]:
            continue
        section = section_of(stage)
        steps = training_steps(config, stage) if section == stage or stage in asked else 0
        batch = batch_size_of(config, stage)
        if steps < 0:
            raise ConfigError(f"{section}: the number of steps must be 0 or more, got {steps}.")
        optimizer_of(config, stage)
        if steps or stage == "algorithm1":  # whose batches serve for the moments, too
            parallel.check_batch(batch, f"{section}.batch_size")
        if steps:
            check_computing(config[section], section, setting, batch)
        if steps and section == stage and setting.features:
            raise ConfigError(
                f"Stage {stage} trains with labels, but the backbone has no head. Set --config.{stage}.steps=0."
            )
        if steps and section == stage and setting.train.num_classes is None:
            raise ConfigError(
                f"Stage {stage} trains with labels, but {setting.train.name} has none. Set --config.{stage}.steps=0."
            )
        if steps and len(setting.train) < batch:
            raise DataError(
                f"{setting.train.name} has {len(setting.train)} training images, fewer than one batch: {section}.batch_size is "
                f"{batch}."
            )
    if not denoise["moment_gib"] >= 0:
        raise ConfigError(f"denoise.moment_gib={denoise['moment_gib']} is a memory in GiB, or 0 for no limit.")
    if not 0.0 <= denoise["ema"] < 1.0:
        raise ConfigError(f"denoise.ema={denoise['ema']} is the decay of a moving average and lies in [0, 1).")
    if setting.test is not None or setting.others:
        check_evaluation(config)


def check_evaluation(config: Config) -> None:
    """Refuses settings that nothing can be evaluated with.

    Raises:
      ConfigError: naming the setting.
    """
    evaluate = config["evaluate"]
    parallel.check_batch(evaluate["batch_size"], "evaluate.batch_size")
    if evaluate["resamples"] < 100:
        raise ConfigError(f"evaluate.resamples={evaluate['resamples']}: at least 100 are needed for an interval.")
    if not evaluate["conditions"]:
        raise ConfigError('evaluate.conditions is empty; give at least "clean".')
    for condition in evaluate["conditions"]:
        parse_spec(condition)


def agree(config: Config, setting: Setting) -> None:
    """Refuses processes of one run that have other settings, images, devices or versions than the first.

    Raises:
      ConfigError: naming the process and what differs.
    """
    if distributed.alone():
        return
    settings = {name: value for name, value in workdir.flatten(config).items() if name != "progress"}
    distributed.check_same("configuration", settings)
    sources = {"train": setting.train, "validation": setting.held_out, "test": setting.test}
    images = {split: _described(source) for split, source in sources.items() if source is not None}
    distributed.check_same("data", images)
    there = environment()
    machine = {name: there[name] for name in ("drep_jax", "jax", "flax", "device")}
    distributed.check_same("environment", {**machine, "local devices": parallel.local_device_count()})


def _described(source: Source) -> str:
    """Returns what tells two sources apart: their names, sizes, and the first and the last image."""
    digest = hashlib.sha256()
    for place in dict.fromkeys((0, len(source) - 1)) if len(source) else ():
        item = source[place]
        digest.update(np.ascontiguousarray(item["image"]).tobytes() + str(item.get("label")).encode())
    return f"{source.name}, {len(source)} images, {source.num_classes} classes, {digest.hexdigest()[:12]}"


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value} must be at least 1.")


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
        if found.sites is not None:
            explicit[name] = explicit_network(setting, found)
            arms[name] = own
        elif found is exported:
            arms[name] = {**own, "params": fused}
        elif name not in arms:  # the control arm as a learner is that very arm
            other = {"backbone": own["params"], "denoise": found.denoise}
            numbers = fuse_exact(other, setting.sites, setting.schedule, rule=found.rule, steps=found.steps)
            arms[name] = {**own, "params": numbers}
    evaluate, seed = config["evaluate"], config["seed"]
    images = {"batch_size": evaluate["batch_size"], "mean": setting.mean, "std": setting.std, "seed": seed}
    told = {"controls": controls, "resamples": evaluate["resamples"], "seed": seed}
    metrics = {}
    distributed.barrier("evaluation")
    if setting.test is not None:
        scores = evaluation.score_arms(
            setting.backbone,
            arms,
            setting.test,
            evaluate["conditions"],
            classification.scores,
            networks=explicit,
            **images,
        )
        metrics = evaluation.summarize(scores, **told)
    sources = {}
    fusible = {name: tree for name, tree in arms.items() if name not in explicit}  # the others need the head
    for part in setting.others:
        scores = neighbours.score_arms(setting.headless, fusible, part, evaluate["conditions"], **images)
        sources[part.name] = {"gallery": len(part.gallery), "metrics": evaluation.summarize(scores, **told)}
    kept = spectra(config, setting, variables, directory, params, trained=exported.variables is not None, **how)
    passed = distributed.from_primary(lambda: certificate is not None and certificate.passed)
    if certificate is None:
        return {"certificate": {"passed": passed}}
    content = {
        "schema": report.SCHEMA,
        "config": config,
        "environment": environment(),
        "sites": describe_sites(setting, variables["params"], fused),
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
    }
    report.write_report(content, directory)
    return content


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


def explicit_network(setting: Setting, learned: Learned) -> Any:
    """Returns (variables, images) ↦ outputs of a network whose denoisers are not fused."""
    sites = setting.sites if learned.sites is None else learned.sites

    def network(variables: Tree, images: Any) -> Any:
        return explicit_apply(
            setting.backbone,
            variables,
            learned.denoise,
            sites,
            setting.schedule,
            images,
            rule=learned.rule,
            steps=learned.steps,
        )

    return network


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
