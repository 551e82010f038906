"""What experiments share: rows of finished runs in a .jsonl file, and paired differences."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from edgefed.simulation.config import SimulationConfig
from edgefed.simulation.result import MethodRun
from edgefed.simulation.simulate import simulate
from edgefed.simulation.simulated_run import Score

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from provenance import provenance  # noqa: E402

__all__ = ["add_arguments", "interval", "play", "provenance", "read_rows", "record", "run_of"]

Plan = TypeVar("Plan")
"""A frozen dataclass whose fields are fields of the row, and name the run."""


def read_rows(path: Path) -> list[dict]:
    """The recorded rows."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_of(row: Mapping, kind: type[Plan]) -> Plan:
    """What a row is of. An older row may lack a field that has a default."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: row[name] for name in names if name in row})


def record(plans: Iterable[Plan], run: Callable[[Plan, Path], dict], path: Path, work: Path) -> None:
    """Append the row of each plan to ``path``, with commit, versions and time; plans that have a row are skipped.

    ``run(plan, folder)`` returns what was measured; ``folder``, below ``work``, is emptied before and after.
    """
    rows, folder = read_rows(path), work / "run"
    for plan in plans:
        if rows and plan in [run_of(row, type(plan)) for row in rows]:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started, wall = time.process_time(), time.monotonic()
        found = run(plan, folder)
        row = {
            **dataclasses.asdict(plan), **found,  # type: ignore[call-overload]
            "cpu_seconds": round(time.process_time() - started, 1),
            "wall_seconds": round(time.monotonic() - wall, 1),
            "provenance": provenance(),
        }  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        shutil.rmtree(folder)
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
        print(f"{plan}: {numbers}, {row['cpu_seconds']} s", flush=True)


def play(config: SimulationConfig, folder: Path, score: Score | None = None) -> MethodRun:
    """The only run of a simulation. Raises SystemExit if a device did not take part, or the run stopped early."""
    found = simulate(config, folder, score=score).runs[0]
    if found.refused or found.stopped:
        raise SystemExit(f"{found.label}: {found.refused or found.stopped}")
    return found


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % confidence interval by Student's t); infinite for fewer than two differences."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return differences[0], math.inf
    spread = statistics.stdev(differences) / math.sqrt(count)
    return statistics.mean(differences), float(t.ppf(0.975, count - 1)) * spread


def add_arguments(parser: argparse.ArgumentParser, results: Path) -> None:
    """The arguments that these scripts have in common: where sets, state and rows are."""
    parser.add_argument("--data", type=Path, help="folder with the public sets, see README.md here")
    parser.add_argument("--work", type=Path, help="folder for the state of the run in progress")
    parser.add_argument("--json", type=Path, default=results, help="file of the recorded rows")
