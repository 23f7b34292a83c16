"""What MkDocs adds to docs/: the pages of the repository that lie outside of it, and a reference page a package."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository ↦ page of the site."""


def _page_of(target: str) -> str | None:
    """The page of the site that a file of the repository is, or None."""
    if target in ELSEWHERE:
        return ELSEWHERE[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else None


def _moved(text: str, source: str) -> str:
    """Text with its links as they are from the page at the top of the site; other files become code."""

    def link(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        page = _page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        return label if page is None else f"[{label}]({page}{hash_}{anchor})"

    return re.sub(r"\[([^]]*)\]\(([^)\s]+)\)", link, text)


def _packages() -> dict[str, list[str]]:
    """Package ↦ its modules, dotted, the package itself first."""
    packages: dict[str, list[str]] = {}
    for path in sorted((ROOT / "drep_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        package = ".".join(parts[:2]) if len(parts) > 2 else "drep_jax"
        packages.setdefault(package, []).append(name)
    return {package: sorted(names) for package, names in sorted(packages.items())}


def _reference(package: str, modules: list[str]) -> str:
    lines = [f"# {package}", ""]
    for module in modules:
        lines += [f"::: {module}"]
        if module == package:  # the heading of the page is its name
            lines += ["    options:", "      show_root_heading: false", "      show_root_toc_entry: false"]
        if module == "drep_jax":  # re-exports what the pages of the packages show
            lines += ["      members: false"]
        lines += [""]
    return "\n".join(lines)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the reference pages into the navigation."""
    for section in config.nav or []:
        if "API" in section:
            section["API"] = [{package: f"api/{package}.md"} for package in _packages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that docs/ does not hold."""
    for source, page in ELSEWHERE.items():
        text = _moved((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, page, content=text))
    for package, modules in _packages().items():
        files.append(File.generated(config, f"api/{package}.md", content=_reference(package, modules)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links of docs/ to the pages that lie outside of it."""
    source = page.file.src_uri
    if page.file.generated_by or source.startswith("api/"):
        return markdown
    return re.sub(
        r"\]\(\.\./([^)\s#]+)",
        lambda match: f"]({ELSEWHERE[match[1]]}" if match[1] in ELSEWHERE else match[0],
        markdown,
    )
