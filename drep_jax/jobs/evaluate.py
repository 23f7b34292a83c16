"""Evaluation without training: the arms of a run, finished or not, and files of weights, on the test conditions."""

import contextlib
import datetime
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from drep_jax import report, weights
from drep_jax.core.fusion import fuse_exact
from drep_jax.errors import CheckpointError, ConfigError, DataError
from drep_jax.evaluation import scoring, summary
from drep_jax.jobs.checks import agree, check_evaluation
from drep_jax.learners import EXPLICIT, rule_and_steps
from drep_jax.parallel import processes
from drep_jax.run import lock, workdir
from drep_jax.run.backbone import read_weights
from drep_jax.run.checkpoints import last_saved
from drep_jax.run.environment import environment
from drep_jax.run.setup import Setting, build
from drep_jax.typing import Config, Tree

FOLDER = "evaluations"


RANKING = tuple(f"retrieval.{name}" for name in ("metric", "rerank", "corrupted", "bootstrap_unit"))


FREE = (*workdir.FREE, "evaluate.", "data.source", "data.data_dir", "model.num_classes", *RANKING)
"""Settings in which an evaluation may differ from the run: on which images, and how."""


def configuration(given: Config, directory: str, *, overrides: Mapping[str, Any], explicit: bool) -> dict[str, Any]:
    """Returns the configuration to evaluate with: the run's own, with what the command line changes.

    Args:
      given: of the command line, complete.
      directory: of the run; if there is none in it, `given` is all there is.
      overrides: {"a.b": value} of the single settings given there.
      explicit: whether a configuration file was named, which is then compared with the run's.

    Raises:
      CheckpointError: if a setting differs that the evaluation cannot change.
    """
    theirs = _config_there(directory)
    if theirs is None:
        return dict(given)
    ours = dict(given) if explicit else _changed(theirs, overrides)
    if other := workdir.differences(theirs, ours, FREE):
        raise CheckpointError(
            f"{directory} holds a run with another configuration, of which --eval_only can change the conditions and images of "
            f"the evaluation only (evaluate.…, data.source, data.data_dir, model.num_classes, "
            f"{', '.join(RANKING)}):\n{workdir.listed(other)}"
        )
    return ours


def _config_there(directory: str) -> dict[str, Any] | None:
    """Returns the configuration of the run in a directory, or None if there is no run."""

    def read() -> dict[str, Any] | None:
        there = os.path.exists(os.path.join(directory, workdir.CONFIG))
        return workdir.read_config(directory) if there else None

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
      directory: of the run; without one, the weights of `backbone.init_from` or the first file are the baseline.
      files: further weights of the same backbone, each FILE or NAME=FILE; fused ones, too.

    Returns:
      What was written (docs/running.md), and where.

    Raises:
      DataError: without labelled test images.
      CheckpointError: without anything to evaluate, or if it does not fit.
    """
    setting = build(config)
    if setting.test is None:
        raise DataError(
            "There are no labelled test images, or the backbone has no head, so there is nothing to evaluate."
        )
    check_evaluation(config)
    agree(config, setting)
    with lock.reading(directory) if processes.primary() else contextlib.nullcontext():
        arms, told = _of_run(config, setting, directory)
    given = [_named(file) for file in files]
    if not arms and config["backbone"]["init_from"]:
        given.insert(0, ("baseline", config["backbone"]["init_from"]))
    for name, path in given:
        label = name if arms else "baseline"
        if label in arms:
            raise ConfigError(f"There is an arm {label} already; give {path} another name: --weights=NAME={path}.")
        arms[label] = read_weights(config, setting, path, allow_fused=True)
        told[label] = {"weights": os.path.abspath(path), "digest": weights.digest(arms[label])}
    if not arms:
        raise CheckpointError(
            f"There is nothing to evaluate: {directory} holds no checkpoint of a backbone, and neither --weights=FILE nor "
            "--config.backbone.init_from=FILE is given."
        )
    folder = processes.from_primary(lambda: _new_folder(os.path.join(directory, FOLDER)))
    controls = [name for name in ("continued",) if name in arms]
    scored = scoring.score(config, setting, setting.test, arms, config["evaluate"]["conditions"])
    resamples = config["evaluate"]["resamples"]
    content = {
        "config": config,
        "environment": environment(),
        "arms": told,
        "metrics": summary.summarize(
            scored.scores, controls=controls, resamples=resamples, seed=config["seed"], clusters=scored.clusters
        ),
    }
    if processes.primary():
        report.write_evaluation(content, folder)
    return content, folder


def _of_run(config: Config, setting: Setting, directory: str) -> tuple[dict[str, Tree], dict[str, dict[str, Any]]]:
    """Returns the arms that a run has saved, and of each where its training stands."""
    arms: dict[str, Tree] = {}
    told: dict[str, dict[str, Any]] = {}

    def add(name: str, variables: Tree, **facts: Any) -> None:
        arms[name], told[name] = variables, {**facts, "digest": weights.digest(variables)}

    if _config_there(directory) is None:
        return arms, told
    if path := config["backbone"]["init_from"]:
        add("baseline", read_weights(config, setting, path), weights=os.path.abspath(path))
    elif found := last_saved(config, setting, directory, "backbone"):
        add("baseline", found.variables, step=found.step, steps=found.steps)
    if found := last_saved(config, setting, directory, "control"):
        add("continued", found.variables, step=found.step, steps=found.steps)
    for name in dict.fromkeys([*config["compare"], config["learner"]]):
        if name in arms:  # the control arm as a learner
            continue
        found = None if name in EXPLICIT else last_saved(config, setting, directory, name)
        if found is None:
            print(f"  {name}: nothing saved, so it is left out.")
            continue
        params = {"backbone": found.variables["params"], "denoise": found.denoise}
        fused = fuse_exact(params, setting.sites, setting.schedule, **rule_and_steps(name, config))
        add(name, {**found.variables, "params": fused}, step=found.step, steps=found.steps)
    return arms, told


def _named(file: str) -> tuple[str, str]:
    """Splits NAME=FILE; the name of a plain FILE is its own without the ending."""
    found = re.fullmatch(r"([\w.-]+)=(.+)", file)
    if found:
        return found[1], found[2]
    return os.path.splitext(os.path.basename(os.path.normpath(file)))[0], file


def _new_folder(parent: str) -> str:
    """Makes a folder named by the time; nothing that was evaluated before is overwritten."""
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
