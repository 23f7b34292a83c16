"""Fuses a finished run again by other strength, rule or time steps, without training."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from drep_jax import files
from drep_jax.core import closed_form
from drep_jax.core.certificate import Certificate
from drep_jax.core.denoisers import Denoisers
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.recipes import WIENER, Recipe, check_rule
from drep_jax.core.reverse_map import site_steps
from drep_jax.errors import CheckpointError, ConfigError, NonFiniteError
from drep_jax.evaluation import cost
from drep_jax.learners import LEARNERS, denoisers_of
from drep_jax.learners.base import direct_maps
from drep_jax.parallel import processes
from drep_jax.run import workdir
from drep_jax.run.checkpoints import last_saved
from drep_jax.run.export import Output, fuse_and_certify, needs_exact, open_original, write
from drep_jax.run.inputs import certificate_images, load_inputs
from drep_jax.run.moments import kept_moments, run_moments
from drep_jax.run.pretraining import use_saved_pca
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.trees import check_finite
from drep_jax.typing import Tree


def load_run(directory: str, *, images: bool = True) -> tuple[Run, Tree, Tree]:
    """Returns a finished run, its backbone's variables and its denoisers.

    Args:
      directory: of the run.
      images: whether to open its images. Without, the run has none, unless an earlier release made
        it: those did not keep what is needed of them.

    Raises:
      CheckpointError: if the run is absent, not finished, or damaged.
    """
    config = processes.from_primary(lambda: workdir.read_config(directory))
    inputs = None if images else processes.from_primary(lambda: load_inputs(directory))
    kept = None if inputs is None else (inputs.unopened(config), inputs.side)
    run = Run(config, build(config, kept), directory)
    use_saved_pca(directory)
    saved = last_saved(run, config["learner"])
    if saved is None:
        raise CheckpointError(
            f"{directory} holds no learned denoisers yet; run train.py with --workdir={directory} first."
        )
    if saved.step < saved.steps:
        raise CheckpointError(
            f"The denoisers in {directory} are at step {saved.step} of {saved.steps}; finish the run first: "
            f"train.py with --workdir={directory}."
        )
    return run, saved.variables, saved.denoise


def fuse_run(
    directory: str,
    output: Output,
    *,
    rule: str | None = None,
    steps: int | None = None,
    time_scale: float | None = None,
    beta_end: float | None = None,
    strength: float = 1.0,
    resolve: bool = False,
    noise: str = "zero",
    seed: int = 0,
) -> tuple[Certificate, list[str]]:
    """Fuses a finished run again, without training, and writes weights and certificate.

    A denoiser belongs to its time step. If the run's learner is `closed_form`, or with `resolve`,
    the denoisers are solved again for the requested time steps, from the run's moments and without
    images. Trained denoisers can only be fused by another rule or with fewer steps.

    Args:
      directory: of the run.
      output: what to write, and where.
      rule, steps, time_scale, beta_end: None for the run's own. With solved denoisers the rule may
        also be `wiener:r`.
      strength: τ, the fraction of the change by fusion; 0 gives the backbone.
      resolve: whether to solve the denoisers again, whatever the run's learner.
      noise: "zero", or "sample" for z drawn once from `seed` and stored in the weights.
      seed: of z.

    Returns:
      The certificate and the paths of the files.

    Raises:
      DrepError: its subclasses say which request the run does not allow.
    """
    if noise not in ("zero", "sample"):
        raise ConfigError(f'Unknown noise "{noise}"; it is "zero" or "sample".')
    if not (np.isfinite(strength) and strength >= 0):
        raise ConfigError(f"The strength must be a number of at least 0, got {strength}.")
    run, variables, denoise = load_run(directory, images=False)
    config, setup = run.config, run.setup
    check_finite({"backbone": variables, "denoise": denoise}, "Refusing to fuse")
    requested = {"rule": rule, "steps": steps, "time_scale": time_scale, "beta_end": beta_end}
    requested = {name: value for name, value in requested.items() if value is not None}
    if resolve or (requested and config["learner"] == "closed_form"):
        run, denoisers, recorded_rule = solve_again(run, variables, requested)
    else:
        denoisers = _as_learned(run, denoise, requested, noise)
        recorded_rule = denoisers.rule
    setup = run.setup
    recorded = {"rule": recorded_rule, "steps": denoisers.steps, "strength": strength}
    if noise == "sample":
        if recorded_rule.startswith(WIENER):
            raise ConfigError(f"Rule {recorded_rule} is one step without noise, so --noise=sample does not apply.")
        denoisers = denoisers.with_noise(setup.sites, jax.random.key(seed))
    if strength != 1.0:
        denoisers = denoisers.as_affine(setup.sites, setup.schedule).scaled(strength)
    return fuse_and_export(run, variables, denoisers, output, recorded)


def _as_learned(run: Run, denoise: Tree, requested: Mapping[str, Any], noise: str) -> Denoisers:
    """Returns the run's own denoisers for fusion; refuses requests they do not allow."""
    config, directory = run.config, run.directory
    direct = LEARNERS[config["learner"]].direct
    learned_at = {
        **config["denoise"],
        "beta_end": config["schedule"]["beta_end"],
        **denoisers_of(config["learner"], config, denoise).keywords,
    }
    resolve = "Add --resolve to take the closed form from the run's moments instead."
    changed = [name for name, value in requested.items() if value != learned_at[name]]
    if direct and (changed or noise == "sample"):
        raise ConfigError(
            f"The run in {directory} learned its maps directly ({config['learner']}): they are one step without noise, so "
            f"--rule, --steps, --time_scale, --beta_end and --noise=sample do not apply. {resolve}"
        )
    rule, steps = requested.get("rule", learned_at["rule"]), requested.get("steps", learned_at["steps"])
    if moved := [name for name in changed if name in ("time_scale", "beta_end")]:
        values = " and ".join(f"{name}={learned_at[name]:g}" for name in moved)
        raise ConfigError(
            f"The run in {directory} trained its denoisers at {values}, and a denoiser belongs to its time step. {resolve}"
        )
    if steps > learned_at["steps"]:
        raise ConfigError(
            f"{steps} steps a site need denoisers of other time steps (t falls by {steps} from site to site); these were "
            f"learned with {learned_at['steps']}. {resolve}"
        )
    if rule.startswith(WIENER):
        raise ConfigError(f'Rule "{rule}" needs other denoisers than those that were trained. {resolve}')
    if rule == "affine" and not direct:
        raise ConfigError(
            'Rule "affine" is for maps given directly; these denoisers predict noise. Use ddpm, paper or ddim.'
        )
    return Denoisers(denoise, rule, steps)


