"""Sizes of the images that certificates are measured on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.denoisers import Denoisers, init_denoise
from drep_jax.errors import ConfigError
from drep_jax.models import create_model
from drep_jax.run.export import fuse_and_certify
from drep_jax.run.inputs import check_sizes, resized, sizes_of
from drep_jax.run.run import Run
from tests import trees
from tests.setups import make_setup


def config(*sizes):
    return {
        "evaluate": {"certificate_sizes": sizes, "certificate_images": 2},
        "model": {"name": "net"},
        "pretrain": {"steps": 0},
        "progress": False,
    }


def test_sizes_are_read():
    assert sizes_of(config("512x683", "97 × 131")) == {"512×683": (512, 683), "97×131": (97, 131)}
    assert sizes_of({"evaluate": {}}) == {}
    for text in ("512", "0x5", "ax5", "5x5x5", "-1x5"):
        with pytest.raises(ConfigError, match=f'certificate_sizes: "{text}" is no size; give height and width'):
            sizes_of(config(text))


def test_images_are_resized_and_side_information_stays():
    x = trees.normal(0, (2, 4, 6, 3))
    plane = jnp.full((2, 4, 6, 1), 7.0)
    large = resized(jnp.concatenate([x, plane], -1), (9, 5))
    assert large.shape == (2, 9, 5, 4) and (large[..., 3] == 7).all()
    np.testing.assert_allclose(resized(x, (4, 6)), x, atol=1e-6)


def test_the_certificate_is_taken_at_every_size(tmp_path):
    net = create_model(
        "resnet", num_classes=2, image_size=(8, 8), stage_sizes=(1,), block="basic", width=4, stem="cifar"
    )
    x = trees.normal(0, (2, 8, 8, 3))
    setup = make_setup(net, x)
    variables = trees.randomize(trees.zeros(setup.abstract), 0, 0.5)
    variables["batch_stats"] = jax.tree_util.tree_map(lambda leaf: abs(leaf) + 0.5, variables["batch_stats"])
    denoise = Denoisers(trees.randomize(trees.zeros(init_denoise(setup.sites)), 1, 0.1), "ddpm", 1)
    check_sizes(config("9x7"), setup)
    _, certificate = fuse_and_certify(Run(config("9x7"), setup, str(tmp_path)), variables, denoise)
    assert certificate.passed and [*certificate.sizes] == ["9×7"]
    assert certificate.to_json()["sizes"]["9×7"]["passed"] and "at 9×7: Certificate: PASSED" in str(certificate)
    failed = dataclasses.replace(certificate.sizes["9×7"], structure={"same_tree": False})
    assert not dataclasses.replace(certificate, sizes={"9×7": failed}).passed


def test_a_size_that_the_backbone_cannot_take_is_refused():
    vit = create_model("vit", num_classes=2, image_size=(8, 8), patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=8)
    setup = make_setup(vit, trees.normal(0, (2, 8, 8, 3)))
    with pytest.raises(ConfigError, match=r"certificate_sizes: net takes no images of 12×8: .*Leave the size out"):
        check_sizes(config("12x8"), setup)
