"""The architecture as it is drawn in docs/architecture.md: who imports whom, where tasks are named, what is defined once."""

import ast
import functools
import io
import pathlib
import re
import tokenize

import pytest

from drep_jax.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "drep_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = (
    ("cli",),
    ("jobs",),
    ("learners", "report"),
    ("evaluation",),
    ("run",),
    ("tasks",),
    ("data", "weights", "exporting", "training", "pretraining", "__init__"),
    ("core", "models", "metrics"),
    ("parallel", "files", "trees", "imports", "progress", "rows"),
    ("errors", "typing"),
)
"""From top to bottom: whoever stands here imports from lower levels only; `__init__` holds the public names."""

CORE_IMPORTS = {"core", "typing", "errors", "trees", "files", "parallel", "rows"}

TASK_WORDS = {*TASKS, "classification", "retrieval", "segmentation", "detection"}

FREE_OF_TASKS = [
    *(path for path in FILES if path.relative_to(PACKAGE).parts[0] not in ("tasks", "metrics")),
    ROOT / "train.py",
    ROOT / "fuse.py",
]

LINES = 400


def module_of(path):
    """Returns the dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def unit_of(module):
    """Returns which package, or which file beside the packages, a module belongs to."""
    return (*module.split("."), "__init__")[1]


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(module):
    """Returns what a module imports of the package anywhere, also in functions or for type checkers, {module: line}."""
    imported, path = {}, MODULES[module]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            imported |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: len(module.split(".")) + (path.name == "__init__.py") - node.level]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            names = (f"{base}.{alias.name}" for alias in node.names)
            imported |= {name if name in MODULES else base: node.lineno for name in names}
    return {name: line for name, line in imported.items() if name.split(".")[0] == "drep_jax"}


def test_everything_has_its_level_and_there_are_at_most_ten():
    units = [unit for level in LEVELS for unit in level]
    assert len(LEVELS) <= 10 and len(units) == len(set(units))
    there = {unit_of(module) for module in MODULES}
    assert there == set(units), f"on no level: {there - set(units)}; not there: {set(units) - there}"


def test_imports_go_downwards_only():
    level = {unit: number for number, units in enumerate(LEVELS) for unit in units}
    upwards, count = [], 0
    for module in MODULES:
        for name, line in imports_of(module).items():
            ours, other = unit_of(module), unit_of(name)
            count += ours != other
            if ours != other and level[other] <= level[ours]:
                upwards.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}")
    assert count > 300, "the imports were not found"
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle():
    done, circles = set(), []

    def walk(module, path):
        if module in path:
            circles.append(" → ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for name in imports_of(module):
                walk(name, [*path, module])
            done.add(module)

    for module in MODULES:
        walk(module, [])
    assert not circles, "\n".join(circles)


def test_the_method_imports_nothing_but_the_ground_floor():
    units = {unit_of(name) for module in MODULES if unit_of(module) == "core" for name in imports_of(module)}
    assert "core" in units and units <= CORE_IMPORTS, units - CORE_IMPORTS


@pytest.mark.parametrize("path", FREE_OF_TASKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tasks_are_named_by_tasks_alone(path):
    """In code, strings, comments and docstrings; names of repositories are names."""
    text = re.sub(r"github\.com/\S+", "", path.read_text(encoding="utf-8"))
    words = re.compile(rf"\b({'|'.join(sorted(TASK_WORDS))})\b", re.IGNORECASE)
    named = [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if words.search(line)]
    assert not named, "\n".join(named)


def test_no_module_is_long():
    lengths = {module_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > LINES}


def test_one_file_knows_how_devices_are_mapped():
    def named(path):
        return {token.string for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)}

    assert [module_of(path) for path in FILES if "pmap" in named(path)] == ["drep_jax.parallel.devices"]


def defined_at_the_top(path):
    """Returns the names that a module gives at its top level, also in branches and blocks."""
    names, blocks = set(), [tree_of(path)]
    while blocks:
        for node in ast.iter_child_nodes(blocks.pop()):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.If | ast.Try | ast.With):
                blocks.append(node)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names |= {
                name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return names


def test_types_are_defined_once():
    shared = defined_at_the_top(PACKAGE / "typing.py")
    assert shared >= {"Tree", "Config", "Path", "Scores", "Batch"}
    again = {module_of(path): defined_at_the_top(path) & shared for path in FILES if path.name != "typing.py"}
    again["drep_jax.weights.files.contents"].remove("Path")  # where a tensor lies in a file
    assert not {module: names for module, names in again.items() if names}


MECHANISM = ("core", "metrics", "training", "pretraining", "evaluation", "parallel", "models")
"""Packages that get plain arguments; the configuration is read above them."""


@pytest.mark.parametrize("path", [p for p in FILES if unit_of(module_of(p)) in MECHANISM], ids=str)
def test_mechanism_never_indexes_the_configuration(path):
    indexed = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "config")
        or (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config")
    ]
    assert not indexed, indexed
