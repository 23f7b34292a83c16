"""Task segmentation: losses by definition, outputs without a class, and bad input, each with its message."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drep_jax.data.npz_source import ArraySource
from drep_jax.errors import ConfigError, DataError
from drep_jax.parallel import devices
from drep_jax.run.setup import build
from drep_jax.tasks.segmentation import Segmentation, make_segmentation
from drep_jax.tasks.segmentation_checks import check_maps
from tests.label_maps import CLASSES, Tiny, scene
from tests.setups import make_setup
from tests.tasks.cases import segmentation as configuration

VOID = 255
COUNT = 8


@pytest.fixture(scope="module")
def batch():
    """Logits at half the size of eight label maps, of which one is all ignored; each device has one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (COUNT, 6, 8)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.3] = VOID
    labels[2] = VOID
    return rng.normal(size=(COUNT, 3, 4, 3)).astype(np.float32), labels


def on_all(task, outputs, labels, smoothing=0.0):
    """Returns loss, metrics and gradient as a step computes them: means over the devices."""

    def loss(outputs, labels):
        value, metrics = task.loss(outputs, {"label": labels}, smoothing, {})
        return value, metrics

    def step(outputs, labels):
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(outputs, labels)
        return devices.mean((value, metrics)), gradient

    (value, metrics), gradient = devices.on_devices(step)(devices.shard(outputs), devices.shard(labels))
    return float(value[0]), {name: float(each[0]) for name, each in metrics.items()}, devices.unshard(gradient)


def expected(logits, labels, smoothing, of_all):
    wide = jax.image.resize(logits, (*labels.shape, logits.shape[-1]), "bilinear")
    known = labels != VOID
    targets = optax.smooth_labels(jax.nn.one_hot(jnp.where(known, labels, 0), logits.shape[-1]), smoothing)
    losses = jnp.where(known, optax.softmax_cross_entropy(wide, targets), 0.0)
    return jnp.sum(losses) / (labels.size if of_all else known.sum())


@pytest.mark.parametrize("average, smoothing", [("labeled", 0.1), ("all", 0.0)])
def test_the_loss_is_divided_by_the_pixels_of_all_devices(batch, average, smoothing):
    logits, labels = batch
    task = Segmentation(average=average)
    value, metrics, gradient = on_all(task, logits, labels, smoothing)
    reference = jax.value_and_grad(lambda x: expected(x, labels, smoothing, average == "all"))
    one, slope = reference(jnp.asarray(logits))
    assert value == pytest.approx(float(one), rel=1e-5)
    np.testing.assert_allclose(gradient / COUNT, slope, atol=1e-6)  # the step takes the mean over devices
    wide = jax.image.resize(logits, (*labels.shape, 3), "bilinear")
    assert metrics["accuracy"] == pytest.approx(
        float(np.mean((np.argmax(wide, -1) == labels)[labels != VOID])), abs=1e-6
    )


def test_nothing_labeled_costs_nothing_and_the_auxiliary_head_counts_in_part(batch):
    logits, labels = batch
    value, _, gradient = on_all(Segmentation(), logits, np.full_like(labels, VOID))
    assert value == 0.0 and not gradient.any()
    both, metrics, _ = on_all(Segmentation(), (logits, logits[:, ::3]), labels)
    main, auxiliary = (on_all(Segmentation(), each, labels)[0] for each in (logits, logits[:, ::3]))
    assert metrics["auxiliary_loss"] == pytest.approx(auxiliary) and auxiliary != pytest.approx(main)
    assert both == pytest.approx(main + 0.4 * auxiliary)


