"""The main job: train or load a backbone, learn its denoisers, fuse, certify, compare with control arms, report.

Order of a run in a work directory, each step resumed or passed over if it is done already:
backbone → control arm (backbone trained on) → denoisers → fusion, certificate, export → evaluation → report.
"""

import itertools
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from drep_jax import closed_form, cost, evaluation, report, weights, workdir
from drep_jax.builder import Setting, build, respaced
from drep_jax.certificate import Certificate, certify
from drep_jax.closed_form import MOMENTS, Moments, load_moments, save_moments
from drep_jax.data.corruptions import parse_spec
from drep_jax.data.loader import evaluation_batches, normalize, training_batches
from drep_jax.denoise_tree import check_finite, get_in, init_denoise, sample_noise, site_steps
from drep_jax.denoiser import LOSSES, explicit_apply
from drep_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, did_you_mean, lookup
from drep_jax.fusion import composed_maps, fuse_exact, survival
from drep_jax.learners import DIRECT, LEARNERS, Learned, Task, check_measuring, denoising_objective, learn
from drep_jax.placebo import placebo_denoisers
from drep_jax.recipes import WIENER, Recipe, as_affine, check_grid, check_rule
from drep_jax.selection import scaled
from drep_jax.sites import Path
from drep_jax.tasks import classification
from drep_jax.training import parallel
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.logging import MetricWriter
from drep_jax.training.moments import collect_moments
from drep_jax.training.stages import STAGES, key_of, optimizer_of, prepare, run_training, section_of, training_steps
from drep_jax.training.state import make_step

Tree = Any
Config = Mapping[str, Any]

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Types that fused weights can be stored in."""


def run(config: Config, directory: str) -> dict[str, Any]:
    """Runs the whole job in `directory`, or finishes one that was begun there, and returns the report."""
    setting = build(config)
    check(config, setting)
    directory = os.path.abspath(directory)
    workdir.claim(directory, config)
    writer = MetricWriter(directory)
    try:
        variables = make_backbone(config, setting, directory, writer)
        arms = {"baseline": variables}
        if config["control"]["steps"]:
            arms["continued"] = train_labelled(config, setting, "control", variables, directory, writer)
        learned = learn_all(config, setting, variables, directory, writer)
    finally:
        writer.close()
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
    for name in ("tokens", "moment_tokens"):
        if not 0.0 < denoise[name] <= 1.0:
            raise ConfigError(f"denoise.{name}={denoise[name]} is a share of the feature vectors and lies in (0, 1].")
    site_steps(setting.sites, setting.schedule, denoise["rule"], denoise["steps"])
    if not config["backbone"]["init_from"] and not config["backbone"]["steps"]:
        raise ConfigError(
            "There is no backbone: give trained weights with --config.backbone.init_from=FILE, or train one from labelled "
            "images with --config.backbone.steps=N."
        )
    for stage in STAGES:
        if stage == "backbone" and config["backbone"]["init_from"]:
            continue
        section = section_of(stage)
        used = section == stage or stage in (config["learner"], *config["compare"])
        steps, batch = training_steps(config, stage) if used else 0, config[section]["batch_size"]
        if steps < 0:
            raise ConfigError(f"{section}: the number of steps must be 0 or more, got {steps}.")
        optimizer_of(config, stage)
        if steps or section == "denoise":  # whose batches serve for the moments, too
            parallel.check_batch(batch, f"{section}.batch_size")
        if steps and section == stage and setting.train.num_classes is None:
            raise ConfigError(
                f"Stage {stage} trains with labels, but {setting.train.name} has none. Set --config.{stage}.steps=0."
            )
        if steps and len(setting.train) < batch:
            raise DataError(
                f"{setting.train.name} has {len(setting.train)} training images, fewer than one batch: {section}.batch_size is "
                f"{batch}."
            )
    if setting.test is not None:
        parallel.check_batch(evaluate["batch_size"], "evaluate.batch_size")
        if evaluate["resamples"] < 100:
            raise ConfigError(f"evaluate.resamples={evaluate['resamples']}: at least 100 are needed for an interval.")
        if not evaluate["conditions"]:
            raise ConfigError('evaluate.conditions is empty; give at least "clean".')
        for condition in evaluate["conditions"]:
            parse_spec(condition)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value} must be at least 1.")


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def make_backbone(config: Config, setting: Setting, directory: str, writer: MetricWriter) -> Tree:
    """Loads the backbone's weights, or trains them from scratch."""
    if path := config["backbone"]["init_from"]:
        return weights.load(path, setting.abstract)
    fresh = jax.jit(setting.backbone.init)(key_of(config, "init"), jnp.zeros(setting.images.shape))
    return train_labelled(config, setting, "backbone", dict(fresh), directory, writer)


