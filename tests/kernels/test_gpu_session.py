"""The session on a GPU is rehearsed on the CPU: every stage runs, each row is kept, and it goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_session.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the benchmarks are not beside the tests")


def load():
    spec = importlib.util.spec_from_file_location("_gpu_session", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def session(out, *arguments, script=SCRIPT, timeout=1800):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGEFED_")}
    command = [sys.executable, str(script), "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_every_stage_runs_on_the_cpu(tmp_path):
    result = session(tmp_path, "--rehearse", "--limit", "1500")
    logs = "".join(path.read_text(errors="replace")[-1500:] for path in sorted(tmp_path.glob("*.log")))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:] + logs
    rows = rows_of(tmp_path)
    stages = load().STAGES
    assert [row["stage"] for row in rows if row.get("done")] == list(stages)
    named = {(row["stage"], row["name"]): row for row in rows if "name" in row}
    for stage in stages:
        assert any(of == stage for of, _ in named), stage
    proofs = [row for (stage, _), row in named.items() if stage in ("proof", "correctness")]
    assert {row["name"].partition(":")[0] for row in proofs} >= {"cuda"}
    assert {row["state"] for row in proofs} <= {"proved", "slower"}  # right, and of any speed in an emulator
    speed = named["speed", "olmoe nf4-20"]
    assert {"edgefed-cuda", "edgefed-reference", "grouped_mm"} <= speed["wall_ms"].keys()
    profiles = {name: row for (stage, name), row in named.items() if stage == "profile"}
    assert profiles["reference"]["host_waits"] >= 4  # one a layer, so that the count can fail
    assert profiles["cuda"]["host_waits"] <= 1  # transformers' own, at the start of a pass
    assert all(row["host_waits"] <= 1 for name, row in profiles.items() if name != "reference")
    assert named["round", "two devices, two rounds"]["status"] == [0, 0]
    again = session(tmp_path, "--rehearse")
    assert again.returncode == 0
    assert rows_of(tmp_path) == rows  # nothing runs twice
    assert "speed (done" in again.stdout
    assert "olmoe nf4-20" in again.stdout


STAGES = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu_session import append
from pathlib import Path
stage, out = sys.argv[1], Path(sys.argv[3])
append(out / "rows.jsonl", {{"stage": stage, "name": "first", "ms": 1.5}})
if stage == "build" and not (out / "mended").exists():
    sys.exit("nvcc: no such option")
if stage == "doctor":
    time.sleep(600)
"""


@pytest.fixture
def made_up(tmp_path):
    """The session with stages that write a row each; "build" fails until it is mended, and "doctor" hangs."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "gpu_session.py").write_text(SCRIPT.read_text().replace('"doctor": 60', '"doctor": 2'))
    (folder / "gpu_stages.py").write_text(STAGES.format(benchmarks=str(BENCHMARKS)))
    return folder / "gpu_session.py"


def test_a_stage_that_fails_or_hangs_keeps_its_rows_and_runs_again(tmp_path, made_up):
    out = tmp_path / "out"
    wanted = [word for stage in ("machine", "build", "doctor", "proof") for word in ("--stage", stage)]
    result = session(out, *wanted, script=made_up)
    assert result.returncode == 1
    ends = {row["stage"]: row for row in rows_of(out) if "name" not in row}
    assert ends["machine"]["done"]
    assert ends["proof"]["done"]
    assert "nvcc: no such option" in ends["build"]["failed"]
    assert ends["doctor"]["failed"] == "did not end within 2 s"
    assert "build (NOT DONE: ended with status 1: nvcc" in result.stdout
    assert result.stdout.count("ms: 1.5") == 4
    (out / "mended").touch()
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"stage": "build", "na')  # cut off by a crash
    session(out, *wanted[:4], script=made_up)
    rows = load().read_rows(out / "rows.jsonl")
    assert [row["stage"] for row in rows if row.get("done")].count("machine") == 1
    assert [row["stage"] for row in rows if "name" in row].count("build") == 2
    assert any(row["stage"] == "build" and row.get("done") for row in rows)


def test_nothing_starts_without_time(tmp_path, made_up):
    result = session(tmp_path / "out", "--stage", "machine", "--limit", "0", script=made_up)
    assert result.returncode == 1
    assert "out of time: start the session again" in result.stdout
