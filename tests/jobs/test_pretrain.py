"""The pre-training of a run on the digits, in tiny form: what it leaves behind, resumes and refuses."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest

from configs import ldae_digits
from drep_jax import weights
from drep_jax.data.corruptions import latent
from drep_jax.errors import CheckpointError, ConfigError, FusionError
from drep_jax.jobs import checks, pretrain
from drep_jax.models.patch_pca import load_pca, save_pca
from drep_jax.report.plots.pretraining import plot_filters, plot_probe_curve, plot_reconstructions
from drep_jax.report.pretraining import pretraining_blocks
from drep_jax.run import pretraining as run_pretraining
from drep_jax.run.inputs import save_inputs
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter, lines_of

STEPS = 6


def tiny(**changes):
    config = ldae_digits.get_config().to_dict()
    config |= {"progress": False, "log_every": 2, "checkpoint_every": 3, "seed": 3}
    config["model"] |= {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24}
    config["pretrain"] |= {
        "steps": STEPS,
        "batch_size": 32,
        "warmup": 1,
        "probe_every": 3,
        "sweep": (),
        "probe_images": 64,
    }
    config["evaluate"] |= {"conditions": ("clean", "pca_latent:1"), "batch_size": 304, "resamples": 200}
    config["evaluate"]["certificate_images"] = 2
    for name, value in changes.items():
        config["pretrain"] |= {name: value}
    return config


@contextlib.contextmanager
def job(directory, **changes):
    config = tiny(**changes)
    setup = build(config)
    os.makedirs(directory, exist_ok=True)
    save_inputs(directory, config, setup)
    with contextlib.closing(MetricWriter(directory)) as writer:
        yield Run(config, setup, directory, writer)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("pretrain") / "run")
    with pytest.MonkeyPatch.context() as patch, job(directory) as run:
        patch.setattr(latent, "_of_the_run", [])
        variables = pretrain.pretrained_backbone(run)
    return run, variables


def test_a_run_leaves_a_probed_vit_and_its_report(done, monkeypatch):
    run, variables = done
    again = weights.load(os.path.join(run.directory, run_pretraining.ENCODER), run.setup.abstract)
    assert weights.digest(again) == weights.digest(variables)
    section = pretrain.pretraining_section(run)
    assert section["certificate"]["passed"] and section["certificate"]["t"] == 10
    assert [step for step, _ in section["loss"]] == [1, 2, 4, 6] and [step for step, _ in section["curve"]] == [3, 6]
    entry = section["probe"]["conditions"]["pca_latent:1"]
    assert set(entry["accuracy"]) == {"encoder", "random encoder", "PCA latents", "pixels"}
    assert set(entry["difference"]) == set(entry["accuracy"]) - {"encoder"}
    # The head is the probe of the table: on clean images it has the accuracy that the table says.
    images = run.setup.inputs({"image": np.stack([run.setup.test[i]["image"] for i in range(len(run.setup.test))])})
    labels = np.array([run.setup.test[i]["label"] for i in range(len(run.setup.test))])
    right = np.asarray(run.setup.backbone.apply(variables, images)).argmax(axis=1) == labels
    assert 100 * right.mean() == pytest.approx(
        section["probe"]["conditions"]["clean"]["accuracy"]["encoder"]["ridge"], abs=0.2
    )
    report = {"pretraining": json.loads(json.dumps(section))}
    assert any("Merge of the time step" in getattr(block, "text", "") for block in pretraining_blocks(report))
    for plot in (plot_probe_curve, plot_reconstructions, plot_filters):
        assert plot(report)[:4] == b"\x89PNG" and plot({}) is None
    assert pretraining_blocks({}) == []
    monkeypatch.setattr(pretrain, "train_autoencoder", None)  # a second start reads it
    monkeypatch.setattr(latent, "_of_the_run", [])
    assert weights.digest(pretrain.pretrained_backbone(run)) == weights.digest(variables)


def test_an_interrupted_pre_training_goes_on_to_the_same_bits(done, tmp_path, monkeypatch):
    run, variables = done
    directory = str(tmp_path / "copy")
    shutil.copytree(run.directory, directory)
    for name in (run_pretraining.ENCODER, pretrain.SECTION):
        os.remove(os.path.join(directory, name))
    shutil.rmtree(os.path.join(directory, "checkpoints", "pretrain", str(STEPS)))
    monkeypatch.setattr(latent, "_of_the_run", [])
    for name in ("pictures", "_log_probe"):
        monkeypatch.setattr(pretrain, name, lambda *arguments: None)
    monkeypatch.setattr(pretrain, "probed", lambda run, *rest: (_Probe(variables), np.zeros(16), {}))

    certificate = _Certificate()
    monkeypatch.setattr(run_pretraining.Pretraining, "certificate", lambda *arguments: certificate)
    with job(directory) as resumed:
        with pytest.raises(FusionError, match="failed its certificate"):
            pretrain.pretrained_backbone(resumed)
        assert not os.path.exists(os.path.join(directory, run_pretraining.ENCODER))
        certificate.passed = True
        again = pretrain.pretrained_backbone(resumed)
    assert weights.digest(unshifted(again)) == weights.digest(unshifted(variables))
    steps = [line["step"] for line in lines_of(directory, "pretrain") if "loss" in line]
    assert steps == [1, 2, 4, 6]

    pca, mean, std = load_pca(os.path.join(directory, "pca.npz"))
    save_pca(os.path.join(directory, "pca.npz"), run_pretraining.pixel_basis(pca), tuple(mean), tuple(std))
    with job(directory) as other, pytest.raises(CheckpointError, match="has 48 components of patches of 4×4"):
        run_pretraining.pca_of(other)
    import dataclasses

    turned = dataclasses.replace(pca, basis=-pca.basis)
    save_pca(os.path.join(directory, "pca.npz"), turned, tuple(mean), tuple(std))
    with job(directory) as other, pytest.raises(CheckpointError, match="was trained with another PCA than pca"):
        run_pretraining.train_autoencoder(other, run_pretraining.pretraining_of(other, turned))


def unshifted(variables):
    """Without what the probe makes of the encoder: head, and the last bias, which centers the features."""
    names = weights.names_of(variables)
    return {name: leaf for name, leaf in names.items() if "head" not in name and not name.endswith("fc2/bias")}


class _Probe:
    def __init__(self, variables):
        self.parameters = variables["params"]["head"]

    def head(self, shift):
        return self.parameters


class _Certificate:
    passed = False

    def to_json(self):
        return {"passed": self.passed}


def test_settings_are_refused_before_any_work(done):
    setup = done[0].setup
    for changes, message in (
        ({"components": 0}, "pretrain.components=0: a patch of 4×4 pixels has 48 numbers"),
        ({"components": 49}, "between 1 and 48"),
        ({"blocks": 3}, "pretrain.blocks=3 is odd"),
        ({"blocks": 0, "t": 1000}, "pretrain.t=1000 is outside the schedule, whose time steps are 0 to 999"),
        ({"sweep": (0, 2000)}, "pretrain.t=2000 is outside the schedule"),
        ({"noise": "laten"}, 'pretrain.noise="laten" is unknown. Did you mean "latent"'),
        ({"time_width": -1}, "pretrain.time_width=-1"),
        ({"probe_every": -1}, "pretrain.probe_every and pretrain.probe_images"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_pretraining.check_pretraining(tiny(**changes), setup)
    assert [run_pretraining.decoder_depth(*each) for each in ((0, 6), (24, 9))] == [6, 15]
    with pytest.raises(ConfigError, match=r"the encoder alone has 4 \(model.depth\): give 8"):
        run_pretraining.decoder_depth(4, 4)
    config = tiny()
    with pytest.raises(ConfigError, match=r"pretrain.steps and backbone.init_from both give"):
        run_pretraining.check_pretraining({**config, "backbone": {**config["backbone"], "init_from": "a"}}, setup)
    without = {**config, "pretrain": {**config["pretrain"], "steps": 0}}
    with pytest.raises(ConfigError, match="There is no backbone"):
        checks.check(without, setup)
    without["backbone"] = {**config["backbone"], "steps": 5}
    with pytest.raises(ConfigError, match="takes the PCA of a run with pre-training, and this run has none"):
        checks.check(without, setup)
    assert checks.check(config, setup)["train"]["images"] == len(setup.train)