def train_labelled(
    config: Config, setting: Setting, stage: str, variables: Tree, directory: str, writer: MetricWriter
) -> Tree:
    """Trains the whole backbone with labels; stage "control" is the arm without denoising of equal budget."""
    options = config[stage]
    others = {name: tree for name, tree in variables.items() if name != "params"}
    backbone = setting.backbone
    if getattr(backbone, "axis_name", "") is None:  # batch statistics of the whole batch, on however many devices
        backbone = backbone.clone(axis_name=parallel.AXIS)

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        images = normalize(batch["image"], setting.mean, setting.std)
        rngs = {"dropout": jax.random.fold_in(key, parallel.device_index())}
        logits, updated = backbone.apply(
            {**others, "params": params["backbone"]}, images, train=True, rngs=rngs, mutable=list(others)
        )
        hits = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        loss = classification.loss(logits, batch["label"], options["label_smoothing"])
        return loss, ({"accuracy": hits}, dict(updated))

    params = {"backbone": variables["params"]}
    state = run_training(config, setting.train, stage, params, others, ("backbone",), loss_fn, directory, writer)[0]
    return {**state.others, "params": state.params["backbone"]}


def learn_all(
    config: Config, setting: Setting, variables: Tree, directory: str, writer: MetricWriter
) -> dict[str, Learned]:
    """Learns the denoisers without labels on the frozen backbone by every learner asked for, the exported one last."""
    began = time.perf_counter()
    moments = take_moments(config, setting, variables, directory)
    task = Task(config, setting, variables, moments, time.perf_counter() - began, directory, writer)
    names = dict.fromkeys([*(name for name in config["compare"] if name != config["learner"]), config["learner"]])
    return {name: learn(name, task) for name in names}


