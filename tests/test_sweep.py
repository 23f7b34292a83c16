"""fuse.py --sweep and --resolve: denoisers solved again from the moments of a finished run."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from drep_jax import closed_form, experiment, weights
from drep_jax.closed_form import MOMENTS, load_moments
from drep_jax.errors import ConfigError
from drep_jax.fusion import fuse_exact
from drep_jax.sites import assign_times
from drep_jax.sweep import as_affine, sweep_candidates
from tests.command import call, largest_difference


def moments_of(finished):
    owner = weights.digest(finished.variables)
    return load_moments(os.path.join(finished.directory, MOMENTS), finished.setting.sites, owner)


@pytest.mark.parametrize("rule, steps", [("ddpm", 3), ("paper", 1), ("ddim", 2), ("ddim:0", 1)])
def test_k_steps_of_any_rule_are_one_affine_map(finished, rule, steps):
    setting = finished.setting
    params = {"backbone": finished.variables["params"], "denoise": finished.denoise}
    maps = as_affine(finished.variables, finished.denoise, setting.sites, setting.schedule, rule, steps)
    expected = fuse_exact(params, setting.sites, setting.schedule, rule=rule, steps=steps)
    got = fuse_exact({**params, "denoise": maps}, setting.sites, setting.schedule, rule="affine", steps=1)
    change = largest_difference(expected, params["backbone"])
    assert largest_difference(got, expected) < 1e-4 * change


def test_the_grid_holds_every_combination_that_fits(finished):
    setting, config = finished.setting, json.loads(json.dumps(finished.config))
    config["sweep"].update(rules=["ddpm", "ddim:0"], steps=[1, 5], scales=[1.0, 60.0], wiener=True)
    config["wiener"]["ratios"] = [0.01]
    moments = moments_of(finished)
    found, dropped = sweep_candidates(config, setting.sites, setting.schedule, finished.variables, moments)
    assert [c.label for c in found] == [
        "ddpm k=1 t×1", "ddpm k=1 t×60", "ddpm k=5 t×1", "ddim:0 k=1 t×1", "ddim:0 k=1 t×60", "wiener 0.01",
    ]  # fmt: skip
    assert len(dropped) == 1 and "ddpm k=5 t×60" in dropped[0] and "1200 time steps" in dropped[0]
    placed = assign_times(setting.sites, timesteps=1000, steps=5)
    solved = closed_form.closed_form(moments, placed, setting.schedule)
    again = as_affine(finished.variables, solved, placed, setting.schedule, "ddpm", 5)
    assert largest_difference(again, found[2].denoise) == 0
    config["sweep"]["rules"] = ["dppm"]
    with pytest.raises(ConfigError, match='Did you mean "ddpm"'):
        sweep_candidates(config, setting.sites, setting.schedule, finished.variables, moments)


def test_sweeping_writes_the_best_point_and_never_a_worse_one(finished, tmp_path):
    out = tmp_path / "sweep"
    ended = call("fuse.py", f"--workdir={finished.directory}", f"--out={out}", "--sweep", "--sweep_images=150")
    assert ended.status == 0 and "Certificate: PASSED" in ended.output, ended
    assert "150 held-out images, by accuracy" in ended.output and "On the test images" in ended.output
    content = json.loads((out / "sweep.json").read_text())
    points, chosen = content["points"], content["front"]["chosen"]
    assert points[0]["strength"] == 0
    totals = [sum(v or 0 for v in point["accuracy"].values()) for point in points]
    assert totals[chosen] >= totals[0]
    assert max(len(point["accuracy"]) for point in points) == 2 and len(points) > 20
    found = weights.load(str(out / "fused.safetensors"), finished.setting.abstract, allow_fused=True)
    same = largest_difference(found["params"], finished.variables["params"]) == 0
    assert same == (chosen == 0)
    assert set(content["metrics"]) == {"clean", "gaussian:60"}


def test_other_time_steps_are_solved_from_the_moments(finished, tmp_path):
    out = tmp_path / "out"
    place = [f"--workdir={finished.directory}", f"--out={out}"]
    ended = call("fuse.py", *place, "--resolve", "--steps=5", "--time_scale=2.5", "--rule=ddim")
    assert ended.status == 0 and "t = 50 … 12" in ended.output and "without images" in ended.output, ended
    setting = finished.setting
    sites = assign_times(setting.sites, timesteps=1000, steps=5, scale=2.5)
    assert [site.times for site in sites] == [(50,), (38,), (25,), (12,)]
    solved = closed_form.closed_form(moments_of(finished), sites, setting.schedule)
    params = {"backbone": finished.variables["params"], "denoise": solved}
    expected = fuse_exact(params, sites, setting.schedule, rule="ddim", steps=5)
    found = weights.load(str(out / "fused.safetensors"), setting.abstract, allow_fused=True)["params"]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree_util.tree_leaves, (found, expected)), strict=True))
    call("fuse.py", *place, "--time_scale=2").refused("--resolve", "other time steps")
    call("fuse.py", *place, "--resolve", "--time_scale=1000").refused("12000 time steps")
    call("fuse.py", *place, "--resolve", "--time_scale=0").refused("above 0")
    call("fuse.py", *place, "--sweep", "--rule=ddpm").refused("--sweep chooses", "--rule")


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
    closed_form.save_moments(str(run / MOMENTS), changed, weights.digest(finished.variables))
    call("fuse.py", *place, "--sweep").refused("another image size")
    os.remove(run / MOMENTS)
    call("fuse.py", *place, "--sweep").refused("no moments")


def test_maps_given_directly_have_no_time_steps(finished, tmp_path):
    config = json.loads(json.dumps(finished.config))
    config["backbone"].update(init_from=finished.backbone, steps=0)
    config["control"]["steps"] = 0
    config.update(learner="measured", compare=["wiener"], noise="gaussian:100")
    config["evaluate"]["conditions"] = ["clean", "gaussian:100"]
    config["sites"]["pattern"] = ".*"
    config["measured"].update(images=200, clean_share=[0.3, 0.6])
    config["select"]["max_clean_loss"] = 100.0
    config["wiener"]["ratios"] = [0.01]
    content = experiment.run(config, str(tmp_path / "run"))
    assert content["exported"] == "measured" and set(content["learning"]) == {"measured", "wiener"}
    assert content["certificate"]["passed"] and content["certificate"]["rule"] == "affine"
    front = content["front"]
    assert front["conditions"] == ["clean", "gaussian:100"] and len(front["points"]) == 9
    assert {point["label"] for point in front["points"]} == {"backbone", "clean share 0.3", "clean share 0.6"}
    chosen = content["learning"]["measured"]["chosen"]
    assert chosen["criterion"] == "accuracy" and content["learning"]["measured"]["images"] == 200
    noisy = content["metrics"]["gaussian:100"]
    assert noisy["difference"]["measured - baseline"]["acc@1"] > 3
    assert noisy["interval"]["measured - baseline"]["acc@1"][0] > 0
    gains = [gain for site in content["spectra"].values() for gain in site["gain"]]
    assert min(gains) < 0.9 and set(content["spectra"]) == {site["path"] for site in content["sites"]}

    place = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert call("fuse.py", *place).status == 0
    again = weights.load(str(tmp_path / "out" / "fused.safetensors"), finished.setting.abstract, allow_fused=True)
    own = weights.load(
        str(tmp_path / "run" / "fused" / "fused.safetensors"), finished.setting.abstract, allow_fused=True
    )
    assert largest_difference(again, own) == 0
    for choice in ("--rule=ddpm", "--steps=2", "--noise=sample", "--time_scale=2"):
        call("fuse.py", *place, choice).refused("learned its maps directly", "--resolve")
    assert call("fuse.py", *place, "--resolve", "--rule=ddpm", "--steps=2").status == 0


def test_unlabelled_pairs_are_measured_and_chosen_by_agreement(finished, tmp_path):
    from PIL import Image

    from drep_jax.data.corruptions import corrupt

    train = finished.setting.train
    clean = np.stack([train[i]["image"] for i in range(120)])
    noisy = corrupt(clean, np.arange(120), "gaussian:70", 5).round().astype(np.uint8)
    for name, images in (("pairs/clean", clean), ("pairs/corrupted", noisy), ("images", clean)):
        os.makedirs(tmp_path / name)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:03}.png")
    config = json.loads(json.dumps(finished.config))
    config["backbone"].update(init_from=finished.backbone, steps=0)
    config["control"]["steps"] = 0
    config["model"]["num_classes"] = 10
    config["data"]["source"] = f"folder:{tmp_path / 'images'}"
    config.update(learner="measured", noise=f"pairs:{tmp_path / 'pairs'}")
    config["select"].update(conditions=["gaussian:60"], max_clean_loss=100.0)
    content = experiment.run(config, str(tmp_path / "run"))
    assert content["metrics"] == {} and content["certificate"]["passed"]
    section = content["learning"]["measured"]
    assert section["chosen"]["criterion"] == "agreement" and section["images"] == 120
    points = content["front"]["points"]
    assert points[0]["scores"]["clean"] == 100
    best = points[content["front"]["chosen"]]["scores"]
    assert sum(best.values()) >= sum(points[0]["scores"].values())