def solve_again(run: Run, variables: Tree, requested: Mapping[str, Any]) -> tuple[Run, Denoisers, str]:
    """Solves the denoisers of a run for other time steps, schedule or rule, from the run's moments.

    They are Algorithm 1's minimum, or a Wiener filter with rule `wiener:r`.

    Args:
      run, variables: a finished run and its backbone.
      requested: any of rule, steps, time_scale and beta_end; the run's own values for the others.

    Returns:
      The run with these time steps, the denoisers, and the rule as requested.
    """
    setup, learned_at = run.setup, run.config["denoise"]
    rule = requested.get("rule", learned_at["rule"])
    check_rule(rule, setup.schedule)
    ratio = Recipe(rule).ratio
    if ratio is not None:
        if useless := [f"--{name}" for name in requested if name != "rule"]:
            raise ConfigError(f"Rule {rule} has no time steps, so {', '.join(useless)} would change nothing.")
        where = f"noise of {ratio:g} times each site's feature power"
    else:
        steps = requested.get("steps", learned_at["steps"])
        scale = requested.get("time_scale", learned_at["time_scale"])
        setup = setup.respaced(steps=steps, time_scale=scale, beta_end=requested.get("beta_end"))
        site_steps(setup.sites, setup.schedule, rule, steps)
        times = [t for site in setup.sites for t in site.times]
        where = f"t = {max(times)}…{min(times)}"
    began = time.perf_counter()
    # After the checks, since without saved moments this is a pass over the images.
    moments = kept_moments(run, variables) or run_moments(dataclasses.replace(run, setup=build(run.config)), variables)
    if ratio is not None:
        denoisers = direct_maps(closed_form.wiener_maps(moments, setup.sites, ratio))
    else:
        denoisers = Denoisers(closed_form.closed_form(moments, setup.sites, setup.schedule), rule, steps)
    seconds = time.perf_counter() - began
    print(f"Denoisers solved anew for {where} from the run's moments in {seconds:.1f} s.")
    return dataclasses.replace(run, setup=setup), denoisers, rule


def fuse_and_export(*args: Any) -> tuple[Certificate, list[str]]:
    """Fuses in float64, certifies and writes weights and certificate, on the first process.

    Args:
      *args: run, variables, denoisers and output; the record in the files.
    """
    return processes.from_primary(lambda: _fuse_and_export(*args))


def _fuse_and_export(
    run: Run,
    variables: Tree,
    denoisers: Denoisers,
    output: Output,
    recorded: Mapping[str, Any],
) -> tuple[Certificate, list[str]]:
    original = open_original(run, variables, output)
    fused, certificate = fuse_and_certify(run, variables, denoisers)
    exact = None
    if needs_exact(output, original):
        exact = fuse_variables_exact(variables, denoisers, run.setup.sites, run.setup.schedule, round_back=False)
    if not all(np.isfinite(figure.error) for figure in certificate.end_to_end.values()):
        description = f"rule {recorded['rule']}, {recorded['steps']} step(s) and strength {recorded['strength']:g}"
        raise NonFiniteError(
            f"With {description} the fused network gives NaN or Inf on real images; nothing was written. Take a smaller "
            "strength or time steps."
        )
    images = certificate_images(run.config, run.setup, run.directory)
    paths = write(output, run.setup, variables, fused, recorded, exact=exact, original=original, images=images)
    content = certificate.to_json()
    if output.statistics is not None:
        content["statistics"] = _cost_of_statistics(run, fused, output)
    files.write_json(os.path.join(output.directory, "certificate.json"), content)
    return certificate, paths


def _cost_of_statistics(run: Run, fused: Tree, output: Output) -> dict[str, Any]:
    """Measures and prints the latency with mixed statistics; returns it with what is mixed, as JSON values."""
    backbone, batch = run.setup.backbone, run.config["evaluate"]["latency_batch"]
    images = jax.random.normal(jax.random.key(0), (batch, *run.setup.images.shape[1:]))
    variables = jax.device_put(dict(fused))
    plain, mixed = jax.jit(backbone.apply), jax.jit(output.network(backbone).apply)
    sides = {"fused": lambda: plain(variables, images), "mixed": lambda: mixed(variables, images)}
    times = cost.interleaved(sides, rounds=run.config["latency_rounds"])
    ratio = cost.ratios(times, "fused")["mixed"]
    print(
        f"Statistics {output.statistics}: another program than the fused network's, {ratio:.2f} times its latency at "
        f"{batch} images. The certificate is that of the weights, with the trained statistics."
    )
    return {"mixed": str(output.statistics), "latency_ratio": ratio, "batch": batch}