def test_outputs_that_are_no_class_are_left_out_or_wrong():
    """The head has outputs of "nothing", then classes 0 and 1."""
    logits = np.array([[[[5.0, 1.0, 0.0], [0.0, 1.0, 5.0]]]], np.float32)
    labels = {"label": np.array([[[0, 1]]], np.uint8)}
    expected = {"never": ([[[0, 1]]], [1, 1, 1]), "wrong": ([[[VOID, 1]]], [0, 1, 0])}
    for how, (answers, of_first) in expected.items():
        task = Segmentation(void_outputs=(0,), void_answers=how)
        statistics, pseudo = jax.jit(lambda x, y, task=task: (task.statistics(x, y), task.pseudo_labels(x)))(
            logits, labels
        )
        assert pseudo["label"].tolist() == answers
        assert statistics["pixels"].tolist() == [[of_first, [1, 1, 1]]]


def test_logits_of_test_images_go_by_the_size_of_the_network_input():
    task = Segmentation(fit="short:512:2048:32")
    assert task.sizes((683, 512), test=True) == ((704, 512), (683, 512))
    assert task.sizes((683, 512), test=False) == ((683, 512),)
    assert Segmentation().sizes((97, 131), test=True) == ((97, 131),)
    assert Segmentation(fit="keep:32").sizes((97, 131), test=True) == (
        (128, 160),
    )  # padded: the first rows and columns


def test_images_without_a_labeled_pixel_have_no_label():
    labels = np.full((3, 2, 2), VOID, np.uint8)
    labels[1, 0, 0] = 0
    assert Segmentation().has_label({"label": labels}).tolist() == [False, True, False]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


class Maps:
    """Images in memory with any labels, as a user's own source gives them."""

    name, note, class_names, in_memory = "maps", None, None, True

    def __init__(self, labels, classes=3, size=(6, 8)):
        self.labels_there, self.num_classes, self.size = labels, classes, size

    def __len__(self):
        return len(self.labels_there)

    def __getitem__(self, index):
        return {"image": np.zeros((*self.size, 3), np.uint8), "label": self.labels_there[index]}


def some_maps(*values):
    """Two maps that hold these labels."""
    return np.resize(np.array(values, np.int64), (2, 6, 8))


@pytest.mark.parametrize(
    "labels, parts",
    [
        (np.zeros((2, 5, 8), int), ("maps, image 0", "(5, 8)", "6 x 8 pixels", "one value for every pixel")),
        (np.zeros((2, 6, 8, 3), int), ("of colors", "classes.txt")),
        (some_maps(1, 2, 3), ("outside 0 … 2", "3: 33.3", "2: 33.3", "one too large", "reduce")),
        (some_maps(VOID), ("all pixels of the 2 label maps looked at are 255", "do not reduce them")),
        (some_maps(0, VOID), ("hold 0 and 255 only", "If 255 is the object")),
        (some_maps(0, 1, -1), ("expected whole numbers from 0 to 255",)),
        (np.zeros(2, np.int32), ("an array of ()", "6 x 8 pixels")),
    ],
)
def test_labels_that_cannot_be_right_are_refused(labels, parts):
    with pytest.raises(DataError) as error:
        check_maps(Maps(labels), 3, "test images")
    for part in parts:
        assert part in str(error.value), error.value


def test_usable_labels_pass_and_none_are_refused():
    check_maps(Maps(some_maps(0, 1, VOID)), 3, "test images")
    check_maps(Maps(some_maps(0)), 3, "test images")  # images of one class
    with pytest.raises(DataError, match="The test images of maps have no labels"):
        check_maps(Maps(some_maps(0)), None, "test images")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"num_classes": 5}, ("has 5 outputs", "have 4 classes", "void_outputs=(4,)")),
        ({"num_classes": 3}, ("has 3 outputs", "have 4 classes", "reduce the labels by one")),
    ],
)
def test_a_head_of_other_classes_is_refused(changes, parts):
    labels = np.zeros((8, 24, 32), np.int64)
    source = Maps(labels, classes=len(CLASSES), size=(24, 32))
    setup = make_setup(Tiny(**changes), np.zeros((1, 24, 32, 3)), source=source, task=Segmentation())
    setup = dataclasses.replace(setup, num_classes=len(CLASSES))
    with pytest.raises(ConfigError) as error:
        setup.task.check_scoring(setup)
    for part in parts:
        assert part in str(error.value), error.value


