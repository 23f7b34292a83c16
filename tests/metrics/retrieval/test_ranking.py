"""Retrieval metrics: against plain loops on random and adversarial cases, and against numbers computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.retrieval import distances, ranking
from tests.metrics.retrieval import naive


def line(query, gallery, **options):
    """Ranks points on a line; distances are exact."""
    options = {"cross_camera": False} | options
    return ranking.rank(np.array(query, np.float32)[:, None], np.array(gallery, np.float32)[:, None], **options)


def same(found, expected):
    for index, entry in enumerate(expected):
        assert found.valid[index] == (entry is not None)
        if entry is None:
            assert np.isnan([found.ap[index], found.inp[index]]).all()
            assert (found.first[index], found.matches[index]) == (-1, 0)
        else:
            np.testing.assert_allclose([found.ap[index], found.inp[index]], entry[:2], rtol=1e-12)
            assert (found.first[index], found.matches[index]) == entry[2:]


def test_by_hand():
    # Distances 1 … 6; right ones at 1, 3 and 6: AP = (1/1 + 2/3 + 3/6)/3, INP = 3/6. The second query: right at 2 only.
    found = line(
        [0, 0, 0], [1, 2, 3, -4, 5, -6], query_ids=np.array([7, 9, 4]), gallery_ids=np.array([7, 9, 7, 8, 8, 7])
    )
    np.testing.assert_allclose(found.ap, [(1 + 2 / 3 + 1 / 2) / 3, 1 / 2, np.nan])
    np.testing.assert_allclose(found.inp, [1 / 2, 1 / 2, np.nan])
    assert found.first.tolist() == [0, 1, -1]
    assert found.valid.tolist() == [True, True, False]
    scores = ranking.scores(found)
    assert list(scores) == ["mAP", "rank1", "rank5", "rank10", "mINP"]
    np.testing.assert_allclose([float(np.mean(one)) for one in scores.values()], [11 / 18, 0.5, 1, 1, 0.5])
    np.testing.assert_array_equal(ranking.cmc(found, 4), [0.5, 1, 1, 1])


def test_wrong_images_come_first_at_one_distance():
    ids = {"query_ids": np.array([1]), "gallery_ids": np.array([1, 2, 1, 2, 2])}
    found = line([0], [1, -1, -1, 1, 3], **ids)  # two right and two wrong at distance 1: ranks 2 and 3
    np.testing.assert_allclose(found.ap, [(1 / 3 + 2 / 4) / 2])
    np.testing.assert_allclose(found.inp, [2 / 4])
    assert found.first[0] == 2
    indices, values, right = ranking.top([[0.0]], [[1.0], [-1], [-1], [1], [3]], cross_camera=False, k=5, **ids)
    assert indices.tolist() == [[1, 3, 0, 2, 4]]
    assert values.tolist() == [[1, 1, 1, 1, 3]]
    assert right.tolist() == [[False, False, True, True, False]]


def test_same_identity_and_camera_are_left_out():
    options = {
        "query_ids": np.array([1, 1]),
        "gallery_ids": np.array([1, 1, 2, 1]),
        "query_cameras": np.array([0, 3]),
        "gallery_cameras": np.array([0, 1, 0, 2]),
    }
    found = line([0, 0], [0, 2, 1, 3], cross_camera=True, **options)
    np.testing.assert_allclose(
        found.ap, [(1 / 2 + 2 / 3) / 2, (1 + 2 / 3 + 3 / 4) / 3]
    )  # a wrong one of camera 0 stays
    assert found.gallery.tolist() == [3, 4]
    assert found.matches.tolist() == [2, 3]
    only = line(
        [0], [0, 1], cross_camera=True, query_ids=[1], gallery_ids=[1, 2], query_cameras=[0], gallery_cameras=[0, 1]
    )
    assert not only.valid[0]
    with pytest.raises(DataError, match=r"None of the 1 queries has a right image"):
        ranking.scores(only)
    indices, values, _ = ranking.top(
        [[0.0]], [[0.0], [1.0]], k=3, query_ids=[1], gallery_ids=[1, 2], query_cameras=[0], gallery_cameras=[0, 1]
    )
    assert indices.tolist() == [[1, -1, -1]]
    np.testing.assert_array_equal(values, [[1, np.nan, np.nan]])


def test_a_picture_does_not_find_itself():
    ids, images = np.array([1, 1, 2]), np.arange(3)
    found = line([0, 1, 5], [0, 1, 5], query_ids=ids, gallery_ids=ids, query_images=images, gallery_images=images)
    assert found.valid.tolist() == [True, True, False]
    assert found.gallery.tolist() == [2, 2, 2]


def test_all_right_all_wrong_and_one_image():
    every = line([0], [3, 1, 2], query_ids=[1], gallery_ids=[1, 1, 1])
    assert (every.ap[0], every.inp[0], every.first[0]) == (1, 1, 0)
    none = line([0], [3, 1, 2], query_ids=[1], gallery_ids=[2, 3, -1])
    assert not none.valid[0] and none.gallery[0] == 3
    last = line([0], [3, 1, 2], query_ids=[-1], gallery_ids=[-1, -2, 0])  # negative names are names
    assert (last.ap[0], last.inp[0], last.first[0]) == (1 / 3, 1 / 3, 2)
    one = line([0], [5], query_ids=[1], gallery_ids=[1])
    assert (one.ap[0], one.inp[0], one.first[0]) == (1, 1, 0)


def test_short_galleries_keep_cmc_monotone():
    found = line([0, 0], [1, 2], query_ids=[1, 2], gallery_ids=[1, 2])
    np.testing.assert_array_equal(ranking.cmc(found, 10), [0.5] + 9 * [1.0])
    assert [float(ranking.scores(found)[f"rank{k}"].mean()) for k in (1, 5, 10)] == [0.5, 1, 1]


@st.composite
def cases(draw):
    """Small whole numbers, so that distances are exact and often equal, with few identities and cameras."""
    q, g, width = draw(st.sampled_from([(1, 1, 1), (1, 9, 2), (5, 1, 2), (5, 9, 1), (5, 9, 4)]))  # few programs
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    spread, names, cameras = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    query = rng.integers(-spread, spread + 1, (q, width)).astype(np.float32)
    gallery = rng.integers(-spread, spread + 1, (g, width)).astype(np.float32)
    ids = rng.integers(-1, names, q), rng.integers(-1, names, g)
    return query, gallery, ids, (rng.integers(0, cameras, q), rng.integers(0, cameras, g)), rng.integers(-1, 2, q + g)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([3, None]), st.booleans())
def test_like_plain_loops(case, block, cross_camera):
    query, gallery, ids, cameras, views = case
    branches = 2 if query.shape[1] > 1 else 1
    q_views, g_views = views[: len(query)], views[len(query) :]
    half = query.shape[1] // branches
    for chosen in {1, branches}:
        rows = [
            [
                naive.squared(a[part], b[part])
                for b, theirs in zip(gallery.tolist(), g_views, strict=True)
                for part in [slice(None) if chosen == 1 else slice(half) if ours == theirs >= 0 else slice(half, None)]
            ]
            for a, ours in zip(query.tolist(), q_views, strict=True)
        ]
        options = {
            "query_ids": ids[0],
            "gallery_ids": ids[1],
            "query_cameras": cameras[0],
            "gallery_cameras": cameras[1],
            "cross_camera": cross_camera,
            "branches": chosen,
            "query_views": q_views,
            "gallery_views": g_views,
        }
        found = ranking.rank(query, gallery, block=block, jitted=False, **options)
        qcams, gcams = cameras if cross_camera else (None, None)
        same(found, naive.evaluate(rows, ids[0], ids[1], qcams, gcams))
        indices, values, right = ranking.top(query, gallery, k=4, block=block, **options)
        for i, row in enumerate(rows):
            listed = naive.ranked(row, ids[0][i], ids[1], None if qcams is None else qcams[i], gcams)[:4]
            assert found.gallery[i] == len(
                naive.ranked(row, ids[0][i], ids[1], None if qcams is None else qcams[i], gcams)
            )
            assert [index for _, _, index in listed] == indices[i, : len(listed)].tolist()
            assert [good for _, good, _ in listed] == right[i, : len(listed)].tolist()
            np.testing.assert_allclose(values[i, : len(listed)] ** 2, [d for d, _, _ in listed], rtol=1e-6)
            assert (indices[i, len(listed) :] == -1).all()


@pytest.fixture(scope="module")
def real():
    """Features that cluster by identity, some of them twice in the gallery, in places that products treat differently."""
    rng = np.random.default_rng(1)
    q, g, width = 45, 1237, 96
    ids = rng.integers(0, 30, q), np.where(rng.random(g) < 0.2, -5, rng.integers(0, 30, g))
    centres = rng.standard_normal((40, width))
    query = (centres[ids[0]] + 2 * rng.standard_normal((q, width))).astype(np.float32)
    gallery = (centres[ids[1]] + 2 * rng.standard_normal((g, width))).astype(np.float32)
    gallery[rng.choice(g, 300, replace=False)] = gallery[7]
    gallery[-1] = gallery[0]
    return {
        "query": query,
        "gallery": gallery,
        "query_ids": ids[0],
        "gallery_ids": ids[1],
        "query_cameras": rng.integers(0, 4, q),
        "gallery_cameras": rng.integers(0, 4, g),
    }


@pytest.mark.parametrize("metric", distances.METRICS)
def test_equal_features_are_at_exactly_one_distance(real, metric):
    pairs = distances.prepare(real["query"], real["gallery"], metric)
    rows = np.concatenate(list(distances.blocks(pairs, 16)))
    _, first, which = np.unique(real["gallery"], axis=0, return_index=True, return_inverse=True)
    assert len(first) < len(rows[0]) - 290
    np.testing.assert_array_equal(rows, rows[:, first[which.reshape(-1)]])
    truth = (real["query"][:, None, :].astype(np.float64) - real["gallery"]) ** 2
    if metric == "euclidean":
        np.testing.assert_allclose(rows, truth.sum(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("metric", distances.METRICS)
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("many", [ranking.MANY, 3])
def test_like_plain_loops_on_real_numbers(real, metric, jitted, many, monkeypatch):
    monkeypatch.setattr(ranking, "MANY", many)
    ranking._counted.clear_cache()
    pairs = distances.prepare(real["query"], real["gallery"], metric)
    rows = np.concatenate(list(distances.blocks(pairs))).tolist()
    expected = naive.evaluate(
        rows, *(real[f"{who}_{what}"] for what in ("ids", "cameras") for who in ("query", "gallery"))
    )
    same(ranking.rank(**real, metric=metric, jitted=jitted), expected)


def test_the_block_makes_no_difference(real):
    whole = ranking.rank(**real)
    for block in (1, 7, 44, 1000):
        part = ranking.rank(**real, block=block)
        np.testing.assert_allclose(part.ap, whole.ap, atol=2e-4)  # a product may round otherwise, ranks move by one
        np.testing.assert_array_equal(part.valid, whole.valid)


def test_cosine_is_euclidean_for_unit_lengths(real):
    unit = {name: distances.unit(real[name], name) for name in ("query", "gallery")}
    found = ranking.rank(**real, metric="cosine")
    np.testing.assert_allclose(found.ap, ranking.rank(**real | unit).ap, atol=1e-3)
    indices, values, _ = ranking.top(**real, metric="cosine", k=3)
    angles = 1 - np.sum(unit["query"][:, None] * unit["gallery"][indices], axis=-1)
    np.testing.assert_allclose(values, angles, atol=1e-5)


def test_two_blocks_at_most(real, monkeypatch):
    """The queries' blocks are made one after the other, not all at once."""
    made, used = [], []
    original = distances._distances
    monkeypatch.setattr(distances, "_distances", lambda *args: made.append(1) or original(*args))
    for rows in distances.blocks(distances.prepare(real["query"], real["gallery"]), 8):
        used.append(len(rows))
        assert len(made) - len(used) <= 1
    assert used == [8, 8, 8, 8, 8, 5]


