"""Images that are fitted by padding: every stage tells the network their size, and padding counts for nothing."""

import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from drep_jax import report
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.measured import measure, measuring
from drep_jax.core.sites import find_sites
from drep_jax.data import collate
from drep_jax.data.augment import augmentation_of
from drep_jax.data.loader import training_batches
from drep_jax.errors import SiteError
from drep_jax.evaluation.arms import one_image
from drep_jax.jobs import train
from drep_jax.learners.distilled import with_corrupted
from drep_jax.learners.losses import denoising_objective, distillation_objective, label_objective
from drep_jax.learners.streams import CorruptedImages
from drep_jax.models import create_model
from drep_jax.models.detectors.darknet import Darknet
from drep_jax.run.moments import MOMENTS, run_moments
from drep_jax.run.run import Run
from drep_jax.run.setup import _check_padded, build
from drep_jax.tasks.detection import Detection
from drep_jax.trees import get_in
from tests.core.test_rows import Told
from tests.models.detectors.networks import TINY, pictures, random_variables, tiny
from tests.tasks.cases import QUICK, detection
from tests.tasks.test_detection_networks import CASES

PADDED = {
    "data.resize": "pad",
    "data.flip": True,
    "data.std": (0.5, 0.5, 0.5),
    "noise": "gaussian:60",
    "denoise.batch_size": 8,
    "denoise.moment_tokens": 1.0,
    "measured.images": 8,
}
SIZES = [(26, 32), (32, 24)]
"""Of the pictures, in turn, fitted into 32 × 32."""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = detection(tmp_path_factory.mktemp("images"), **PADDED)
    setup = build(config)
    return config, setup, random_variables(setup.backbone)


@pytest.fixture
def dirty(monkeypatch):
    """Lets padding have any pixels."""
    plain = collate.fitted

    def fitted(*args, **options):
        item = plain(*args, **options)
        height, width = item.get("size", item["image"].shape[:2])
        item["image"] = item["image"].copy()
        item["image"][height:], item["image"][:, width:] = 251, 77
        return item

    return lambda: monkeypatch.setattr(collate, "fitted", fitted)


