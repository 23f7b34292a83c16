"""fuse.py --sweep and --resolve: denoisers solved again from the moments of a finished run."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from drep_jax import closed_form, experiment, weights
from drep_jax.closed_form import MOMENTS
from drep_jax.errors import ConfigError
from drep_jax.fusion import fuse_exact
from drep_jax.recipes import Recipe, as_affine, make_grid, solve
from drep_jax.sites import assign_times
from tests.command import call, largest_difference


def moments_of(finished):
    return experiment.saved_moments(finished.config, finished.setting, finished.variables, finished.directory)


@pytest.mark.parametrize("rule, steps", [("ddpm", 3), ("paper", 1), ("ddim", 2), ("ddim:0", 1)])
def test_k_steps_of_any_rule_are_one_affine_map(finished, rule, steps):
    setting = finished.setting
    params = {"backbone": finished.variables["params"], "denoise": finished.denoise}
    maps = as_affine(finished.denoise, setting.sites, setting.schedule, rule=rule, steps=steps)
    expected = fuse_exact(params, setting.sites, setting.schedule, rule=rule, steps=steps)
    got = fuse_exact({**params, "denoise": maps}, setting.sites, setting.schedule, rule="affine", steps=1)
    change = largest_difference(expected, params["backbone"])
    assert largest_difference(got, expected) < 1e-4 * change


def test_the_grid_holds_every_combination_that_fits(finished):
    setting = finished.setting
    options = {"rules": ["ddpm", "ddim:0", "wiener:0.01"], "steps": [1, 5], "scales": [1.0, 60.0], "strengths": [1.0]}
    grid = make_grid(options, setting.sites, setting.schedule)
    assert grid.recipes == (
        Recipe("ddpm"), Recipe("ddpm", 1, 60.0), Recipe("ddpm", 5), Recipe("ddim:0"), Recipe("ddim:0", 1, 60.0),
        Recipe("wiener:0.01"),
    )  # fmt: skip
    assert len(grid.dropped) == 1 and "1200 time steps" in grid.dropped["ddpm, k 5, t ×60"]
    moments = moments_of(finished)
    solved = solve(grid.recipes, moments, setting.sites, setting.schedule)
    placed = assign_times(setting.sites, timesteps=1000, steps=5)
    alone = closed_form.closed_form(moments, placed, setting.schedule, dtype=np.float64)
    again = as_affine(alone, placed, setting.schedule, rule="ddpm", steps=5)
    assert largest_difference(again, solved[2]) == 0
    assert largest_difference(solved[5], closed_form.wiener_maps(moments, setting.sites, 0.01)) == 0
    for change, message in (
        ({"rules": ["dppm"]}, 'Did you mean "ddpm"'),
        ({"rules": ["wiener:0"]}, "above 0"),
        ({"rules": ["affine"]}, "given directly"),
        ({"steps": [0]}, "at least 1"),
        ({"scales": [-1.0]}, "above 0"),
        ({"strengths": [float("nan")]}, "at least 0"),
        ({"rules": []}, "is empty"),
        ({"rules": ["ddpm"], "scales": [1000.0]}, "Nothing of the grid fits"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_grid({**options, **change}, setting.sites, setting.schedule)


def test_sweeping_writes_the_best_point_and_never_a_worse_one(finished, tmp_path):
    out = tmp_path / "sweep"
    ended = call("fuse.py", f"--workdir={finished.directory}", f"--out={out}", "--sweep", "--sweep_images=150")
    assert ended.status == 0 and "Certificate: PASSED" in ended.output, ended
    assert "without images" in ended.output and "On the test images" in ended.output
    content = json.loads((out / "sweep.json").read_text())
    points, chosen = content["front"]["points"], content["front"]["chosen"]
    assert points[0]["strength"] == 0 and len(points) > 20
    totals = [sum(value or 0 for value in point["scores"].values()) for point in points]
    assert totals[chosen] >= totals[0]
    found = weights.load(str(out / "fused.safetensors"), finished.setting.abstract, allow_fused=True)
    same = largest_difference(found["params"], finished.variables["params"]) == 0
    assert same == (chosen == 0)
    assert set(content["metrics"]) == {"clean", "gaussian:60"}


def test_other_time_steps_are_solved_from_the_moments(finished, tmp_path):
    out = tmp_path / "out"
    place = [f"--workdir={finished.directory}", f"--out={out}"]
    ended = call("fuse.py", *place, "--resolve", "--steps=5", "--time_scale=2.5", "--rule=ddim")
    assert ended.status == 0 and "t = 50…12" in ended.output and "without images" in ended.output, ended
    setting = finished.setting
    sites = assign_times(setting.sites, timesteps=1000, steps=5, time_scale=2.5)
    assert [site.times for site in sites] == [(50,), (38,), (25,), (12,)]
    solved = closed_form.closed_form(moments_of(finished), sites, setting.schedule)
    params = {"backbone": finished.variables["params"], "denoise": solved}
    expected = fuse_exact(params, sites, setting.schedule, rule="ddim", steps=5)
    found = weights.load(str(out / "fused.safetensors"), setting.abstract, allow_fused=True)["params"]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree_util.tree_leaves, (found, expected)), strict=True))
    call("fuse.py", *place, "--time_scale=2").refused("--resolve", "belongs to its time step")
    call("fuse.py", *place, "--rule=wiener:0.01").refused("--resolve", "other denoisers")
    call("fuse.py", *place, "--resolve", "--time_scale=1000").refused("12000 time steps")
    call("fuse.py", *place, "--resolve", "--time_scale=0").refused("0")
    call("fuse.py", *place, "--sweep", "--noise=sample").refused("--sweep", "--noise")
    call("fuse.py", *place, "--strength=-1").refused("strength", "at least 0")
    call("fuse.py", *place, "--strength=nan").refused("strength", "at least 0")
    assert call("fuse.py", *place, "--strength=0").status == 0
    found = weights.load(str(out / "fused.safetensors"), setting.abstract, allow_fused=True)["params"]
    assert largest_difference(found, finished.variables["params"]) == 0
    call("fuse.py", *place, "--strength=1e38").refused("NaN or Inf")


def test_moments_that_are_not_this_backbones_are_refused(finished, tmp_path):
    run = shutil.copytree(finished.directory, tmp_path / "run")
    place = [f"--workdir={run}", f"--out={tmp_path / 'out'}"]
    moments = moments_of(finished)
    closed_form.save_moments(str(run / MOMENTS), moments, "another")
    call("fuse.py", *place, "--sweep").refused("another backbone")
    call("fuse.py", *place, "--resolve").refused("another backbone")
    first, *rest = finished.setting.sites
    wide = closed_form.Moments(9, np.zeros(first.width + 1), np.eye(first.width + 1))
    changed = {first.path: wide, **{site.path: moments[site.path] for site in rest}}
    closed_form.save_moments(str(run / MOMENTS), changed, experiment._owner(finished.setting, finished.variables))
    call("fuse.py", *place, "--sweep").refused("another image size")
    os.remove(run / MOMENTS)
    call("fuse.py", *place, "--sweep").refused("moments.npz")