def take_moments(config: Config, setting: Setting, variables: Tree, directory: str) -> dict[Path, Moments]:
    """Returns the moments of the sites' features over the training images, from the run's own file if it has them."""
    path = os.path.join(directory, MOMENTS)
    if os.path.exists(path):
        return saved_moments(config, setting, variables, directory)
    batch = config["denoise"]["batch_size"]
    limit = config["denoise"]["moment_images"] or len(setting.train)
    count = min(-(-limit // batch), -(-len(setting.train) // batch))
    first = itertools.islice(evaluation_batches(setting.train, batch), count)
    bar = tqdm.tqdm(first, "moments", count, unit="batch", disable=not config["progress"])
    batches = ((normalize(b["image"], setting.mean, setting.std), b["mask"].astype(np.float32)) for b in bar)
    tokens = config["denoise"]["moment_tokens"]
    moments = collect_moments(setting.backbone, variables, setting.sites, batches, tokens=tokens, seed=config["seed"])
    save_moments(path, moments, _owner(setting, variables), tokens)
    return moments


def saved_moments(config: Config, setting: Setting, variables: Tree, directory: str) -> dict[Path, Moments]:
    """Returns the moments that a run has kept.

    Raises:
      CheckpointError: if there are none, or they are of another backbone, image size, share of the tokens or choice of sites.
    """
    path, tokens = os.path.join(directory, MOMENTS), config["denoise"]["moment_tokens"]
    return load_moments(path, setting.sites, _owner(setting, variables), tokens)


def _owner(setting: Setting, variables: Tree) -> str:
    """Names whose features the moments describe: a convolutional backbone alone does not tell the image size."""
    height, width = setting.images.shape[1:3]
    return f"{weights.digest(variables)} {height}x{width}"


# ---------------------------------------------------------------------------------------------------------------------
# Fusion and what is said about it
# ---------------------------------------------------------------------------------------------------------------------


def finish(
    config: Config, setting: Setting, directory: str, arms: dict[str, Tree], learned: Mapping[str, Learned]
) -> dict[str, Any]:
    """Fuses, certifies, exports, evaluates all arms and writes the report."""
    variables = arms["baseline"]
    exported = learned[config["learner"]]
    denoise = exported.denoise
    how: dict[str, Any] = {"rule": exported.rule, "steps": exported.steps}
    fused, certificate = fuse_and_certify(config, setting, variables, denoise, **how)
    export(os.path.join(directory, "fused"), variables, fused, setting=setting, **how)
    params = {"backbone": variables["params"], "denoise": denoise}
    random_maps = placebo_denoisers(params, setting.sites, setting.schedule, key_of(config, "placebo"), **how)
    placebo = fuse_exact({**params, "denoise": random_maps}, setting.sites, setting.schedule, rule="affine", steps=1)
    arms = {
        "baseline": variables,
        "placebo": {**variables, "params": placebo},
        **{name: tree for name, tree in arms.items() if name != "baseline"},
    }
    controls = [name for name in arms if name != "baseline"]
    for name, found in learned.items():
        other = {"backbone": variables["params"], "denoise": found.denoise}
        numbers = fused
        if found is not exported:
            numbers = fuse_exact(other, setting.sites, setting.schedule, rule=found.rule, steps=found.steps)
        arms[name] = {**variables, "params": numbers}
    metrics = {}
    if setting.test is not None:
        evaluate = config["evaluate"]
        scores = evaluation.score_arms(
            setting.backbone,
            arms,
            setting.test,
            evaluate["conditions"],
            classification.scores,
            batch_size=evaluate["batch_size"],
            mean=setting.mean,
            std=setting.std,
            seed=config["seed"],
        )
        metrics = evaluation.summarize(scores, controls=controls, resamples=evaluate["resamples"], seed=config["seed"])
    content = {
        "schema": report.SCHEMA,
        "config": config,
        "environment": workdir.environment(),
        "sites": describe_sites(setting, variables["params"], fused),
        "coverage": vars(setting.covered),
        "learning": {name: found.section for name, found in learned.items()},
        "exported": config["learner"],
        "metrics": metrics,
        "certificate": certificate.to_json(),
        "cost": measure_cost(config, setting, variables, fused, exported),
        "spectra": spectra(config, setting, variables, directory, params, **how),
        "front": exported.choice.front() if exported.choice else None,
    }
    report.write_report(content, directory)
    return content


def spectra(
    config: Config, setting: Setting, variables: Tree, directory: str, params: Tree, *, rule: str, steps: int
) -> dict[str, Any]:
    """Returns the report's `spectra`: how much of each principal axis of a site's features its denoiser keeps."""
    moments = take_moments(config, setting, variables, directory)
    maps = composed_maps(params, setting.sites, setting.schedule, rule=rule, steps=steps)
    return {
        site.name: closed_form.spectrum(
            moments[site.path], np.eye(site.width) + np.swapaxes(np.asarray(maps[site.path]["matrix"]), -1, -2)
        )
        for site in setting.sites
    }


def fuse_and_certify(
    config: Config, setting: Setting, variables: Tree, denoise: Tree, *, rule: str, steps: int
) -> tuple[Tree, Certificate]:
    """Returns the fused parameters, rounded once to their own types, and their certificate on real images."""
    params = {"backbone": variables["params"], "denoise": denoise}
    fused = fuse_exact(params, setting.sites, setting.schedule, rule=rule, steps=steps)
    images = certificate_images(config, setting)
    certificate = certify(
        setting.backbone,
        variables,
        denoise,
        setting.sites,
        setting.schedule,
        images,
        rule=rule,
        steps=steps,
        fused=fused,
    )
    return fused, certificate


def certificate_images(config: Config, setting: Setting) -> jax.Array:
    """Returns the first few test images (training images if there is no test set), normalised."""
    source = setting.test if setting.test is not None else setting.train
    count = min(config["evaluate"]["certificate_images"], len(source))
    return normalize(jnp.stack([source[i]["image"] for i in range(count)]), setting.mean, setting.std)


def export(
    directory: str,
    variables: Tree,
    fused: Tree,
    *,
    rule: str,
    steps: int,
    setting: Setting,
    strength: float = 1.0,
    dtype: str | None = None,
    allow_rounding: bool = False,
    exact: Tree | None = None,
) -> None:
    """Writes the plain backbone with fused weights: `orbax/` and `fused.safetensors` in `directory`.

    Args:
      directory: made if absent.
      variables: the unfused backbone's.
      fused: fused parameters.
      rule, steps, setting, strength: recorded in the files.
      dtype: storage type; None keeps each parameter's own.
      allow_rounding: write even if less than 90 % of the change survives the type.
      exact: fused parameters in float64, to measure that against; needed with `dtype`.

    Raises:
      CheckpointError: if rounding would lose more than 10 % of the change.
    """
    stored = fused
    if dtype is not None:
        stored = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf).astype(dtype), fused if exact is None else exact)
        kept = survival(variables["params"], exact if exact is not None else fused, stored)
        print(f"Stored as {dtype}, {100 * kept.share:.1f} % of the change survives (worst: {kept.worst_layer}).")
        if kept.share < 0.9 and not allow_rounding:
            raise CheckpointError(
                f"Storing as {dtype} rounds away {100 * (1 - kept.share):.0f} % of what fusion changed; the network would be "
                "the backbone with rounding noise. Keep float32, or insist with --allow_rounding."
            )
    times = {site.name: [*site.times] for site in setting.sites}
    fusion = {"rule": rule, "steps": steps, "strength": strength, "sites": times}
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write weights to {directory}: {error.strerror}.") from error
    everything = {**variables, "params": stored}
    weights.save_safetensors(os.path.join(directory, "fused.safetensors"), everything, fusion)
    weights.save_orbax(os.path.join(directory, "orbax"), everything, fusion)


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


