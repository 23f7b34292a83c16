"""The loop's promises beyond resuming: what NaN and Ctrl-C do at awkward moments, and what its log counts."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import NonFiniteError
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.logging import MetricWriter, read_metrics
from drep_jax.training.loop import run_stage
from drep_jax.training.optimizers import make_optimizer
from drep_jax.training.signals import Interrupted
from drep_jax.training.state import create_state, make_step, partitioned
from tests.command import same_bits

STEPS = 8


def start():
    tx = partitioned(make_optimizer("sgd", learning_rate=0.1, steps=STEPS), ("denoise",))
    return create_state({"denoise": {"w": jnp.ones(3)}}, {}, tx, {}, jax.random.key(0)), tx


def loss_fn(params, others, batch, key):
    sites = {name: jnp.mean(batch[name] * jnp.square(params["denoise"]["w"])[None]) for name in ("a/fc", "z/fc")}
    return sum(sites.values()), (sites, others)


def batches(start):
    for number in range(start + 1, STEPS + 100):
        generator = np.random.default_rng(number)
        yield {name: generator.uniform(1, 2, (8, 3)).astype(np.float32) for name in ("a/fc", "z/fc")}


def run(directory, feed=batches, loss=loss_fn, **options):
    state, tx = start()
    step = make_step(loss, tx)
    checkpointer, writer = Checkpointer(str(directory / "stage")), MetricWriter(str(directory))
    settings = {"steps": STEPS, "log_every": 3, "checkpoint_every": 2, "progress": False, **options}
    try:
        return run_stage(
            "denoise", state, {}, lambda number: step, feed, checkpointer=checkpointer, writer=writer, **settings
        )
    finally:
        checkpointer.close()
        writer.close()


def lines(directory):
    return [(line["step"], line["loss"]) for line in read_metrics(str(directory / "metrics.jsonl"))]


def at(number, act):
    """Batches that call `act(batch)` just before step `number`."""

    def feed(start):
        for step, batch in enumerate(batches(start), start + 1):
            if step == number:
                act(batch)
            yield batch

    return feed


def poison(batch):
    batch["z/fc"][0, 0] = np.nan


def press(batch):
    os.kill(os.getpid(), signal.SIGINT)


def test_log_holds_the_mean_of_all_losses_since_the_line_before(tmp_path):
    every = tmp_path / "every"
    run(every, log_every=1)
    losses = dict(lines(every))
    assert sorted(losses) == list(range(1, STEPS + 1))
    run(tmp_path / "third")
    expected = [(1, losses[1]), (3, (losses[2] + losses[3]) / 2)]
    expected += [(6, sum(losses[i] for i in (4, 5, 6)) / 3), (8, (losses[7] + losses[8]) / 2)]
    assert [step for step, _ in lines(tmp_path / "third")] == [step for step, _ in expected]
    np.testing.assert_allclose([v for _, v in lines(tmp_path / "third")], [v for _, v in expected], rtol=1e-12)


def test_nan_names_the_site_and_not_only_the_sum(tmp_path):
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, at(5, poison))
    for text in (
        "Stage denoise",
        "z/fc became nan",
        "step 5",
        "(step 4)",
        str(tmp_path / "stage"),
        "another --workdir",
    ):
        assert text in str(error.value), error.value
    assert "a/fc" not in str(error.value)
    assert same_bits(run(tmp_path)[0], run(tmp_path / "healthy")[0])  # from the checkpoint that was kept
    assert lines(tmp_path) == lines(tmp_path / "healthy")


def test_parameters_that_overflow_under_a_finite_loss_are_not_saved(tmp_path):
    def steep(params, others, batch, key):
        w = params["denoise"]["w"]
        return jnp.sum(jnp.sqrt(w - jax.lax.stop_gradient(w) + batch["a/fc"][0])), (
            {},
            others,
        )  # at 0 its slope is infinite

    with pytest.raises(NonFiniteError, match=r"Not saving step 8 .*step 6\).*denoise/w contains NaN or Inf"):
        run(tmp_path, at(8, lambda batch: batch["a/fc"].fill(0)), steep)
    assert sorted(os.listdir(tmp_path / "stage")) == ["4", "6"]


def test_ctrl_c_at_the_last_step_is_not_swallowed(tmp_path):
    with pytest.raises(Interrupted, match=f"after step {STEPS} of {STEPS}; the state is saved"):
        run(tmp_path, at(STEPS, press))
    assert int(run(tmp_path)[0].step) == STEPS


def test_ctrl_c_between_lines_of_the_log_leaves_the_same_log(tmp_path):
    run(tmp_path / "straight")
    with pytest.raises(Interrupted, match="after step 5"):
        run(tmp_path / "stopped", at(5, press))
    run(tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")


def test_a_finished_stage_takes_no_batch(tmp_path):
    final, seconds = run(tmp_path)

    def nothing(start):
        raise AssertionError("a batch was asked for")

    again, spent = run(tmp_path, nothing)
    assert same_bits(final, again) and 0 < spent <= seconds
