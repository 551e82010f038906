"""The documentation is what the code says: generated pages are current, links resolve, examples exist."""

from __future__ import annotations

import json
import re
import runpy
import statistics
import sys
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
    assert (ROOT / "examples/own_loss.py").read_text() in (DOCS / "pages/guides/training.md").read_text()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_the_text_names_exist(path):
    names = re.findall(r"`((?:edgefed|benchmarks|experiments|tests|docs|examples)/[\w./-]+\.(?:py|md|json|toml|png))`",
                       path.read_text(encoding="utf-8"))  # fmt: skip
    assert not [name for name in names if not (ROOT / name).exists()]


# Figures of the text and the recorded rows that they are of. A comment below a table or paragraph names a result file,
# and has a line for each figure: how it stands above, "=", and where its value is in the file.
#
#     <!-- figures benchmarks/results/slices.json
#     take 55 = rows {"share": "1/2"} time_ratio %
#     | `hfedmoe` | 25 % ... 0.307 = mean rows {"method": "hfedmoe"} global_loss_after
#     -->
#
# "..." stands for the middle of a line. The figure is the last number before "=". The place is a path of names and
# indices; {...} takes the elements of a list with these values, or with one of several in [...]. mean, stdev, min, max
# and sum are of all that it leads to; without one of them it leads to one. %, MiB and GiB at the end divide the value
# by this unit.

BLOCKS = re.compile(r"<!-- figures (\S+)\n(.*?)-->", re.DOTALL)
UNITS = {"%": 0.01, "MiB": 2.0**20, "GiB": 2.0**30}
TOGETHER = {name: getattr(statistics, name) for name in ("mean", "stdev")} | {"min": min, "max": max, "sum": sum}
WORDS = re.compile(r"\{.*?\}|\S+")


def matches(found, wanted):
    return found in wanted if isinstance(wanted, list) else found == wanted


def recorded(file, place):
    """The value at a place in a result file, in its unit."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = [[json.loads(line) for line in text.splitlines()]] if file.endswith(".jsonl") else [json.loads(text)]
    words = WORDS.findall(place)
    unit = UNITS[words.pop()] if words[-1] in UNITS else 1.0
    combine = TOGETHER[words.pop(0)] if words[0] in TOGETHER else None
    for word in words:
        if word.startswith("{"):
            wanted = json.loads(word)
            rows = [row for each in found for row in each]
            found = [row for row in rows if all(matches(row.get(key), value) for key, value in wanted.items())]
        else:
            found = [each[int(word) if isinstance(each, list) else word] for each in found]
    assert found, f"nothing at {place}"
    assert combine or len(found) == 1, f"{len(found)} values at {place}"
    return (combine(found) if combine else found[0]) / unit


def wrong_figures(text):
    """What is wrong with the figures of a page, in words."""
    wrong, start = [], 0
    for block in BLOCKS.finditer(text):
        above, start = " ".join(text[start : block.start()].split(" ")), block.end()
        for line in block[2].strip().splitlines():
            shown, _, place = line.partition(" = ")
            parts = [re.escape(part).replace(r"\ ", r"\s+") for part in shown.split(" ... ")]
            number = re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", shown)[-1].replace(",", "")
            value = recorded(block[1], place)
            if not re.search(".*".join(parts) + r"(?![\d.]*\d)", above):
                wrong.append(f"{shown!r} is not in the text above")
            elif abs(value - float(number)) > 0.5000001 * 10.0 ** -len(number.partition(".")[2]):
                wrong.append(f"{shown!r} is {value:.6g} in {block[1]}")
    return wrong


@pytest.mark.parametrize("path", [path for path in TEXTS if BLOCKS.search(path.read_text(encoding="utf-8"))],
                         ids=lambda path: path.relative_to(ROOT).as_posix())  # fmt: skip
def test_figures_are_those_of_the_recorded_rows(path):
    assert not wrong_figures(path.read_text(encoding="utf-8"))


def test_a_figure_that_differs_from_its_row_is_found():
    comment = """<!-- figures benchmarks/results/slices.json
    | half ... 55 = rows {"share": "1/2"} time_ratio %
    -->"""
    assert not wrong_figures(f"| half | 55 % |\n{comment}")
    assert "is 55.1796 in" in wrong_figures(f"| half | 54 % |\n{comment.replace('55', '54')}")[0]
    assert "is not in the text" in wrong_figures(f"| half | 54 % |\n{comment}")[0]
    assert "is not in the text" in wrong_figures(f"| half | 55.3 % |\n{comment}")[0]


@pytest.fixture
def experiment(monkeypatch):
    """Runs the definitions of a script of experiments/."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "experiments"), str(ROOT / "benchmarks")])
    return lambda name: runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))