def measure_cost(config: Config, setting: Setting, variables: Tree, fused: Tree, learned: Learned) -> dict[str, Any]:
    """Measures FLOPs and interleaved latency of baseline, fused and explicit network on one batch."""
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
    times = cost.interleaved(
        {
            "baseline": lambda: plain(before, images),
            "fused": lambda: plain(after, images),
            "explicit": lambda: explicit(before, denoise, images),
        },
        rounds=config["latency_rounds"],
    )
    flops = {
        "baseline": cost.flops(plain, before, images),
        "fused": cost.flops(plain, after, images),
        "explicit": cost.flops(explicit, before, denoise, images),
    }
    count = {
        name: sum(leaf.size for leaf in jax.tree_util.tree_leaves(tree))
        for name, tree in {"backbone": variables["params"], "denoise": denoise}.items()
    }
    return {
        "flops": flops,
        "flop_ratio": {name: flops[name] / flops["baseline"] for name in ("fused", "explicit")},
        "latency_ms": {name: 1e3 * float(np.median(values)) for name, values in times.items()},
        "latency_ratio": {name: r for name, r in cost.ratios(times, "baseline").items() if name != "baseline"},
        "parameters": count,
        "batch": batch,
    }


# ---------------------------------------------------------------------------------------------------------------------
# A finished run
# ---------------------------------------------------------------------------------------------------------------------


