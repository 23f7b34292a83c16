"""Re-ranking: against a dense version with sets, and what it does to rankings."""

import numpy as np
import pytest

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.retrieval import ranking
from drep_jax.metrics.retrieval.rerank import Rerank, reranked


def dense(query, gallery, k1, k2, share):
    """The paper's definition with Python sets and n × n arrays."""
    images = np.concatenate([query, gallery]).astype(np.float64)
    n = len(images)
    original = ((images[:, None] - images[None]) ** 2).sum(axis=-1)
    original = original / original.max(axis=1, keepdims=True)
    order = [sorted(range(n), key=lambda j: (j != i, original[i, j], j)) for i in range(n)]

    def reciprocal(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    v = np.zeros((n, n))
    for i in range(n):
        own = reciprocal(i, k1)
        wide = set(own)
        for j in own:
            theirs = reciprocal(j, round(k1 / 2))
            if 3 * len(theirs & own) > 2 * len(theirs):
                wide |= theirs
        for j in wide:
            v[i, j] = np.exp(-original[i, j])
        v[i] /= v[i].sum()
    v = np.stack([v[order[i][:k2]].mean(axis=0) for i in range(n)])
    q = len(query)
    jaccard = np.array(
        [[1 - np.minimum(v[i], v[j]).sum() / np.maximum(v[i], v[j]).sum() for j in range(q, n)] for i in range(q)]
    )
    return (1 - share) * jaccard + share * original[:q, q:]


@pytest.mark.parametrize("constants", [(20, 6, 0.3), (5, 2, 0.3), (4, 1, 0.0), (7, 3, 1.0), (1, 1, 0.5)])
@pytest.mark.parametrize("spread", [3, 40])
def test_like_the_dense_version(constants, spread):
    rng = np.random.default_rng(spread)
    ids = rng.integers(0, 8, 70)
    images = rng.integers(-spread, spread + 1, (8, 6))[ids] + rng.integers(-1, 2, (70, 6))  # whole numbers: many ties
    images[40:44] = images[3]
    query, gallery = images[:17].astype(np.float32), images[17:].astype(np.float32)
    found = np.concatenate(list(reranked(query, gallery, Rerank(*constants), block=8)))
    np.testing.assert_allclose(found, dense(query, gallery, *constants), atol=2e-6)


def test_fewer_images_than_neighbours():
    query, gallery = np.array([[0.0, 1]]), np.array([[1.0, 1], [5, 2]])
    found = np.concatenate(list(reranked(query, gallery)))
    np.testing.assert_allclose(found, dense(query, gallery, 20, 6, 0.3), atol=2e-6)
    one = np.concatenate(list(reranked(query, query)))  # all images alike: every distance 0
    np.testing.assert_allclose(one, [[0]], atol=1e-6)


def test_neighbours_correct_each_other():
    """A chain of one identity: its far end is no near neighbour of the query, but shares neighbours with it."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(6), 24)
    images = np.stack([np.tile(np.arange(24), 6), 8 * ids], axis=1) + rng.uniform(-0.5, 0.5, (144, 2))
    images = images.astype(np.float32)
    query, gallery = slice(0, None, 6), np.setdiff1d(np.arange(144), np.arange(0, 144, 6))
    options = {"query_ids": ids[query], "gallery_ids": ids[gallery], "cross_camera": False}
    before = ranking.rank(images[query], images[gallery], **options)
    after = ranking.rank_blocks(reranked(images[query], images[gallery], Rerank(8, 3, 0.3)), ranking.rules(**options))
    assert after.ap.mean() > before.ap.mean() + 0.05
    same = ranking.rank_blocks(
        reranked(images[query], images[gallery], Rerank(original_weight=1.0)), ranking.rules(**options)
    )
    np.testing.assert_allclose(same.ap, before.ap)  # λ = 1 leaves the order alone


def test_cosine_is_for_unit_lengths():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((30, 5))
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    found = np.concatenate(list(reranked(7 * images[:9], images[9:], metric="cosine")))
    np.testing.assert_allclose(found, dense(unit[:9], unit[9:], 20, 6, 0.3), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 0.3), "k1 = 0"),
        ((4, 6, 0.3), r"at most k1 \+ 1 = 5"),
        ((4, 2, 1.5), "λ = 1.5"),
        ((4, True, 0.5), "k2 = True"),
    ],
)
def test_constants_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        Rerank(*values)


def test_bad_features_are_refused():
    with pytest.raises(DataError, match="hold NaN or Inf"):
        next(reranked(np.ones((2, 3)), np.full((4, 3), np.nan)))
    with pytest.raises(ConfigError, match="Unknown metric"):
        next(reranked(np.ones((2, 3)), np.ones((4, 3)), metric="l1"))
