"""The loss of l-DAE against Eq. 4 in NumPy, its noise, its schedules, and the settings it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import ConfigError
from drep_jax.models.patch_pca import patch_pca, pixel_basis
from drep_jax.pretraining.objective import Objective

NUMBERS, COMPONENTS = 12, 3


def make_pca(scale="whiten"):
    rng = np.random.default_rng(1)
    root = rng.standard_normal((NUMBERS, NUMBERS))
    return patch_pca(500, rng.standard_normal(NUMBERS), root @ root.T, components=COMPONENTS, patch=(2, 2), scale=scale)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((3, 4, NUMBERS)).astype(np.float32)
    return jnp.asarray(patches), jnp.array([0, 500, 999]), jax.random.split(jax.random.key(seed), 3)


@pytest.mark.parametrize("scale", ["global", "whiten"])
def test_the_loss_is_equation_4(scale):
    pca = make_pca(scale)
    objective = Objective(pca)
    patches, t, keys = batch()
    noisy, noise = objective.corrupted(patches, t, keys)
    prediction = np.random.default_rng(2).standard_normal(patches.shape).astype(np.float32)
    sigma = np.sqrt(2) * np.asarray(t) / 999
    latents = (np.asarray(patches) - pca.mean) @ pca.directions.T / pca.scale
    expected = (latents + sigma[:, None, None] * np.asarray(noise)) * pca.scale @ pca.directions + pca.mean
    np.testing.assert_allclose(noisy, expected, rtol=1e-4, atol=1e-4)
    unit = pca.deviation if scale == "whiten" else pca.deviation[0]
    squares = (((np.asarray(patches) - prediction) @ pca.basis.T) / unit) ** 2
    weights = np.where(np.arange(NUMBERS) < COMPONENTS, 1.0, 0.1)
    loss = ((squares * weights).sum(-1).mean(-1) / (1 + sigma**2)).mean()
    np.testing.assert_allclose(objective.loss(prediction, patches, t, noise), loss, rtol=1e-4)


def test_every_row_of_the_ablation_is_perfect_at_its_target_and_only_there():
    """A prediction that is the target has loss 0 (but for the rounding), and restores the latents' part of the image."""
    pca, (patches, t, keys) = make_pca(), batch(1)
    projection = pca.decode(pca.encode(patches))
    for changes in (
        {"schedule": "variance", "predict": "noise", "inputs": "latent", "outputs": "latent"},
        {"schedule": "variance", "inputs": "latent", "outputs": "latent"},
        {"inputs": "latent", "outputs": "latent"},
        {"outputs": "latent"},
        {"outputs": "projection"},
        {"predict": "noise"},
        {},
        {"schedule": "single"},
        {"schedule": "ddpm", "predict": "noise", "outputs": "latent"},
        {"noise": "pixels"},
        {"noise": "mask"},
        {"noise": "none"},
    ):
        basis = pixel_basis(pca) if changes.get("noise") in ("pixels", "mask") else pca
        objective = Objective(basis, **changes)
        steps = jnp.minimum(t, 900)
        noisy, noise = objective.corrupted(patches, steps, keys)
        assert noisy.shape[-1] == objective.input_width
        target = {
            "latent": noise if objective.predict == "noise" else basis.encode(patches),
            "projection": projection,
            "image": basis.decode(noise) if objective.predict == "noise" else patches,
        }[objective.outputs]
        assert target.shape[-1] == objective.output_width
        assert float(objective.loss(target, patches, steps, noise)) < 1e-6, changes
        assert float(objective.loss(target + 1.0, patches, steps, noise)) > 1e-3, changes
        restored = objective.restored(target, noisy, steps)
        difference = pca.encode(restored) - pca.encode(patches)
        assert float(jnp.abs(difference).max()) < 0.05, changes


def test_levels_of_the_schedules():
    pca = make_pca()
    for schedule in ("linear", "single", "variance", "ddpm"):
        gamma, sigma = Objective(pca, schedule=schedule, timesteps=100).levels()
        assert gamma.shape == sigma.shape == (100,)
        if schedule in ("linear", "single"):
            assert np.all(gamma == 1)
        else:
            np.testing.assert_allclose(gamma**2 + sigma**2, 1)
            assert np.all(np.diff(sigma) > 0)
    gamma, _ = Objective(pca, schedule="variance", timesteps=100).levels()
    np.testing.assert_allclose(gamma**2, np.linspace(0.99, 0, 100), atol=1e-12)
    _, sigma = Objective(pca, timesteps=101).levels()
    np.testing.assert_allclose(sigma, np.sqrt(2) * np.arange(101) / 100)
    assert Objective(pca, schedule="single").levels()[1][3] == pytest.approx(1 / np.sqrt(3))


def test_masks_hide_whole_patches_and_only_these_count():
    objective = Objective(pixel_basis(make_pca()), noise="mask", mask_ratio=0.5)
    patches, t, keys = batch(3)
    noisy, hidden = objective.corrupted(patches, t, keys)
    hidden = np.asarray(hidden)[..., 0]
    assert 0 < hidden.sum() < hidden.size
    mean = objective.pca.mean
    np.testing.assert_allclose(np.asarray(noisy)[hidden], np.broadcast_to(mean, (hidden.sum(), NUMBERS)), atol=1e-5)
    np.testing.assert_allclose(np.asarray(noisy)[~hidden], np.asarray(patches)[~hidden], atol=1e-4)
    wrong_where_seen = jnp.where(jnp.asarray(hidden)[..., None], patches, patches + 5)
    assert float(objective.loss(wrong_where_seen, patches, t, jnp.asarray(hidden)[..., None])) < 1e-9


def test_noise_is_a_function_of_the_image_and_not_of_the_batch():
    objective = Objective(make_pca())
    patches, t, keys = batch(4)
    whole, _ = objective.corrupted(patches, t, keys)
    alone, _ = objective.corrupted(patches[1:2], t[1:2], keys[1:2])
    np.testing.assert_array_equal(whole[1:2], alone)


def test_settings_that_cannot_be():
    pca = make_pca()
    for changes, message in (
        ({"schedule": "linaer"}, r'pretrain.schedule="linaer" is unknown. Did you mean "linear"'),
        ({"predict": "image"}, 'pretrain.predict="image" is unknown'),
        ({"max_sigma": 0.0}, "pretrain.max_sigma=0.0"),
        ({"max_sigma": float("nan")}, "pretrain.max_sigma=nan"),
        ({"timesteps": 1}, "pretrain.timesteps=1 must be at least 2"),
        ({"residual_weight": 2.0}, "pretrain.residual_weight=2.0"),
        ({"mask_ratio": 1.0}, "pretrain.mask_ratio=1.0"),
        ({"predict": "noise", "noise": "mask"}, 'with pretrain.noise="mask" there is no noise'),
    ):
        with pytest.raises(ConfigError, match=message):
            Objective(pca, **changes)
    objective = Objective(pca)
    for t in (-1, 1000, True, 3.5):
        with pytest.raises(
            ConfigError, match=rf"pretrain.t={t} is outside the schedule, whose time steps are 0 to 999"
        ):
            objective.check_time(t)
    assert dataclasses.replace(objective, timesteps=10).check_time(9) is None
