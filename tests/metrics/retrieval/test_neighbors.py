"""The precision of neighbors against a loop over the images."""

import numpy as np
import pytest

from drep_jax.metrics.retrieval.neighbors import neighbor_precision
from drep_jax.tasks.retrieval import NEIGHBORS, Retrieval


def test_neighbors_are_agreed_on_as_far_as_they_are_found_early():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(30, 6))
    unit = clean / np.linalg.norm(clean, axis=1, keepdims=True)
    nearest = np.stack([[j for j in np.argsort(-(unit @ unit[i])) if j != i][:NEIGHBORS] for i in range(30)])
    for same in (clean, 3 * clean):
        np.testing.assert_allclose(neighbor_precision(same, clean, NEIGHBORS), np.ones(30))
    means = []
    for spread in (0.1, 0.5, 2.0):
        noisy = clean + spread * np.random.default_rng(1).normal(size=clean.shape)
        other = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
        precisions = []
        for i in range(30):
            order = [j for j in np.argsort(-(other @ other[i])) if j != i]
            places = [k for k, j in enumerate(order, start=1) if j in nearest[i]]
            precisions.append(np.mean([hits / place for hits, place in enumerate(places, start=1)]))
        np.testing.assert_allclose(neighbor_precision(noisy, clean, NEIGHBORS), precisions)
        items = Retrieval().agreement({"feature": noisy}, {"feature": clean})
        np.testing.assert_allclose(items.statistics["mAP"], precisions)
        means.append(np.mean(precisions))
    assert 1 > means[0] > means[1] > means[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_numbers_agree_with_nothing(bad):
    clean = np.random.default_rng(0).normal(size=(30, 6))
    broken = clean.copy()
    broken[3, 0] = bad
    for features, reference in ((broken, clean), (clean, broken)):
        assert np.isnan(neighbor_precision(features, reference, NEIGHBORS)).all()


def test_of_few_images_not_all_others_are_neighbors():
    """With as many neighbors as there are other images, every ranking would be perfect and nothing could be chosen by it."""
    rng = np.random.default_rng(0)
    clean, other = rng.normal(size=(2, NEIGHBORS + 1, 4))
    np.testing.assert_allclose(neighbor_precision(clean, clean, NEIGHBORS), 1.0)
    assert neighbor_precision(other, clean, NEIGHBORS).mean() < 0.95
