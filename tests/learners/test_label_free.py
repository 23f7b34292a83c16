"""Runs whose learner chooses on held-out images: measured noise and Wiener filters, with labels and without."""

import json
import os

import jax
import numpy as np
import pytest

from drep_jax import report, weights
from drep_jax.core.denoisers import Denoisers, init_denoise
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.moments import collect_moments
from drep_jax.errors import ConfigError, DataError
from drep_jax.evaluation.selection import Candidate
from drep_jax.jobs import train
from drep_jax.learners import label_free
from drep_jax.learners.base import with_leading
from drep_jax.learners.checks import check_choosing
from drep_jax.learners.streams import CorruptedImages
from drep_jax.run import workdir
from drep_jax.run.config import defaults
from drep_jax.run.moments import MOMENTS, NOISY_MOMENTS, kept_moments
from drep_jax.trees import get_in
from tests.command import call, largest_difference, same_bits


def test_denoisers_of_all_clean_shares_count_as_memory():
    class Images:
        bytes, resident = 2**28, True

    class Site:
        denoiser_shape = (2**12, 2**12)

    options = {"memory_gib": 1.0, "clean_share": (0.5, 0.6, 0.75)}
    assert label_free._memory_left({**options, "clean_share": (0.5,)}, Images, [Site]) == 0.75
    assert label_free._memory_left(options, Images, [Site] * 3) == 0.75 - 2 * 3 * 2**-4
    assert label_free._memory_left(options, Images, [Site] * 99) == 0.0


@pytest.mark.slow
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
    content = train.run(config, str(tmp_path / "run"))
    assert content["exported"] == "measured" and set(content["learning"]) == {"measured", "wiener"}
    assert content["certificate"]["passed"] and content["certificate"]["rule"] == "affine"
    front = content["front"]
    assert front["conditions"] == ["clean", "gaussian:100"] and len(front["points"]) == 9
    assert {point["label"] for point in front["points"]} == {"backbone", "clean share 0.3", "clean share 0.6"}
    chosen = content["learning"]["measured"]["chosen"]
    assert chosen["criterion"] == "accuracy" and content["learning"]["measured"]["images"] == 200
    section = content["learning"]["measured"]
    assert section["held_out"].keys() == section["per_site"].keys() >= set(section["left_alone"])
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| held out |" in page and "was not fitted to, the mean error is 0." in page
    noisy = content["metrics"]["gaussian:100"]
    assert noisy["difference"]["measured - baseline"]["acc@1"] > 3
    assert noisy["interval"]["measured - baseline"]["acc@1"][0] > 0
    gains = [gain for site in content["spectra"].values() for gain in site["gain"]]
    assert min(gains) < 0.9 and set(content["spectra"]) == {site["path"] for site in content["sites"]}

    place = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert call("fuse.py", *place).status == 0
    again = weights.load(str(tmp_path / "out" / "fused.safetensors"), finished.setup.abstract, allow_fused=True)
    own = weights.load(str(tmp_path / "run" / "fused" / "fused.safetensors"), finished.setup.abstract, allow_fused=True)
    assert largest_difference(again, own) == 0
    for choice in ("--rule=ddpm", "--steps=2", "--noise=sample", "--time_scale=2"):
        call("fuse.py", *place, choice).refused("learned its maps directly", "--resolve")
    assert call("fuse.py", *place, "--resolve", "--rule=ddpm", "--steps=2").status == 0


@pytest.mark.slow
def test_unlabelled_pairs_are_measured_and_chosen_by_agreement(finished, tmp_path):
    from PIL import Image

    from drep_jax.data.corruptions import corrupt

    images_of = finished.setup.train
    clean = np.stack([images_of[i]["image"] for i in range(120)])
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
    content = train.run(config, str(tmp_path / "run"))
    assert content["metrics"] == {} and content["certificate"]["passed"]
    section = content["learning"]["measured"]
    assert section["chosen"]["criterion"] == "agreement" and section["images"] == 120
    points = content["front"]["points"]
    assert points[0]["scores"]["clean"] == 100
    best = points[content["front"]["chosen"]]["scores"]
    assert sum(best.values()) >= sum(points[0]["scores"].values())


