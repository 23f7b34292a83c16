"""The encoder at a fixed time step as a plain ViT: exact, seen to be when it is not, and what it refuses."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.models import create_model
from drep_jax.models.autoencoder import images_of, patches_of
from drep_jax.models.patch_pca import patch_pca
from drep_jax.pretraining.certificate import certify_merge, encoder_features
from drep_jax.pretraining.merge import autoencoder_of, check_vit, merge, shifted
from drep_jax.pretraining.objective import Objective
from tests.trees import outputs

PLAIN = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "class_token": False, "pool": "gap"}


def make_vit(**changes):
    return create_model("vit", num_classes=0, image_size=(8, 8), **{**PLAIN, **changes})


def make_case(vit, components=6, **changes):
    """Returns autoencoder, its parameters away from their start, objective, shapes of the ViT, and images."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((48, 48)) * np.linspace(1, 0.1, 48)
    pca = patch_pca(999, rng.standard_normal(48), root.T @ root, components=components, patch=(4, 4), scale="whiten")
    objective = Objective(pca, **changes)
    net = autoencoder_of(vit, objective)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, objective.input_width)), jnp.zeros(1))
    params = jax.tree_util.tree_map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes["params"]
    )
    images = rng.standard_normal((3, 8, 8, 3)).astype(np.float32)
    return net, params, objective, jax.eval_shape(vit.init, jax.random.key(0), images)["params"], images


def test_the_plain_vit_is_the_encoder_and_a_wrong_leaf_shows():
    vit = make_vit()
    net, params, objective, abstract, images = make_case(vit)
    certificate = certify_merge(net, params, objective, vit, abstract, images, 10)
    assert certificate.passed, str(certificate)
    exact = certificate.end_to_end["float64"]
    assert exact.error < 1e-13 and exact.bound < 1e-12 and exact.change > 0.1
    assert set(certificate.blocks["float32"]) == {"encoderblock_0", "encoderblock_1"}
    assert "PASSED" in str(certificate) and certificate.to_json()["results"]["float64"]["passed"]

    wrong = copy.deepcopy(merge(params, objective, vit, abstract, 10))
    bias = wrong["encoderblock_1"]["attn"]["out"]
    bias["bias"] = bias["bias"] * np.float32(1.001)
    failed = certify_merge(net, params, objective, vit, abstract, images, 10, merged=wrong)
    assert not failed.passed and not failed.blocks["float64"]["encoderblock_1"].passed
    assert failed.blocks["float64"]["encoderblock_0"].passed and not failed.end_to_end["float64"].passed
    later = merge(params, objective, vit, abstract, 600)
    assert np.abs(later["encoderblock_0"]["norm1"]["bias"] - wrong["encoderblock_0"]["norm1"]["bias"]).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "vit_changes", "project"),
    [
        ({"inputs": "latent", "schedule": "variance"}, {"pool": "mean", "final_norm": False, "scan": True}, True),
        ({"schedule": "ddpm"}, {"pool": "mean", "positions": "sincos2d"}, True),
        ({}, {"final_norm": False}, False),
    ],
)
def test_inputs_pools_and_positions(changes, vit_changes, project):
    """Without the certificate: features of the two networks on images."""
    vit = make_vit(**vit_changes)
    net, params, objective, abstract, images = make_case(vit, **changes)
    merged = {"params": merge(params, objective, vit, abstract, 7, project=project)}
    expected = jax.jit(lambda p, x: encoder_features(net, p, objective, vit, x, 7, project=project))(params, images)
    np.testing.assert_allclose(outputs(vit, merged, images), expected, rtol=2e-4, atol=2e-4)
    assert ("norm" in merged["params"]) == vit.final_norm
    shift = np.linspace(-1, 1, 16)
    centered = {"params": shifted(merged["params"], vit, shift)}
    np.testing.assert_allclose(outputs(vit, centered, images), expected - shift[None], rtol=2e-4, atol=2e-4)
    # The projection is part of the patch embedding: what lies beyond the components makes no difference.
    beyond = objective.pca.basis[-1].astype(np.float32) * np.ones((3, 4, 1), np.float32)
    moved = images + np.asarray(images_of(jnp.asarray(beyond), (2, 2), (4, 4)))
    same = np.abs(np.asarray(outputs(vit, merged, moved) - expected)).max() < 1e-3
    assert same == project


def test_patches_and_images_are_inverse():
    images = jnp.arange(2 * 6 * 4 * 3.0).reshape(2, 6, 4, 3)
    patches = patches_of(images, (3, 2))
    assert patches.shape == (2, 4, 18)
    np.testing.assert_array_equal(patches[1, 2], images[1, 3:6, 0:2].reshape(-1))
    np.testing.assert_array_equal(images_of(patches, (2, 2), (3, 2)), images)


def test_what_cannot_be_merged():
    vit = make_vit()
    _, params, objective, abstract, _ = make_case(vit)
    merged = merge(params, objective, vit, abstract, 10)
    with pytest.raises(CheckpointError, match=r"cannot be merged twice"):
        merge(merged, objective, vit, abstract, 10)
    with pytest.raises(ConfigError, match=r"pretrain.t=1000 is outside the schedule"):
        merge(params, objective, vit, abstract, 1000)
    with pytest.raises(CheckpointError, match="not those of a denoising autoencoder"):
        merge({"fc": params["head"]}, objective, vit, abstract, 10)
    latent = make_case(vit, inputs="latent")
    other = make_case(vit, components=5, inputs="latent")
    with pytest.raises(CheckpointError, match=r"takes 6 numbers a patch.*make 5 numbers"):
        merge(latent[1], other[2], vit, abstract, 10)
    for changes, message in (
        ({"class_token": True}, "model.class_token=False"),
        ({"pool": "cls", "class_token": True}, "model.pool="),
        ({"registers": 1}, "model.registers=0"),
        ({"post_norm": True}, "model.post_norm=False"),
        ({"layer_scale": True}, "model.layer_scale=False"),
        ({"patch_stride": 2}, "model.patch_stride=None"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_vit(make_vit(**changes))
    with pytest.raises(ConfigError, match="the backbone is a ResNet"):
        check_vit(create_model("resnet20_cifar", num_classes=0, image_size=(8, 8)))
