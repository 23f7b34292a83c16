"""Every entry of a registry is documented, and those whose own tests are not table-driven have a test that names them."""

import re
from pathlib import Path

import pytest

from drep_jax.core.schedule import RULES
from drep_jax.data import SOURCES
from drep_jax.data.corruptions import CORRUPTIONS
from drep_jax.data.corruptions.cifar10c import PROTOCOL
from drep_jax.learners import LEARNERS
from drep_jax.models import MODELS
from drep_jax.tasks import TASKS
from drep_jax.training.optimizers import OPTIMIZERS
from drep_jax.weights.formats import FORMATS

ROOT = Path(__file__).parents[2]
# registry ↦ its entries, the page that has them, whether some test has to name each (or tests go through the whole table)
REGISTRIES = {
    "MODELS": (MODELS, "models.md", False),
    "SOURCES": (SOURCES, "data.md", False),
    "FORMATS": ({form.name for form in FORMATS}, "weights.md", True),
    "LEARNERS": (LEARNERS, "training.md", True),
    "TASKS": (TASKS, "architecture.md", True),
    "CORRUPTIONS": (CORRUPTIONS, "corruptions.md", False),
    "PROTOCOL": (PROTOCOL, "corruptions.md", False),
    "OPTIMIZERS": (OPTIMIZERS, "training.md", False),
    "RULES": (RULES, "method.md", True),
}
ENTRIES = [(name, entry) for name, (entries, _, _) in REGISTRIES.items() for entry in sorted(entries)]


def whole(name):
    """Matches a name that is not part of a longer one."""
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")


@pytest.mark.parametrize(("registry", "entry"), ENTRIES)
def test_every_entry_is_documented(registry, entry):
    page = REGISTRIES[registry][1]
    assert whole(entry).search((ROOT / "docs" / page).read_text(encoding="utf-8")), f"{entry} is missing in docs/{page}"


@pytest.mark.parametrize(("registry", "entry"), [pair for pair in ENTRIES if REGISTRIES[pair[0]][2]])
def test_every_entry_is_tested_by_name(registry, entry):
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent != Path(__file__).parent]
    assert any(whole(entry).search(path.read_text(encoding="utf-8")) for path in tests), f"{registry}: {entry}"


def test_every_registry_is_looked_at():
    """A registry is a module's constant in capitals that several files may add to; CONTRIBUTING.md names each."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]{4,})`", text))
    assert named | {"PROTOCOL"} == set(REGISTRIES)
