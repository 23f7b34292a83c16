"""Every `python …` command in the pages and docstrings: script, configuration, settings, flags and values are there.

Nothing is run; tests/test_benchmarks.py, tests/examples and CI run them.
"""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

from drep_jax.errors import DrepError
from drep_jax.imports import import_module
from drep_jax.run.config import renamed
from drep_jax.run.workdir import flatten

ROOT = Path(__file__).parents[2]
PAGES = [
    path for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "examples/**/*.md") for path in ROOT.glob(pattern)
]
SCRIPTS = [
    path
    for pattern in ("*.py", "configs/*.py", "benchmarks/*.py", "examples/**/*.py", "drep_jax/**/*.py")
    for path in ROOT.glob(pattern)
]
COMMAND = re.compile(r"\bpython3? (?=(?:[\w./-]+\.py|-m drep_jax)\b)((?:\\\n|[^\n`])*)")
ENDS = {";", "&", "&&", "||", "|", ">", "2>&1"}
ABSL = {"help", "helpfull", "config"}
DEFAULT = "configs/digits.py"
PLACEHOLDER = re.compile(r"…|\.\.\.|[A-Z][A-Z_]*\d*(\.\w+)?")


def text_of(path):
    """A page, or the docstrings and messages of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    nodes = ast.walk(ast.parse(text))
    return "\n\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def words_of(command):
    """The words of a command line without comments, brackets around options, and what follows the command."""
    line = re.sub(r"\\\n\s*", " ", command)
    line = re.sub(r"\[(-[^]]*)\]", r"\1", re.sub(r"\s#.*", "", line))
    for cut in (line, line.rpartition('"')[0], line.rpartition("'")[0], line.split('"')[0]):
        try:
            words = shlex.split(cut)
            break
        except ValueError:  # within a sentence or a string
            continue
    end = next((number for number, word in enumerate(words) if word in ENDS), len(words))
    return [word.rstrip(";,)") if word.endswith(";") else word for word in words[:end]]


@functools.cache
def flags_of(script):
    """The flags that a script defines, by its source and that of what it takes flags from."""
    sources = [ROOT / script]
    if script in ("train.py", "fuse.py"):
        sources += [ROOT / "drep_jax" / "cli" / "app.py"]
    if script == "train.py":
        sources += [ROOT / "drep_jax" / "parallel" / "hosts.py"]
    if "benchmarks.arms import" in sources[0].read_text(encoding="utf-8"):
        sources.append(ROOT / "benchmarks" / "arms.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)) | set(re.findall(r'add_argument\(\s*"--(\w+)"', text))
    return defined | ABSL - ({"config"} if script != "train.py" else set()) | ({"tiny"} if "Parser(" in text else set())


@functools.cache
def settings_of(source):
    path, *argument = source.split(":", 1)
    return flatten(import_module(str(ROOT / path)).get_config(*argument).to_dict())


def fits(value, default):
    """Whether the text of a setting is a value of the default's type."""
    if PLACEHOLDER.fullmatch(value):
        return True
    try:
        if isinstance(default, bool):
            return value.lower() in ("true", "false", "1", "0")
        if isinstance(default, int | float):
            return isinstance(float(value), float) if isinstance(default, float) else bool(int(value)) or True
        return not isinstance(default, list | tuple) or isinstance(ast.literal_eval(value), tuple | list)
    except (ValueError, SyntaxError):
        return False


def problems_of(command):
    """What is wrong with a command, as text."""
    words = words_of(command)
    if words[0] == "-m":
        script = words[1].replace(".", "/") + ".py"
        words = words[1:]
    else:
        script = words[0]
    if not (ROOT / script).is_file():
        return [f"there is no {script}"]
    options = [word for word in words[1:] if word.startswith("--")]
    sources = [word.partition("=")[2] for word in options if word.startswith("--config=")]
    source = next((name for name in sources if "…" not in name), DEFAULT)
    if not (ROOT / source.partition(":")[0]).is_file():
        return [f"there is no configuration {source}"]
    problems = []
    for option in options:
        name, equals, value = option.removeprefix("--").partition("=")
        if name.startswith("config."):
            try:
                settings = settings_of(source)
            except (DrepError, ValueError, KeyError, TypeError) as error:
                return [f"{source}: {error}"]
            setting = name.removeprefix("config.").removesuffix("…")
            section, _, key = setting.rpartition(".")
            if setting.startswith("model.") or key in ("", "x", "y"):
                continue
            if setting not in settings and not renamed({section: {key: 0}})[1]:
                problems.append(f"there is no setting {setting}")
            elif equals and not fits(value, settings.get(setting)):
                problems.append(f"{setting}={value} is no value like {settings.get(setting)!r}")
        elif name and name not in flags_of(script) and name.removeprefix("no") not in flags_of(script):
            problems.append(f"{script} has no flag --{name}")
    return problems


def commands():
    for path in [*PAGES, *SCRIPTS]:
        if path.name == "CHANGELOG.md":
            continue
        for match in COMMAND.finditer(text_of(path)):
            yield path.relative_to(ROOT), match[1]


def test_every_command_could_be_run():
    quoted = list(commands())
    assert len(quoted) > 100, "the commands were not found"
    wrong = [f"{path}: python {command}: {'; '.join(bad)}" for path, command in quoted if (bad := problems_of(command))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("tran.py", "there is no tran.py"),
        ("-m drep_jax.data.prepared cifar10", "there is no drep_jax/data/prepared.py"),
        ("-m drep_jax.data.prepare cifar10 --data=DIR", "no flag --data"),
        ("train.py --config=configs/resnet21.py", "no configuration configs/resnet21.py"),
        ("train.py --config=configs/digits.py --config.learner.name=x", "no setting learner.name"),
        ("train.py --config.denoise.train_step=3", "no setting denoise.train_step"),
        ("train.py --config.denoise.train_steps=many", "no value like 500"),
        ("train.py --config.data.flip=on", "no value like False"),
        ("train.py --config.compare=wiener", r"no value like \('algorithm1'"),
        ("train.py --eval-only", "no flag --eval-only"),
        ("fuse.py --workdir=runs/x --strenght=0.5", "no flag --strenght"),
        ("benchmarks/step.py --mode # every mode", "no flag --mode"),
        ("train.py --workdir=runs/x \\\n    --config.seed=a", "no value like 0"),
    ],
)
def test_a_wrong_command_is_noticed(command, problem):
    match = COMMAND.search(f"    PYTHONPATH=. python {command}\n")
    assert match and re.search(problem, "; ".join(problems_of(match[1])))


def test_every_benchmark_is_quoted_in_its_page():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8") + "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")
    )
    names = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {
        "adaptation.py",
        "arms.py",
        "common.py",
        "keeping.py",
        "single_thread.py",
    }
    assert sorted(name for name in names if f"python benchmarks/{name}" not in page) == []
