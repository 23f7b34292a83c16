"""Runs of task "retrieval" on a small folder: every way of training, its arms, its picture, and what is refused beforehand."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from configs.default import get_default
from drep_jax import weights
from drep_jax.core.denoisers import Denoisers, init_denoise
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.data.collate import read
from drep_jax.data.corruptions import corrupt
from drep_jax.data.metadata import table_of
from drep_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from drep_jax.evaluation import selection
from drep_jax.evaluation.arms import score_arms
from drep_jax.jobs import checks, evaluate, train
from drep_jax.jobs.dry_run import dry_run
from drep_jax.jobs.findings import exhibit_of
from drep_jax.jobs.scores import reading, scores_of
from drep_jax.learners import Learned
from drep_jax.learners.base import selection_of
from drep_jax.learners.labeled import WithFinal, with_final
from drep_jax.learners.losses import label_objective
from drep_jax.run import stages
from drep_jax.run.checkpoints import last_saved
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.run.stages import starting
from drep_jax.tasks.retrieval import CENTERS
from tests import reid_trees
from tests.command import same_bits, whole_reports

LEARNERS = ("algorithm1", "label_augmented", "alternating", "final_only")
"""Beside the exported one, where every way is tried; that takes a minute of compiling."""


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Twelve persons in two colours each, four pictures in each of two cameras, of which one is darker."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    for person in range(12):
        top, bottom = rng.integers(40, 255, (2, 3))
        for camera in range(2):
            for number in range(4):
                picture = np.concatenate([np.full((8, 8, 3), top), np.full((8, 8, 3), bottom)])
                picture = np.clip(picture * (1 - 0.4 * camera) + rng.normal(0, 12, picture.shape), 0, 255)
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"{person:04d}_c{camera + 1}_{number}.png")
    return str(folder)


def config_for(people, **changes):
    config = get_default()
    config.name, config.task, config.progress = "people", "retrieval", False
    config.latency_rounds = 2
    config.learner, config.compare, config.noise = "measured", LEARNERS, "gaussian:30..60"
    config.data.update(
        {"source": f"reid_folder:{people}?test=0.4&held_out=0.3", "image_size": (16, 8), "resize": "exact"}
    )
    config.model.update({"name": "transreid", "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24})
    config.model.update({"jigsaw": True, "drop_path": 0.0})
    config.retrieval.update({"side": "camera", "identities": 4, "instances": 2, "center_weight": 0.01, "attributed": 1})
    config.backbone.update({"steps": 12, "batch_size": 8, "learning_rate": 3e-3})
    config.control.update({"steps": 2, "batch_size": 8, "learning_rate": 1e-3})
    config.denoise.update({"train_steps": 2, "batch_size": 8, "learning_rate": 0.01})
    config.alternate.update({"steps": 2, "period": 1})
    config.measured.images = 16
    config.select.labels = True
    config.evaluate.update({"conditions": ("clean", "gaussian:60"), "batch_size": 16, "resamples": 200})
    config.evaluate.update({"certificate_images": 2, "latency_batch": 8})
    config.update_from_flattened_dict(changes)
    return config.to_dict()


@pytest.fixture(scope="module")
def run(people, tmp_path_factory):
    config = config_for(people, **{"compare": ("final_only",), "control.steps": 0})
    directory = str(tmp_path_factory.mktemp("run") / "people")
    with whole_reports():
        report = train.run(config, directory)
    return Run(config, build(config), directory), report


def scored_under(run, setup, variables, condition):
    """Returns what one network gives for the test images of a setup, under one condition."""
    ((_, scored),) = score_arms(setup, {"base": variables}, setup.test, (condition,), **reading(run.config))
    return scored


def check_arms(report, setup, denoised, controls):
    table = table_of(setup.test)
    for entry in report["metrics"].values():
        assert entry["n"] == int(table["query"].sum()) > 0
        assert set(entry["denoised"]) == denoised and set(entry["control"]) == controls
        for scores in (entry["baseline"], *entry["denoised"].values()):
            assert list(scores) == ["mAP", "rank1", "rank5", "rank10", "mINP"]
            assert 0 < scores["mAP"] <= 100 and 0 <= scores["rank1"] <= scores["rank5"] <= scores["rank10"]
        assert set(entry["mcnemar"]) == set(entry["difference"])
    assert report["certificate"]["passed"] and report["front"]


def test_every_arm_is_scored_on_the_same_queries(run):
    run, report = run
    check_arms(report, run.setup, {"measured", "final_only"}, {"placebo"})
    assert report["learning"]["measured"]["chosen"]["criterion"] == "mAP"


@pytest.mark.slow
def test_every_way_of_training_has_its_arms(people, tmp_path):
    config = config_for(people)
    report = train.run(config, str(tmp_path / "every"))
    setup = build(config)
    check_arms(report, setup, {"measured", *LEARNERS}, {"placebo", "continued"})
    assert np.isfinite(report["learning"]["alternating"]["loss"]).all()
    content, _ = evaluate.evaluate(config, str(tmp_path / "every"))
    for condition, entry in report["metrics"].items():
        for arm in ("label_augmented", "alternating"):
            assert content["metrics"][condition]["denoised"][arm] == pytest.approx(entry["denoised"][arm])


@pytest.mark.slow
def test_merged_sources_may_hold_out_nothing_and_have_no_identities_to_choose_by(people):
    other = f"reid_folder:{people}?test=0.5&seed=3&held_out="
    changes = {"retrieval.side": "", "backbone.steps": 0, "backbone.init_from": "x", "control.steps": 0, "compare": ()}
    changes |= {"retrieval.center_weight": 0.0}
    for share, size in (("0", 0), ("0.5", None)):
        config = config_for(people, **changes, **{"data.merge": ((other + share, 1.0),)})
        setup = build(config)
        alone = len(build(config_for(people, **changes)).held_out)
        assert len(setup.held_out) == alone if size == 0 else len(setup.held_out) > alone
    variables = dict(setup.backbone.init(jax.random.key(0), np.zeros(setup.images.shape, np.float32)))
    nothing = selection.Candidate("nothing", init_denoise(setup.sites))
    assert (
        config["select"]["labels"]
        and selection.choose(setup, variables, [nothing], selection_of(config)).criterion == "agreement"
    )
    config = config_for(people, **{**changes, "data.source": f"reid_folder:{people}?held_out=0"})
    with pytest.raises(DataError, match=r'"measured" chooses its strength on held-out images, and reid_folder'):
        checks.check(config, build(config))
    config = config_for(people, **{**changes, "data.source": f"reid_folder:{people}?held_out=0.01"})
    with pytest.raises(DataError, match="holds out one identity only"):
        checks.check(config, build(config))
    config["select"]["labels"] = False
    checks.check(config, build(config))


@pytest.mark.slow
def test_merged_sources_are_learned_from_together_and_evaluated_by_their_own_queries(people, tmp_path):
    changes = {"retrieval.side": "", "control.steps": 0, "learner": "algorithm1", "compare": (), "backbone.steps": 0}
    plain = config_for(people, **{**changes, "backbone.steps": 2, "learner": "closed_form"})
    train.run(plain, str(tmp_path / "first"))
    saved = str(tmp_path / "backbone.safetensors")
    weights.save_safetensors(saved, last_saved(Run(plain, build(plain), str(tmp_path / "first")), "backbone").variables)
    other = f"reid_folder:{people}?test=0.5&seed=3"
    merged = config_for(people, **changes, **{"data.merge": ((other, 1.0),), "backbone.init_from": saved})
    report = train.run(merged, str(tmp_path / "merged"))
    assert list(report["sources"]) and all(source["gallery"] is None for source in report["sources"].values())
    for source in report["sources"].values():
        assert set(source["metrics"]["clean"]["denoised"]) == {"algorithm1"}
        assert source["metrics"]["clean"]["n"] > 0
    assert report["metrics"]["clean"]["n"] > 0


def test_scores_are_those_of_features_compared_by_hand(run):
    run, report = run
    config, setup = run.config, run.setup
    found = last_saved(run, "backbone")
    batch = read(setup.test, np.arange(len(setup.test)))
    noisy = corrupt(batch["image"], batch["index"], "gaussian:60", config["seed"])
    features = np.array(jax.jit(setup.backbone.apply)(found.variables, setup.inputs({**batch, "image": noisy})))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    precisions = []
    for q in np.flatnonzero(batch["query"]):
        allowed = (batch["gallery"] == 1) & ~(
            (batch["label"] == batch["label"][q]) & (batch["camera"] == batch["camera"][q])
        )
        order = np.argsort(-(features[allowed] @ features[q]))
        right = batch["label"][allowed][order] == batch["label"][q]
        precisions.append(np.mean(np.arange(1, right.sum() + 1) / (np.flatnonzero(right) + 1)))
    assert report["metrics"]["gaussian:60"]["baseline"]["mAP"] == pytest.approx(100 * np.mean(precisions), abs=1e-3)


def exhibit_for(run, saved, arm, condition, baseline=None):
    """Returns what a report may show of a learner's result."""
    setup = run.setup
    learned = Learned(Denoisers(saved.denoise, "affine", 1), {})
    fused = fuse_variables_exact(saved.variables, saved.denoise, setup.sites, setup.schedule, rule="affine", steps=1)
    first = saved.variables if baseline is None else baseline
    arms = {"baseline": first, arm: fused}
    ((_, scored),) = score_arms(setup, arms, setup.test, (condition,), **reading(run.config))
    return exhibit_of(run, setup.test, arms, condition, scored, saved.variables, fused, learned)