def test_void_outputs_make_a_larger_head_fit():
    source = Maps(np.zeros((8, 24, 32), np.int64), classes=len(CLASSES), size=(24, 32))
    for void, fits in (((4,), True), ((0,), True), ((5,), False)):
        task = Segmentation(void_outputs=void)
        setup = make_setup(Tiny(num_classes=5), np.zeros((1, 24, 32, 3)), source=source, task=task)
        setup = dataclasses.replace(setup, num_classes=len(CLASSES))
        if fits:
            task.check_scoring(setup)
        else:
            with pytest.raises(ConfigError, match="has the outputs 0 … 4"):
                task.check_scoring(setup)


def test_a_backbone_without_maps_is_refused():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(4)(x.mean(axis=(1, 2)))

    setup = make_setup(Flat(), np.zeros((1, 6, 8, 3)), source=Maps(some_maps(0, 1)), task=Segmentation())
    with pytest.raises(ConfigError, match=r"outputs of shape \(1, 4\).*any fraction of the image"):
        setup.task.check_scoring(setup)


@pytest.mark.parametrize(
    "name, value, part",
    [
        ("average", "mean", 'Unknown segmentation.average "mean"'),
        ("void_answers", "sometimes", "Unknown segmentation.void_answers"),
        ("bootstrap_unit", "video", "Unknown segmentation.bootstrap_unit"),
        ("auxiliary_weight", -1.0, "must be a number of at least 0"),
        ("boundary_ratio", 0.0, "above 0 and below 1"),
        ("void_outputs", (1, 1), "expected different indices"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, name, value, part):
    config = configuration(tmp_path)
    config["segmentation"][name] = value
    with pytest.raises(ConfigError, match=part):
        make_segmentation(config)


def test_a_backbone_without_a_head_mixing_and_clusters_that_nobody_knows(tmp_path):
    config = configuration(tmp_path)
    with pytest.raises(ConfigError, match="num_classes=-1 is a backbone without a head"):
        make_segmentation({**config, "model": {**config["model"], "num_classes": -1}})
    for name in ("mixup", "randaugment"):
        with pytest.raises(ConfigError, match=f"data.{name}"):
            build({**config, "data": {**config["data"], name: 1}})
    source = Maps(some_maps(0, 1))
    with pytest.raises(ConfigError, match="knows no clusters"):
        Segmentation(bootstrap_unit="cluster").check_test(source)
    source.clusters = np.array([0, 1])
    Segmentation(bootstrap_unit="cluster").check_test(source)
    items = Segmentation(bootstrap_unit="cluster").items({"pixels": np.zeros((1, 3, 3))}, source, np.array([1]), "")
    assert items.clusters.tolist() == [1]


def test_labels_of_single_images_are_refused():
    digits = ArraySource("digits", np.zeros((4, 6, 8, 3), np.uint8), np.zeros(4, np.int32), ("a", "b"), None)
    with pytest.raises(DataError, match="one value for every pixel"):
        Segmentation().check_test(digits)


def test_an_image_smaller_than_the_crop_is_enlarged_with_its_labels(tmp_path):
    """By data.resize; a random crop pads it with ignored labels instead (data.scale)."""
    from drep_jax.data.decode import fitted

    image, labels = scene(np.random.default_rng(0), (12, 20))
    raw = {"image": image, "label": labels, "where": "image"}
    item = fitted(raw, (24, 32), "crop", Segmentation.columns)
    assert item["image"].shape == (24, 32, 3) and item["label"].shape == (24, 32)
    np.testing.assert_array_equal(item["label"], np.kron(labels, np.ones((2, 2), int))[:, 4:36])