def test_moments_do_not_see_padding(case, dirty, tmp_path, capsys):
    """They count the cells of the pictures alone, and are the same whatever the padding shows."""
    config, setup, variables = case

    def taken(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return run_moments(Run(config, setup, str(tmp_path / name)), variables)

    clean = taken("clean")
    for site in setup.sites:
        side = {"conv_0": 32, "conv_1": 8, "conv_2": 2}[site.name.partition("/")[0]]
        side = side // 4 if site.kind == "patch" else side
        cells = [np.prod([sum(i * 32 // side < length for i in range(side)) for length in size]) for size in SIZES]
        assert clean[site.path].count == 6 * sum(cells), site.name
    dirty()
    for path, moments in taken("dirty").items():
        np.testing.assert_array_equal(moments.mean, clean[path].mean)
        np.testing.assert_array_equal(moments.covariance, clean[path].covariance)

    # Those that a run of an earlier release has saved count padding.
    file = tmp_path / "clean" / MOMENTS
    with np.load(file) as archive:
        earlier = {name: 0 * array if name.endswith("mean") else array for name, array in archive.items()}
    earlier.pop("sizes")
    np.savez(file, **earlier)
    assert "taken anew" not in capsys.readouterr().out
    again = taken("clean")
    assert f"{file} counts padded pixels; the moments are taken anew, without them." in capsys.readouterr().out
    for path, moments in again.items():
        np.testing.assert_array_equal(moments.mean, clean[path].mean)
    taken("clean")
    assert not capsys.readouterr().out


def test_every_stage_tells_the_network_the_size(case, dirty, monkeypatch):
    config, setup, variables = case
    task, augmentation = setup.task, augmentation_of(config["data"])

    def batch_of(columns):
        options = {"seed": 0, "augmentation": augmentation, "columns": columns, "num_threads": 0}
        batch = next(training_batches(setup.train, 8, sizes=setup.sizes, **options))
        return with_corrupted(config)(batch, 0)

    clean = batch_of(())
    assert sorted(set(map(tuple, clean["size"].tolist()))) == sorted(SIZES)
    inside = collate.valid_pixels(clean["size"], (32, 32))
    assert not clean["corrupted"][~inside].any(), "noise is on the picture alone"
    images = CorruptedImages(config, setup)
    dirty()
    assert batch_of(())["image"][~inside].any()
    for name in ("image", "corrupted"):
        inputs = [np.asarray(setup.inputs({**batch, "image": batch[name]})) for batch in (clean, batch_of(()))]
        np.testing.assert_array_equal(*inputs)
        assert not inputs[0][~inside].any() and inputs[0][inside].all()
    every = np.arange(8)
    np.testing.assert_array_equal(images.take(every), CorruptedImages(config, setup).take(every))

    told = []
    apply = Darknet.apply

    def spy(self, *args, **options):
        told.append(options.get("size"))
        return apply(self, *args, **options)

    monkeypatch.setattr(Darknet, "apply", spy)
    params, others = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
    options = {**config["distilled"], **config["denoise"], "label_smoothing": 0.0}
    trained, key = {"backbone": params, "denoise": init_denoise(setup.sites)}, jax.random.key(0)
    stages = {
        "algorithm1": lambda batch: denoising_objective(setup, options, trained, others, batch, key),
        "distilled": lambda batch: distillation_objective(setup, options, variables, params, others, batch),
        "labels": lambda batch: label_objective(setup, options, params, others, batch, key, train=False),
        "evaluation": lambda batch: task.predict(setup.backbone, variables, setup.inputs(batch), batch),
    }
    for name, stage in stages.items():
        told.clear()
        jax.eval_shape(stage, batch_of(task.columns))
        assert told and all(size is not None and size.shape == (8, 2) for size in told), name
    told.clear()
    measuring(setup.backbone, variables, setup.sites, images, chunk=2, outputs=False, ridge=0.1)
    assert told and all(size is not None for size in told)
    assert one_image(setup, setup.test, 1)["size"].tolist() == [list(SIZES[1])]


def test_networks_and_images_without_padding_are_left_alone(case):
    config, setup, _ = case

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x

    batch = {"size": np.array([[1, 2]])}
    assert Detection().arguments(Plain(), batch) == {}, "a network that does not take the size"
    assert Detection().arguments(setup.backbone, {}) == {} != Detection().arguments(setup.backbone, batch)
    squashed = build({**config, "data": {**config["data"], "resize": "squash"}})
    assert "size" not in collate.read(squashed.train, np.arange(2), sizes=squashed.sizes)


def test_a_network_that_calls_other_layers_is_refused():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x, size=None):
            return nn.Dense(2, name="first" if size is None else "second")(x) + nn.Dense(2, name="third")(x)

    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    setup = types.SimpleNamespace(
        backbone=Other(), images=image, sites=find_sites(Other(), image), arguments=lambda batch: batch
    )
    with pytest.raises(SiteError, match=r"Other is told the size of padded images .* then calls first otherwise"):
        _check_padded(setup)


@pytest.mark.slow  # the network of `case` is checked as it is built
@pytest.mark.parametrize("name", TINY)
def test_sites_are_the_same_with_a_size(name):
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    plain, padded = find_sites(tiny(name), image), find_sites(tiny(name), image, size=np.float32([[40, 64]]))
    assert [[layer.path for layer in site.layers] for site in plain] == [
        [layer.path for layer in site.layers] for site in padded
    ]
    assert [[layer.calls for layer in site.layers] for site in plain] == [
        [layer.calls for layer in site.layers] for site in padded
    ]


@pytest.mark.slow  # tests/core/test_rows.py has pictures in padding through two layers
@pytest.mark.parametrize("name", ["detr_r50", "faster_rcnn_r50"])
def test_noise_is_measured_where_padding_masks_attention_and_cuts_proposals(name):
    """All of the image is what no size is; a smaller picture has another solution, at nearly all sites."""
    net = create_model(name, num_classes=5, image_size=(64, 64), **CASES[name])
    variables, clean = random_variables(net), pictures((64, 64), 4)
    images = np.stack([clean, clean + 0.5 * pictures((64, 64), 4, 1)])
    sites = find_sites(net, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))

    def solved(height):
        streams = images if height is None else Told(images, size=np.tile(np.float32([[height, 64]]), (4, 1)))
        return measure(net, variables, sites, streams, [1.0], ridge=1e-2, vectors=10**4, chunk=4, outputs=False).denoise

    none, whole, part = (
        [np.asarray(get_in(denoise, site.path)["kernel"]) for site in sites] for denoise in map(solved, (None, 64, 40))
    )
    changes = []
    for site, one, same, other in zip(sites, none, whole, part, strict=True):
        np.testing.assert_allclose(same, one, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=site.name)
        assert np.isfinite(other).all(), site.name
        changes.append(np.abs(other - one).max() > 0.01 * np.abs(one).max())
    assert np.mean(changes) > 0.9


@pytest.mark.slow  # tests above trace its parts
def test_the_whole_job_on_padded_images(tmp_path, monkeypatch):
    changes = {
        **QUICK,
        "learner": "measured",
        "compare": ("closed_form", "wiener", "algorithm1", "distilled", "label_augmented"),
        "backbone.steps": 100,
        "detection.confidence": 0.01,
    }
    monkeypatch.setattr(report, "PLOTS", {})
    content = train.run(detection(tmp_path, **{**PADDED, **changes}), str(tmp_path / "run"))
    assert content["certificate"]["passed"] and content["metrics"]["clean"]["n"] == 10
    assert set(content["learning"]) >= {"measured", "closed_form", "wiener", "algorithm1", "distilled"}
    with np.load(tmp_path / "run" / MOMENTS) as archive:
        assert archive["sizes"]
