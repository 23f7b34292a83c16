"""The main job: train or load a backbone, learn denoisers, fuse, certify, compare, report.

Steps of a run in a work directory, each resumed, or skipped if it is done:
pre-training → backbone → control arm (backbone trained further) → denoisers → fusion, certificate, export
→ evaluation → report.
"""

import contextlib
import dataclasses
import os
import traceback
from collections.abc import Mapping
from typing import Any

from drep_jax import files, report
from drep_jax.core.certificate import Certificate
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.data import unreadable
from drep_jax.data.datasets import Labeled
from drep_jax.errors import DrepError, EvaluationError
from drep_jax.evaluation import knn, summary
from drep_jax.evaluation.arms import Network, Scored, items_of, score_arms
from drep_jax.exporting.statistics import Statistics
from drep_jax.jobs.checks import agree, check
from drep_jax.jobs.findings import describe_sites, exhibit_of, measure_cost, spectra
from drep_jax.jobs.pretrain import pretrained_backbone, pretraining_section
from drep_jax.jobs.scores import compared, placebo_of, protocol_of, reading, scores_of, with_statistics
from drep_jax.learners import Learned, LearnerInputs, learn, train_labeled
from drep_jax.parallel import processes
from drep_jax.progress import pulsing
from drep_jax.run import workdir
from drep_jax.run.backbone import fresh_variables, read_weights
from drep_jax.run.environment import environment
from drep_jax.run.export import Output, fuse_and_certify, write
from drep_jax.run.inputs import save_inputs
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter
from drep_jax.training.signals import Interrupted
from drep_jax.typing import Config, Tree


def run(config: Config, directory: str) -> dict[str, Any]:
    """Runs the whole job in `directory`, or resumes the one there, and returns the report.

    Every process of a run calls this. The first one writes the directory and returns the report;
    the others return {"certificate": {"passed": …}} alone.

    Raises:
      DrepError: its subclasses name the setting or file that cannot be used.
    """
    setup = build(config)
    data = check(config, setup)
    agree(config, setup)
    directory = os.path.abspath(directory)
    primary = processes.primary()
    if primary:
        print("\n".join([*report.data_lines({"data": data}), *setup.forms]), flush=True)
    if not primary:
        config = {**config, "progress": False}
    with workdir.claimed(directory, config) if primary else contextlib.nullcontext():
        with contextlib.closing(
            processes.on_primary(lambda: MetricWriter(directory, wandb=config["wandb"], record=config))
        ) as writer:
            if primary:
                unreadable.keep_records(directory, setup.parts)
                with pulsing("saving inputs", 1, "file", shown=config["progress"]):
                    save_inputs(directory, config, setup)
            job = Run(config, setup, directory, writer)
            variables = make_backbone(job)
            continued = train_labeled(job, "control", variables) if config["control"]["steps"] else None
            learned = learn_all(job, variables, continued)
        return finish(job, variables, continued, learned, data)


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def make_backbone(job: Run) -> Tree:
    """Returns the backbone's variables: read from a file, pre-trained without labels, trained, or both of these."""
    if path := job.config["backbone"]["init_from"]:
        return read_weights(job, path)
    variables = pretrained_backbone(job) if job.config["pretrain"]["steps"] else fresh_variables(job)
    return train_labeled(job, "backbone", variables)[0] if job.config["backbone"]["steps"] else variables


def learn_all(job: Run, variables: Tree, continued: tuple[Tree, float] | None = None) -> dict[str, Learned]:
    """Runs every requested learner, the exported one last.

    Args:
      job: the run.
      variables: the frozen backbone's.
      continued: the control arm and its seconds of training, or None.

    Returns:
      {learner: its result}.
    """
    inputs = LearnerInputs(job, variables, continued)
    return {name: learn(name, inputs) for name in job.learners}


