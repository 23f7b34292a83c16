"""Labels: Eq. 12 through fused weights, training in turn, the control arm, DenoiseRep⁻; each against its definition."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drep_jax import report
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse
from drep_jax.data.loader import normalize, training_batches
from drep_jax.errors import ConfigError
from drep_jax.jobs import checks, train
from drep_jax.jobs import fuse as fuse_job
from drep_jax.learners.losses import augmented_objective, denoising_objective
from drep_jax.run.setup import build
from drep_jax.run.stages import phase_of, prepare
from drep_jax.training.logging import read_metrics
from drep_jax.weights.native import load
from tests.command import same_bits, whole_reports
from tests.tiny_config import get_config

STEPS = 16


def configured(finished, **changes):
    """The tiny job from the finished run's backbone, with labelled learners of equal budgets."""
    config = get_config()
    config.backbone.init_from = finished.backbone
    config.learner = "alternating"
    config.compare = ("label_augmented", "continued", "final_only")
    config.control.update({"steps": STEPS, "batch_size": 32, "learning_rate": 1e-3})
    config.denoise.update({"train_steps": STEPS, "batch_size": 32, "learning_rate": 0.05, "ema": 0.5})
    config.denoise.divide_optimizer = True
    config.alternate.update({"steps": STEPS, "period": 3})
    config.update_from_flattened_dict(changes)
    return config.to_dict()


@pytest.fixture(scope="module")
def labelled(finished, tmp_path_factory):
    config = configured(finished)
    directory = str(tmp_path_factory.mktemp("labelled") / "run")
    with whole_reports(drawn=False):
        return config, directory, train.run(config, directory)


@pytest.fixture(scope="module")
def batch(finished):
    setup = finished.setup
    return {k: jnp.asarray(v) for k, v in next(training_batches(setup.train, 16, seed=5)).items()}


def noisy_denoisers(denoise, scale=0.3):
    leaves, tree = jax.tree_util.tree_flatten(denoise)
    rng = np.random.default_rng(2)
    return jax.tree_util.tree_unflatten(tree, [scale * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def test_the_loss_is_equation_12(finished, batch):
    setup, variables = finished.setup, finished.variables
    config = configured(finished)
    options = {**config["denoise"], "label_smoothing": 0.1}
    params = {"backbone": variables["params"], "denoise": noisy_denoisers(finished.denoise)}
    key = jax.random.key(1)
    how = {"rule": options["rule"], "steps": options["steps"]}

    @jax.jit
    def expected(params):
        images = normalize(batch["image"], setup.mean, setup.std)
        logits = explicit_apply(
            setup.backbone, variables, params["denoise"], setup.sites, setup.schedule, images, **how
        )
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], 10), 0.1)
        label = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))
        return label, denoising_objective(setup, options, params, {}, batch, key)[0]

    label, denoising = map(float, expected(params))
    for weight in (0.0, 0.25, 1.0):
        loss = functools.partial(augmented_objective, setup, options, weight=weight, train=False)
        found, _ = jax.jit(lambda p, loss=loss: loss(p, {}, batch, key))(params)
        np.testing.assert_allclose(found, (1 - weight) * label + weight * denoising, rtol=2e-5)


def test_labels_reach_the_denoisers_through_fusion(finished, batch):
    """The directional derivative of the label loss by the denoisers is that of the fused network's loss."""
    setup, config = finished.setup, configured(finished)
    options = {**config["denoise"], "label_smoothing": 0.0}
    backbone, start = finished.variables["params"], noisy_denoisers(finished.denoise)

    @jax.jit
    def loss(denoise):
        params = {"backbone": backbone, "denoise": denoise}
        return augmented_objective(setup, options, params, {}, batch, jax.random.key(0), weight=0.0, train=False)[0]

    @jax.jit
    def plain(denoise):
        fused = fuse({"backbone": backbone, "denoise": denoise}, setup.sites, setup.schedule, steps=3)
        logits = setup.backbone.apply({"params": fused}, normalize(batch["image"], setup.mean, setup.std))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))

    gradient = jax.grad(loss)(start)
    norm = float(optax.tree_utils.tree_norm(gradient))
    assert norm > 0
    step = 2.0
    ahead, behind = (
        float(plain(jax.tree_util.tree_map(lambda a, g, s=s: a + s * step * g / norm, start, gradient)))
        for s in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), norm, rtol=0.05)


