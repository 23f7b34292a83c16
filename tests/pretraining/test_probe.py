"""Linear probes against their definitions, and what they refuse."""

import numpy as np
import pytest

from drep_jax.errors import ConfigError, DataError
from drep_jax.pretraining.probe import ridge_probe, standardized, trained_probe


def features_and_labels(count=200, width=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    centers = rng.standard_normal((3, width)) * 2
    return (centers[labels] + rng.standard_normal((count, width))) * np.linspace(1, 50, width) + 7, labels


def test_ridge_is_the_minimum_for_standardized_features():
    features, labels = features_and_labels()
    probe = ridge_probe(features, labels, 3, strengths=(0.1,))
    standard = standardized(features, features)
    targets = np.eye(3)[labels]
    expected = np.linalg.solve(
        standard.T @ standard + 0.1 * len(labels) * np.eye(6), standard.T @ (targets - targets.mean(axis=0))
    )
    np.testing.assert_allclose(probe(features), standard @ expected + targets.mean(axis=0), atol=1e-4)
    for shift in (0.0, features.mean(axis=0)):
        head = probe.head(shift)
        np.testing.assert_allclose((features - shift) @ head["kernel"] + head["bias"], probe(features), atol=1e-4)


def test_the_strength_is_the_largest_that_is_as_good():
    rng = np.random.default_rng(0)
    features, labels = features_and_labels()
    informative = ridge_probe(features, labels, 3)
    assert informative.hits(features, labels).mean() > 0.8
    nothing = ridge_probe(rng.standard_normal((200, 6)), labels, 3)
    assert nothing.strength > informative.strength or nothing.strength == 10.0


def test_the_recipe_learns_the_same_classes_whatever_the_scale():
    features, labels = features_and_labels()
    options = {"epochs": 30, "batch_size": 50, "learning_rate": 0.05}
    probe = trained_probe(features, labels, 3, **options)
    assert probe.hits(*features_and_labels()).mean() > 0.9
    scaled = trained_probe(1000 * features - 3, labels, 3, **options)
    np.testing.assert_allclose(scaled(1000 * features - 3), probe(features), atol=1e-2)


def test_what_no_probe_can_learn_from():
    features, labels = features_and_labels(20)
    with pytest.raises(DataError, match="at least 10 labeled images, and there are 9"):
        ridge_probe(features[:9], labels[:9], 3)
    with pytest.raises(DataError, match="not finite"):
        ridge_probe(np.where(features > features.mean(), np.nan, features), labels, 3)
    with pytest.raises(ConfigError, match="at least one epoch"):
        trained_probe(features, labels, 3, epochs=0)