def test_ranked_results_are_shown_and_sites_stand_for_themselves(run):
    run, report = run
    config, directory, setup = run.config, run.directory, run.setup
    shown = report["ranked"]
    assert shown["arms"] == ["baseline", "measured"] and shown["queries"] and len(shown["sites"]) == 1
    assert os.path.getsize(os.path.join(directory, "plots", "ranked.png")) > 2000
    page = pathlib.Path(directory, "report.html").read_text()
    assert "Ranked results" in page and shown["sites"][0]["path"] in page
    found = last_saved(run, "measured")
    params = {"backbone": found.variables["params"], "denoise": found.denoise}
    site = next(s for s in setup.sites if s.name == shown["sites"][0]["path"])
    exhibit = exhibit_for(run, found, "measured", shown["condition"])
    alone = exhibit.alone(site.name)["params"]
    assert same_bits(exhibit.alone(None), found.variables)
    paths = {"/".join(layer.path) for layer in site.layers}
    changed = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(alone):
        name = "/".join(part.key for part in path)
        old = params["backbone"]
        for part in path:
            old = old[part.key]
        if not np.array_equal(leaf, old):
            changed.add(name.rsplit("/", 1)[0])
    assert changed == paths or not np.any(jax.tree_util.tree_leaves(found.denoise)[0])
    arms = {"alone": {**found.variables, "params": alone}, "base": found.variables}
    ((_, scored),) = score_arms(setup, arms, setup.test, (shown["condition"],), **reading(config))
    rows = scored.statistics
    ap = {arm: setup.task.result(own, setup.test, scored.index).scores["mAP"] for arm, own in rows.items()}
    assert shown["sites"][0]["mAP"] == pytest.approx(100 * np.mean(ap["alone"] - ap["base"]), abs=1e-6)