def test_turns_are_those_of_the_configuration(finished):
    config = configured(finished)
    assert [phase_of(config, n) for n in range(1, 10)] == ["denoise"] * 3 + ["backbone"] * 3 + ["denoise"] * 3
    config["alternate"].update(order=("backbone", "denoise"), period=1)
    assert [phase_of(config, n) for n in range(1, 5)] == ["backbone", "denoise"] * 2


def test_in_turn_one_moves_and_the_other_stands_with_its_optimiser(finished, batch):
    from drep_jax.parallel import devices
    from drep_jax.training.state import make_step

    config = configured(finished)
    setup, params = finished.setup, {"backbone": finished.variables["params"], "denoise": finished.denoise}
    state, frozen, optimizers = prepare(dataclasses.replace(finished.run, config=config), "alternating", params, {})
    assert frozen == {} and set(optimizers) == {("denoise",), ("backbone",)}
    options = {**config["denoise"], "label_smoothing": 0.0}

    def loss_fn(params, others, part, key):
        return augmented_objective(setup, options, params, others, part, key, weight=0.0, train=False)

    wide = devices.shard({k: np.asarray(v) for k, v in batch.items()})
    for active, tx in optimizers.items():
        step = make_step(loss_fn, tx, active=active, ema=0.5)
        after = devices.unreplicate(step(devices.replicate(state), devices.replicate(frozen), wide)[0])
        for name in ("denoise", "backbone"):
            assert same_bits(after.params[name], jax.tree_util.tree_map(np.asarray, state.params[name])) == (
                (name,) != active
            )
            inner = [s.opt_state.inner_states[name] for s in (state, after)]
            assert same_bits(*jax.tree_util.tree_map(np.asarray, inner)) == ((name,) != active)


def test_the_moving_average_is_what_was_learned(labelled):
    _, directory, _ = labelled
    _, variables, denoise = fuse_job.load_run(directory)
    from tests.jobs.test_train import restored

    last = restored(directory, "alternating")
    assert not same_bits(denoise, last["denoise"])
    assert same_bits(variables["params"], jax.tree_util.tree_map(np.asarray, last["backbone"]))


def test_every_arm_is_compared(labelled, finished):
    _, directory, found = labelled
    report.validate(found)
    assert found["exported"] == "alternating" and found["certificate"]["passed"]
    for entry in found["metrics"].values():
        assert set(entry["control"]) == {"placebo", "continued"}
        assert set(entry["denoised"]) == {"label_augmented", "final_only", "alternating"}
        assert "alternating - continued" in entry["difference"]
    # the control arm and the alternating one saw the same images, and both trained
    assert found["learning"]["alternating"]["steps"] == found["learning"]["continued"]["steps"] == STEPS
    lines = [line for line in read_metrics(os.path.join(directory, "metrics.jsonl")) if line["stage"] == "alternating"]
    assert all("accuracy" in line for line in lines) and any("denoising_loss" in line for line in lines)


def test_the_naive_alternative_costs_what_fusion_does_not(labelled):
    """DenoiseRep⁻ (Table 4): one explicit denoiser before the head, 2·d² operations an image more."""
    _, _, found = labelled
    flops, batch = found["cost"]["flops"], found["cost"]["batch"]
    assert flops["fused"] == flops["baseline"]
    assert flops["final_only"] - flops["baseline"] >= 3 * 2 * 16 * 16 * batch  # three steps
    section = found["learning"]["final_only"]
    ((nothing, best),) = section["per_site"].values()
    assert best < nothing and list(section["per_site"]) == ["head"]


