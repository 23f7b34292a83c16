"""Sites of DETR, YOLOv3, ATSS and CenterNet-update: which layers share one, which are none; fusion, certified; real sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import find_sites
from drep_jax.core.certificate import certify
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.schedule import Schedule
from drep_jax.models import create_model
from tests.models.detectors.networks import TINY, abstract, pictures, random_variables, tiny

IMAGE = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
SCHEDULE = Schedule(beta_end=0.02)


@functools.cache
def readers(name):
    """{name of a site's first layer: all layers that share its denoiser}, without those of the ResNet."""
    sites = find_sites(tiny(name), IMAGE)
    names = [[layer.name for layer in site.layers] for site in sites]
    return {shared[0]: shared[1:] for shared in names}, sites


def test_sites_of_a_detr():
    shared, _ = readers("detr_r50")
    assert shared["encoder_0/attn/query"] == ["encoder_0/attn/key"] and shared["encoder_0/attn/value"] == []
    # All layers of the decoder read one memory: with its positions the keys, without them the values.
    assert shared["decoder_0/cross_attn/key"] == ["decoder_1/cross_attn/key"]
    assert shared["decoder_0/cross_attn/value"] == ["decoder_1/cross_attn/value"]
    assert shared["class_embed"] == ["bbox_embed_0"]
    # What the first decoder layer computes before it looks at the image is constant.
    layers = {name for first, others in shared.items() for name in (first, *others)}
    every = {"/".join(path[:-1]) for path in paths(abstract(tiny("detr_r50"))["params"]) if path[-1] == "kernel"}
    constant = {f"decoder_0/attn/{name}" for name in ("query", "key", "value", "out")} | {"decoder_0/cross_attn/query"}
    assert every - layers == constant


def paths(tree):
    return [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atss_r50", "centernet_r50"])
def test_layers_shared_by_levels_are_one_site_with_a_call_for_each(name):
    shared, sites = readers(name)
    head = [site for site in sites if site.path[0] == "head"]
    outputs = [["head/reg", "head/centerness"]] if "atss" in name else [["head/reg"]]
    assert [[layer.name for layer in site.layers] for site in head] == [
        ["head/cls_conv_0", "head/reg_conv_0"],
        ["head/cls_conv_1"],
        ["head/reg_conv_1"],
        ["head/cls"],
        *outputs,
    ]
    assert all(layer.calls == 5 for site in head for layer in site.layers)
    assert [site.bias for site in head] == [False, False, False, True, True]  # a GroupNorm takes no constant
    laterals = [name for first, others in shared.items() for name in others if "lateral" in name]
    # In PyTorch's style the next stage's first convolution reads the same map through the same window.
    assert laterals == ([] if "center" in name else ["neck/lateral_0", "neck/lateral_1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_fusion_is_certified(name):
    """Fused equals explicit on a padded size that the strides do not divide, all sites."""
    module = tiny(name)
    sites = find_sites(module, IMAGE, pattern=".*", batchnorm_bias=True)
    denoise = random_variables_like(jax.eval_shape(lambda: init_denoise(sites)))
    size = (64, 96) if "yolo" in name else (70, 97)
    certificate = certify(module, random_variables(module), denoise, sites, SCHEDULE, pictures(size, 1))
    assert certificate.passed, str(certificate)
    assert min(row.figure.change for row in certificate.sites["float64"]) > 1e-6


def random_variables_like(shapes):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: np.asarray(0.1 * rng.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5, np.float32), shapes
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_full_networks_run_at_320_pixels(name):
    module = create_model(name, num_classes=80, image_size=(320, 320))
    variables, x = random_variables(module), pictures((320, 320), 1)
    outputs, objects = jax.jit(lambda v, x: (lambda y: (y, module.objects(y, (320, 320))))(module.apply(v, x)))(
        variables, x
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs))
    assert objects.valid.shape == (1, 100) and np.isfinite(objects.boxes).all()
