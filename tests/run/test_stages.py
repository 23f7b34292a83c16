"""One training stage: masks, devices, resuming, NaN, Ctrl-C."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drep_jax.errors import CheckpointError, ConfigError, NonFiniteError
from drep_jax.parallel import devices
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.logging import CLOCK, MetricWriter, read_metrics
from drep_jax.training.loop import run_stage
from drep_jax.training.optimizers import make_optimizer
from drep_jax.training.signals import Interrupted
from drep_jax.training.state import create_state, make_step, partitioned, split

PARAMS = {
    "backbone": {"kernel": jax.random.normal(jax.random.key(0), (6, 4)), "negative_zero": jnp.array([-0.0])},
    "denoise": {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)},
}


def loss_fn(params, others, batch, key):
    x = batch["x"]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["index"])
    noise = jax.vmap(lambda k: jax.random.normal(k, (6,)))(keys)
    guess = (x + noise) @ params["denoise"]["kernel"] + params["denoise"]["bias"].reshape(1, 6)
    loss = jnp.mean((noise - guess) ** 2) + 0.01 * jnp.mean((x @ params["backbone"]["kernel"]) ** 2)
    return loss, ({"site": loss * 2}, others)


def batches(start):
    while True:
        rng = np.random.default_rng(start)
        yield {"x": rng.normal(size=(16, 6)).astype(np.float32), "index": np.arange(16, dtype=np.int32)}
        start += 1


def make(trainable=("denoise",), rate=0.05, steps=20):
    tx = partitioned(make_optimizer("adam", learning_rate=rate, steps=steps), trainable)
    chosen, frozen = split(PARAMS, trainable)
    return create_state(chosen, {}, tx, frozen, jax.random.key(3)), frozen, tx


class Stage:
    """A stage in a directory, as often resumed as wanted."""

    def __init__(self, path, steps=20, loss=loss_fn, **options):
        self.path, self.steps, self.loss, self.options = str(path), steps, loss, options
        os.makedirs(self.path, exist_ok=True)

    def run(self, feed=batches):
        state, frozen, tx = make(steps=self.steps)
        checkpointer, writer = Checkpointer(os.path.join(self.path, "c")), MetricWriter(self.path)
        step = make_step(self.loss, tx)
        settings = {"log_every": 4, "checkpoint_every": 5, **self.options}
        try:
            return run_stage(
                "denoise", state, frozen, lambda number: step, feed,
                steps=self.steps, checkpointer=checkpointer, writer=writer, progress=False, **settings,
            )[0]  # fmt: skip
        finally:
            checkpointer.close()
            writer.close()

    def lines(self):
        found = list(read_metrics(os.path.join(self.path, "metrics.jsonl")))
        return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


def same(a, b):
    jax.tree_util.tree_map(np.testing.assert_array_equal, a, b)


def test_eight_devices_equal_one():
    state, frozen, tx = make()
    step = make_step(loss_fn, tx)
    many, kept = devices.replicate(state), devices.replicate(frozen)
    assert devices.device_count() == 8
    params, opt_state = state.params, state.opt_state
    feed = batches(0)
    for number in range(5):
        batch = next(feed)
        many, metrics = step(many, kept, devices.shard(batch))
        key = jax.random.fold_in(jax.random.key(3), number)
        loss, grads = jax.value_and_grad(lambda p, b=batch, k=key: loss_fn({**frozen, **p}, {}, b, k)[0])(params)
        zeros = jax.tree_util.tree_map(jnp.zeros_like, frozen)
        updates, opt_state = tx.update({**grads, **zeros}, opt_state, {**params, **frozen})
        params = optax.apply_updates(params, {"denoise": updates["denoise"]})
        np.testing.assert_allclose(devices.unreplicate(metrics)["loss"], loss, rtol=1e-5)
    jax.tree_util.tree_map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), devices.unreplicate(many).params, params
    )
    assert float(jnp.abs(params["denoise"]["kernel"]).max()) > 0.05


def test_optimiser_holds_nothing_for_frozen_parameters():
    for trainable, shapes in ((("denoise",), {(6, 6), (6,)}), (("backbone",), {(6, 4), (1,)})):
        state, _, _ = make(trainable)
        found = {leaf.shape for leaf in jax.tree_util.tree_leaves(state.opt_state) if leaf.ndim}
        assert found == shapes
        assert set(state.params) == set(trainable)
    with pytest.raises(ConfigError, match="no parameter subtree"):
        split(PARAMS, ("denoize",))


def test_no_recompilation_after_the_first_step():
    state, frozen, tx = make()
    traced = []

    def counted(*args):
        traced.append(1)
        return loss_fn(*args)

    step, many, kept = make_step(counted, tx), devices.replicate(state), devices.replicate(frozen)
    feed = batches(0)
    for _ in range(4):
        many, _ = step(many, kept, devices.shard(next(feed)))
    assert len(traced) == 1


def test_resumed_run_has_the_same_bits(tmp_path):
    straight = Stage(tmp_path / "a")
    final = straight.run()
    broken = Stage(tmp_path / "b")

    def dies(start):
        for number, batch in enumerate(batches(start)):
            if start + number == 13:
                raise RuntimeError("power cut")
            yield batch

    with pytest.raises(RuntimeError, match="power cut"):
        broken.run(dies)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "denoise", "st')  # a line cut off by the crash
    resumed = broken.run()
    same(final, resumed)
    assert int(resumed.step) == 20
    assert broken.lines() == straight.lines()
    same(final, broken.run())  # a finished stage is only read


def test_interrupt_saves_and_resumes_with_the_same_bits(tmp_path):
    final = Stage(tmp_path / "a").run()
    stage = Stage(tmp_path / "b")

    def pressed(start):
        for number, batch in enumerate(batches(start)):
            if start + number == 7:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"after step 8 of 20; the state is saved"):
        stage.run(pressed)
    assert signal.getsignal(signal.SIGINT) is before
    same(final, stage.run())
    assert stage.lines() == Stage(tmp_path / "a").lines()


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    stage = Stage(tmp_path, log_every=7)

    def poisoned(start):
        for number, batch in enumerate(batches(start)):
            if start + number == 11:
                batch["x"][0, 0] = np.nan
            yield batch

    with pytest.raises(NonFiniteError, match=r"Stage denoise: (site|loss) became nan at step 12.*step 10.*kept"):
        stage.run(poisoned)
    assert sorted(os.listdir(tmp_path / "c")) == ["10", "5"]
    same(Stage(tmp_path.parent / "whole").run(), stage.run())


def test_checkpoint_refuses_parameters_that_are_not_finite(tmp_path):
    state, frozen, _ = make()
    bad = state.replace(params={"denoise": {**state.params["denoise"], "bias": jnp.full(6, jnp.inf)}})
    checkpointer = Checkpointer(str(tmp_path))
    with pytest.raises(NonFiniteError, match="denoise/bias"):
        checkpointer.save(bad, frozen, {})
    assert checkpointer.latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpointer.restore(state, frozen)
    checkpointer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons coroutines on damage
def test_damaged_and_foreign_checkpoints(tmp_path):
    Stage(tmp_path).run()
    state, frozen, _ = make()
    folder = tmp_path / "c"

    other = state.replace(params={"denoise": {"elsewhere": {"kernel": jnp.zeros((2, 2))}}})
    checkpointer = Checkpointer(str(folder))
    with pytest.raises(CheckpointError, match=r"(?s)another model.*denoise/bias.*denoise/elsewhere/kernel"):
        checkpointer.restore(other, frozen)
    wide = state.replace(params={"denoise": {"kernel": jnp.zeros((9, 9)), "bias": jnp.zeros(9)}})
    with pytest.raises(CheckpointError, match=r"(?s)another model.*denoise/kernel \(6, 6\).*denoise/kernel \(9, 9\)"):
        checkpointer.restore(wide, frozen)
    checkpointer.close()

    for victim in sorted((folder / "20" / "state").rglob("*")):
        if victim.is_file() and victim.parent.name == "d":
            victim.write_bytes(victim.read_bytes()[:20])
    checkpointer = Checkpointer(str(folder))
    with pytest.raises(CheckpointError, match=r"(?s)step 20.*damaged.*Delete .*c/20 to go on"):
        checkpointer.restore(state, frozen)
    checkpointer.close()
    shutil.rmtree(folder / "20" / "state")
    checkpointer = Checkpointer(str(folder))
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpointer.restore(state, frozen)
    checkpointer.close()
    shutil.rmtree(folder / "20")
    final = Stage(tmp_path).run()  # as the message says: goes on from step 15
    same(final, Stage(tmp_path.parent / "fresh").run())


def test_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    state, frozen, _ = make()
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(state, frozen, {"seconds": 0.0})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(CheckpointError, match=r"(?s)No space left.*untouched"):
        checkpointer.save(state.replace(step=jnp.int32(1)), frozen, {})
    assert checkpointer.latest() == 0
    checkpointer.close()


def test_optimisers():
    for name in ("adam", "adamw", "sgd"):
        tx = make_optimizer(name, learning_rate=0.1, steps=50, warmup=5, clip=1.0)
        x = jnp.ones(3)
        state = tx.init(x)
        for _ in range(50):
            updates, state = tx.update(2 * x, state, x)
            x = optax.apply_updates(x, updates)
        assert float(jnp.abs(x).max()) < 0.3, name
    with pytest.raises(ConfigError, match='Did you mean "adam"'):
        make_optimizer("adm", learning_rate=0.1, steps=5)
    with pytest.raises(ConfigError, match="warmup"):
        make_optimizer("adam", learning_rate=0.1, steps=5, warmup=5)
    with pytest.raises(ConfigError, match="weight decay"):
        make_optimizer("adam", learning_rate=0.1, steps=5, weight_decay=0.1)


def test_batches_must_divide_among_devices():
    devices.check_batch(16, "x")
    for size in (0, 6, 12):
        with pytest.raises(
            ConfigError, match=f"x={size} must be a positive multiple of 8, the number of the local devices"
        ):
            devices.check_batch(size, "x")
    tree = {"a": np.arange(32).reshape(16, 2)}
    same(devices.unshard(devices.shard(tree)), tree)


def test_tensorboard_and_json_lines_agree(tmp_path):
    writer = MetricWriter(str(tmp_path))
    writer.write("s", 1, {"loss": 2.0})
    writer.write("s", 2, {"loss": 1.0})
    writer.write("other", 9, {"loss": 5.0})
    writer.rewind("s", 1)
    writer.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"stage": "s", "step": 1, "loss": 2.0},
        {"stage": "other", "step": 9, "loss": 5.0},
    ]
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "tensorboard"))