def test_sites_of_a_trained_backbone_are_compared_with_it_and_not_with_the_baseline(run):
    run, _ = run
    setup = run.setup
    baseline = last_saved(run, "backbone")
    trained = jax.tree_util.tree_map(lambda leaf: np.roll(leaf, 1, axis=-1), baseline.variables)
    saved = dataclasses.replace(baseline, variables=trained, denoise=init_denoise(setup.sites))
    exhibit = exhibit_for(run, saved, "alternating", "clean", baseline.variables)
    ranked = dataclasses.replace(setup.task, attributed=1).examples(exhibit)["ranked"]
    assert any(query["ap"]["baseline"] != query["ap"]["alternating"] for query in ranked["queries"])
    assert [(site["mAP"], site["gained"], site["lost"]) for site in ranked["sites"]] == [(0.0, 0, 0)]


def test_centers_are_trained_beside_the_backbone_and_stay_out_of_it(run):
    run, _ = run
    directory, setup = run.directory, run.setup
    from tests.jobs.test_train import restored

    found = last_saved(run, "backbone")
    params, _ = starting(run, "backbone", found.variables)
    saved = restored(directory, "backbone")
    assert set(saved[CENTERS]) == set(params[CENTERS]) == {str(i) for i in range(5)}
    assert not same_bits(saved[CENTERS], params[CENTERS])
    assert CENTERS not in found.variables and CENTERS not in found.variables["params"]
    assert setup.abstract["params"].keys() == found.variables["params"].keys()


