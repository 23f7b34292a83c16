"""train.py and fuse.py as a user meets them: messages, exit statuses, and what they write."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from drep_jax.run import export
from drep_jax.run.stages import prepare
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.trees import get_in, set_in
from tests.command import TINY, call

TYPOS = {
    "unknown setting": (["--config.denoise.leaning_rate=1"], ["leaning_rate", 'Did you mean "learning_rate"']),
    "unknown section": (["--config.denoize.rule=ddpm"], ["denoize", "denoise"]),
    "not a number": (["--config.seed=many"], ["seed", "many"]),
    "unknown option": (["--wokdir=x"], ["wokdir", "workdir"]),
    "not an option": (["extra"], ["extra"]),
    "unknown model": (["--config.model.name=vitt"], ["vitt", 'Did you mean "vit"']),
    "unknown rule": (["--config.denoise.rule=dppm"], ["dppm", 'Did you mean "ddpm"']),
    "affine": (["--config.denoise.rule=affine"], ["affine", "ddpm"]),
    "target above t": (["--config.denoise.rule=ddim:5", "--config.denoise.steps=1"], ["t=4", "r=5"]),
    "two jumps": (["--config.denoise.rule=ddim:0"], ["ddim:0", "3 times"]),
    "unknown source": (["--config.data.source=digit"], ["digit", 'Did you mean "digits"']),
    "unknown learner": (["--config.learner=closedform"], ["closedform", 'Did you mean "closed_form"']),
    "unknown loss": (["--config.denoise.loss=l3"], ["l3", "l2"]),
    "unknown optimizer": (["--config.denoise.optimizer=adm"], ["denoise", "adm", 'Did you mean "adam"']),
    "unknown corruption": (["--config.evaluate.conditions=('clean','gausian:20')"], ["gausian", "gaussian"]),
    "no such layer": (["--config.sites.pattern=.*fc3"], ["fc3", "selects no layer", "encoderblock_0/mlp/fc1"]),
    "t outside the schedule": (["--config.schedule.timesteps=3"], ["4 sites of 3 step(s)", "12 time steps", "3"]),
    "odd batch": (["--config.denoise.batch_size=20"], ["denoise.batch_size=20", "8"]),
    "odd evaluation batch": (["--config.evaluate.batch_size=100"], ["evaluate.batch_size=100", "8"]),
    "fewer images than a batch": (["--config.control.batch_size=1024"], ["1000", "control", "1024"]),
    "no backbone": (["--config.backbone.steps=0"], ["init_from", "backbone.steps"]),
    "warm-up without end": (["--config.denoise.warmup=30"], ["denoise", "warmup=30", "30 steps"]),
    "too few resamples": (["--config.evaluate.resamples=9"], ["resamples=9", "100"]),
    "never log": (["--config.log_every=0"], ["log_every=0", "at least 1"]),
    "tfds": (["--config.data.source=tfds:cifar10"], ["cifar10", "not prepared", "drep_jax.data.prepare", "folder:DIR"]),
    "tfds typo": (["--config.data.source=tfds:cifar01"], ["cifar01", "Did you mean"]),
    "unknown learner beside": (["--config.compare=('mesured',)"], ["mesured", 'Did you mean "measured"']),
    "unknown noise": (["--config.noise=gausian:0..40"], ["gausian", "gaussian"]),
    "noise that does nothing": (["--config.noise=gaussian:0"], ["gaussian:0", "nothing to measure"]),
    "no draws": (["--config.measured.draws=0"], ["measured.draws=0", "at least 1"]),
    "all clean": (["--config.measured.clean_share=(0.5,1.0)"], ["measured.clean_share", "[0, 1)"]),
    "negative images": (["--config.measured.images=-3"], ["measured.images=-3", "0 for all"]),
    "negative held-out images": (["--config.select.images=-3"], ["select.images=-3", "0 for all"]),
    "negative images of moments": (["--config.denoise.moment_images=-3"], ["denoise.moment_images=-3", "0 for all"]),
    "negative ridge": (["--config.measured.ridge=-1.0"], ["measured.ridge=-1", "above 0, or 0"]),
    "no noise power": (["--config.wiener.ratios=(0.0,)"], ["wiener.ratios", "above 0"]),
    "negative strength": (["--config.select.strengths=(-1.0,1.0)"], ["select.strengths", "at least 0"]),
    "unknown selection noise": (["--config.select.conditions=('clean','blurr:2')"], ["blurr", "blur"]),
    "no time": (["--config.denoise.time_scale=0"], ["scale of the time steps", "0"]),
    "time outside the schedule": (["--config.denoise.time_scale=100."], ["1200 time steps at time scale 100", "1000"]),
    "unknown rule of the sweep": (["--config.sweep.rules=('dppm',)"], ["dppm", 'Did you mean "ddpm"']),
    "no steps of the sweep": (["--config.sweep.steps=()"], ["sweep.steps is empty"]),
    "no such pairs": (["--config.learner=measured", "--config.noise=pairs:/nowhere"], ["/nowhere", "DIR/clean/NAME"]),
    "no folder": (["--config.data.source=folder:/nowhere"], ["/nowhere"]),
}


@pytest.mark.parametrize("case", TYPOS)
def test_bad_settings_are_refused_before_anything_is_written(case, tmp_path, monkeypatch):
    arguments, expected = TYPOS[case]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    call("train.py", TINY, f"--workdir={tmp_path / 'run'}", *arguments).refused(*expected)
    assert not os.path.exists(tmp_path / "run")


def test_what_a_configuration_refuses_is_told_without_a_traceback():
    ended = call("train.py", "--config=configs/cifar10_training.py:alternatin")
    ended.refused('Unknown way of training "alternatin"', 'Did you mean "alternating"')


def test_a_configuration_that_is_not_there_is_named_with_a_near_one():
    call("train.py", "--config=configs/digit.py").refused("configs/digit.py", "configs/digits.py")


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path):
    place = f"--workdir={tmp_path / 'run'}"
    ended = call("train.py", TINY, place, "--config.dry_run=true", "--config.data.source=tfds:imagenet2012")
    assert ended.status == 0, ended
    for text in (
        "Model vit",
        "4 denoisers",
        "encoderblock_1/mlp/fc2",
        "algorithm1, step 2: loss",
        "images/s",
        "peak memory",
    ):
        assert text in ended.output
    assert not os.path.exists(tmp_path / "run")
    call("train.py", TINY, "--config.dry_run=true", "--config.dry_run_batch=0").refused("dry_run_batch=0")


def test_dry_run_counts_pretraining():
    flags = ["--config.dry_run=true", "--config.dry_run_batch=2", "--config.data.source=tfds:imagenet2012"]
    flags += ["--config.pretrain.steps=5", "--config.pretrain.components=8"]
    flags += ["--config.model.depth=1", "--config.control.steps=0", "--config.compare=()"]
    flags += ["--config.model.class_token=False", "--config.model.final_norm=False", "--config.model.pool=mean"]
    ended = call("train.py", TINY, *flags)
    assert ended.status == 0, ended
    for text in ("pretrain, step 2: loss", "pretrain, batch", "algorithm1, step 2: loss", "algorithm1, batch"):
        assert text in ended.output
    call("train.py", TINY, *flags, "--config.pretrain.blocks=3").refused("pretrain.blocks=3 is odd")


def test_nan_in_given_weights_is_refused(finished, tmp_path):
    tensors = dict(safetensors.numpy.load_file(finished.backbone))
    tensors["params/head/bias"] = np.full_like(tensors["params/head/bias"], np.nan)
    safetensors.numpy.save_file(tensors, tmp_path / "nan.safetensors")
    place = f"--workdir={tmp_path / 'run'}"
    given = f"--config.backbone.init_from={tmp_path / 'nan.safetensors'}"
    call("train.py", TINY, place, given).refused("nan.safetensors", "params/head/bias contains NaN")
    call("train.py", TINY, place, "--config.backbone.init_from=/nowhere.safetensors").refused("/nowhere.safetensors")
    useless = "--config.backbone.init_format=timm"
    call("train.py", TINY, place, given, useless).refused("backbone.init_format", "are for foreign files")


def test_a_loss_that_diverges_names_stage_step_and_site(finished, tmp_path):
    given = f"--config.backbone.init_from={finished.backbone}"
    fast = ["--config.denoise.learning_rate=1e38", "--config.control.steps=0"]
    ended = call("train.py", TINY, f"--workdir={tmp_path / 'run'}", given, *fast)
    ended.refused("Stage algorithm1", "encoderblock_0/mlp/fc1", "step 2", "lower learning rate")
    # Another --workdir is asked for, since this one holds what the first rate has begun.
    slow = ["--config.denoise.learning_rate=0.1", "--config.control.steps=0"]
    again = call("train.py", TINY, f"--workdir={tmp_path / 'run'}", given, *slow)
    again.refused("another configuration", "denoise.learning_rate: 1e+38 there, 0.1 now", "Choose another --workdir")


def test_a_run_is_not_mixed_with_another(finished):
    place = f"--workdir={finished.directory}"
    call("train.py", TINY, place, "--config.seed=1").refused(
        "another configuration", "seed: 0 there, 1 now", "--workdir"
    )


# ---- fuse.py -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fuse(finished, tmp_path):
    """Runs fuse.py on the finished run; returns how it ended and the file it wrote."""

    def run(*arguments, workdir=finished.directory):
        out = tmp_path / f"out{len(os.listdir(tmp_path))}"
        ended = call("fuse.py", f"--workdir={workdir}", f"--out={out}", *arguments)
        path = out / "fused.safetensors"
        return ended, path.read_bytes() if path.exists() else None

    return run


def passed(result):
    ended, written = result
    assert ended.status == 0 and "Certificate: PASSED" in ended.output, ended
    return written


def own(finished):
    with open(os.path.join(finished.directory, "fused", "fused.safetensors"), "rb") as file:
        return file.read()


def test_fusing_again_gives_the_weights_of_the_run(finished, fuse):
    assert passed(fuse()) == own(finished)


@pytest.mark.slow
def test_rules_and_steps_give_different_weights_and_all_pass(finished, fuse):
    ways = [["--rule=paper"], ["--rule=ddim:0", "--steps=1"], ["--rule=ddim", "--steps=2"]]
    assert len({passed(fuse(*way)) for way in ways} | {own(finished)}) == len(ways) + 1


def test_more_steps_than_were_learned_are_refused(fuse):
    fuse("--steps=4")[0].refused("4 steps", "learned with 3")
    fuse("--steps=0")[0].refused("at least 1", "0")


@pytest.mark.slow
def test_sampled_noise_is_decided_by_its_seed(finished, fuse):
    one, again, other = (passed(fuse("--noise=sample", f"--seed={seed}")) for seed in (1, 1, 2))
    assert one == again != other
    assert own(finished) not in (one, other)


@pytest.mark.slow
def test_types_that_round_the_change_away_are_refused(finished, fuse):
    ended, written = fuse("--dtype=bfloat16", "--steps=1")
    ended.refused("bfloat16", "rounds away", "--allow_rounding")
    assert written is None
    ended, written = fuse("--dtype=bfloat16", "--steps=1", "--allow_rounding")
    assert ended.status == 0 and "of the change survives" in ended.output
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name.startswith("params/")} == {"BF16"}
    assert passed(fuse("--dtype=float32")) == own(finished)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--rule=dppm"], ["dppm", 'Did you mean "ddpm"']),
        (["--rule=affine"], ["affine", "ddpm, paper or ddim"]),
        (["--rule=ddim:0"], ["ddim:0", "3 times"]),
        (["--noise=sampled"], ["sampled", '"sample"']),
        (["--dtype=bflot16"], ["bflot16", 'Did you mean "bfloat16"']),
        (["--dtype=int8"], ["int8"]),
        (["--sed=1"], ["sed", "seed"]),
        (["--steps=two"], ["steps", "two"]),
    ],
)
def test_bad_arguments_of_fuse_are_refused(arguments, expected, fuse):
    ended, written = fuse(*arguments)
    ended.refused(*expected)
    assert written is None


def test_places_that_hold_no_finished_run_are_refused(finished, fuse, tmp_path):
    call("fuse.py").refused("--workdir")
    fuse(workdir="/nowhere")[0].refused("/nowhere is no finished run")
    fuse(workdir=os.path.join(finished.directory, "fused"))[0].refused("already be fused", "Give the work directory")
    fuse(workdir=os.path.join(finished.directory, "fused", "orbax"))[0].refused("already be fused")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(os.path.join(finished.directory, "config.json"), begun)
    fuse(workdir=begun)[0].refused("no learned denoisers yet", f"--workdir={begun}")
    shutil.copytree(os.path.join(finished.directory, "checkpoints"), begun / "checkpoints")
    shutil.rmtree(begun / "checkpoints" / "algorithm1" / "30")
    fuse(workdir=begun)[0].refused("step 20 of 30", "finish the run first")
    (begun / "file").write_text("in the way")
    call("fuse.py", f"--workdir={finished.directory}", f"--out={begun / 'file' / 'x'}").refused(
        "Cannot write weights to"
    )


def test_nan_in_a_saved_denoiser_is_refused(finished, fuse, tmp_path, monkeypatch):
    copied = shutil.copytree(finished.directory, tmp_path / "run")
    monkeypatch.setattr("drep_jax.training.checkpoint.check_finite", lambda tree, what: None)
    params = {"backbone": finished.variables["params"], "denoise": finished.denoise}
    state, frozen, _ = prepare(finished.run, "algorithm1", params, {})
    place = ("encoderblock_1", "mlp", "fc2", "kernel")
    bad = jnp.asarray(get_in(finished.denoise, place)).at[0, 0].set(jnp.nan)
    state = state.replace(params={"denoise": set_in(finished.denoise, place, bad)})
    checkpointer = Checkpointer(str(copied / "checkpoints" / "algorithm1"))
    checkpointer.save(state.replace(step=jnp.int32(31)), frozen, {})
    checkpointer.close()
    ended, written = fuse(workdir=copied)
    ended.refused("Refusing to fuse", "denoise/encoderblock_1/mlp/fc2/kernel contains NaN")
    assert written is None


def test_a_fusion_that_does_nothing_fails_its_certificate(fuse, monkeypatch):
    def nothing(variables, *args, **kwargs):
        return jax.tree_util.tree_map(np.asarray, dict(variables))

    monkeypatch.setattr(export, "fuse_variables_exact", nothing)
    ended, _ = fuse()
    assert ended.status == 3 and "Certificate: FAILED" in ended.output


# ---- train.py --eval_only ----------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(finished, tmp_path):
    """Runs train.py --eval_only on a copy of the finished run; returns how it ended and what it wrote."""
    copied = shutil.copytree(finished.directory, tmp_path / "run")

    def run(*arguments, workdir=copied):
        ended = call("train.py", "--eval_only", f"--workdir={workdir}", *arguments)
        made = sorted((workdir / "evaluations").glob("*/evaluation.json"))
        return ended, json.loads(made[-1].read_text()) if made else None

    run.directory = copied
    return run


def test_arms_of_a_run_are_evaluated_beside_its_report(finished, evaluated):
    kept = {path: path.read_bytes() for path in evaluated.directory.glob("*.*")}
    shutil.rmtree(evaluated.directory / "checkpoints" / "algorithm1" / "30")  # as if it had stopped at step 20
    ended, found = evaluated("--config.evaluate.conditions=('clean',)")
    assert ended.status == 0, ended
    theirs, ours = finished.report["metrics"]["clean"], found["metrics"]["clean"]
    assert ours["baseline"] == pytest.approx(theirs["baseline"])
    assert ours["control"]["continued"] == pytest.approx(theirs["control"]["continued"])
    assert list(found["metrics"]) == ["clean"] and set(ours["denoised"]) == {"algorithm1"}
    assert [(arm["step"], arm["steps"]) for arm in found["arms"].values()] == [(40, 40), (5, 5), (20, 30)]
    assert "step 20 of 30, unfinished" in ended.output and "acc@1 against baseline" in ended.output
    assert {path: path.read_bytes() for path in evaluated.directory.glob("*.*")} == kept
    page = next((evaluated.directory / "evaluations").glob("*/evaluation.md")).read_text()
    assert "| algorithm1 " in page and "Evaluation without training" in page


def test_files_of_weights_are_evaluated_without_a_run(finished, evaluated, tmp_path):
    place = tmp_path / "elsewhere"
    fused = os.path.join(finished.directory, "fused")
    files = f"--weights={finished.backbone},{fused}/fused.safetensors,again={fused}/orbax"
    ended, found = evaluated(TINY, files, workdir=place)
    assert ended.status == 0, ended
    for condition, theirs in finished.report["metrics"].items():
        ours = found["metrics"][condition]
        assert ours["baseline"] == pytest.approx(theirs["baseline"])
        assert ours["denoised"]["fused"] == ours["denoised"]["again"] == pytest.approx(theirs["denoised"]["algorithm1"])
    assert os.listdir(place) == ["evaluations"]
    given = f"--config.backbone.init_from={finished.backbone}"
    twice, found = evaluated(TINY, given, "--config.evaluate.conditions=('clean',)", workdir=place)
    assert twice.status == 0 and list(found["arms"]) == ["baseline"] and len(os.listdir(place / "evaluations")) == 2


def test_what_cannot_be_evaluated_is_refused(finished, evaluated, tmp_path):
    evaluated(TINY, workdir=tmp_path / "none")[0].refused("nothing to evaluate", "--weights=FILE", "init_from")
    evaluated("--config.seed=3")[0].refused("another configuration", "seed: 0 there, 3 now", "evaluate.…")
    evaluated(TINY, "--config.denoise.steps=2")[0].refused("denoise.steps: 3 there, 2 now")
    evaluated("--config.evaluate.conditions=('blurr:2',)")[0].refused("blurr", "blur")
    evaluated(f"--weights=continued={finished.backbone}")[0].refused("an arm continued already", "--weights=NAME=")
    assert not (evaluated.directory / "evaluations").exists()
    call("train.py", TINY, "--weights=x").refused("--weights goes with --eval_only")
    (tmp_path / "run" / "evaluations").write_text("in the way")
    evaluated("--config.evaluate.conditions=('clean',)")[0].refused("Cannot write the evaluation")
