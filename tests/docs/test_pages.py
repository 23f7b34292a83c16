"""What the pages say exists: links, anchors, names, settings and files. Lines fit in 100 columns; spelling is American."""

import functools
import importlib
import re
import unicodedata
from pathlib import Path

import pytest

from configs.default import get_default

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "examples/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
COLUMNS = 100
TABLES = "docs/troubleshooting.md"
"""A row of its tables is one line, however long."""

FREE_SECTIONS = ("model",)  # takes any option of the backbone's class

BRITISH = re.compile(
    r"(optimis|normalis|recognis|initialis|generalis|minimis|maximis|summaris|organis|quantis|vectoris|regularis"
    r"|centre(?!_)|centred|colour|behaviour|neighbour|favour|labelled|labelling|modelled|modelling|cancelled|grey"
    r"|licence|catalogue|artefact|whilst|analyse[ds]?\b|per cent\b|defence|metres?\b|programme\b|judgement)",
    re.IGNORECASE,
)


@functools.cache
def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page):
    """The page without code."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`]*`", "", text)


def anchor(heading):
    """The anchor that GitHub and MkDocs give a heading."""
    heading = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip())


@functools.cache
def anchors_of(page):
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def links_of(page):
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit(page):
    lines = [
        line for line in enumerate(text_of(page).splitlines(), 1) if not (page == TABLES and line[1].startswith("|"))
    ]
    long = [number for number, line in lines if len(line) > COLUMNS]
    assert long == [], f"{page}: lines of more than {COLUMNS} columns"


@pytest.mark.parametrize("page", PAGES)
def test_spelling_is_american(page):
    assert sorted({match.group() for match in BRITISH.finditer(prose_of(page))}) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (fragment and fragment not in anchors_of(str(target.resolve().relative_to(ROOT)))):
            broken.append(link)
    assert broken == []


def resolves(name):
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for attribute in parts[cut:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_names_are_those_of_the_code(page):
    names = {name.rstrip(".") for name in re.findall(r"\bdrep_jax\.[A-Za-z_][\w.]*", text_of(page))}
    assert sorted(name for name in names if not resolves(name)) == []


@pytest.mark.parametrize("page", PAGES)
def test_imports_of_examples_work(page):
    missing = []
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
        compile(block, page, "exec")
        for module, names in re.findall(r"^from (drep_jax[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            missing += [f"{module}.{name}" for name in names.split(", ") if not resolves(f"{module}.{name}")]
    assert missing == []


def is_setting(path):
    config = get_default().to_dict()
    for key in path.split("."):
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_those_of_the_default_configuration(page):
    settings = set(re.findall(r"(?:--|\b)config\.([a-z_]\w*(?:\.[a-z_]\w*)*)", text_of(page)))
    # `section.name` in a code span, for the sections that there are
    sections = "|".join(name for name, value in get_default().to_dict().items() if isinstance(value, dict))
    settings |= set(re.findall(rf"`((?:{sections})\.[a-z]\w*)", text_of(page)))
    settings -= {"x.y"}  # the placeholder of the README
    settings = {path for path in settings if path.split(".")[-1] not in ("json", "py", "png")}  # names of files
    unknown = [path for path in settings if path.split(".")[0] not in FREE_SECTIONS and not is_setting(path)]
    assert sorted(unknown) == []


def test_settings_of_tables_by_section_exist():
    """The tables of docs/reid.md leave the section out of their rows: it is in the header."""
    tables = re.findall(
        r"^\| `config\.(\w+)\.?` .*\n\|[-| ]+\n((?:\|.*\n)+)", "".join(map(text_of, PAGES)), re.MULTILINE
    )
    assert len(tables) >= 2
    for section, rows in tables:
        for first in re.findall(r"^\|([^|]*)\|", rows, re.MULTILINE):
            for name in re.findall(r"`([a-z_]+)`", first):
                assert is_setting(f"{section}.{name}"), f"{section}.{name}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    tops = "benchmarks|configs|docs|drep_jax|examples|tests|train\\.py|fuse\\.py|requirements[\\w-]*\\.txt"
    paths = set(re.findall(rf"(?<![\w/.-])((?:{tops})(?:/[\w./-]+)?)", text_of(page)))
    paths = {path.rstrip(".") for path in paths if "NAME" not in path}
    named = {path for path in paths if "." in Path(path).name or path.endswith("/")}
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", PAGES)
def test_options_of_the_commands_exist(page):
    """Every `--flag` in a command of train.py or fuse.py, continuation lines included."""
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "fuse.py"))
    source += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "drep_jax").rglob("*.py"))
    commands = re.findall(r"python (?:train|fuse)\.py((?:[^\n`]|\\\n)*)", text_of(page))
    flags = {flag for command in commands for flag in re.findall(r"--([a-z_]+)(?=[= \n]|$)", command)}
    assert sorted(flag for flag in flags - {"config", "help", "helpfull"} if f'"{flag}"' not in source) == []


def test_the_marked_commands_of_the_readme_are_there():
    """CI runs what the README says."""
    for mark in ("main-job", "tests"):
        assert re.search(rf"^<!-- {mark} -->\n```bash\n\S.*\n```$", text_of("README.md"), re.MULTILINE), mark


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES if page.startswith("docs/") and Path(page).name not in navigation] == []
