"""The documentation is what the code says: generated pages are current, links resolve, examples exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from edgefed.cli.main import VERBS
from edgefed.errors import all_errors
from edgefed.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "pages").rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]


def test_generated_pages_are_current():
    pages = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    assert len(pages) == 3
    outdated = [path.name for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    assert not outdated, "run python docs/generate.py"


def test_the_reference_names_everything():
    text = {name: (DOCS / "pages/reference" / f"{name}.md").read_text() for name in ("cli", "errors", "method-options")}
    assert not [verb for verb in VERBS if f"edgefed {verb}" not in text["cli"]]
    assert not [code for code in all_errors() if code != "error" and f"`{code}`" not in text["errors"]]
    assert not [name for name in METHODS if f"## {name}\n" not in text["method-options"]]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in local if not (path.parent / link).exists()]
    assert not missing


def test_every_page_is_in_the_navigation():
    navigation = (DOCS / "mkdocs.yml").read_text()
    absent = [p for p in PAGES if p.relative_to(DOCS / "pages").as_posix() not in navigation]
    assert not absent


def test_the_tutorial_shows_the_example_as_it_is():
    tutorial = (DOCS / "pages/tutorials/your-own-method.md").read_text()
    assert (ROOT / "examples/own_method.py").read_text() in tutorial


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_the_text_names_exist(path):
    names = re.findall(r"`((?:edgefed|benchmarks|experiments|tests|docs|examples)/[\w./-]+\.(?:py|md|json|toml|png))`",
                       path.read_text(encoding="utf-8"))  # fmt: skip
    assert not [name for name in names if not (ROOT / name).exists()]
