"""The PCA of patches against its definition in NumPy, and what it refuses."""

import dataclasses

import numpy as np
import pytest

from drep_jax.errors import CheckpointError, ConfigError, DataError
from drep_jax.models.patch_pca import load_pca, patch_pca, pixel_basis, save_pca

PATCH = (2, 2)
NUMBERS = 12


def patches_and_moments(count=200):
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((count, NUMBERS)) @ rng.standard_normal((NUMBERS, NUMBERS)) + 3.0
    return patches, (count, patches.mean(axis=0), np.cov(patches.T, bias=True))


@pytest.mark.parametrize("scale", ["global", "whiten", "none"])
@pytest.mark.parametrize("center", [True, False])
def test_decoding_what_was_encoded_is_the_orthogonal_projection(scale, center):
    patches, moments = patches_and_moments()
    pca = patch_pca(*moments, components=5, patch=PATCH, scale=scale, center=center)
    np.testing.assert_allclose(pca.basis @ pca.basis.T, np.eye(NUMBERS), atol=1e-12)
    origin = moments[1] if center else np.zeros(NUMBERS)
    values, vectors = np.linalg.eigh(moments[2])
    directions = vectors[:, np.argsort(values)[::-1][:5]]
    projected = (patches - origin) @ directions @ directions.T + origin
    np.testing.assert_allclose(pca.decode(pca.encode(patches)), projected, atol=1e-10)
    whole = patch_pca(*moments, components=NUMBERS, patch=PATCH, scale=scale, center=center)
    np.testing.assert_allclose(whole.decode(whole.encode(patches)), patches, atol=1e-10)
    variance = pca.encode(patches - patches.mean(axis=0) + origin).var(axis=0)
    expected = {"global": variance.mean(), "whiten": variance, "none": pca.variance[:5] / variance}[scale]
    np.testing.assert_allclose(expected, np.ones_like(expected), rtol=1e-9)


def test_signs_and_order_do_not_depend_on_the_solver():
    _, (count, mean, covariance) = patches_and_moments()
    pca = patch_pca(count, mean, covariance, components=4, patch=PATCH)
    turned = patch_pca(count, -mean, covariance.copy(order="F"), components=4, patch=PATCH)
    np.testing.assert_allclose(pca.basis, turned.basis, atol=1e-12)
    assert np.all(np.take_along_axis(pca.basis, np.abs(pca.basis).argmax(axis=1)[:, None], axis=1) > 0)
    assert np.all(np.diff(pca.variance) <= 0)
    pixels = pixel_basis(pca)
    np.testing.assert_array_equal(pixels.basis, np.eye(NUMBERS))
    assert pixels.components == NUMBERS and pixels.digest() != pca.digest()


def test_what_no_pca_can_be_made_of():
    _, (count, mean, covariance) = patches_and_moments()
    for components in (0, NUMBERS + 1, True):
        with pytest.raises(ConfigError, match=rf"pretrain.components={components}.*between 1 and {NUMBERS}"):
            patch_pca(count, mean, covariance, components=components, patch=PATCH)
    with pytest.raises(ConfigError, match=r'pretrain.scale="unit": expected one of global'):
        patch_pca(count, mean, covariance, components=4, patch=PATCH, scale="unit")
    with pytest.raises(DataError, match=f"at least that many patches, and there are {NUMBERS - 1}"):
        patch_pca(NUMBERS - 1, mean, covariance, components=4, patch=PATCH)
    with pytest.raises(DataError, match=f"vary in 0 of {NUMBERS} directions"):
        patch_pca(count, mean, 0 * covariance, components=1, patch=PATCH)
    gray = np.kron(np.eye(4), np.ones((3, 3)))
    with pytest.raises(DataError, match=f"vary in 4 of {NUMBERS} directions, fewer than the 5"):
        patch_pca(count, mean, gray, components=5, patch=PATCH)
    assert patch_pca(count, mean, gray, components=4, patch=PATCH).kept == pytest.approx(1.0)


def test_it_is_saved_with_the_normalization_of_its_images(tmp_path):
    _, moments = patches_and_moments()
    pca, path = patch_pca(*moments, components=4, patch=PATCH, scale="whiten"), str(tmp_path / "pca.npz")
    save_pca(path, pca, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    loaded, mean, std = load_pca(path)
    assert loaded.digest() == pca.digest() and loaded.patch == PATCH and loaded.count == 200
    assert dataclasses.replace(pca, components=5).digest() != pca.digest()
    assert (mean.tolist(), std.tolist()) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    with pytest.raises(CheckpointError, match="There is no PCA of patches"):
        load_pca(str(tmp_path / "other.npz"))
    np.savez(tmp_path / "wrong.npz", mean=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"wrong\.npz is no PCA of patches"):
        load_pca(str(tmp_path / "wrong.npz"))