def test_one_program_for_all_blocks(real):
    pairs = distances.prepare(real["query"][:45], real["gallery"])
    list(distances.blocks(pairs, 10))
    before = distances._distances._cache_size()
    list(distances.blocks(pairs, 10))
    assert distances._distances._cache_size() == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(real, value):
    gallery = real["gallery"].copy()
    gallery[[5, 9], [0, 3]] = value
    with pytest.raises(DataError, match=r"2 of 1237 features of the gallery hold NaN or Inf, the first in row 5"):
        ranking.rank(**real | {"gallery": gallery})
    with pytest.raises(DataError, match=r"query set hold NaN or Inf"):
        ranking.rank(**real | {"query": np.full((45, 96), 1e300)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": np.zeros((0, 96)), "query_ids": np.zeros(0, int), "query_cameras": np.zeros(0, int)},
            "query set is empty",
        ),
        ({"gallery": np.zeros((0, 96)), "gallery_ids": np.zeros(0, int)}, "gallery set is empty"),
        ({"query": np.full((45, 96), 1e19)}, "45 of 45 features of the query set are too large to be squared"),
        ({"query": np.zeros(45)}, r"shape \(45,\)"),
        ({"query": np.zeros((45, 95))}, "95 features an image and the gallery 96"),
        ({"query": np.full((45, 96), "a")}, "expected real numbers"),
        (
            {"query_ids": np.zeros(44, int), "query_cameras": np.zeros(44, int)},
            "45 features but 44 identities of queries",
        ),
        ({"gallery_ids": np.zeros(1238, int)}, r"Gallery cameras have shape \(1237,\)"),
        ({"gallery_ids": np.zeros(1237)}, "expected integers"),
        ({"query_cameras": None}, "cross-camera rule needs the cameras"),
        ({"branches": 2}, "No query views"),
        (
            {"query": np.zeros((45, 96)), "metric": "cosine"},
            "45 of 45 features of the query set are zero, the first in row 0",
        ),
        ({"query": np.zeros((45, 3)), "gallery": np.zeros((1237, 3)), "branches": 2}, "even width"),
    ],
)
def test_what_cannot_be_ranked_is_refused(real, change, message):
    with pytest.raises(DataError, match=message):
        ranking.rank(**real | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "cosin"}, 'Did you mean "cosine"'),
        ({"branches": 3}, "branches = 3"),
        ({"block": 0}, "block = 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(real, change, message):
    with pytest.raises(ConfigError, match=message):
        ranking.rank(**real | change)


def test_distances_that_are_given(real):
    rule = ranking.rules([1, 2], [1, 2, 1], cross_camera=False)
    rows = np.array([[3.0, 2, 1], [1, 1, 1]], np.float32)
    found = ranking.rank_blocks([rows[:1], jnp.asarray(rows[1:])], rule)
    np.testing.assert_allclose(found.ap, [(1 + 2 / 3) / 2, 1 / 3])
    with pytest.raises(DataError, match="Distances of 1 queries; expected all 2"):
        ranking.rank_blocks([rows[:1]], rule)
    with pytest.raises(DataError, match=r"expected \(rows, 3\)"):
        ranking.rank_blocks([rows[:, :2]], rule)
    rows[0, 1] = np.nan
    for jitted in (False, True):
        with pytest.raises(DataError, match="A distance is NaN"):
            ranking.rank_blocks([rows], rule, jitted=jitted)
    with pytest.raises(ConfigError, match="k = 0"):
        ranking.top([[1.0]], [[1.0]], k=0, query_ids=[1], gallery_ids=[1])