@pytest.mark.full
def test_the_tables_of_equal_memory_are_those_of_the_recorded_rows(experiment):
    script = experiment("equal_memory")
    text = (DOCS / "pages/results/text.md").read_text(encoding="utf-8")
    tables = script["tables"](script["read_rows"](script["RESULTS"]))
    assert tables
    assert not [what for what, table in tables.items() if table not in text]


@pytest.mark.full
def test_methods_are_compared_at_their_own_settings_and_paired_by_seed(experiment):
    script = experiment("equal_memory")

    def row(method, name, seed, loss, rate=0.003, steps=10):
        return {
            "method": method, "set": name, "seed": seed, "learning_rate": rate, "local_steps": steps, "global": loss,
            "device": loss + 1, "expert_bytes_by_client": [2**20, 2**20], "bytes_down": 2**20,
        }  # fmt: skip

    tried = [(0.003, 10, 2.0), (0.001, 10, 2.5), (0.003, 20, 1.5)]
    rows = [row(method, "tasks", 100, loss, rate, steps) for method in script["METHODS"] for rate, steps, loss in tried]
    rows.append(row("fmes", "tasks", 100, 1.0, rate=0.01))  # no other method has tried this rate
    rows += [row("fmes", "tasks", 100, 1.9, rate=0.001)]
    chosen = script["chosen_settings"](rows, (10,))
    assert chosen["slices"] == chosen["slices-energy"] == (0.003, 10)
    assert chosen["fmes"] == (0.001, 10)
    assert script["chosen_settings"](rows)["fmes"] == (0.003, 20)
    rows += [row("slices", "dolly", seed, 3.0 + seed) for seed in (0, 1, 2)]
    rows += [row("fmes", "dolly", seed, 3.5 + seed, rate=0.001) for seed in (0, 1)]
    rows += [row("fmes", "dolly", 2, 0.0)]  # another rate
    first, second = script["comparison"](rows, ("slices", "fmes"))
    assert (first["seeds"], first["global"], first["global_difference"]) == (2, 3.5, (0.0, 0.0))
    assert (second["global"], second["global_difference"]) == (4.0, (0.5, 0.0))
    assert "| dolly, 2 | `fmes` | 4.000 | +0.500 ± 0.000 | 5.000 | +0.500 ± 0.000 | 1.0 MiB |" in script["table"](
        rows, ("slices", "fmes")
    )


@pytest.mark.full
def test_times_to_quality_are_paired_by_seed_and_its_own_target(experiment):
    script = experiment("time_to_accuracy")

    def run(label, seed, curve):
        return {
            "label": label, "seed": seed, "learning_rate": 0.001, "curve": curve, "accuracy": [0.0], "refused": {},
            "bytes_up": 10**9, "bytes_down": 10**9,
        }  # fmt: skip

    runs = [run("fmd", 0, [(0, 5.0), (1000, 4.0)]), run("fmd", 1, [(0, 7.0), (1000, 5.0)])]  # targets 4.5 and 6
    runs += [run("slices-paced", 0, [(0, 5.0), (100, 4.0)]), run("slices-paced", 1, [(0, 7.0), (100, 5.0)])]
    summary = script["summarise"](runs, 0.5)
    assert summary["methods"]["slices-paced"]["seconds_to_crossing"] == pytest.approx([50, 50])
    assert summary["methods"]["fmd"]["seconds_to_crossing"] == pytest.approx([500, 500])
    table = script["table"](summary, "slices-paced")
    assert "| `fmd`, 2 | 8.3 | 10.00 (10.00 to 10.00) | 4.500 | 0.28 h | 1.0 GB |" in table
