"""Every family of backbones through the whole method: sites, Algorithm 1, closed form, measured noise, fusion, certificate.

The table has one narrow network for each class in the registry, so that a new family is tested by one line here; the same
at full size for every entry is `pytest -m full tests/models/test_pipeline.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import algorithm1_losses, certify, find_sites, fuse_exact, measure
from drep_jax.core import closed_form
from drep_jax.core.moments import collect_moments
from drep_jax.core.schedule import Schedule
from drep_jax.models import MODELS, create_model
from tests.models import test_mcunet
from tests.models.detectors.networks import class_of, finds_objects

SCHEDULE = Schedule(beta_end=0.02)

# model: (narrow options, image size, sites by default)
NARROW = {
    "vit": ({"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}, (8, 12), 4),
    "resnet": ({"stage_sizes": (1, 1), "block": "bottleneck", "width": 4, "stem": "cifar"}, (8, 8), 9),
    "swin": (
        {"patch_size": 2, "width": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4},
        (15, 18),
        6,
    ),
    "swinv2": (
        {"patch_size": 2, "width": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4},
        (16, 16),
        6,
    ),
    "clip_reid": ({"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "projection": 12}, (8, 12), 4),
    "resnet_reid": ({"stage_sizes": (1, 1), "block": "bottleneck", "width": 4, "branches": 2}, (32, 32), 9),
    "transreid": (
        {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "jigsaw": True},
        (8, 16),
        6,
    ),
    "vmamba": ({"depths": (1,), "width": 8, "ssm_ratio": 1.0}, (16, 16), 2),
    "mcunet": ({}, (12, 10), None),  # its options are a file
    "fcn": ({"stage_sizes": (1, 1, 1, 1), "width": 2}, (32, 32), None),
    "segformer": (
        {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "head_width": 8},
        (32, 48),
        8,
    ),
}


def lively(model, size, seed=0, spread=0.02):
    """Variables with nothing at zero or one, and statistics that fit the images, so that every layer matters."""
    images = jnp.asarray(np.random.default_rng(seed).normal(size=(8, *size, 3)), jnp.float32)
    variables = dict(jax.jit(model.init)(jax.random.key(seed, impl="rbg"), images))
    rng = np.random.default_rng(seed + 1)

    def stir(path, leaf):
        scale = spread if path[0].key == "params" and leaf.ndim > 1 else 0.1
        return leaf + scale * rng.normal(size=leaf.shape).astype(leaf.dtype) * (path[0].key == "params")

    variables = jax.tree_util.tree_map_with_path(stir, variables)
    if "batch_stats" in variables:
        keys = {"dropout": jax.random.key(seed)}
        warm = jax.jit(lambda v: model.apply(v, images, True, rngs=keys, mutable=["batch_stats"])[1])
        for _ in range(20):
            variables = {**variables, **warm(variables)}
    return jax.tree_util.tree_map(np.asarray, variables)


def smooth_images(count, size, seed=0):
    """Images with structure, so that features have a covariance to learn."""
    coarse = np.random.default_rng(seed).normal(size=(count, 4, 4, 3))
    return np.asarray(jax.image.resize(coarse, (count, *size, 3), "cubic"), np.float32)


def check(model, size, count, expected_sites=None, *, pattern=".*", spread=0.02, remaining=0.9):
    """Runs the method with every layer a site and states what must hold; `remaining` of what noise does to the outputs."""
    variables, images = lively(model, size, spread=spread), smooth_images(count, size)
    if expected_sites is not None:
        assert len(find_sites(model, images)) == expected_sites
    sites = find_sites(model, images, pattern=pattern)

    moments = collect_moments(model, variables, sites, [(images, np.ones(count, np.float32))])
    denoise = closed_form.closed_form(moments, sites, SCHEDULE)
    optimum = closed_form.expected_losses(moments, sites, SCHEDULE)

    @functools.partial(jax.jit, static_argnums=0)
    def losses(scale, tree):
        scaled = jax.tree_util.tree_map(lambda leaf: scale * leaf, tree)
        return algorithm1_losses(
            model, variables, scaled, sites, SCHEDULE, jax.random.key(3), jnp.arange(count), jnp.asarray(images)
        )

    nothing, learned = losses(0.0, denoise), losses(1.0, denoise)
    assert set(nothing) == set(optimum)
    for name, least in optimum.items():
        assert abs(nothing[name] - 1) < 0.2, name  # the mean of ε²
        # Where hardly anything can be learned, the sample says nothing of the order.
        assert least > 0.98 or learned[name] < nothing[name], name
        assert abs(learned[name] - least) < 0.15 * (nothing[name] + least), name
    gradient = jax.jit(jax.grad(lambda tree: sum(losses(1.0, tree).values())))(denoise)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree_util.tree_leaves(gradient))

    few = jnp.asarray(images[:2])
    certificate = certify(model, variables, denoise, sites, SCHEDULE, few)
    assert certificate.passed, str(certificate)

    noisy = images + 0.5 * np.random.default_rng(5).normal(size=images.shape).astype(np.float32)
    found = measure(model, variables, sites, np.stack([images, images, noisy]), [0.5, 0.5])
    direct = {"rule": "affine", "steps": 1}
    fused = fuse_exact({"backbone": variables["params"], "denoise": found.denoise}, sites, SCHEDULE, **direct)
    run = jax.jit(lambda params, x: model.apply({**variables, "params": params}, x))
    clean, before, after = run(variables["params"], images), run(variables["params"], noisy), run(fused, noisy)
    assert np.linalg.norm(after - clean) < remaining * np.linalg.norm(before - clean)
    assert certify(model, variables, found.denoise, sites, SCHEDULE, few, fused=fused, **direct).passed


def test_every_family_has_a_narrow_network():
    """Those that find objects have theirs in detectors/test_network_sites.py and detectors/test_rcnn.py."""
    assert {class_of(name) for name in MODELS if not finds_objects(name)} == {class_of(name) for name in NARROW}


# Those that take longest, or are mostly another one, run with `pytest -m slow`.
LONG = (
    "swin",
    "vit",
    "resnet",
    "clip_reid",
    "resnet_reid",
    "swinv2",
    "transreid",
    "vmamba",
    "mcunet",
    "fcn",
    "segformer",
)
# CLIP normalizes its class token before the blocks, and TransReID's is the output itself: with small kernels they would see
# little of the images.
SPREAD = {"clip_reid": 0.2, "transreid": 0.2}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in NARROW])
def test_the_whole_method_runs_on_every_family(name, tmp_path):
    options, size, expected = NARROW[name]
    if name == "mcunet":
        options = {"architecture": test_mcunet.written(tmp_path, test_mcunet.architecture())}
    model = create_model(name, num_classes=5, image_size=size, **options)
    check(model, size, 24, expected, spread=SPREAD.get(name, 0.02))


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NARROW and not finds_objects(name)])
def test_the_whole_method_runs_at_full_size(name):
    size = (256, 256) if name.startswith("swin") else (32, 32) if name.endswith("cifar") else (224, 224)
    size = (256, 128) if name.startswith("transreid") else size
    model = create_model(name, num_classes=1000, image_size=size)
    sites = find_sites(model, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
    # Denoisers of all sites of the widest networks would not fit in memory in float64; every third site stands for them.
    pattern = "|".join(f"(?:{layer.name})" for site in sites[::3] for layer in site.layers)
    # An image for each simulated device: so few that measured denoisers keep close to the identity, so they need only help.
    check(model, size, 8, pattern=pattern, remaining=1.0)
