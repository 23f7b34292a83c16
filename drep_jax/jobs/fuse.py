"""A finished run fused again: other strength, rule, steps or time steps, without training and without images."""

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from drep_jax import files
from drep_jax.core import closed_form
from drep_jax.core.certificate import Certificate
from drep_jax.core.denoisers import as_affine, sample_noise, scaled
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.recipes import WIENER, Recipe, check_rule
from drep_jax.core.reverse_map import site_steps
from drep_jax.errors import CheckpointError, ConfigError, NonFiniteError
from drep_jax.learners import DIRECT, rule_and_steps
from drep_jax.parallel import processes
from drep_jax.run import workdir
from drep_jax.run.checkpoints import last_saved
from drep_jax.run.export import Output, certificate_images, fuse_and_certify, needs_exact, open_original, write
from drep_jax.run.moments import saved_moments
from drep_jax.run.setup import Setting, build, respaced
from drep_jax.trees import check_finite
from drep_jax.typing import Config, Tree


def load_run(directory: str) -> tuple[Config, Setting, Tree, Tree]:
    """Returns configuration, setting, backbone variables and denoisers of a finished run.

    Raises:
      CheckpointError: if the run is absent, not finished, or damaged.
    """
    config = processes.from_primary(lambda: workdir.read_config(directory))
    setting = build(config)
    found = last_saved(config, setting, directory, config["learner"])
    if found is None:
        raise CheckpointError(
            f"{directory} holds no learned denoisers yet; run train.py with --workdir={directory} first."
        )
    if found.step < found.steps:
        raise CheckpointError(
            f"The denoisers in {directory} are at step {found.step} of {found.steps}; finish the run first: "
            f"train.py with --workdir={directory}."
        )
    return config, setting, found.variables, found.denoise


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
    """Fuses a finished run again, without training, writes weights and certificate, and returns it and the files' paths.

    A denoiser belongs to its time step. Where the run took Algorithm 1's minimum (learner `closed_form`), or with
    `resolve`, it is solved anew for what is asked, from the run's moments and without images; what was trained can be
    fused by another rule or with fewer steps only.

    Args:
      directory: of the run.
      output: what to write, and where.
      rule, steps, time_scale, beta_end: None for the run's own; with new denoisers the rule may also be `wiener:r`.
      strength: τ, how much of the fusion is taken.
      resolve: whether the denoisers are to be solved anew whatever the run's learner.
      noise: "zero", or "sample" for a z drawn once from `seed` and kept in the weights.
      seed: of that draw.
    """
    if noise not in ("zero", "sample"):
        raise ConfigError(f'Unknown noise "{noise}"; it is "zero" or "sample".')
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
    return fuse_and_export(config, setting, variables, denoise, output, how, recorded)


def _as_learned(directory: str, config: Config, asked: Mapping[str, Any], noise: str) -> dict[str, Any]:
    """Returns rule and steps for the denoisers that the run learned, or refuses what they were not learned for."""
    direct = config["learner"] in DIRECT
    own = {**config["denoise"], "beta_end": config["schedule"]["beta_end"], **rule_and_steps(config["learner"], config)}
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


def fuse_and_export(*args: Any) -> tuple[Certificate, list[str]]:
    """Fuses in float64, certifies and writes weights and certificate; of several processes the first one does it.

    Args:
      *args: configuration, setting, variables, denoisers and output; how they are fused (rule, steps); what is written down
        about it.
    """
    return processes.from_primary(lambda: _fuse_and_export(*args))


def _fuse_and_export(
    config: Config,
    setting: Setting,
    variables: Tree,
    denoise: Tree,
    output: Output,
    how: Mapping[str, Any],
    recorded: Mapping[str, Any],
) -> tuple[Certificate, list[str]]:
    original = open_original(config, setting, variables, output)
    fused, certificate = fuse_and_certify(config, setting, variables, denoise, **how)
    exact = None
    if needs_exact(output, original):
        params = {"backbone": variables["params"], "denoise": denoise}
        exact = fuse_exact(params, setting.sites, setting.schedule, round_back=False, **how)
    if not all(np.isfinite(figure.error) for figure in certificate.end_to_end.values()):
        told = f"rule {recorded['rule']}, {recorded['steps']} step(s) and strength {recorded['strength']:g}"
        raise NonFiniteError(
            f"With {told} the fused network gives NaN or Inf on real images; nothing was written. Take a smaller "
            "strength or time steps."
        )
    images = certificate_images(config, setting)
    paths = write(output, setting, variables, fused, recorded, exact=exact, original=original, images=images)
    files.write_json(os.path.join(output.directory, "certificate.json"), certificate.to_json())
    return certificate, paths
