"""Batches of P identities with K images each: what every block holds, and that all images are used equally often."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drep_jax.data.reid.sampler import epoch_length, identity_order
from drep_jax.errors import ConfigError, DataError


def labels_of(sizes, seed=0):
    """Images of identities 0, 3, 6, … in a random order: labels need not be without gaps."""
    return np.random.default_rng(seed).permutation(np.repeat(3 * np.arange(len(sizes)), sizes)).astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 9), min_size=5, max_size=12),
    st.integers(2, 5),
    st.integers(2, 11),
    st.integers(0, 2**63),
    st.integers(0, 50),
)
def test_every_block_has_distinct_identities_with_their_images(sizes, identities, instances, seed, epoch):
    labels = labels_of(sizes)
    order = identity_order(labels, identities, instances, seed, epoch)
    assert order.dtype == np.int32 and len(order) == epoch_length(labels, identities, instances)
    for block in order.reshape(-1, identities, instances):
        who = labels[block]
        assert (who == who[:, :1]).all() and len(set(who[:, 0])) == identities
        for row in block:
            own = sizes[labels[row[0]] // 3]
            counts = Counter(row.tolist()).values()
            assert len(counts) == min(own, instances) and max(counts) == -(-instances // own)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=4, max_size=9), st.integers(2, 4), st.integers(2, 9), st.integers(1, 20))
def test_identities_and_their_images_are_used_equally_often(sizes, identities, instances, epochs):
    labels = labels_of(sizes)
    uses = Counter(
        np.concatenate([identity_order(labels, identities, instances, 5, e) for e in range(epochs)]).tolist()
    )
    of = [[uses[image] for image in np.flatnonzero(labels == 3 * i)] for i in range(len(sizes))]
    assert all(max(own) - min(own) <= 1 for own in of)
    turns = [sum(own) // instances for own in of]
    assert max(turns) - min(turns) <= 1


def test_it_depends_on_seed_and_epoch_alone():
    labels = labels_of([4, 5, 6, 7, 3])
    first = identity_order(labels, 2, 3, 7, 4)
    assert (first == identity_order(labels.copy(), 2, 3, 7, 4)).all()
    assert (first != identity_order(labels, 2, 3, 8, 4)).any() and (first != identity_order(labels, 2, 3, 7, 5)).any()
    assert first.tolist()[:6] == [22, 21, 2, 1, 18, 19], "from one release to the next"


def test_an_epoch_has_about_as_many_places_as_images():
    labels = np.repeat(np.arange(751), 17)
    length = epoch_length(labels, 16, 4)
    assert length % 64 == 0 and abs(length - len(labels)) < 751 * 4


def test_identities_of_one_image():
    labels = np.array([0, 0, 1, 2, 2, 3, 3, 3, 4])
    with pytest.raises(DataError, match=r'2 identities have one image only.*: anna, otto\. .*singletons="drop"'):
        identity_order(labels, 2, 2, 0, 0, names=["a", "anna", "b", "c", "otto"])
    with pytest.raises(DataError, match="1, 4"):
        epoch_length(labels, 2, 2)
    seen = {int(i) for e in range(9) for i in identity_order(labels, 2, 2, 0, e, singletons="drop")}
    assert seen == {0, 1, 3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    ("identities", "instances", "lonely", "fragment"),
    [
        (4, 2, "drop", "P=4 identities need as many, but there are 3"),
        (1, 2, "refuse", "got P=1 and K=2"),
        (2, 1, "refuse", "got P=2 and K=1"),
        (2, 2, "keep", 'got "keep"'),
    ],
)
def test_what_cannot_be(identities, instances, lonely, fragment):
    labels = np.repeat(np.arange(3), 2)
    with pytest.raises(ConfigError) as caught:
        identity_order(labels, identities, instances, 0, 0, singletons=lonely)
    assert fragment in str(caught.value)
    with pytest.raises(ConfigError, match="there are 0"):
        epoch_length(np.zeros(0, np.int32), 2, 2)
