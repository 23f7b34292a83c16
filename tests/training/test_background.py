"""Checkpoints written in the background: training goes on, what is written is of the step that was saved, errors surface."""

import contextlib
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from drep_jax.errors import CheckpointError, NonFiniteError
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.logging import MetricWriter, read_metrics
from drep_jax.training.loop import run_stage
from drep_jax.training.optimizers import make_optimizer
from drep_jax.training.profile import Profile
from drep_jax.training.signals import Interrupted
from drep_jax.training.state import create_state, make_step, partitioned
from tests.command import files_of_at_most, same_bits

STEPS = 8
SIZE = 40_000  # random numbers, which no compression makes small


def start():
    tx = partitioned(make_optimizer("sgd", learning_rate=0.1, steps=STEPS), ("denoise",))
    params = {"denoise": {"w": jax.random.normal(jax.random.key(0), (SIZE,))}}
    return create_state(params, {}, tx, {}, jax.random.key(1)), tx


def loss(params, others, batch, key):
    return jnp.mean((params["denoise"]["w"] - jnp.mean(batch["x"])) ** 2) + jnp.mean(batch["poison"]), ({}, others)


def batches(first):
    for step in range(first + 1, 10**6):
        yield {"x": np.full((8, 2), step, np.float32), "poison": np.zeros((8, 1), np.float32)}


def at(actions):
    """Batches that call `actions[n](batch)` just before step n."""

    def feed(first):
        for step, batch in enumerate(batches(first), first + 1):
            actions.get(step, lambda batch: None)(batch)
            yield batch

    return feed


@pytest.fixture(scope="module")
def step():
    return make_step(loss, start()[1])


def run(directory, step, feed=batches, full_from=None, **more):
    """Trains; from step `full_from` on, when what was saved is on disk, the disk is full."""
    checkpointer, writer = Checkpointer(str(directory / "stage")), MetricWriter(str(directory))
    options = {"steps": STEPS, "log_every": 3, "checkpoint_every": 2, "progress": False, **more}
    limit = contextlib.ExitStack()

    def fill(first):
        for number, batch in enumerate(feed(first), first + 1):
            if number == full_from:
                checkpointer.wait()
                limit.enter_context(files_of_at_most(SIZE))
            yield batch

    try:
        with limit:
            return run_stage(
                "s", start()[0], {}, lambda number: step, fill, checkpointer=checkpointer, writer=writer, **options
            )[0]
    finally:
        checkpointer.close()
        writer.close()


@pytest.fixture
def gate(monkeypatch):
    """No checkpoint is finished before the gate is opened."""
    opened, finalize = threading.Event(), ocp.CheckpointManager._finalize

    def late(self, *args):
        if not opened.wait(30):
            raise TimeoutError("training did not go on")
        finalize(self, *args)

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", late)
    return opened


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, step, gate):
    seen = []

    def pass_by(batch):
        seen.append(gate.is_set())
        gate.set()

    final = run(tmp_path / "slow", step, at({4: pass_by}))
    assert seen == [False]  # steps 3 and 4 were taken while the checkpoint of step 2 was not finished
    assert same_bits(final, run(tmp_path / "quick", step))


def test_what_is_written_is_of_the_step_that_was_saved(tmp_path, step, gate):
    """The step overwrites its own buffers, and the loop its list of losses, long before the write is over."""
    with pytest.raises(RuntimeError, match="power cut"):

        def cut(batch):
            gate.set()
            raise RuntimeError("power cut")

        run(tmp_path / "cut", step, at({4: cut}))
    checkpointer = Checkpointer(str(tmp_path / "cut" / "stage"), read_only=True)
    found, _, meta = checkpointer.restore(start()[0], {})
    checkpointer.close()
    w = np.asarray(start()[0].params["denoise"]["w"])
    assert int(found.step) == 2 and [set(line) for line in meta["unlogged"]] == [{"loss"}]
    assert np.abs(np.asarray(found.params["denoise"]["w"]) - w).max() > 0
    assert same_bits(run(tmp_path / "cut", step), run(tmp_path / "whole", step))