@pytest.mark.slow
def test_noise_without_pairs_is_learned_from_second_moments(finished, tmp_path):
    """Noisy images of other scenes; the noise of the evaluation is laid from a bank."""
    from PIL import Image

    from drep_jax.data.corruptions import corrupt

    source = finished.setup.train
    clean = np.stack([source[i]["image"] for i in range(160)])
    noisy = corrupt(clean, np.arange(160), "gaussian:70", 5).round().astype(np.uint8)
    for name, images in (("noisy", noisy[:120]), ("bank/corrupted", noisy[120:]), ("bank/clean", clean[120:])):
        os.makedirs(tmp_path / name)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:03}.png")
    config = json.loads(json.dumps(finished.config))
    config["backbone"].update(init_from=finished.backbone, steps=0)
    config["control"]["steps"] = 0
    bank = f"bank:{tmp_path / 'bank'}"
    config.update(learner="measured", compare=[], noise=f"unpaired:{tmp_path / 'noisy'}")
    config["evaluate"].update(conditions=["clean", bank], spectra=False)
    config["measured"]["clean_share"] = [0.2]
    config["select"].update(images=48, strengths=[0.0, 1.0], max_clean_loss=100.0)
    content = train.run(config, str(tmp_path / "run"))
    assert content["certificate"]["passed"] and set(content["metrics"]) == {"clean", bank}
    assert content["data"]["noisy images"]["images"] == 120
    section = content["learning"]["measured"]
    assert section["images"] == 120 and os.path.exists(tmp_path / "run" / NOISY_MOMENTS)
    assert section["per_site"] == {} or all(after < before for before, after in section["per_site"].values())
    points = content["front"]["points"]
    assert len(points) == 2 and points[1]["label"] == "clean share 0.2"
    assert points[1]["scores"] != points[0]["scores"]
    config["noise"] = f"unpaired:{tmp_path / 'bank'}"
    with pytest.raises(DataError, match="holds pairs, the clean images among them"):
        train.run(config, str(tmp_path / "other"))


def test_measured_noise_needs_no_moments_unless_spectra_are_asked_for(finished, tmp_path, monkeypatch, capsys):
    config = json.loads(json.dumps(finished.config))
    config["backbone"].update(init_from=finished.backbone, steps=0)
    config["control"]["steps"] = 0
    config.update(learner="measured", compare=[], noise="gaussian:60")
    config["evaluate"].update(conditions=["clean"], spectra=False)
    config["measured"].update(images=64, vectors=20)
    config["progress"] = True
    config["select"].update(images=48, strengths=[0.0, 1.0], leading=[1.0, 0.5])
    taken = []

    def never(*arguments, **options):
        raise AssertionError("moments were taken")

    def counted(*arguments, **options):
        taken.append(1)
        return collect_moments(*arguments, **options)

    directory, path = str(tmp_path / "run"), str(tmp_path / "run" / MOMENTS)
    monkeypatch.setattr("drep_jax.run.moments.collect_moments", never)
    monkeypatch.setattr("drep_jax.progress.SHOWN_AFTER", 0.0)
    content = train.run(config, directory)
    assert content["certificate"]["passed"] and content["spectra"] is None and not os.path.exists(path)
    report.validate(report.plain(content))
    labels = [point["label"] for point in content["front"]["points"]]
    assert labels == ["backbone", "clean share 0.75, first 2 of 4 sites", "clean share 0.75"]
    chosen = content["learning"]["measured"]["chosen"]
    assert chosen["sites"] == {0: 0, 1: 2, 2: 4}[content["front"]["chosen"]]
    assert len(content["learning"]["measured"]["per_site"]) == chosen["sites"]
    assert "measured" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    told = capsys.readouterr()
    assert "measuring, clean share 0.75: 100%" in told.err and "(held out 0." in told.err and "→" in told.err

    monkeypatch.setattr("drep_jax.run.moments.collect_moments", counted)
    out = f"--out={tmp_path / 'out'}"
    assert call("fuse.py", f"--workdir={directory}", out).status == 0 and not taken
    ended = call("fuse.py", f"--workdir={directory}", out, "--resolve", "--rule=wiener:0.1")
    assert ended.status == 0 and "PASSED" in ended.output and taken == [1] and os.path.exists(path), ended

    os.remove(path)
    config["evaluate"]["spectra"] = True
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    again = train.run(config, directory)
    assert taken == [1, 1] and os.path.exists(path)
    assert set(again["spectra"]) == {site["path"] for site in again["sites"]}
    assert again["metrics"] == content["metrics"]
    kept = kept_moments(finished.run, finished.variables)
    for site in finished.setup.sites:  # they are of the backbone, whatever the learner
        variance = np.asarray(again["spectra"][site.name]["variance"])
        np.testing.assert_allclose(variance.sum(), np.trace(kept[site.path].covariance), rtol=1e-5)


