"""Defaults of settings for old runs, and what --help says of all of them."""

import json
import re

import pytest

from configs.default import RENAMED
from drep_jax.cli import help
from drep_jax.errors import CheckpointError
from drep_jax.files import write_json
from drep_jax.run import config
from drep_jax.run.config import completed, defaults, meanings, renamed
from drep_jax.run.workdir import CONFIG, claimed, differences, flatten, read_config
from tests.command import TINY, call


def test_what_an_old_configuration_lacks_has_its_default():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": ()}
    assert completed({"a": 9, "b": {"c": 8}, "g": 7}, base) == {"a": 9, "b": {"c": 8, "d": {"e": 3}}, "f": (), "g": 7}
    found = completed({"seed": 5, "denoise": {"rule": "paper"}})
    assert found["seed"] == 5 and found["denoise"]["rule"] == "paper"
    assert found["denoise"]["steps"] == defaults()["denoise"]["steps"] and found["wandb"] == defaults()["wandb"]


# ---- renamed settings --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_announced():
    """Every test is a process that has announced no new name yet."""
    config.announce.cache_clear()


def with_old_names(settings):
    """Returns settings as a release wrote them that knew the old names only."""
    old = json.loads(json.dumps(settings))
    for before, now in RENAMED.items():
        section, key = before.split(".")
        old[section][key] = old[section].pop(now.split(".")[1])
    return old


def test_new_names_are_settings_and_old_ones_are_not():
    names = flatten(defaults())
    assert RENAMED and set(RENAMED.values()) <= set(names) and not set(RENAMED) & set(names)
    assert len(set(RENAMED.values())) == len(RENAMED)
    assert all(old.rpartition(".")[0] == new.rpartition(".")[0] for old, new in RENAMED.items())


@pytest.mark.parametrize("old", RENAMED)
def test_the_value_of_an_old_name_is_that_of_the_new_one(old):
    section, key = old.split(".")
    given = {section: {key: "given", "side": "camera"}}
    current, names = renamed(given)
    assert flatten(current) == {RENAMED[old]: "given", "retrieval.side": "camera"} and names == [old]
    assert given == {section: {key: "given", "side": "camera"}}, "the argument is left alone"
    assert flatten(completed(given))[RENAMED[old]] == "given" and old not in flatten(completed(given))
    both = {section: {key: "file", RENAMED[old].split(".")[1]: "command line"}}
    assert flatten(renamed(both)[0]) == {RENAMED[old]: "file"}
    assert flatten(renamed(both, keep=[RENAMED[old]])[0]) == {RENAMED[old]: "command line"}


def test_saved_runs_with_old_names_go_on(tmp_path, capsys):
    old = with_old_names({**defaults(), "task": "retrieval"})
    write_json(str(tmp_path / CONFIG), old)
    (tmp_path / "checkpoints" / "backbone" / "5").mkdir(parents=True)
    now = {**defaults(), "task": "retrieval"}
    assert differences(old, now) == differences(now, old) == {}
    with claimed(str(tmp_path), now):
        pass
    assert read_config(str(tmp_path)) == json.loads(json.dumps(now))
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == sorted(f'Setting "{old}" is now called "{new}".' for old, new in RENAMED.items())
    now["retrieval"]["examples"] = 7
    with pytest.raises(CheckpointError, match=r"retrieval\.examples: 2 there, 7 now"), claimed(str(tmp_path), now):
        pass


def test_command_lines_with_old_names_go_on():
    ended = call("train.py", TINY, "--help", "--config.retrieval.lonely=drop", "--config.retrieval.shown", "5")
    assert ended.status == 0, ended
    assert '  retrieval.singletons = "drop"' in ended.output and "  retrieval.examples = 5" in ended.output
    assert "lonely" not in ended.output
    assert ended.messages.splitlines() == [
        'Setting "retrieval.lonely" is now called "retrieval.singletons".',
        'Setting "retrieval.shown" is now called "retrieval.examples".',
    ]
    call("train.py", TINY, "--help", "--config.retrieval.loneli=drop").refused('Unknown setting "loneli"')
    call("train.py", TINY, "--help", "--config.retrieval.shown=many").refused("retrieval.examples", "many")


def test_configuration_files_with_old_names_go_on(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs.default import get_default\n\n\ndef get_config():\n    config = get_default()\n"
        '    config.retrieval.update({"lonely": "drop", "shown": 4})\n    return config\n'
    )
    ended = call("train.py", f"--config={file}", "--help", "--config.retrieval.examples=9")
    assert ended.status == 0 and '  retrieval.singletons = "drop"' in ended.output, ended
    assert "  retrieval.examples = 9" in ended.output, "the command line overrides the file"
    assert len(ended.messages.splitlines()) == 2


# ---- what the comments say ---------------------------------------------------------------------------------------------


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


# ---- settings that earlier releases did not have ------------------------------------------------------------------------


def test_old_runs_keep_the_form_of_their_denoisers(tmp_path):
    """A run without `sites.concatenated` has one denoiser over a concatenation; new ones have one a source."""
    old = json.loads(json.dumps(defaults()))
    del old["sites"]["concatenated"]
    assert defaults()["sites"]["concatenated"] == "blocks"
    assert completed(old)["sites"]["concatenated"] == "full" and completed({})["sites"]["concatenated"] == "full"
    assert completed(defaults()) == defaults()
    write_json(str(tmp_path / CONFIG), old)
    (tmp_path / "checkpoints" / "backbone" / "5").mkdir(parents=True)
    assert read_config(str(tmp_path))["sites"]["concatenated"] == "full"
    with claimed(str(tmp_path), defaults()):  # it did not choose, so it may go on
        pass
    chosen = defaults()
    chosen["sites"]["max_width"] = 4608
    with (
        pytest.raises(CheckpointError, match=r"sites\.max_width: 2304 there, 4608 now"),
        claimed(str(tmp_path), chosen),
    ):
        pass