def test_the_explicit_final_feature_is_denoised_behind_the_backbone(run):
    run, report = run
    setup = run.setup
    found = last_saved(run, "backbone")
    images = setup.inputs(read(setup.test, np.arange(4)))
    beyond = dataclasses.replace(setup, backbone=WithFinal(setup.backbone))
    same = jax.jit(beyond.backbone.apply)(with_final(beyond, found.variables), images)
    np.testing.assert_allclose(same, jax.jit(setup.backbone.apply)(found.variables, images), rtol=1e-5, atol=1e-6)
    assert (
        report["cost"]["flops"]["final_only"] > report["cost"]["flops"]["fused"] == report["cost"]["flops"]["baseline"]
    )
    assert list(report["learning"]["final_only"]["optimum"]) == ["final"]


def test_a_finished_run_is_evaluated_again_by_its_weights(run):
    run, report = run
    config, directory = run.config, run.directory
    _, folder = evaluate.evaluate(evaluate.configuration(config, directory, overrides={}, explicit=False), directory)
    again = json.loads(pathlib.Path(folder, "evaluation.json").read_text())["metrics"]
    for condition, entry in report["metrics"].items():
        assert again[condition]["denoised"]["measured"] == pytest.approx(entry["denoised"]["measured"])
        assert again[condition]["baseline"] == pytest.approx(entry["baseline"])


@pytest.mark.slow
def test_only_queries_or_only_the_gallery_can_be_corrupted(run, people):
    run, _ = run
    found = last_saved(run, "backbone")
    kept = {}
    for noisy in ("both", "query", "gallery"):
        setup = build(config_for(people, **{"retrieval.corrupted": noisy}))
        scored = scored_under(run, setup, found.variables, "gaussian:60")
        assert np.array_equal(scored.index, np.arange(len(setup.test)))
        kept[noisy] = scored.statistics["base"]["feature"]
    clean = scored_under(run, run.setup, found.variables, "clean").statistics["base"]["feature"]
    query = table_of(run.setup.test)["query"] == 1
    for noisy, corrupted in (("query", query), ("gallery", ~query)):
        assert np.array_equal(kept[noisy][corrupted], kept["both"][corrupted])
        assert np.array_equal(kept[noisy][~corrupted], clean[~corrupted])
    assert not np.array_equal(kept["query"], kept["gallery"])


