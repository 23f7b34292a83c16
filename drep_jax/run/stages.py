"""The training stages of a run as rows of a table, prepared and run from the configuration."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from drep_jax.core.denoisers import init_denoise
from drep_jax.data.augment import augmentation_of
from drep_jax.data.labels import checked
from drep_jax.data.loader import training_batches
from drep_jax.errors import ConfigError
from drep_jax.parallel import devices, processes
from drep_jax.run.run import Run
from drep_jax.training.checkpoint import folder_of, open_checkpoints
from drep_jax.training.loop import run_stage
from drep_jax.training.optimizers import make_optimizer
from drep_jax.training.profile import parse_profile
from drep_jax.training.state import (
    TEACHER,
    create_state,
    extra_params,
    frozen_state,
    make_step,
    partitioned,
    split,
)
from drep_jax.typing import Batch, Config, Tree


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run, with its own checkpoints in `checkpoints/<name>` and its own random key.

    Attributes:
      name: of the stage, or of a learner that solves instead of training.
      section: of its settings.
      trains: names of the subtrees that it trains. Extra parameters of the task are trained in
        every labeled stage, too.
      labeled: whether it trains with labels.
      stream: identifies its order of the images; learners with the control arm's budget share its
        order.
      steps_setting: section and name of the number of optimizer steps; None for a solved result.
      batch_section: section of its batch size; stages that train the backbone use the control
        arm's.
      taught: whether the unchanged backbone stands beside the trained one, as frozen `TEACHER`.
    """

    name: str
    section: str
    trains: tuple[str, ...]
    labeled: bool
    stream: int
    steps_setting: tuple[str, str] | None
    batch_section: str
    taught: bool = False

    def steps(self, config: Config) -> int:
        """Returns the number of optimizer steps; 0 for a solved result."""
        if self.steps_setting is None:
            return 0
        section, name = self.steps_setting
        return config[section][name]

    def batch_size(self, config: Config) -> int:
        """Returns the images per step, over all devices."""
        return config[self.batch_section]["batch_size"]

    @property
    def in_phases(self) -> bool:
        """Whether it trains several subtrees in turn (appendix A)."""
        return len(self.trains) > 1


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("backbone", "backbone", ("backbone",), True, 0, ("backbone", "steps"), "backbone"),
        Stage("pretrain", "pretrain", ("backbone",), False, 0, ("pretrain", "steps"), "pretrain"),
        Stage("control", "control", ("backbone",), True, 1, ("control", "steps"), "control"),
        Stage("algorithm1", "denoise", ("denoise",), False, 2, ("denoise", "train_steps"), "denoise"),
        Stage("label_augmented", "denoise", ("denoise",), True, 1, ("denoise", "train_steps"), "denoise"),
        Stage("alternating", "denoise", ("denoise", "backbone"), True, 1, ("alternate", "steps"), "control"),
        Stage("distillation", "distilled", ("denoise",), False, 1, ("distilled", "steps"), "distilled"),
        Stage("backbone_distillation", "distilled", ("backbone",), False, 1, ("distilled", "steps"), "distilled", True),
    )
}

KEYS = {
    "init": 0,
    "backbone": 1,
    "control": 2,
    "algorithm1": 3,
    "placebo": 4,
    "noise": 5,
    "closed_form": 6,
    "wiener": 7,
    "measured": 8,
    "label_augmented": 9,
    "alternating": 10,
    "continued": 11,
    "extra": 12,
    "distillation": 13,
    "distilled": 14,
    "backbone_distillation": 15,
    "distilled_backbone": 16,
    "pretrain": 17,
    "pretrain_init": 18,
}
"""Purpose of a random key ↦ number folded into the seed; numbers are unique and never reused."""


def stage_of(name: str) -> Stage:
    """Returns the stage of a name; for a learner that solves, the stage that stores its result."""
    return STAGES.get(name) or Stage(name, "denoise", ("denoise",), False, 0, None, "denoise")


def key_of(config: Config, purpose: str) -> jax.Array:
    """Returns the random key of a purpose."""
    return jax.random.fold_in(jax.random.key(config["seed"]), KEYS[purpose])


def phase_of(config: Config, number: int) -> str:
    """Returns the subtree trained in step `number` (from 1) of "alternating" (appendix A)."""
    order = config["alternate"]["order"]
    return order[(number - 1) // config["alternate"]["period"] % len(order)]


def optimizer_of(config: Config, name: str) -> Any:
    """Returns a stage's optimizer; for a stage in phases {subtree: optimizer}.

    Raises:
      ConfigError: naming the stage.
    """
    stage = stage_of(name)
    steps, sharded = stage.steps(config), config[stage.section]["divide_optimizer"]
    if not stage.in_phases:
        return _optimizer(config[stage.section], stage.section, steps, sharded)
    phases = [phase_of(config, number) for number in range(1, steps + 1)]
    sections = {"denoise": "denoise", "backbone": "control"}
    return {
        subtree: _optimizer(config[section], section, phases.count(subtree), sharded)
        for subtree, section in sections.items()
    }


def _optimizer(options: Config, section: str, steps: int, sharded: bool) -> Any:
    try:
        return make_optimizer(
            options["optimizer"],
            learning_rate=options["learning_rate"],
            steps=steps,
            warmup=options["warmup"] if steps else 0,
            weight_decay=options["weight_decay"],
            clip=options["clip"],
            sharded=sharded,
            **{name: options[name] for name in ("decay", "floor", "no_decay", "rates") if name in options},
        )
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


def split_variables(variables: Tree) -> tuple[Tree, Tree]:
    """Returns a backbone's parameters and its other collections."""
    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}


