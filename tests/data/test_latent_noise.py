"""Noise in the latents of patches: its covariance in the image, its names, and what it refuses."""

import numpy as np
import pytest

from drep_jax.data.corruptions import check_spec, corrupt, latent, parse_spec
from drep_jax.errors import CheckpointError, ConfigError, DataError
from drep_jax.models.patch_pca import patch_pca, save_pca

STD = (0.5, 0.25, 0.2)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(latent, "_of_the_run", [])
    rng = np.random.default_rng(0)
    root = rng.standard_normal((12, 12))
    pca = patch_pca(100, rng.standard_normal(12), root @ root.T, components=3, patch=(2, 2), scale="global")
    path = str(tmp_path / "pca.npz")
    save_pca(path, pca, (0.5, 0.5, 0.5), STD)
    return path, pca


def test_its_covariance_in_a_patch_is_that_of_the_latents(saved):
    path, pca = saved
    image = np.zeros((200, 200, 3), np.float32)
    noise = latent.open_latent(path, {})(image, np.random.default_rng(1), 0.5)
    patches = noise.reshape(100, 2, 100, 2, 3).swapaxes(1, 2).reshape(-1, 12) / (255 * np.tile(STD, 4))
    expected = 0.25 * pca.directions.T * pca.scale**2 @ pca.directions
    np.testing.assert_allclose(np.cov(patches.T), expected, atol=0.06 * np.abs(expected).max())
    assert latent.open_latent(path, {})(image[:5, :3], np.random.default_rng(1), 0.5).shape == (5, 3, 3)


def test_the_run_names_the_pca_or_the_spec_does(saved):
    path, _ = saved
    assert [part.name for part in parse_spec("clean,pca_latent:0..1.4")] == ["clean", "pca_latent:"]
    assert (parse_spec("pca_latent:0..1.4")[0].low, parse_spec("pca_latent:0..1.4")[0].high) == (0.0, 1.4)
    images = np.full((2, 8, 8, 3), 128, np.uint8)
    with pytest.raises(ConfigError, match="takes the PCA of a run with pre-training, and this run has none"):
        corrupt(images, np.arange(2), "pca_latent:1", 0)
    named = corrupt(images, np.arange(2), f"pca_latent:{path}?strength=0.3", 0)
    latent.use_pca(path)
    of_the_run = corrupt(images, np.arange(2), "pca_latent:0.3", 0)
    np.testing.assert_array_equal(named, of_the_run)
    assert np.abs(named - 128).mean() > 1 and not np.array_equal(named[0], named[1])
    twice = corrupt(images, np.arange(2), "pca_latent:0.6", 0)
    inside = (twice > 0) & (twice < 255)
    np.testing.assert_allclose((twice - 128)[inside], 2 * (of_the_run - 128)[inside], atol=1e-3)


def test_what_is_refused(saved, tmp_path):
    path, _ = saved
    for spec, message in (
        ("pca_latent:-1", "strength"),
        ("pca_latent:50", "strength"),
        ("pca_latent:1..0.5", "strength"),
        (f"pca_latent:{path}?color=1", 'has no option "color"'),
    ):
        with pytest.raises(ConfigError, match=message):
            check_spec(spec)
    with pytest.raises(CheckpointError, match="There is no PCA of patches"):
        check_spec(f"pca_latent:{tmp_path}/none.npz?strength=1")
    with pytest.raises(DataError, match="3 channels, and the image has 1"):
        corrupt(np.zeros((1, 4, 4, 1), np.uint8), np.arange(1), f"pca_latent:{path}", 0)