@pytest.mark.slow
def test_a_trained_backbone_is_fused_again_and_resumed(labelled, tmp_path):
    from drep_jax.run.export import Output

    config, directory, found = labelled
    again = train.run(config, directory)
    assert again["metrics"] == found["metrics"]
    certificate, _ = fuse_job.fuse_run(directory, Output(str(tmp_path / "again")))
    assert certificate.passed
    with (
        open(os.path.join(directory, "fused", "fused.safetensors"), "rb") as one,
        open(tmp_path / "again" / "fused.safetensors", "rb") as two,
    ):
        assert one.read() == two.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": "final_only"}, "leaves nothing to fuse"),
        ({"denoise.label_lambda": 1.5}, r"label_lambda=1.5 is λ"),
        ({"alternate.order": ("denoise", "denoise")}, "once each"),
        ({"alternate.period": 0}, "period=0"),
        ({"alternate.steps": 0}, r"alternate.steps=N"),
        ({"alternate.steps": 8}, "with another budget it is no control"),
        ({"control.batch_size": 64}, "with another budget it is no control"),
        ({"denoise.ema": 1.0}, "ema=1.0"),
        ({"denoise.accumulate": 3}, "accumulate=3"),
        ({"control.compute": "float16"}, "control.compute='float16'"),
        ({"control.steps": 0, "compare": ("continued",)}, r"control.steps=N"),
    ],
)
def test_what_makes_no_sense_is_refused(finished, changes, message):
    config = configured(finished, **changes)
    with pytest.raises(ConfigError, match=message):
        checks.check(config, build(config))


def test_labelled_learners_need_labels(finished, tmp_path):
    config = configured(finished, **{"model.num_classes": -1, "control.steps": 0})
    setup = build({**config, "model": {**config["model"], "num_classes": -1}})
    with pytest.raises(ConfigError, match="this backbone has none"):
        checks.check(config, setup)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"compute": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        {"accumulate": 2},
    ],
    ids=str,
)
def test_ways_to_compute_give_the_gradient_of_the_plain_step(finished, batch, options):
    """Recomputing and accumulating change nothing but rounding; bfloat16 keeps the direction and float32 parameters."""
    from drep_jax.parallel import devices
    from drep_jax.training.state import create_state, make_step, partitioned

    setup = finished.setup
    plain = {**configured(finished)["denoise"], "label_smoothing": 0.0}
    params = {"backbone": finished.variables["params"], "denoise": noisy_denoisers(finished.denoise)}
    tx = partitioned(optax.sgd(1.0), ("backbone", "denoise"))
    state = create_state(params, {}, tx, {}, jax.random.key(0))
    wide = devices.shard({k: np.asarray(v) for k, v in batch.items()})

    @functools.cache
    def moved(name):
        chosen = {**plain, **(options if name == "changed" else {})}

        def loss_fn(params, others, part, key):
            return augmented_objective(setup, chosen, params, others, part, key, weight=0.5, train=True)

        step = make_step(loss_fn, tx, accumulate=chosen["accumulate"])
        after = devices.unreplicate(step(devices.replicate(state), {}, wide)[0]).params
        return jax.flatten_util.ravel_pytree(jax.tree_util.tree_map(jnp.subtract, after, params))[0]

    one, other = moved("plain"), moved("changed")
    assert other.dtype == jnp.float32
    tolerance = 0.1 if "compute" in options else 1e-4
    assert 0 <= float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one)) < tolerance
    if "compute" in options:
        assert float(jnp.linalg.norm(one - other)) > 0


def test_the_control_arm_can_be_what_is_exported(finished, tmp_path):
    """Its weights are the trained backbone's to the bit, and nothing is told of it as a control of itself."""
    config = configured(finished, learner="continued", compare=())
    directory = str(tmp_path / "run")
    found = train.run(config, directory)
    for entry in found["metrics"].values():
        assert set(entry["denoised"]) == {"continued"} and set(entry["control"]) == {"placebo"}
    assert found["certificate"]["passed"] and found["learning"]["continued"]["seconds"] > 0
    from tests.jobs.test_train import restored

    trained = jax.tree_util.tree_map(np.asarray, restored(directory, "control")["backbone"])
    kept = load(os.path.join(directory, "fused", "fused.safetensors"), finished.setup.abstract, allow_fused=True)
    assert same_bits(jax.tree_util.tree_map(np.asarray, kept["params"]), trained)
    baseline = finished.variables["params"]
    assert not same_bits(trained, jax.tree_util.tree_map(np.asarray, baseline))
