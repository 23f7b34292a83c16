"""Evaluation without training: arms of a run, finished or not, and weight files."""

import contextlib
import datetime
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from drep_jax import report, weights
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.data import open_source
from drep_jax.data.labels import check_classes
from drep_jax.errors import CheckpointError, ConfigError, DataError, DrepError
from drep_jax.files import expanded
from drep_jax.jobs.checks import agree, check_evaluation
from drep_jax.jobs.scores import compared, protocol_of, scores_of, with_statistics
from drep_jax.jobs.scoring_checks import UNKNOWN, check_scoring
from drep_jax.learners import LEARNERS, denoisers_of
from drep_jax.parallel import processes
from drep_jax.run import lock, workdir
from drep_jax.run.backbone import read_weights
from drep_jax.run.checkpoints import last_saved
from drep_jax.run.environment import environment
from drep_jax.run.pretraining import ENCODER, saved_encoder, use_saved_pca
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup, build
from drep_jax.tasks import make_task
from drep_jax.typing import Config, Tree

FOLDER = "evaluations"


FREE = (*workdir.FREE, "evaluate.", "data.source", "data.data_dir", "data.test_resize", "model.num_classes")
"""Settings in which an evaluation may differ from its run, beside those of the task."""


def configuration(
    command_line: Config, directory: str, *, overrides: Mapping[str, Any], explicit: bool
) -> dict[str, Any]:
    """Returns the configuration of an evaluation: the run's, with the command line's overrides.

    Args:
      command_line: the complete configuration from the command line.
      directory: of the run; if it holds no run, `command_line` is the result.
      overrides: {"a.b": value}, the single settings on the command line.
      explicit: whether a configuration file was named, which is then compared with the run's.

    Raises:
      CheckpointError: if a setting differs that an evaluation cannot change.
    """
    saved = _config_there(directory)
    if saved is None:
        return dict(command_line)
    requested = dict(command_line) if explicit else _changed(saved, overrides)
    scoring = make_task(saved).evaluation_settings
    if other := workdir.differences(saved, requested, (*FREE, *scoring)):
        raise CheckpointError(
            f"{directory} holds a run with another configuration, of which --eval_only can change the conditions and images of "
            f"the evaluation only ({', '.join(['evaluate.…', *FREE[-4:], *scoring])}):\n{workdir.listed(other)}"
        )
    return requested


def _config_there(directory: str) -> dict[str, Any] | None:
    """Returns the configuration of the run in a directory, or None if there is no run."""

    def read() -> dict[str, Any] | None:
        exists = os.path.exists(os.path.join(directory, workdir.CONFIG))
        return workdir.read_config(directory) if exists else None

    return processes.from_primary(read)


