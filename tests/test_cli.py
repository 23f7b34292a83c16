"""train.py and fuse.py as a user meets them: messages, exit statuses, and what they write."""

import os

import pytest

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
    "unknown learner": (["--config.denoise.learner=closedform"], ["closedform", 'Did you mean "closed_form"']),
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
    "tfds": (["--config.data.source=tfds:cifar10"], ["cifar10", "not prepared", "download_and_prepare", "folder:DIR"]),
    "tfds typo": (["--config.data.source=tfds:cifar01"], ["cifar01", "Did you mean"]),
    "no folder": (["--config.data.source=folder:/nowhere"], ["/nowhere"]),
}


@pytest.mark.parametrize("case", TYPOS)
def test_bad_settings_are_refused_before_anything_is_written(case, tmp_path, monkeypatch):
    arguments, expected = TYPOS[case]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    call("train.py", TINY, f"--workdir={tmp_path / 'run'}", *arguments).refused(*expected)
    assert not os.path.exists(tmp_path / "run")


def test_a_configuration_that_is_not_there_is_named_with_a_near_one():
    call("train.py", "--config=configs/digit.py").refused("configs/digit.py", "configs/digits.py")