def starting(run: Run, name: str, variables: Tree) -> tuple[Tree, Tree]:
    """Returns a stage's initial {subtree: parameters} and the backbone's other collections."""
    stage, setup = stage_of(name), run.setup
    backbone, others = split_variables(variables)
    params = {"backbone": backbone}
    if stage.trains != ("backbone",):
        params["denoise"] = init_denoise(setup.sites)
    if stage.taught:
        params[TEACHER] = backbone
    if stage.labeled:
        key = key_of(run.config, "extra")
        params |= setup.task.extra_params(setup.backbone, setup.abstract, setup.images, key)
    return params, others


def prepare(run: Run, name: str, params: Tree, others: Tree) -> Any:
    """Returns a stage's initial state, frozen parameters and optimizers.

    Args:
      run: with its configuration and task.
      name: of the stage, or of a learner that solves.
      params: {"backbone": tree}, optionally "denoise", and the extra parameters of the task.
      others: other variable collections of the backbone.

    Returns:
      (state, frozen, {active subtrees: optimizer}).
    """
    config, stage = run.config, stage_of(name)
    optimizers = run.setup.task.extra_optimizers()
    extra = {subtree: optimizers[subtree] for subtree in extra_params(params)}
    trainable = (*stage.trains, *extra)
    trained, frozen = split(params, trainable)
    optimizer = optimizer_of(config, name)
    averaged = ("denoise",) if "denoise" in trainable and config["denoise"]["ema"] else ()
    key = key_of(config, name)
    if not stage.in_phases:
        each = {subtree: optimizer for subtree in stage.trains} | extra
        tx = partitioned(each if extra else optimizer, trainable)
        return create_state(trained, others, tx, frozen, key, averaged=averaged), frozen, {trainable: tx}
    by_phase: dict[tuple[str, ...], Any] = {
        (subtree, *extra): partitioned(
            {other: tx if other == subtree else frozen_state(tx) for other, tx in optimizer.items()} | extra, trainable
        )
        for subtree in optimizer
    }
    tx = by_phase[(trainable[0], *extra)]
    return create_state(trained, others, tx, frozen, key, averaged=averaged), frozen, by_phase


def run_training(
    run: Run,
    name: str,
    params: Tree,
    others: Tree,
    loss_fn: Any,
    log_extra: Any = None,
    prepare_batch: Callable[[Batch, int], Batch] | None = None,
    evaluate: Callable[[Tree], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> tuple[Any, float]:
    """Runs or resumes a stage; returns its final state and its seconds.

    Args:
      run: its training images are learned from.
      name: of the stage.
      params, others: before the first step, see `prepare`.
      loss_fn: that of `make_step`; for a stage in phases {subtree: loss_fn}.
      log_extra, evaluate, evaluate_every: see `run_stage`.
      prepare_batch: (batch, position of its first image in the stream) ↦ batch, on the host.
    """
    config, stage, source = run.config, stage_of(name), run.setup.train
    options = config[stage.section]
    state, frozen, optimizers = prepare(run, name, params, others)
    seed = config["seed"] * 3 + stage.stream
    augmentation = augmentation_of(config["data"], labeled=stage.labeled)
    order = run.setup.task.order(source, seed) if stage.labeled else None
    columns = run.setup.task.columns if stage.labeled else ()

    def batches(start: int) -> Iterator[dict[str, Any]]:
        size, host = stage.batch_size(config), devices.host()
        options: dict[str, Any] = {"augmentation": augmentation, "shard": host, "order": order, "columns": columns}
        options["sizes"] = run.setup.sizes
        stream = training_batches(source, size, seed=seed, start_step=start, **options)
        if prepare_batch is not None:
            stream = _prepared(stream, prepare_batch, start * size + host[0] * (size // host[1]), size)
        return checked(stream, source) if stage.labeled else stream

    sharded = options["divide_optimizer"]
    steps = {
        active: make_step(
            loss_fn[active[0]] if isinstance(loss_fn, Mapping) else loss_fn,
            tx,
            active=active,
            accumulate=options["accumulate"],
            ema=config["denoise"]["ema"],
            sharded=sharded,
        )
        for active, tx in optimizers.items()
    }
    by_subtree = {active[0]: step for active, step in steps.items()}
    only = next(iter(steps.values()))
    checkpointer = open_checkpoints(folder_of(run.directory, name))
    try:
        return run_stage(
            name,
            state,
            frozen,
            (lambda number: by_subtree[phase_of(config, number)]) if stage.in_phases else (lambda number: only),
            batches,
            steps=stage.steps(config),
            checkpointer=checkpointer,
            writer=run.writer,
            log_every=config["log_every"],
            checkpoint_every=config["checkpoint_every"],
            progress=config["progress"],
            log_extra=log_extra,
            sharded=sharded,
            profile=parse_profile(config["profile"], run.directory) if processes.primary() else None,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
        )
    finally:
        checkpointer.close()


def _prepared(
    batches: Iterable[Batch], prepare_batch: Callable[[Batch, int], Batch], first_position: int, size: int
) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        yield prepare_batch(batch, first_position + number * size)
