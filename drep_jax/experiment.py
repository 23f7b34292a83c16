"""The main job: train or load a backbone, learn its denoisers, fuse, certify, compare with control arms, report.

Order of a run in a work directory, each step resumed or passed over if it is done already:
backbone → control arm (backbone trained on) → denoisers → fusion, certificate, export → evaluation → report.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from drep_jax import closed_form, cost, evaluation, report, weights, workdir
from drep_jax.builder import Setting, build
from drep_jax.certificate import Certificate, certify
from drep_jax.closed_form import MOMENTS, Moments, load_moments, save_moments
from drep_jax.data.corruptions import parse_spec
from drep_jax.data.loader import evaluation_batches, normalize, training_batches
from drep_jax.denoise_tree import check_finite, get_in, init_denoise, sample_noise, site_steps
from drep_jax.denoiser import LOSSES, algorithm1_losses, explicit_apply
from drep_jax.errors import CheckpointError, ConfigError, DataError, did_you_mean, lookup
from drep_jax.fusion import fuse_exact, survival
from drep_jax.placebo import placebo_denoisers
from drep_jax.sites import Path
from drep_jax.tasks import classification
from drep_jax.training import parallel
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.logging import FILE, MetricWriter, read_metrics
from drep_jax.training.loop import run_stage
from drep_jax.training.moments import collect_moments
from drep_jax.training.state import create_state, make_optimizer, make_step, partitioned, split

Tree = Any
Config = Mapping[str, Any]

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Types that fused weights can be stored in."""

