"""What is asked of every task: metrics of weighted items, agreement with itself, statistics of each image alone."""

import jax
import numpy as np
import pytest
from jax.tree_util import tree_map

from drep_jax.core.denoisers import init_denoise
from drep_jax.evaluation.arms import items_of, score_arms
from drep_jax.evaluation.selection import Candidate, choose
from drep_jax.evaluation.summary import count_of, value_of
from drep_jax.jobs.scores import reading
from drep_jax.learners.base import selection_of
from drep_jax.run.setup import build
from drep_jax.tasks import TASKS, make_task
from tests.tasks.cases import CASES, setup_of


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return setup_of(request.param, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def items(case):
    """The items of random networks on test images, or, where those have no labels to score, of held-out ones by agreement."""
    config, setup, variables = case
    source, conditions = (
        (setup.held_out, ("clean", "gaussian:60")) if setup.test is None else (setup.test, ("gaussian:60",))
    )
    rows = dict(score_arms(setup, {"arm": variables}, source, conditions, **reading(config)))
    if setup.test is None:
        clean, noisy = (rows[condition].statistics["arm"] for condition in conditions)
        return setup.task.agreement(noisy, clean)
    return items_of(setup, source, rows["gaussian:60"], "gaussian:60")["arm"]


def test_every_task_has_a_case():
    assert {name.split()[0] for name in CASES} == set(TASKS), "add the task to tests/tasks/cases.py"


def test_a_task_says_what_it_is(case):
    config, setup, _ = case
    task = setup.task
    assert task.name in TASKS and make_task(config) == task and hash(task) == hash(make_task(config))
    assert task.metrics and task.criterion and task.items_are and task.resampled
    assert task.exact_test is None or task.exact_test in task.metrics
    for name in task.evaluation_settings:
        section, key = name.split(".")
        assert key in config[section]


def metrics_of(case, items):
    """Returns the metrics that can be computed of the items: all, or only the headline where images are compared."""
    metrics = case[1].task.metrics
    known = {
        name: metric for name, metric in metrics.items() if case[1].test is not None or name == next(iter(metrics))
    }
    assert known
    return known


def test_with_weights_one_a_metric_is_the_published_number(case, items):
    """Of a metric that is a mean, the mean of the statistic that has its name."""
    for name, metric in metrics_of(case, items).items():
        value = value_of(metric, items)
        assert 0.0 <= value <= 1.0
        if name in items.statistics:
            assert value == pytest.approx(np.mean(items.statistics[name], dtype=np.float64), rel=1e-12)
    headline = value_of(next(iter(case[1].task.metrics.values())), items)
    assert 0.0 < headline < 1.0, "nothing is tested by networks that are always right or wrong"


def test_weights_are_how_often_an_item_counts(case, items):
    count = count_of(items)
    weights = np.random.default_rng(0).integers(0, 4, count)
    repeated = tree_map(lambda leaf: np.repeat(np.asarray(leaf), weights, axis=0), items.statistics)
    for name, metric in metrics_of(case, items).items():
        value = float(metric(items.statistics, weights.astype(np.float64)))
        assert value == pytest.approx(float(metric(repeated, np.ones(weights.sum()))), rel=1e-9), name
        assert float(metric(items.statistics, 3.7 * weights)) == pytest.approx(value, rel=1e-9)
        order = np.random.default_rng(1).permutation(count)
        shuffled = tree_map(lambda leaf: np.asarray(leaf)[order], items.statistics)  # noqa: B023
        assert float(metric(shuffled, weights[order].astype(np.float64))) == pytest.approx(value, rel=1e-9)


def test_a_metric_takes_many_weights_at_once(case, items):
    weights = np.random.default_rng(0).uniform(0.1, 2, (2, 3, count_of(items)))
    for metric in metrics_of(case, items).values():
        values = np.asarray(metric(items.statistics, weights))
        assert values.shape == (2, 3)
        one_by_one = [[float(metric(items.statistics, row)) for row in rows] for rows in weights]
        np.testing.assert_allclose(values, one_by_one, rtol=1e-9)
    assert np.ptp(values) > 0


def test_the_backbone_agrees_with_itself_on_clean_images(case):
    config, setup, variables = case
    nothing = Candidate("nothing", init_denoise(setup.sites))
    choice = choose(setup, variables, [nothing], selection_of(config, labels=False, strengths=(0.0, 1.0)))
    assert choice.criterion == "agreement"
    for point in choice.points:
        assert point.accuracy is None and point.agreement["clean"] == pytest.approx(100.0)
        assert point.agreement["gaussian:60"] < 99.0


def test_an_image_has_its_statistics_whatever_the_others_are(case):
    """So batches, hosts and padding make no difference."""
    config, setup, variables = case
    source = setup.test if setup.test is not None else setup.held_out
    options = reading(config)
    one, other = (
        next(score_arms(setup, {"arm": variables}, source, ("clean",), **{**options, "batch_size": size}))[1]
        for size in (options["batch_size"], 8)
    )
    assert np.array_equal(one.index, other.index) and np.array_equal(one.index, np.arange(len(source)))
    assert one.statistics["arm"].keys() == other.statistics["arm"].keys()
    for name, rows in one.statistics["arm"].items():
        assert len(rows) == len(source)
        close = np.isclose(rows, other.statistics["arm"][name], rtol=1e-3, atol=1e-4)
        assert np.mean(close) > 0.99, name  # a tie may fall either way


def test_distillation_is_at_its_minimum_where_outputs_are_those_of_the_clean_image(case):
    _, setup, variables = case
    task, count = setup.task, 6
    images = jax.ShapeDtypeStruct((count, *setup.images.shape[1:]), np.float32)
    form = jax.eval_shape(lambda v, x: task.predict(setup.backbone, v, x, {}), variables, images)
    rng = np.random.default_rng(0)
    clean, step = (tree_map(lambda leaf: 2 * rng.normal(size=leaf.shape).astype(np.float32), form) for _ in range(2))
    least, gradient = jax.value_and_grad(task.distillation_loss)(clean, clean)
    assert abs(float(least)) < 1e-6
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree_util.tree_leaves(gradient)) < 1e-6
    near, far = (
        float(task.distillation_loss(tree_map(lambda a, b, t=t: a + t * b, clean, step), clean)) for t in (0.1, 1.0)
    )
    assert 1e-6 < near < far


def test_dry_runs_and_old_configurations_that_name_no_task_have_the_default(tmp_path):
    config = CASES["classification"](tmp_path)
    del config["task"]
    assert build(config).task == make_task({**config, "task": "classification"})