def test_a_full_disk_is_told_with_the_step_and_training_resumes_when_there_is_space(tmp_path, step):
    with pytest.raises(CheckpointError) as error:
        run(tmp_path / "full", step, full_from=4)
    for text in ("the checkpoint of step 4", str(tmp_path / "full" / "stage"), "File too large", "that of step 2"):
        assert text in str(error.value), error.value
    assert "give the same command again" in str(error.value)
    assert "2" in os.listdir(tmp_path / "full" / "stage") and "4" not in os.listdir(tmp_path / "full" / "stage")
    assert same_bits(run(tmp_path / "full", step), run(tmp_path / "never_full", step))
    assert sorted(os.listdir(tmp_path / "full" / "stage")) == ["6", "8"]  # and nothing half written


def test_nan_after_a_write_that_failed_names_what_is_really_there(tmp_path, step, capsys):
    with pytest.raises(NonFiniteError, match=r"loss became nan at step 5.*last good checkpoint \(step 2\)"):
        run(tmp_path, step, at({5: lambda batch: batch["poison"].fill(np.nan)}), full_from=4)
    assert "The checkpoint of step 4 could not be written: File too large" in capsys.readouterr().err


def test_the_last_write_of_a_stage_is_waited_for(tmp_path, step):
    with pytest.raises(CheckpointError, match="the checkpoint of step 8"):
        run(tmp_path, step, full_from=8)
    assert sorted(os.listdir(tmp_path / "stage"))[:2] == ["4", "6"]


def test_readers_make_and_delete_nothing(tmp_path, step):
    run(tmp_path, step)
    half = tmp_path / "stage" / "7.orbax-checkpoint-tmp"
    half.mkdir()
    reader = Checkpointer(str(tmp_path / "stage"), read_only=True)
    assert reader.latest() == 8
    reader.close()
    assert half.exists()
    writer = Checkpointer(str(tmp_path / "stage"))
    writer.save(start()[0].replace(step=jnp.int32(9)), {}, {})
    writer.close()
    assert sorted(os.listdir(tmp_path / "stage")) == ["8", "9"]


def test_fields_that_a_checkpoint_lacks_are_empty_or_it_is_refused(tmp_path):
    state = start()[0]
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(state, {}, {})
    assert same_bits(checkpointer.restore(state, {})[0], state)
    with pytest.raises(CheckpointError, match=r"other training settings.*ema"):
        checkpointer.restore(state.replace(ema=state.params), {})
    checkpointer.close()


@pytest.mark.parametrize("number, last", [(4, 5), (STEPS, STEPS)])
def test_a_signal_that_comes_while_saving_is_not_lost(number, last, tmp_path, step, monkeypatch):
    save = Checkpointer.save

    def late(self, state, frozen, meta, **options):
        save(self, state, frozen, meta, **options)
        if int(state.step) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpointer, "save", late)
    with pytest.raises(
        Interrupted, match=f"Stopped by SIGTERM in stage s after step {last} of {STEPS}; the state is saved"
    ):
        run(tmp_path, step)
    assert str(last) in os.listdir(tmp_path / "stage")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Cannot keep checkpoints in .*checkpoints/s: Not a directory"):
        Checkpointer(str(tmp_path / "checkpoints" / "s"))


# ---- what a person sees meanwhile --------------------------------------------------------------------------------------


def test_the_bar_and_the_log_say_how_fast_it_goes(tmp_path, step, capsys):
    run(tmp_path, step, progress=True, log_extra=lambda params: {"gap": 0.25})
    shown = capsys.readouterr().err
    assert f"{STEPS}/{STEPS}" in shown and "gap=0.2500" in shown and "loss=" in shown and "images/s=" in shown
    first, *others = read_metrics(str(tmp_path / "metrics.jsonl"))
    assert "images_per_second" not in first and all(line["gap"] == 0.25 for line in others)
    assert all(line["images_per_second"] > 0 for line in others)
    # 16 images from the line of step 1 to that of step 3, in less time than between these lines
    seconds = others[0]["seconds"] - first["seconds"]
    assert others[0]["images_per_second"] >= 0.99 * 16 / seconds


def test_a_stage_traces_the_steps_asked_for(tmp_path, step):
    run(tmp_path, step, profile=Profile(3, 2, str(tmp_path)))
    found = [path for path in (tmp_path / "profile" / "s").rglob("*.xplane.pb")]
    assert len(found) == 1 and b"train" in found[0].read_bytes()