def test_a_finished_run_can_be_evaluated_with_re_ranking_and_by_persons(run):
    run, report = run
    config, directory, setup = run.config, run.directory, run.setup
    overrides = {
        "retrieval.rerank": (6, 3, 0.0),
        "retrieval.bootstrap_unit": "identity",
        "evaluate.conditions": ("clean",),
    }
    changed = evaluate.configuration(config, directory, overrides=overrides, explicit=False)
    content, _ = evaluate.evaluate(changed, directory)
    entry, before = content["metrics"]["clean"], report["metrics"]["clean"]
    assert entry["n"] == before["n"] and entry["baseline"]["mAP"] != before["baseline"]["mAP"]
    assert not entry["mcnemar"] and before["mcnemar"]
    found = last_saved(run, "backbone")
    task = dataclasses.replace(setup.task, rerank=(6, 3, 0.0))
    scored = scored_under(run, setup, found.variables, "clean")
    expected = 100 * task.result(scored.statistics["base"], setup.test, scored.index).scores["mAP"].mean()
    assert entry["baseline"]["mAP"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_run_is_evaluated_on_a_set_of_more_identities(run, people):
    run, _ = run
    config, directory, setup = run.config, run.directory, run.setup
    overrides = {"data.source": f"reid_folder:{people}?test=0.2&held_out=0", "evaluate.conditions": ("clean",)}
    changed = evaluate.configuration(config, directory, overrides=overrides, explicit=False)
    assert build(changed).train.num_classes > setup.train.num_classes
    with pytest.raises(CheckpointError, match="classifier"):
        evaluate.evaluate({**changed, "retrieval": {**changed["retrieval"], "unseen": "keep"}}, directory)
    overrides["model.num_classes"] = setup.train.num_classes
    changed = evaluate.configuration(config, directory, overrides=overrides, explicit=False)
    with pytest.raises(DataError, match=r"trained on another set\), whose embedding means nothing.*unseen=drop"):
        evaluate.evaluate(changed, directory)
    overrides["retrieval.unseen"] = "drop"
    changed = evaluate.configuration(config, directory, overrides=overrides, explicit=False)
    content, _ = evaluate.evaluate(changed, directory)
    assert set(content["arms"]) >= {"baseline", "measured"}
    with pytest.raises(ConfigError, match=r"trains with identities, of which .* and the backbone's classifier"):
        setup.task.check(changed, build(changed), checks.stage_plans(changed), chooses=False)


@pytest.mark.slow
def test_a_dry_run_needs_neither_cameras_nor_queries(people, capsys):
    config = config_for(people)
    assert "denoisers while learning" in dry_run({**config, "dry_run_batch": 2})
    config["model"]["num_classes"] = -1
    assert "denoisers while learning" in dry_run({**config, "dry_run_batch": 2})


def test_features_that_are_no_numbers_are_refused_by_the_arm_s_name(run):
    run, _ = run
    setup = run.setup
    found = last_saved(run, "backbone")
    broken = jax.tree_util.tree_map(lambda leaf: np.full_like(leaf, np.nan), found.variables)
    with pytest.raises(NonFiniteError, match="Arm broken on clean images gives features with NaN or Inf"):
        scores_of(run.config, setup, setup.test, {"broken": broken}, ("clean",))


def test_the_backbone_is_told_the_camera_of_each_image(run):
    setup = run[0].setup
    batch = read(setup.train, np.arange(8))
    images = setup.inputs(batch)
    assert setup.side == (("camera", 2),) and images.shape == (8, 16, 8, 4) == (8, *setup.images.shape[1:])
    assert np.array_equal(images[..., 3], np.broadcast_to(batch["camera"][:, None, None], (8, 16, 8)))
    assert set(batch["camera"]) == {0, 1} or len(set(table_of(setup.train)["camera"])) == 2


def test_batches_hold_identities_and_every_stage_the_same(run):
    setup = run[0].setup
    order = setup.task.order(setup.train, 5)
    labels = table_of(setup.train)["label"]
    for block in order.at(0).reshape(-1, 4, 2):
        assert len({labels[pair[0]] for pair in block}) == 4
        assert all(labels[a] == labels[b] and a != b for a, b in block)
    assert dataclasses.replace(setup.task, instances=0).order(setup.train, 5) is None


def test_stages_with_labels_see_identities_and_those_without_any_images(run, monkeypatch, tmp_path):
    variables = last_saved(run[0], "backbone").variables
    run = dataclasses.replace(run[0], directory=str(tmp_path))
    orders = {}

    def only_batches(name, state, frozen, step_of, batches, **options):
        batches(0)
        return state, 0.0

    monkeypatch.setattr(stages, "run_stage", only_batches)
    for name in ("control", "label_augmented", "algorithm1"):
        monkeypatch.setattr(
            stages, "training_batches", lambda *args, name=name, **options: orders.update({name: options["order"]})
        )
        stages.run_training(run, name, *starting(run, name, variables), lambda *args: None)
    assert orders["algorithm1"] is None
    for name in ("control", "label_augmented"):  # the control arm sees the images of what it is a control of
        assert np.array_equal(orders[name].at(0), orders["control"].at(0))
        assert not np.array_equal(orders[name].at(0), orders[name].at(1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"control.batch_size": 16, "denoise.batch_size": 16},
            ConfigError,
            r"control.batch_size=16, but retrieval.identities=4",
        ),
        ({"data.mixup": 0.2}, ConfigError, "mix labels, which task retrieval cannot use"),
        ({"retrieval.views": True}, ConfigError, r"has 1 branch\(es\)"),
        ({"retrieval.identities": 40, "retrieval.instances": 2}, ConfigError, "retrieval.identities=40 of"),
        ({"model.name": "vit", "model.num_classes": 0, "retrieval.side": ""}, ConfigError, "no option|has no neck"),
        ({"retrieval.side": "view"}, ConfigError, 'names "view", which .* does not give for every image'),
        (
            {"noise": "pairs:DIR"},
            ConfigError,
            r"side information \(camera\), which is not known of the images in pairs",
        ),
        (
            {"data.source": "digits", "data.resize": "squash"},
            ConfigError,
            "needs test images that are queries and a gallery, and digits",
        ),
        ({"data.image_size": (17, 8), "data.resize": "squash"}, ConfigError, "17|divisible"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(people, changes, error, message):
    config = config_for(people, **changes)
    if config["model"]["name"] == "vit":
        config["model"] = {k: v for k, v in config["model"].items() if k not in ("jigsaw",)}
    with pytest.raises(error, match=message):
        setup = build(config)
        checks.check(config, setup)


def test_parts_of_a_batch_need_two_identities(people, monkeypatch):
    monkeypatch.setattr(checks.devices, "device_count", lambda: 1)
    config = config_for(people, **{"backbone.accumulate": 4, "learner": "closed_form", "compare": ()})
    with pytest.raises(ConfigError, match=r"backbone.accumulate=4 cuts batches into parts of one identity"):
        checks.check(config, build(config))
    config["retrieval"]["triplet_weight"] = 0.0
    checks.check(config, build(config))


def test_images_that_are_query_and_gallery_are_not_corrupted_as_one_of_them(people, tmp_path):
    base = reid_trees.veri(tmp_path)
    changes = {"data.source": f"veri:{base}?held_out=0", "data.resize": "squash", "retrieval.side": ""}
    build(config_for(people, **changes))
    with pytest.raises(
        ConfigError, match=r'corrupted="query", but 1 of the 3 test images of veri:.* are both queries and in'
    ):
        build(config_for(people, **changes, **{"retrieval.corrupted": "query"}))


def test_identities_of_one_image_are_refused_or_dropped(tmp_path):
    for name, count in (("a", 3), ("b", 3), ("c", 1)):
        for camera in (1, 2) if count > 1 else (1,):
            for number in range(count):
                os.makedirs(tmp_path / "train", exist_ok=True)
                Image.new("RGB", (8, 16)).save(tmp_path / "train" / f"{name}_c{camera}_{number}.png")
    for part in ("query", "gallery"):
        os.makedirs(tmp_path / part)
        Image.new("RGB", (8, 16)).save(tmp_path / part / f"z_c{1 + (part == 'gallery')}_0.png")
    changes = {"data.source": f"reid_folder:{tmp_path}?held_out=0", "retrieval.identities": 2, "retrieval.instances": 4}
    config = config_for(tmp_path, **changes, learner="closed_form", compare=())
    with pytest.raises(DataError, match=r"1 identity has one image only.*: c"):
        checks.check(config, build(config))
    config["retrieval"]["singletons"] = "drop"
    checks.check(config, build(config))


@pytest.mark.slow
def test_the_loss_of_a_step_moves_neck_and_trunk(run):
    run, _ = run
    config, setup = run.config, run.setup
    from drep_jax.parallel import devices

    found = last_saved(run, "backbone")
    params, others = starting(run, "backbone", found.variables)
    batch = {name: column.reshape(8, 1, *column.shape[1:]) for name, column in read(setup.train, np.arange(8)).items()}

    def slope(batch):
        def loss(weights):
            key = jax.random.key(0)
            return label_objective(
                setup, config["backbone"], weights, others, batch, key, train=True, extra={CENTERS: params[CENTERS]}
            )[0]

        return devices.mean(jax.grad(loss)(params["backbone"]))

    gradient = devices.unreplicate(devices.on_devices(slope)(batch))
    still = [
        "/".join(p.key for p in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(leaf)
    ]
    assert not still, still
    assert jax.tree_util.tree_structure(init_denoise(setup.sites)) == jax.tree_util.tree_structure(
        starting(run, "label_augmented", found.variables)[0]["denoise"]
    )