def test_leading_sites_alone_are_fused(finished):
    sites, backbone = finished.setup.sites, finished.variables["params"]
    maps = jax.tree_util.tree_map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), init_denoise(sites))
    shortened = with_leading(Candidate("maps", maps), sites, 1)
    assert (
        shortened.label == "maps, first 1 of 4 sites"
        and with_leading(Candidate("maps", maps), sites, 4).denoise is maps
    )
    params = {"backbone": backbone, "denoise": Denoisers(shortened.denoise, "affine")}
    fused = fuse_exact(params, sites, finished.setup.schedule)
    changed = [
        not same_bits(*(get_in(tree, layer.path) for tree in (fused, backbone)))
        for site in sites
        for layer in site.layers
    ]
    assert changed == [True, False, False, False]


@pytest.mark.parametrize("leading", [[], [0.0, 1.0], [1.5]])
def test_leading_fractions_out_of_range_are_refused(finished, leading):
    config = json.loads(json.dumps(finished.config))
    config["select"]["leading"] = leading
    with pytest.raises(ConfigError, match=r"select\.leading=.*in \(0, 1\]"):
        check_choosing(config, finished.setup)


@pytest.mark.slow
def test_a_backbone_without_a_head_is_chosen_by_the_nearest_image(finished, tmp_path):
    headless = {name: leaf for name, leaf in finished.variables["params"].items() if name != "head"}
    weights.save_safetensors(str(tmp_path / "headless.safetensors"), {"params": headless})
    config = json.loads(json.dumps(finished.config))
    config["backbone"].update(init_from=str(tmp_path / "headless.safetensors"), steps=0)
    config["control"]["steps"] = 0
    config["model"]["num_classes"] = -1
    config.update(learner="measured", compare=[], noise="gaussian:60..120")
    config["evaluate"]["conditions"] = ["clean", "gaussian:100"]
    config["sites"]["pattern"] = ".*"
    config["measured"].update(images=200, clean_share=[0.5])
    config["select"].update(max_clean_loss=10.0, images=100)
    content = train.run(config, str(tmp_path / "run"))
    chosen = content["learning"]["measured"]["chosen"]
    assert chosen["criterion"] == "agreement" and content["metrics"] == {} and content["certificate"]["passed"]
    points = content["front"]["points"]
    assert points[0]["scores"]["clean"] == 100.0 and points[0]["scores"]["gaussian:100"] < 90
    best = max(point["scores"]["gaussian:100"] for point in points)
    assert best > points[0]["scores"]["gaussian:100"] + 2
    config["control"]["steps"] = 5
    with pytest.raises(ConfigError, match=r"no head.*control\.steps=0"):
        train.run(config, str(tmp_path / "other"))


def test_a_run_with_the_fixed_ridge_goes_on_with_it():
    before, now, fixed = defaults(), defaults(), defaults()
    before["measured"] = {"ridge": 1e-3}  # an older release knew no bound on memory
    fixed["measured"]["ridge"] = 1e-3
    assert workdir.differences(before, now) == {"measured.ridge": (1e-3, 0.0)}
    assert not workdir.differences(before, fixed)


def test_images_that_do_not_fit_into_memory_are_made_when_they_are_needed(finished):
    config = json.loads(json.dumps(finished.config))
    config["measured"].update(images=12, draws=2)
    held = CorruptedImages(config, finished.setup)
    config["measured"]["memory_gib"] = held.bytes / 2**30
    made = CorruptedImages(config, finished.setup)
    assert held.resident and not made.resident and held.shape == made.shape == (4, 12, *finished.setup.images.shape[1:])
    index = np.array([7, 0, 7])
    np.testing.assert_array_equal(held.take(index), made.take(index))
    clean, again, *corrupted = made.take(index)
    np.testing.assert_array_equal(clean, again)
    assert all(np.abs(one - clean).max() > 0.1 for one in corrupted) and np.abs(corrupted[0] - corrupted[1]).max() > 0.1