STAGES = ("backbone", "control", "denoise")
"""Training stages; each keeps its checkpoints in `checkpoints/<stage>` and draws from a key of its own."""


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
        denoise, learning = learn_denoisers(config, setting, variables, directory, writer)
    finally:
        writer.close()
    return finish(config, setting, directory, arms, denoise, learning)


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
    lookup(LEARNERS, denoise["learner"], "learner")
    lookup(LOSSES, denoise["loss"], "loss")
    if not 0.0 < denoise["tokens"] <= 1.0:
        raise ConfigError(f"denoise.tokens={denoise['tokens']} is a share of the feature vectors and lies in (0, 1].")
    site_steps(setting.sites, setting.schedule, denoise["rule"], denoise["steps"])
    if not config["backbone"]["init_from"] and not config["backbone"]["steps"]:
        raise ConfigError(
            "There is no backbone: give trained weights with --config.backbone.init_from=FILE, or train one from labelled "
            "images with --config.backbone.steps=N."
        )
    for stage in STAGES:
        if stage == "backbone" and config["backbone"]["init_from"]:
            continue
        steps, batch = _steps(config, stage), config[stage]["batch_size"]
        if steps < 0:
            raise ConfigError(f"{stage}: the number of steps must be 0 or more, got {steps}.")
        _optimizer(config, stage)
        if steps or stage == "denoise":
            parallel.check_batch(batch, f"{stage}.batch_size")
        if steps and stage != "denoise" and setting.train.num_classes is None:
            raise ConfigError(
                f"Stage {stage} trains with labels, but {setting.train.name} has none. Set --config.{stage}.steps=0."
            )
        if steps and len(setting.train) < batch:
            raise DataError(
                f"{setting.train.name} has {len(setting.train)} training images, fewer than one batch: {stage}.batch_size is "
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
    fresh = jax.jit(setting.backbone.init)(_key(config, "init"), jnp.zeros(setting.images.shape))
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
    state = _train(config, setting, stage, params, others, ("backbone",), loss_fn, directory, writer)[0]
    return {**state.others, "params": state.params["backbone"]}


def learn_denoisers(
    config: Config, setting: Setting, variables: Tree, directory: str, writer: MetricWriter
) -> tuple[Tree, dict[str, Any]]:
    """Learns the denoisers without labels on the frozen backbone, by Algorithm 1 or as its global minimum.

    Returns:
      The `denoise` subtree, and the report's section on learning.
    """
    learner = lookup(LEARNERS, config["denoise"]["learner"], "learner")
    began = time.perf_counter()
    moments = take_moments(config, setting, variables, directory)
    pass_seconds = time.perf_counter() - began
    optimum = closed_form.expected_losses(moments, setting.sites, setting.schedule)
    denoise, learning = learner(config, setting, variables, moments, directory, writer)
    start = closed_form.expected_losses(moments, setting.sites, setting.schedule, init_denoise(setting.sites))
    final = closed_form.expected_losses(moments, setting.sites, setting.schedule, denoise)
    return denoise, {
        "learner": config["denoise"]["learner"],
        **learning,
        "moment_seconds": pass_seconds,
        "per_site": {name: [start[name], final[name]] for name in start},
        "optimum": optimum,
        "images": len(setting.train),
    }


def take_moments(config: Config, setting: Setting, variables: Tree, directory: str) -> dict[Path, Moments]:
    """Returns the moments of the sites' features over the training images, from the run's own file if it has them."""
    path = os.path.join(directory, MOMENTS)
    owner = weights.digest(variables)
    if os.path.exists(path):
        return load_moments(path, setting.sites, owner)
    batch = config["denoise"]["batch_size"]
    limit = config["denoise"]["moment_images"] or len(setting.train)
    count = min(-(-limit // batch), -(-len(setting.train) // batch))
    first = itertools.islice(evaluation_batches(setting.train, batch), count)
    bar = tqdm.tqdm(first, "moments", count, unit="batch", disable=not config["progress"])
    batches = ((normalize(b["image"], setting.mean, setting.std), b["mask"].astype(np.float32)) for b in bar)
    moments = collect_moments(setting.backbone, variables, setting.sites, batches)
    save_moments(path, moments, owner)
    return moments


def _by_algorithm1(
    config: Config,
    setting: Setting,
    variables: Tree,
    moments: Mapping[Path, Moments],
    directory: str,
    writer: MetricWriter,
) -> tuple[Tree, dict[str, Any]]:
    options = config["denoise"]
    others = {name: tree for name, tree in variables.items() if name != "params"}
    least = sum(closed_form.expected_losses(moments, setting.sites, setting.schedule).values())

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return denoising_objective(setting, options, params, others, batch, key)

    def gap(params: Tree) -> dict[str, float]:
        now = closed_form.expected_losses(moments, setting.sites, setting.schedule, params["denoise"])
        return {"gap": sum(now.values()) - least}

    params = {"backbone": variables["params"], "denoise": init_denoise(setting.sites)}
    state, seconds = _train(
        config, setting, "denoise", params, others, ("denoise",), loss_fn, directory, writer, probe=gap
    )
    lines = [line for line in read_metrics(os.path.join(directory, FILE)) if line["stage"] == "denoise"]
    curve = [[line["step"], line["loss"]] for line in lines]
    return state.params["denoise"], {"steps": int(state.step), "seconds": seconds, "loss": curve}


def _by_closed_form(
    config: Config,
    setting: Setting,
    variables: Tree,
    moments: Mapping[Path, Moments],
    directory: str,
    writer: MetricWriter,
) -> tuple[Tree, dict[str, Any]]:
    began = time.perf_counter()
    solved = closed_form.closed_form(moments, setting.sites, setting.schedule)
    others = {name: tree for name, tree in variables.items() if name != "params"}
    params = {"backbone": variables["params"], "denoise": solved}
    state, frozen, _ = _start(config, "denoise", params, others, ("denoise",))
    checkpointer = Checkpointer(os.path.join(directory, "checkpoints", "denoise"))
    try:
        checkpointer.save(state, frozen, {"stage": "denoise"})
    finally:
        checkpointer.close()
    return solved, {"steps": 0, "seconds": time.perf_counter() - began, "loss": []}


LEARNERS: dict[str, Callable[..., tuple[Tree, dict[str, Any]]]] = {
    "algorithm1": _by_algorithm1,
    "closed_form": _by_closed_form,
}


def denoising_objective(
    setting: Setting, options: Config, params: Tree, others: Tree, batch: Tree, key: jax.Array
) -> tuple[Any, tuple[dict[str, Any], Tree]]:
    """Returns the sum of Algorithm 1's losses over the sites, with each one as a metric."""
    losses = algorithm1_losses(
        setting.backbone,
        {**others, "params": params["backbone"]},
        params["denoise"],
        setting.sites,
        setting.schedule,
        key,
        batch["index"],
        normalize(batch["image"], setting.mean, setting.std),
        loss=options["loss"],
        tokens=options["tokens"],
    )
    return sum(jnp.sum(value) for value in losses.values()), (_scalars(losses), others)


def _scalars(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Names every loss after its site, and copy if stacked."""
    return {
        name if value.ndim == 0 else f"{name}[{copy}]": value if value.ndim == 0 else value[copy]
        for name, value in losses.items()
        for copy in range(value.size)
    }


def _train(
    config: Config,
    setting: Setting,
    stage: str,
    params: Tree,
    others: Tree,
    trainable: tuple[str, ...],
    loss_fn: Any,
    directory: str,
    writer: MetricWriter,
    probe: Any = None,
) -> Any:
    options = config[stage]
    state, frozen, tx = _start(config, stage, params, others, trainable)
    seed = config["seed"] * len(STAGES) + STAGES.index(stage)
    augment = {name: config["data"][name] for name in ("flip", "shift")}

    def batches(start: int) -> Iterator[dict[str, Any]]:
        return training_batches(setting.train, options["batch_size"], seed=seed, start_step=start, **augment)

    checkpointer = Checkpointer(os.path.join(directory, "checkpoints", stage))
    try:
        return run_stage(
            stage,
            state,
            frozen,
            make_step(loss_fn, tx),
            batches,
            steps=_steps(config, stage),
            checkpointer=checkpointer,
            writer=writer,
            log_every=config["log_every"],
            checkpoint_every=config["checkpoint_every"],
            progress=config["progress"],
            probe=probe,
        )
    finally:
        checkpointer.close()


def _start(config: Config, stage: str, params: Tree, others: Tree, trainable: tuple[str, ...]) -> Any:
    """Returns the state before a stage's first step, its frozen parameters and its optimiser."""
    tx = partitioned(_optimizer(config, stage), trainable)
    chosen, frozen = split(params, trainable)
    return create_state(chosen, others, tx, frozen, _key(config, stage)), frozen, tx


def _optimizer(config: Config, stage: str) -> Any:
    options, steps = config[stage], _steps(config, stage)
    try:
        return make_optimizer(
            options["optimizer"],
            learning_rate=options["learning_rate"],
            steps=steps,
            warmup=options["warmup"] if steps else 0,
            weight_decay=options["weight_decay"],
            clip=options["clip"],
        )
    except ConfigError as error:
        raise ConfigError(f"{stage}: {error}") from error


def _steps(config: Config, stage: str) -> int:
    if stage != "denoise":
        return config[stage]["steps"]
    return config[stage]["train_steps"] if config[stage]["learner"] == "algorithm1" else 0


def _key(config: Config, purpose: str) -> jax.Array:
    purposes = ("init", *STAGES, "placebo", "noise")
    return jax.random.fold_in(jax.random.key(config["seed"]), purposes.index(purpose))


# ---------------------------------------------------------------------------------------------------------------------
# Fusion and what is said about it
# ---------------------------------------------------------------------------------------------------------------------


def finish(
    config: Config, setting: Setting, directory: str, arms: dict[str, Tree], denoise: Tree, learning: dict[str, Any]
) -> dict[str, Any]:
    """Fuses, certifies, exports, evaluates all arms and writes the report."""
    options = config["denoise"]
    variables = arms["baseline"]
    fused, certificate = fuse_and_certify(
        config, setting, variables, denoise, rule=options["rule"], steps=options["steps"]
    )
    export(os.path.join(directory, "fused"), variables, fused, options["rule"], options["steps"], setting)
    params = {"backbone": variables["params"], "denoise": denoise}
    how = {"rule": options["rule"], "steps": options["steps"]}
    random_maps = placebo_denoisers(params, setting.sites, setting.schedule, _key(config, "placebo"), **how)
    placebo = fuse_exact({**params, "denoise": random_maps}, setting.sites, setting.schedule, rule="affine", steps=1)
    arms = {
        "baseline": variables,
        "placebo": {**variables, "params": placebo},
        **{name: tree for name, tree in arms.items() if name != "baseline"},
        "fused": {**variables, "params": fused},
    }
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
        metrics = evaluation.summarize(scores, resamples=evaluate["resamples"], seed=config["seed"])
    content = {
        "schema": 1,
        "config": config,
        "environment": workdir.environment(),
        "sites": describe_sites(setting, variables["params"], fused),
        "coverage": vars(setting.covered),
        "learning": learning,
        "metrics": metrics,
        "certificate": certificate.to_json(),
        "cost": measure_cost(config, setting, variables, fused, denoise),
    }
    report.write_report(content, directory)
    return content


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
    rule: str,
    steps: int,
    setting: Setting,
    *,
    dtype: str | None = None,
    allow_rounding: bool = False,
    exact: Tree | None = None,
) -> None:
    """Writes the plain backbone with fused weights: `orbax/` and `fused.safetensors` in `directory`.

    Args:
      directory: made if absent.
      variables: the unfused backbone's.
      fused: fused parameters.
      rule, steps, setting: recorded in the files.
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
    fusion = {"rule": rule, "steps": steps, "sites": {site.name: [*site.times] for site in setting.sites}}
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


def measure_cost(config: Config, setting: Setting, variables: Tree, fused: Tree, denoise: Tree) -> dict[str, Any]:
    """Measures FLOPs and interleaved latency of baseline, fused and explicit network on one batch."""
    options = config["denoise"]
    batch = config["evaluate"]["latency_batch"]
    images = jax.random.normal(jax.random.key(0), (batch, *setting.images.shape[1:]))
    backbone = setting.backbone
    plain = jax.jit(lambda v, x: backbone.apply(v, x))
    explicit = jax.jit(
        lambda v, d, x: explicit_apply(
            backbone, v, d, setting.sites, setting.schedule, x, rule=options["rule"], steps=options["steps"]
        )
    )
    after = jax.device_put({**variables, "params": fused})
    before, denoise = jax.device_put(dict(variables)), jax.device_put(denoise)
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
    state, frozen, _ = _start(config, "denoise", params, zeros, ("denoise",))
    wanted = _steps(config, "denoise")
    folder = os.path.join(directory, "checkpoints", "denoise")
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
    rule: str | None,
    steps: int | None,
    noise: str,
    seed: int,
    dtype: str | None,
    allow_rounding: bool,
) -> Certificate:
    """Fuses a finished run again, without training, and writes weights and certificate to `out`.

    Args:
      directory: of the run.
      out: where to write.
      rule, steps: None for the run's own.
      noise: "zero", or "sample" for a z drawn once from `seed` and kept in the weights.
      seed: of that draw.
      dtype, allow_rounding: see `export`.
    """
    if noise not in ("zero", "sample"):
        raise ConfigError(f'Unknown noise "{noise}"; it is "zero" or "sample".')
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f'Unknown storage type "{dtype}".{did_you_mean(dtype, DTYPES)}')
    config, setting, variables, denoise = load_run(directory)
    rule = config["denoise"]["rule"] if rule is None else rule
    steps = config["denoise"]["steps"] if steps is None else steps
    if rule == "affine":
        raise ConfigError(
            'Rule "affine" is for maps given directly; these denoisers predict noise. Use ddpm, paper or ddim.'
        )
    check_finite({"backbone": variables, "denoise": denoise}, "Refusing to fuse")
    if noise == "sample":
        denoise = sample_noise(denoise, setting.sites, jax.random.key(seed))
    fused, certificate = fuse_and_certify(config, setting, variables, denoise, rule=rule, steps=steps)
    params = {"backbone": variables["params"], "denoise": denoise}
    exact = None
    if dtype is not None:
        exact = fuse_exact(params, setting.sites, setting.schedule, rule=rule, steps=steps, round_back=False)
    export(out, variables, fused, rule, steps, setting, dtype=dtype, allow_rounding=allow_rounding, exact=exact)
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
    variables = jax.jit(setting.backbone.init)(_key(config, "init"), jnp.zeros(setting.images.shape))
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
    state, frozen, tx = _start(config, "denoise", params, others, ("denoise",))

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