def _changed(config: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(config)
    for name, value in overrides.items():
        section, _, rest = name.partition(".")
        changed[section] = _changed(changed.get(section, {}), {rest: value}) if rest else value
    return changed


def evaluate(config: Config, directory: str, files: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Evaluates and writes `DIRECTORY/evaluations/<date>/evaluation.json` and `.md`.

    Args:
      config: see `configuration`.
      directory: of the run. If it holds no run, `backbone.init_from` or else the first file is the
        baseline.
      files: further weights of the same backbone, plain or fused, each FILE or NAME=FILE.

    Returns:
      The content of evaluation.json (docs/running.md), and its folder.

    Raises:
      DataError: without labeled test images.
      CheckpointError: without weights to evaluate, or if they do not fit the backbone.
    """
    config = _with_side(config, directory)
    setup = build(config)
    if setup.test is None:
        raise DataError(
            "There are no labeled test images, or the backbone has no head, so there is nothing to evaluate."
        )
    use_saved_pca(directory)
    check_evaluation(config)
    data = check_scoring(config, setup)
    _check_classes(config, directory, setup)
    agree(config, setup)
    if processes.primary():
        print("\n".join(report.data_lines({"data": data})), flush=True)
    run = Run(config, setup, directory)
    with lock.reading(directory) if processes.primary() else contextlib.nullcontext():
        arms, described = _of_run(run)
    named_files = [_named(file) for file in files]
    if not arms and config["backbone"]["init_from"]:
        named_files.insert(0, ("baseline", config["backbone"]["init_from"]))
    for name, path in named_files:
        label = name if arms else "baseline"
        if label in arms:
            raise ConfigError(f"There is an arm {label} already; give {path} another name: --weights=NAME={path}.")
        arms[label] = read_weights(run, path, allow_fused=True)
        described[label] = {"weights": os.path.abspath(path), "digest": weights.digest(arms[label])}
    if not arms:
        raise CheckpointError(
            f"There is nothing to evaluate: {directory} holds no checkpoint of a backbone, and neither --weights=FILE nor "
            "--config.backbone.init_from=FILE is given."
        )
    folder = processes.from_primary(lambda: _new_folder(os.path.join(directory, FOLDER)))
    controls = [name for name in ("continued",) if name in arms]
    rows, mixed = with_statistics(config, arms, [name for name in arms if name not in controls])
    controls += [name for name in mixed if name.startswith("baseline+")]
    results = scores_of(config, setup, setup.test, rows, config["evaluate"]["conditions"], statistics=mixed)
    content = {
        "config": config,
        "environment": environment(),
        "arms": described,
        "data": data,
        "metrics": compared(config, setup, results, controls),
        **protocol_of(setup, results),
    }
    if processes.primary():
        report.write_evaluation(content, folder)
    return content, folder


def _with_side(config: Config, directory: str) -> Config:
    """Returns the configuration with what the run's backbone knows of side information.

    Only for other images than the run's own, whose cameras are other ones.

    Raises:
      ConfigError: if the run's images, which tell it, are not there.
    """
    task, saved = make_task(config), _config_there(directory)
    if saved is None or not task.side_columns or task.side_known:
        return config
    if saved["data"]["source"] == config["data"]["source"]:
        return config
    setting = f"{task.name}.side_values"
    try:
        side = build(saved).side
    except DataError as error:
        raise ConfigError(
            f"The backbone is told {' and '.join(task.side_columns)}, and how many it knows cannot be found out, since the "
            f"run's own images cannot be opened: {error} Give the numbers with --config.{setting}=(…,)."
        ) from error
    return {**config, task.name: {**config[task.name], "side_values": tuple(count for _, count in side)}}


def _check_classes(config: Config, directory: str, setup: Setup) -> None:
    """Refuses test images of other classes than those that the run's backbone was trained with.

    Only for other images than the run's own, and only where those can be opened.

    Raises:
      DataError: with both lists of classes, and what to do.
    """
    saved = _config_there(directory)
    if saved is None or saved["data"]["source"] == config["data"]["source"] or not setup.task.test_needs_head:
        return
    if config["evaluate"].get("unknown_classes", "refuse") != "refuse" or setup.test is None:
        return
    data = saved["data"]
    options = {"image_size": tuple(data["image_size"]), "resize": data["resize"], "data_dir": data["data_dir"] or None}
    try:
        trained = open_source(data["source"], "train", **options)
    except DrepError:
        return
    try:
        check_classes(trained, setup.test, unknown="refuse", setting=UNKNOWN)
    except DataError as error:
        raise DataError(
            f"{error} The backbone of the run was trained on {trained.name}. If both have the same classes in the same order "
            f'under other names, set --config.{UNKNOWN}="score".'
        ) from error


def _of_run(run: Run) -> tuple[dict[str, Tree], dict[str, dict[str, Any]]]:
    """Returns the arms that a run has saved, and for each its weights or training step."""
    config, setup = run.config, run.setup
    arms: dict[str, Tree] = {}
    described: dict[str, dict[str, Any]] = {}

    def add(name: str, variables: Tree, **facts: Any) -> None:
        arms[name], described[name] = variables, {**facts, "digest": weights.digest(variables)}

    if _config_there(run.directory) is None:
        return arms, described
    if path := config["backbone"]["init_from"]:
        add("baseline", read_weights(run, path), weights=os.path.abspath(path))
    elif saved := last_saved(run, "backbone"):
        add("baseline", saved.variables, step=saved.step, steps=saved.steps)
    elif not config["backbone"]["steps"] and (pretrained := saved_encoder(run)) is not None:
        add("baseline", pretrained, weights=os.path.abspath(os.path.join(run.directory, ENCODER)))
    if saved := last_saved(run, "control"):
        add("continued", saved.variables, step=saved.step, steps=saved.steps)
    for name in run.learners:
        if name in arms:  # learner "continued" is the control arm
            continue
        saved = None if LEARNERS[name].explicit else last_saved(run, name)
        if saved is None:
            print(f"  {name}: nothing saved, so it is left out.")
            continue
        denoisers = denoisers_of(name, config, saved.denoise)
        fused = fuse_variables_exact(saved.variables, denoisers, setup.sites, setup.schedule)
        add(name, fused, step=saved.step, steps=saved.steps)
    return arms, described


def _named(file: str) -> tuple[str, str]:
    """Splits NAME=FILE; a plain FILE is named after itself, without the extension."""
    match = re.fullmatch(r"([\w.-]+)=(.+)", file)
    if match:
        return match[1], expanded(match[2])
    return os.path.splitext(os.path.basename(os.path.normpath(file)))[0], file


def _new_folder(parent: str) -> str:
    """Makes a folder named by the time; earlier evaluations are not overwritten."""
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in range(1, 1000):
        folder = os.path.join(parent, name if number == 1 else f"{name}-{number}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise CheckpointError(f"Cannot write the evaluation to {folder}: {error.strerror}.") from error
    raise CheckpointError(f"There are a thousand evaluations named {name} in {parent}.")
