"""Defaults of settings for old runs, and what --help says of all of them."""

import re

from drep_jax.cli import help
from drep_jax.run import config
from drep_jax.run.config import completed, defaults, meanings
from drep_jax.run.workdir import flatten
from tests.command import TINY, call


def test_what_an_old_configuration_lacks_has_its_default():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": ()}
    assert completed({"a": 9, "b": {"c": 8}, "g": 7}, base) == {"a": 9, "b": {"c": 8, "d": {"e": 3}}, "f": (), "g": 7}
    found = completed({"seed": 5, "denoise": {"rule": "paper"}})
    assert found["seed"] == 5 and found["denoise"]["rule"] == "paper"
    assert found["denoise"]["steps"] == defaults()["denoise"]["steps"] and found["wandb"] == defaults()["wandb"]


def test_every_setting_has_a_meaning():
    found = meanings()
    assert [name for name in flatten(defaults()) if not found.get(name)] == []
    assert found["control.learning_rate"] == found["backbone.learning_rate"] != ""
    assert "Without labels" in found["learner"] and "exported" in found["learner"]


def test_the_package_without_the_scripts_has_no_defaults(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "SOURCE", str(tmp_path / "configs" / "default.py"))
    config._module.cache_clear()
    try:
        assert defaults() == {} and meanings() == {} and completed({"a": 1}) == {"a": 1}
    finally:
        config._module.cache_clear()


def test_help_names_every_option_and_setting_with_the_values_of_the_configuration():
    ended = call("train.py", TINY, "--help", "--config.seed=17")
    assert ended.status == 0 and not ended.messages
    text = ended.output
    for expected in ("--workdir=", "--eval_only ", "--weights=", "--helpfull", "seed = 17", "tests/tiny_config.py"):
        assert expected in text, expected
    for name in flatten(defaults()):
        assert f"  {name} = " in text, name
    assert re.search(r"control.steps = 5 +of training", text)
    assert text.index("--eval_only") < text.index("data: the images") < text.index("denoise.ema")
    assert max(map(len, text.splitlines())) <= help.WIDTH + 8
    assert "showprefixforinfo" not in text  # absl's own


def test_help_of_fuse_needs_no_work_directory():
    ended = call("fuse.py", "-h")
    assert ended.status == 0 and "--sweep " in ended.output and "Settings" not in ended.output
    assert "--workdir=" in ended.output and "Work directory of the run" in ended.output


def test_bad_settings_beside_help_are_explained():
    call("train.py", "--config=configs/digit.py", "--help").refused("configs/digit.py", "configs/digits.py")
    call("train.py", TINY, "--help", "--config.sed=1").refused("sed", "seed")