def load_run(directory: str) -> tuple[Config, Setting, Tree, Tree]:
    """Returns configuration, setting, backbone variables and denoisers of a finished run.

    Raises:
      CheckpointError: if the run is absent, not finished, or damaged.
    """
    config = workdir.read_config(directory)
    setting = build(config)
    variables = setting.abstract
    zeros = jax.tree_util.tree_map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(variables))
    params = {"backbone": zeros.pop("params"), "denoise": init_denoise(setting.sites)}
    stage = config["learner"]
    state, frozen, _ = prepare(config, stage, params, zeros, ("denoise",))
    wanted = training_steps(config, stage)
    folder = os.path.join(directory, "checkpoints", stage)
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{directory} holds no learned denoisers yet; run train.py with --workdir={directory} first."
        )
    checkpointer = Checkpointer(folder)
    try:
        state, frozen, _ = checkpointer.restore(state, frozen)
    finally:
        checkpointer.close()
    if int(state.step) < wanted:
        raise CheckpointError(
            f"The denoisers in {directory} are at step {int(state.step)} of {wanted}; finish the run first: "
            f"train.py with --workdir={directory}."
        )
    return config, setting, {**state.others, "params": frozen["backbone"]}, state.params["denoise"]


def refuse(
    directory: str,
    out: str,
    *,
    rule: str | None = None,
    steps: int | None = None,
    time_scale: float | None = None,
    beta_end: float | None = None,
    strength: float = 1.0,
    resolve: bool = False,
    noise: str = "zero",
    seed: int = 0,
    dtype: str | None = None,
    allow_rounding: bool = False,
) -> Certificate:
    """Fuses a finished run again, without training, and writes weights and certificate to `out`.

    A denoiser belongs to its time step. Where the run took Algorithm 1's minimum (learner `closed_form`), or with
    `resolve`, it is solved anew for what is asked, from the run's moments and without images; what was trained can be
    fused by another rule or with fewer steps only.

    Args:
      directory: of the run.
      out: where to write.
      rule, steps, time_scale, beta_end: None for the run's own; with new denoisers the rule may also be `wiener:r`.
      strength: τ, how much of the fusion is taken.
      resolve: whether the denoisers are to be solved anew whatever the run's learner.
      noise: "zero", or "sample" for a z drawn once from `seed` and kept in the weights.
      seed: of that draw.
      dtype, allow_rounding: see `export`.
    """
    if noise not in ("zero", "sample"):
        raise ConfigError(f'Unknown noise "{noise}"; it is "zero" or "sample".')
    check_dtype(dtype)
    if not (np.isfinite(strength) and strength >= 0):
        raise ConfigError(f"The strength must be a number of at least 0, got {strength}.")
    config, setting, variables, denoise = load_run(directory)
    check_finite({"backbone": variables, "denoise": denoise}, "Refusing to fuse")
    asked = {"rule": rule, "steps": steps, "time_scale": time_scale, "beta_end": beta_end}
    asked = {name: value for name, value in asked.items() if value is not None}
    if resolve or (asked and config["learner"] == "closed_form"):
        setting, denoise, how = solve_again(directory, config, setting, variables, asked)
    else:
        how = _as_learned(directory, config, asked, noise)
    recorded = {"rule": how["rule"], "steps": how["steps"], "strength": strength}
    if how["rule"].startswith(WIENER):
        how = {"rule": "affine", "steps": 1}
        if noise == "sample":
            raise ConfigError(f"Rule {recorded['rule']} is one step without noise, so --noise=sample does not apply.")
    if noise == "sample":
        denoise = sample_noise(denoise, setting.sites, jax.random.key(seed))
    if strength != 1.0:
        denoise = scaled(as_affine(denoise, setting.sites, setting.schedule, **how), strength)
        how = {"rule": "affine", "steps": 1}
    return fuse_and_export(
        config, setting, variables, denoise, out, how, recorded, dtype=dtype, allow_rounding=allow_rounding
    )


