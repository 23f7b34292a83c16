"""fuse.py on other time steps and on a grid of them: solved from a finished run's moments, chosen on held-out images."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from drep_jax import weights
from drep_jax.core.closed_form import closed_form, wiener_maps
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.recipes import Recipe, as_affine, solve
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import normalize
from drep_jax.errors import DataError
from drep_jax.evaluation.selection import SELECTION_SEED, Choice, Point
from drep_jax.jobs import train
from drep_jax.jobs.fuse import load_run
from drep_jax.jobs.sweep import table
from drep_jax.learners import LearnerInputs, learn
from drep_jax.run import inputs, moments
from drep_jax.run.moments import MOMENTS
from drep_jax.run.run import Run
from tests.command import call, largest_difference, same_bits

GRID = {
    "rules": ("ddpm", "ddim:0", "wiener:0.1"),
    "steps": (1, 4),
    "scales": (1.0, 80.0),
    "strengths": (0.0, 0.5, 1.5),
}
RECIPES = [Recipe("ddpm"), Recipe("ddpm", 1, 80.0), Recipe("ddpm", 4), Recipe("ddim:0"), Recipe("ddim:0", 1, 80.0)]
RECIPES += [Recipe("wiener:0.1")]


def copied(finished, place, change):
    """A copy of the finished run whose configuration is changed by `change`."""
    directory = shutil.copytree(finished.directory, place)
    with open(place / "config.json", encoding="utf-8") as file:
        config = json.load(file)
    change(config)
    (place / "config.json").write_text(json.dumps(config))
    return directory


def record(out):
    with open(out / "orbax" / "drep_jax.json", encoding="utf-8") as file:
        return json.load(file)["fused"]


def written(finished, out):
    return weights.load(str(out / "fused.safetensors"), finished.setup.abstract, allow_fused=True)["params"]


def moments_of(finished):
    return moments.kept_moments(finished.run, finished.variables)


def params_of(finished, denoise):
    return {"backbone": finished.variables["params"], "denoise": denoise}


# ---- other time steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--time_scale=2"], ["time_scale=1", "--resolve"]),
        (["--beta_end=0.02"], ["beta_end=0.002", "--resolve"]),
        (["--steps=4"], ["4 steps", "learned with 3", "--resolve"]),
        (["--rule=wiener:0.1"], ["wiener:0.1", "--resolve"]),
        (["--resolve", "--time_scale=100"], ["1200 time steps at time scale 100"]),
        (["--resolve", "--rule=wiener:0.1", "--steps=2"], ["wiener:0.1 has no time steps", "--steps"]),
        (["--resolve", "--rule=wiener:0.1", "--noise=sample"], ["without noise"]),
        (["--resolve", "--rule=weiner:0.1"], ["weiner", 'Did you mean "wiener"']),
        (["--resolve", "--rule=affine"], ["affine", "given directly"]),
        (["--resolve", "--rule=ddim:0"], ["ddim:0", "3 times"]),
        (["--resolve", "--time_scale=0"], ["scale of the time steps"]),
        (["--strength=-1"], ["strength", "at least 0"]),
        (["--strength=nan"], ["strength", "at least 0"]),
        (["--strength=1e38"], ["NaN or Inf", "nothing was written"]),
        (["--sweep_images=5"], ["--sweep only"]),
        (["--sweep", "--noise=sample"], ["--noise does not go with it"]),
        (["--sweep", "--sweep_images=-1"], ["0 (all of them)", "-1"]),
        (["--sweep", "--rule=ddpm", "--time_scale=1000"], ["Nothing of the grid fits"]),
        (["--sweep", "--rule=dppm"], ["dppm", 'Did you mean "ddpm"']),
        (["--sweep", "--dtype=int8"], ["int8"]),
    ],
)
def test_what_a_trained_run_cannot_give_is_refused(arguments, expected, finished, tmp_path):
    call("fuse.py", f"--workdir={finished.directory}", f"--out={tmp_path / 'out'}", *arguments).refused(*expected)
    assert not os.path.exists(tmp_path / "out" / "fused.safetensors")


@pytest.fixture
def without_images(monkeypatch):
    """The images of a run are gone, or on another machine."""

    def absent(*args, **options):
        raise DataError("There is no directory.")

    monkeypatch.setattr("drep_jax.run.setup.open_images", absent)


def test_resolve_takes_the_closed_form_at_the_time_steps_asked_for(finished, tmp_path, without_images):
    asked = ["--resolve", "--steps=2", "--time_scale=10", "--beta_end=0.02", "--strength=0.5"]
    ended = call("fuse.py", f"--workdir={finished.directory}", f"--out={tmp_path}", *asked)
    assert ended.status == 0 and "Certificate: PASSED" in ended.output, ended
    assert ended.output.count("solved anew for t = 80…20 from the run's moments") == 1
    told = record(tmp_path)
    assert (told["rule"], told["steps"], told["strength"]) == ("ddpm", 2, 0.5)
    assert [*told["sites"].values()] == [[80], [60], [40], [20]]
    setup = finished.setup.respaced(steps=2, time_scale=10.0, beta_end=0.02)
    denoise = closed_form(moments_of(finished), setup.sites, setup.schedule)
    expected = fuse_exact(params_of(finished, denoise), setup.sites, setup.schedule, steps=2, strength=0.5)
    change = largest_difference(expected, finished.variables["params"])
    assert change > 1e-3
    assert largest_difference(expected, written(finished, tmp_path)) < 1e-5 * change + 1e-7


def test_resolve_takes_a_wiener_filter(finished, tmp_path):
    ended = call("fuse.py", f"--workdir={finished.directory}", f"--out={tmp_path}", "--resolve", "--rule=wiener:0.1")
    assert ended.status == 0 and "Certificate: PASSED" in ended.output, ended
    setup = finished.setup
    maps = wiener_maps(moments_of(finished), setup.sites, 0.1)
    expected = fuse_exact(params_of(finished, maps), setup.sites, setup.schedule, rule="affine", steps=1)
    assert same_bits(expected, written(finished, tmp_path)) and record(tmp_path)["rule"] == "wiener:0.1"


def test_what_a_run_keeps_of_its_images(finished, tmp_path, without_images):
    kept = inputs.load_inputs(finished.directory)
    assert (kept.num_classes, kept.side) == (10, ())
    np.testing.assert_array_equal(kept.images, inputs.first_images(finished.config, finished.setup))
    _, variables, _ = load_run(finished.directory, images=False)
    assert same_bits(variables, finished.variables)
    directory = copied(finished, tmp_path / "run", lambda config: None)
    path = pathlib.Path(directory, inputs.INPUTS)
    path.write_bytes(path.read_bytes()[:-100])
    call("fuse.py", f"--workdir={directory}", "--resolve").refused(str(path), "damaged", "delete it")
    path.unlink()  # as an earlier release left it: its images are opened
    call("fuse.py", f"--workdir={directory}", "--resolve").refused("There is no directory.")


@pytest.mark.slow
def test_what_was_trained_can_be_mixed_with_the_backbone(finished, tmp_path, without_images):
    setup = finished.setup
    for strength in (0.0, 0.25):
        arguments = [f"--workdir={finished.directory}", f"--out={tmp_path}", f"--strength={strength}"]
        ended = call("fuse.py", *arguments)
        assert ended.status == 0 and "PASSED" in ended.output and "solved anew" not in ended.output
        params = params_of(finished, finished.denoise)
        expected = fuse_exact(params, setup.sites, setup.schedule, steps=3, strength=strength)
        assert largest_difference(expected, written(finished, tmp_path)) < 1e-6
        assert same_bits(finished.variables["params"], written(finished, tmp_path)) == (strength == 0.0)


@pytest.mark.slow
def test_a_run_that_was_solved_is_solved_again_without_being_told(finished, tmp_path):
    directory = copied(finished, tmp_path / "run", lambda config: config.update(learner="closed_form"))
    config = train.workdir.read_config(directory)
    learn("closed_form", LearnerInputs(Run(config, finished.setup, str(directory)), finished.variables))

    def fuse(*arguments):
        ended = call("fuse.py", f"--workdir={directory}", f"--out={tmp_path / 'out'}", *arguments)
        assert ended.status == 0 and "PASSED" in ended.output, ended
        return written(finished, tmp_path / "out"), "solved anew" in ended.output

    own, again = fuse()
    assert not again
    same, again = fuse("--steps=3", "--time_scale=1")
    assert again and same_bits(own, same)
    other, again = fuse("--time_scale=20")
    assert again and largest_difference(own, other) > 1e-3


@pytest.mark.parametrize("rule, steps", [("ddpm", 3), ("paper", 1), ("ddim", 2), ("ddim:0", 1)])
def test_k_steps_of_any_rule_are_one_affine_map(finished, rule, steps):
    setup, params = finished.setup, params_of(finished, finished.denoise)
    maps = as_affine(finished.denoise, setup.sites, setup.schedule, rule=rule, steps=steps)
    expected = fuse_exact(params, setup.sites, setup.schedule, rule=rule, steps=steps)
    got = fuse_exact(params_of(finished, maps), setup.sites, setup.schedule, rule="affine", steps=1)
    assert largest_difference(got, expected) < 1e-4 * largest_difference(expected, params["backbone"])


@pytest.mark.parametrize("damage", ["backbone", "size", "width"])
def test_moments_of_something_else_are_refused(damage, finished, tmp_path):
    directory = copied(finished, tmp_path / "run", lambda config: None)
    path = os.path.join(directory, MOMENTS)
    with np.load(path) as file:
        arrays = dict(file)
    owner = str(arrays["owner"])
    assert owner.endswith(" 8x8")
    first = finished.setup.sites[0]
    if damage == "width":
        np.savez(path, **{**arrays, f"{first.name}:mean": np.zeros(first.width + 1)})
    else:
        other = owner.replace("8x8", "16x16") if damage == "size" else "0" + owner[1:]
        np.savez(path, **{**arrays, "owner": np.array(other if other != owner else "1" + owner[1:])})
    expected = f"moments of {first.name} have shape" if damage == "width" else "another backbone or image size"
    for way in ("--resolve", "--sweep"):
        call("fuse.py", f"--workdir={directory}", f"--out={tmp_path / 'out'}", way).refused(MOMENTS, expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--resolve", "--sweep"])
def test_moments_that_are_absent_are_taken(way, finished, tmp_path):
    """A run whose learner needs none has kept none; what asks for them first takes them."""
    directory = copied(finished, tmp_path / "run", lambda config: config["sweep"].update(GRID))
    path = os.path.join(directory, MOMENTS)
    os.remove(path)
    options = ["--sweep_images=8", "--rule=ddpm", "--steps=1"] if way == "--sweep" else []
    ended = call("fuse.py", f"--workdir={directory}", f"--out={tmp_path / 'out'}", way, *options)
    assert ended.status == 0 and "PASSED" in ended.output, ended
    owner = moments.owner_of(finished.setup, finished.variables)
    taken, before = moments.load_moments(path, finished.setup.sites, owner), moments_of(finished)
    for place, known in before.items():
        assert taken[place].count == known.count
        np.testing.assert_array_equal(taken[place].covariance, known.covariance)


# ---- the sweep -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(finished, tmp_path_factory):
    """The sweep of a small grid: how it ended, where it wrote, and its sweep.json."""
    place = tmp_path_factory.mktemp("swept")
    directory = copied(finished, place / "run", lambda config: config["sweep"].update(GRID))
    ended = call("fuse.py", f"--workdir={directory}", "--sweep", "--sweep_images=0", "--time_scale=80")
    assert "ddpm, k 4, t ×80" in ended.output.splitlines()[0]
    ended = call("fuse.py", f"--workdir={directory}", "--sweep", "--sweep_images=0")
    assert ended.status == 0, ended
    out = place / "run" / "sweep"
    with open(out / "sweep.json", encoding="utf-8") as file:
        return ended, out, json.load(file)


def naive_scores(finished, count):
    """Accuracy of every point and condition, fused one by one in float64."""
    setup = finished.setup
    source = setup.held_out
    images = np.stack([source[i]["image"] for i in range(count)])
    labels = np.array([source[i]["label"] for i in range(count)])
    apply = jax.jit(setup.backbone.apply)
    trees = solve(RECIPES, moments_of(finished), setup.sites, setup.schedule)
    grid = [(trees[0], 0.0), *((tree, tau) for tree in trees for tau in (0.5, 1.5))]
    rows = []
    for tree, tau in grid:
        params = params_of(finished, tree)
        fused = fuse_exact(params, setup.sites, setup.schedule, rule="affine", steps=1, strength=tau)
        row = []
        for condition in ("clean", "gaussian:60"):
            noisy = corrupt(images, np.arange(count), condition, finished.config["seed"] + SELECTION_SEED)
            logits = apply({"params": fused}, normalize(noisy, setup.mean, setup.std))
            row.append(100 * np.mean(np.argmax(logits, -1) == labels))
        rows.append(row)
    return np.array(rows)


def test_scores_are_those_of_fusing_one_by_one(finished, swept):
    _, _, content = swept
    assert content["images"] == 197 and content["criterion"] == "accuracy"
    labels = ["backbone", *(recipe.label for recipe in RECIPES for _ in range(2))]
    assert [point["label"] for point in content["points"]] == labels
    assert [point["strength"] for point in content["points"]] == [0.0, *[0.5, 1.5] * len(RECIPES)]
    found = np.array([[*point["accuracy"].values()] for point in content["points"]])
    expected = naive_scores(finished, 197)
    # float32 against float64: a logit that ties may fall either way
    np.testing.assert_allclose(found, expected, atol=1.01 * 100 / 197)
    assert np.mean(np.isclose(found, expected)) > 0.8
    assert len(np.unique(found, axis=0)) > 4


def test_the_chosen_point_is_the_best_allowed_one_and_is_written(finished, swept):
    ended, out, content = swept
    points = content["points"]
    chosen = points[content["chosen"]]
    base = points[0]["accuracy"]
    limit = finished.config["select"]["max_clean_loss"]
    assert content["max_clean_loss"] == limit and points[0]["change"] == 0.0

    def total(point):
        return sum(point["accuracy"].values())

    allowed = [p for p in points if not p["overflow"] and p["accuracy"]["clean"] >= base["clean"] - limit - 1e-9]
    assert total(chosen) == max(map(total, allowed)) >= sum(base.values())
    assert chosen["change"] == min(p["change"] for p in allowed if total(p) == total(chosen))
    setup = finished.setup
    recipe = Recipe(chosen.get("rule", "ddpm"), chosen.get("steps", 1), chosen.get("scale", 1.0))
    (tree,) = solve([recipe], moments_of(finished), setup.sites, setup.schedule)
    expected = fuse_exact(
        params_of(finished, tree), setup.sites, setup.schedule, rule="affine", steps=1, strength=chosen["strength"]
    )
    assert largest_difference(expected, written(finished, out)) < 1e-6
    assert record(out)["strength"] == chosen["strength"]
    assert content["certificate"]["passed"] and os.path.exists(out / "certificate.json")
    assert "PASSED" in ended.output and str(out) in ended.output


def test_output_has_the_table_the_front_and_one_look_at_the_test_images(swept):
    ended, _, content = swept
    for text in ("recipe", "agreement", "chosen", "unchanged", "13 points on 197 held-out images", "losing at most 1"):
        assert text in ended.output
    assert ended.output.count("swept: ") == 2 == len(content["metrics"])
    for entry in content["metrics"].values():
        assert entry["n"] == 600 and "swept - placebo" in entry["difference"]
        low, high = entry["interval"]["swept - baseline"]["acc@1"]
        assert low <= entry["difference"]["swept - baseline"]["acc@1"] <= high
    front = content["front"]
    assert front["conditions"] == ["clean", "gaussian:60"] and front["chosen"] == content["chosen"]
    assert front["points"][3]["scores"] == content["points"][3]["accuracy"]
    assert content["dropped"] and "time scale 80" in content["dropped"]["ddpm, k 4, t ×80"]
    # The two criteria differ by at most the backbone's clean error.
    error = 100 - content["points"][0]["accuracy"]["clean"]
    gaps = [abs(p["accuracy"][c] - p["agreement"][c]) for p in content["points"] for c in front["conditions"]]
    assert 0 < max(gaps) <= error + 1e-9


def test_without_labels_the_backbone_s_clean_answers_decide(finished, swept, tmp_path):
    def change(config):
        config["sweep"].update(GRID)
        config["select"]["labels"] = False

    directory = copied(finished, tmp_path / "run", change)
    out = tmp_path / "out"
    ended = call(
        "fuse.py",
        f"--workdir={directory}",
        f"--out={out}",
        "--sweep",
        "--sweep_images=50",
        "--rule=ddim:0",
        "--strength=1.5",
    )
    assert ended.status == 0 and "by agreement" in ended.output, ended
    with open(out / "sweep.json", encoding="utf-8") as file:
        content = json.load(file)
    assert content["criterion"] == "agreement" and content["images"] == 50
    assert [(p["label"], p["strength"]) for p in content["points"]] == [
        ("backbone", 0.0),
        ("ddim:0, t ×1", 1.5),
        ("ddim:0, t ×80", 1.5),
    ]
    assert all(point["accuracy"] is None for point in content["points"])
    assert content["points"][0]["agreement"]["clean"] == 100.0
    assert content["front"]["points"][1]["scores"] == content["points"][1]["agreement"]


def test_table_shows_overflow_losses_and_the_chosen_point_beyond_the_best():
    def point(label, clean, noisy, strength=1.0):
        return Point(label, 0, strength, strength, {"clean": clean, "n": noisy}, {"clean": 50.0, "n": noisy})

    nan = float("nan")
    better = [point(f"reckless {i}", 80.0, 99.0 - i) for i in range(20)]
    points = (point("backbone", 90.0, 40.0, 0.0), point("huge", nan, nan), *better, point("good", 90.0, 50.0))
    text = table(Choice(points, len(points) - 1, "accuracy", ("clean", "n"), 10, 1.0), 0.5)
    assert text.count("loses 10.00 on clean") == 15
    lines = text.splitlines()
    assert any(line.startswith("good") and line.endswith("chosen") for line in lines)
    assert any(line.startswith("backbone") and line.endswith("unchanged") for line in lines)
    assert "Overflow (not finite, never chosen): huge at 1." in text
    none = table(Choice(points, 0, "agreement", ("clean", "n"), 10, 1.0), 0.5)
    assert "Nothing in the grid is better" in none and "agreement  " not in none