# ---------------------------------------------------------------------------------------------------------------------
# Fusion, evaluation, report
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arms:
    """The networks that a run compares.

    Attributes:
      variables: name ↦ variables, in the order of the tables; baseline and placebo first.
      networks: name ↦ network, for arms on the explicit path, which cannot be fused.
      controls: names of the control arms, which show changes without denoising.
      statistics: name ↦ what BatchNorms mix with their trained statistics, for arms that do.
    """

    variables: dict[str, Tree]
    networks: dict[str, Network]
    controls: list[str]
    statistics: Mapping[str, Statistics] = dataclasses.field(default_factory=dict)

    @property
    def fusible(self) -> dict[str, Tree]:
        """The arms that are weights of the backbone and no more; the others need its head or its BatchNorms."""
        others = (*self.networks, *self.statistics)
        return {name: tree for name, tree in self.variables.items() if name not in others}


def finish(
    job: Run,
    baseline: Tree,
    continued: tuple[Tree, float] | None,
    learned: Mapping[str, Learned],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Fuses, certifies, exports, evaluates all arms and writes the report.

    Args:
      job: the run.
      baseline: variables of the unchanged backbone.
      continued: the control arm and its seconds of training, or None.
      learned: by learner, its result.
      data: of the report.

    Raises:
      EvaluationError: if the evaluation fails; weights, certificate and a report without scores are
        written before.
    """
    config, setup = job.config, job.setup
    exported = learned[config["learner"]]
    variables = exported.variables or baseline
    fused, certificate = fuse_exported(job, variables, exported)
    processes.barrier("evaluation")
    failure: Exception | None = None
    metrics: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    site_spectra = cost = None
    try:
        arms = arms_of(job, baseline, continued, learned, fused)
        metrics, pictures = evaluate_arms(job, arms, variables, fused, exported)
        sources = {part.name: score_other(job, part, arms) for part in setup.others}
        site_spectra = spectra(job, variables, exported)
        if certificate is not None:
            with pulsing("latency", 1, "comparison", shown=config["progress"]):
                cost = measure_cost(job, variables, fused, exported, arms.networks)
    except Interrupted:
        raise
    except Exception as error:
        if not processes.alone():  # the other processes may be waiting for this one
            raise
        failure, metrics, pictures, sources = error, {}, {}, {}
    passed = processes.from_primary(lambda: certificate is not None and certificate.passed)
    if certificate is None:
        return {"certificate": {"passed": passed}}
    content = {
        "schema": report.SCHEMA,
        "config": config,
        "environment": environment(),
        "sites": describe_sites(setup, variables["params"], fused["params"]),
        "forms": [*setup.forms],
        "coverage": vars(setup.covered),
        "learning": {name: result.section for name, result in learned.items()},
        "exported": config["learner"],
        "items": {"are": setup.task.items_are, "resampled": setup.task.resampled},
        "metrics": metrics,
        "sources": sources or None,
        "data": data,
        "unreadable": unreadable.summary(setup.parts),
        "certificate": certificate.to_json(),
        "cost": cost,
        "spectra": site_spectra,
        "pretraining": pretraining_section(job),
        "front": exported.choice.front() if exported.choice else None,
        **pictures,
    }
    if failure is not None:
        content["evaluation_failed"] = f"{type(failure).__name__}: {failure}"
    report.write_report(content, job.directory)
    if failure is not None:
        raise _failed(job, failure) from failure
    return content


def _failed(job: Run, failure: Exception) -> EvaluationError:
    """Returns the error of an evaluation that failed, which says what is there and how to go on."""
    reason = str(failure)
    if not isinstance(failure, DrepError):  # no bad input: what a developer needs is kept
        path = os.path.join(job.directory, "evaluation_error.txt")
        files.write_bytes(path, "".join(traceback.format_exception(failure)).encode())
        reason = f"{type(failure).__name__}: {failure} (the traceback is in {path})"
    return EvaluationError(
        f"The evaluation failed: {reason}\nEverything was learned, and is kept: the fused weights are in "
        f"{os.path.join(job.directory, 'fused')}, and report.md has their certificate. The same command again only evaluates. "
        f"To evaluate on other images: python train.py --eval_only --workdir={job.directory} --config.data.source=…"
    )


def fuse_exported(job: Run, variables: Tree, exported: Learned) -> tuple[Tree, Certificate | None]:
    """Returns the exported learner's fused variables; on process 0 also the certificate."""
    denoisers = exported.denoisers
    if not processes.primary():
        return fuse_variables_exact(variables, denoisers, job.setup.sites, job.setup.schedule), None
    fused, certificate = fuse_and_certify(job, variables, denoisers)
    record = {**denoisers.keywords, "strength": 1.0}
    write(Output(os.path.join(job.directory, "fused")), job.setup, variables, fused, record)
    return fused, certificate


def arms_of(
    job: Run, baseline: Tree, continued: tuple[Tree, float] | None, learned: Mapping[str, Learned], fused: Tree
) -> Arms:
    """Returns all arms: baseline, placebo of the exported learner, control arm, learners."""
    setup, name = job.setup, job.config["learner"]
    exported = learned[name]
    variables = exported.variables or baseline
    with pulsing("placebo", 1, "arm", shown=job.config["progress"]):
        random_maps = placebo_of(job, variables, exported.denoisers)
        placebo = fuse_variables_exact(variables, random_maps, setup.sites, setup.schedule)
    arms: dict[str, Tree] = {"baseline": baseline, "placebo": placebo}
    if continued is not None:
        arms["continued"] = continued[0]
    controls = [arm for arm in arms if arm not in ("baseline", name)]
    networks: dict[str, Network] = {}
    for learner, result in learned.items():
        backbone = result.variables or baseline
        if result.network is not None:
            networks[learner], arms[learner] = result.network, backbone
        elif result is exported:
            arms[learner] = fused
        elif learner not in arms:  # learner "continued" is the control arm, already there
            arms[learner] = fuse_variables_exact(backbone, result.denoisers, setup.sites, setup.schedule)
    arms, mixed = with_statistics(job.config, arms, ["baseline", name])
    return Arms(arms, networks, [*controls, *(row for row in mixed if row.startswith("baseline+"))], mixed)


def evaluate_arms(
    job: Run, arms: Arms, variables: Tree, fused: Tree, exported: Learned
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the report's `metrics` of all arms on the test images, and the task's examples."""
    config, setup = job.config, job.setup
    if setup.test is None:
        return {}, {}
    pair = ("baseline", config["learner"])
    headline = next(iter(setup.task.metrics.values()))
    conditions = config["evaluate"]["conditions"]
    results, largest = {}, -1.0
    most_changed: tuple[str, Scored] | None = None  # only one condition's statistics are held
    for condition, scored in score_arms(
        setup,
        arms.variables,
        setup.test,
        conditions,
        networks=arms.networks,
        statistics=arms.statistics,
        **reading(config),
    ):
        results[condition] = items_of(setup, setup.test, scored, condition)
        before, after = (summary.value_of(headline, results[condition][arm]) for arm in pair)
        if abs(after - before) > largest:
            largest, most_changed = abs(after - before), (condition, scored)
    metrics = compared(config, setup, results, arms.controls)
    if most_changed is None:
        return metrics, {}
    compared_arms = {arm: arms.variables[arm] for arm in pair}
    examples = setup.task.examples(
        exhibit_of(job, setup.test, compared_arms, *most_changed, variables, fused, exported)
    )
    return metrics, {**protocol_of(setup, results), **examples}


def score_other(job: Run, part: Labeled, arms: Arms) -> dict[str, Any]:
    """Returns the report's metrics of a further source, by test split or nearest neighbors."""
    config, setup = job.config, job.setup
    conditions = config["evaluate"]["conditions"]
    if part.gallery is None:
        results = scores_of(config, setup, part.test, arms.fusible, conditions)
        return {"gallery": None, "metrics": compared(config, setup, results, arms.controls)}
    results = knn.score_by_neighbors(setup, arms.fusible, part, conditions, **reading(config))
    metrics = compared(config, setup, results, arms.controls, metrics=knn.METRICS, exact_test=knn.METRIC)
    return {"gallery": len(part.gallery), "metrics": metrics}