def check_dtype(dtype: str | None) -> None:
    """Refuses a storage type that is not one of `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f'Unknown storage type "{dtype}".{did_you_mean(dtype, DTYPES)}')


def _as_learned(directory: str, config: Config, asked: Mapping[str, Any], noise: str) -> dict[str, Any]:
    """Returns rule and steps for the denoisers that the run learned, or refuses what they were not learned for."""
    direct = config["learner"] in DIRECT
    own = {**config["denoise"], "beta_end": config["schedule"]["beta_end"]}
    if direct:
        own.update(rule="affine", steps=1)
    resolve = "Add --resolve to take the closed form from the run's moments instead."
    changed = [name for name, value in asked.items() if value != own[name]]
    if direct and (changed or noise == "sample"):
        raise ConfigError(
            f"The run in {directory} learned its maps directly ({config['learner']}): they are one step without noise, so "
            f"--rule, --steps, --time_scale, --beta_end and --noise=sample do not apply. {resolve}"
        )
    rule, steps = asked.get("rule", own["rule"]), asked.get("steps", own["steps"])
    if moved := [name for name in changed if name in ("time_scale", "beta_end")]:
        raise ConfigError(
            f"The run in {directory} trained its denoisers at {' and '.join(f'{name}={own[name]:g}' for name in moved)}, and "
            f"a denoiser belongs to its time step. {resolve}"
        )
    if steps > own["steps"]:
        raise ConfigError(
            f"{steps} steps a site need denoisers of other time steps (t falls by {steps} from site to site); these were "
            f"learned with {own['steps']}. {resolve}"
        )
    if rule.startswith(WIENER):
        raise ConfigError(f'Rule "{rule}" needs other denoisers than those that were trained. {resolve}')
    if rule == "affine" and not direct:
        raise ConfigError(
            'Rule "affine" is for maps given directly; these denoisers predict noise. Use ddpm, paper or ddim.'
        )
    return {"rule": rule, "steps": steps}


def solve_again(
    directory: str, config: Config, setting: Setting, variables: Tree, asked: Mapping[str, Any]
) -> tuple[Setting, Tree, dict[str, Any]]:
    """Solves Algorithm 1's minimum, or a Wiener filter, from the moments of a run, for other time steps, schedule or rule.

    Args:
      directory, config, setting, variables: of the run.
      asked: any of rule, steps, time_scale and beta_end; the run's own for the others.

    Returns:
      The setting with these time steps, the denoisers, and their rule and steps.
    """
    began = time.perf_counter()
    own = config["denoise"]
    rule = asked.get("rule", own["rule"])
    check_rule(rule, setting.schedule)
    moments = saved_moments(config, setting, variables, directory)
    if (ratio := Recipe(rule).ratio) is not None:
        if useless := [f"--{name}" for name in asked if name != "rule"]:
            raise ConfigError(f"Rule {rule} has no time steps, so {', '.join(useless)} would change nothing.")
        steps, where = 1, f"noise of {ratio:g} times each site's feature power"
        denoise = closed_form.wiener_maps(moments, setting.sites, ratio)
    else:
        steps = asked.get("steps", own["steps"])
        scale = asked.get("time_scale", own["time_scale"])
        setting = respaced(setting, steps=steps, time_scale=scale, beta_end=asked.get("beta_end"))
        site_steps(setting.sites, setting.schedule, rule, steps)
        times = [t for site in setting.sites for t in site.times]
        where = f"t = {max(times)}…{min(times)}"
        denoise = closed_form.closed_form(moments, setting.sites, setting.schedule)
    seconds = time.perf_counter() - began
    print(f"Denoisers solved anew for {where} from the run's moments, without images, in {seconds:.1f} s.")
    return setting, denoise, {"rule": rule, "steps": steps}


def fuse_and_export(
    config: Config,
    setting: Setting,
    variables: Tree,
    denoise: Tree,
    out: str,
    how: Mapping[str, Any],
    recorded: Mapping[str, Any],
    *,
    dtype: str | None,
    allow_rounding: bool,
) -> Certificate:
    """Fuses in float64, certifies and writes weights and certificate to `out`; `how` is fused, `recorded` is written down."""
    fused, certificate = fuse_and_certify(config, setting, variables, denoise, **how)
    exact = None
    if dtype is not None:
        params = {"backbone": variables["params"], "denoise": denoise}
        exact = fuse_exact(params, setting.sites, setting.schedule, round_back=False, **how)
    if not all(np.isfinite(figure.error) for figure in certificate.end_to_end.values()):
        told = f"rule {recorded['rule']}, {recorded['steps']} step(s) and strength {recorded['strength']:g}"
        raise NonFiniteError(
            f"With {told} the fused network gives NaN or Inf on real images; nothing was written. Take a smaller "
            "strength or time steps."
        )
    options: dict[str, Any] = {"dtype": dtype, "allow_rounding": allow_rounding, "exact": exact}
    export(out, variables, fused, setting=setting, **recorded, **options)
    workdir.write_json(os.path.join(out, "certificate.json"), certificate.to_json())
    return certificate


# ---------------------------------------------------------------------------------------------------------------------
# Dry run
# ---------------------------------------------------------------------------------------------------------------------


def dry_run(config: Config) -> str:
    """Takes two label-free steps of the full-size job on random images and returns what it needs, as text."""
    _at_least_one("dry_run_batch", config["dry_run_batch"])
    classes = config["model"].get("num_classes") or 1000
    size = parallel.device_count() * config["dry_run_batch"]
    data = {**config["data"], "source": f"random:{max(64, size)}:{classes}"}
    config = {**config, "data": data, "denoise": {**config["denoise"], "batch_size": size}}
    setting = build(config)
    variables = jax.jit(setting.backbone.init)(key_of(config, "init"), jnp.zeros(setting.images.shape))
    total = {n: sum(x.size for x in jax.tree_util.tree_leaves(t)) for n, t in dict(variables).items()}
    denoise = init_denoise(setting.sites)
    added = sum(x.size for x in jax.tree_util.tree_leaves(denoise))
    lines = [
        f"Model {config['model']['name']}, {total['params']:,} parameters; {added:,} more in {len(setting.sites)} denoisers "
        f"while learning, none after fusion.",
        f"Sites cover {setting.covered.layers} of {setting.covered.candidates} linear layers, "
        f"{100 * setting.covered.kernel_share:.0f} % of the weights.",
        "",
    ]
    lines += [
        f"  t={','.join(map(str, site.times)):>5s}  {site.kind:9s} d={site.width:<5d} {', '.join(x.name for x in site.layers)}"
        for site in setting.sites
    ]
    text = "\n".join(lines)
    print(text, flush=True)

    options = config["denoise"]
    params = {"backbone": dict(variables)["params"], "denoise": denoise}
    others = {name: tree for name, tree in dict(variables).items() if name != "params"}
    state, frozen, tx = prepare(config, "algorithm1", params, others, ("denoise",))

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return denoising_objective(setting, options, params, others, batch, key)

    step = make_step(loss_fn, tx)
    state, kept = parallel.replicate(state), parallel.replicate(frozen)
    seconds = []
    for number, batch in zip(range(2), training_batches(setting.train, size, seed=0), strict=False):
        began = time.perf_counter()
        state, metrics = step(state, kept, parallel.shard(batch))
        loss = float(parallel.unreplicate(metrics)["loss"])
        seconds.append(time.perf_counter() - began)
        print(
            f"  step {number + 1}: loss {loss:.3f}, {seconds[-1]:.2f} s{' (compiling included)' if not number else ''}"
        )
    more = (
        f"\nBatch {size} on {parallel.device_count()} device(s): {seconds[1]:.2f} s a step, {size / seconds[1]:.1f} images/s; "
        f"peak memory {cost.peak_memory() / 2**30:.2f} GiB."
    )
    print(more)
    return text + more
