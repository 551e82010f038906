"""What the demo says while it runs: how long it will take in all, what goes on, and how long is left."""

from __future__ import annotations

import io
import re
import time

from rich.console import Console

from edgefed.cli.demo import DemoDisplay
from edgefed.progress import Pulse
from edgefed.protocol.messages import RoundStatus, RunConfig, Status, TrainingConfig


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def status(rounds_done: int, state: str = "training") -> Status:
    history = tuple(
        RoundStatus(
            server_round=number, participants=4, updates=4, seconds=5.0, uploaded_bytes=1, experts_changed=1,
            metrics={"train_loss": 3.0},
        )
        for number in range(1, rounds_done + 1)
    )  # fmt: skip
    run = RunConfig(
        run_id="r", model="tiny", method="hfedmoe", method_options={}, rounds=2, seed=0, training=TrainingConfig()
    )
    return Status(
        run=run, state=state, server_round=rounds_done + 1, min_clients=4, quorum=0, deadline_s=None,
        updates_received=0, clients=(), history=history, memory_peak_bytes=1,
    )  # fmt: skip


def test_the_demo_says_what_goes_on_and_how_long_is_left(capsys):
    clock = Clock()
    with DemoDisplay(rounds=2, methods=1, usual_s=90.0, clock=clock) as display:
        display.method("hfedmoe")
        clock.now += 30
        display.status(status(1))
        clock.now += 9
        display.status(status(2, "finished"))
        clock.now += 10
        display.note("hfedmoe: evaluating 3 global models")
        display.evaluated(1, 3)
        clock.now += 5
        display.evaluated(3, 3)
        display.note("exporting the final model")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "with its usual settings, this takes about 90 s on two idle cores"
    assert lines[1] == "hfedmoe: starting the aggregator and the agents"
    assert re.fullmatch(r"hfedmoe: round 1/2: train 3\.00, 4 of 4 clients, 5\.0 s \(about 42 s left\)", lines[2])
    assert re.fullmatch(r"hfedmoe: round 2/2: .* \(about 27 s left\)", lines[3])
    assert lines[4].startswith("comparing: ")
    assert lines[6] == "evaluated 1 of 3 global models (about 4.3 s left)"
    assert lines[7] == "evaluated 3 of 3 global models"
    assert lines[8] == "exporting the final model"


def test_a_silence_ends_after_seconds(capsys, monkeypatch):
    monkeypatch.setattr(Pulse, "TIMES_S", (0.05, 60.0))
    with DemoDisplay(rounds=2, methods=1, usual_s=90.0) as display:
        display.method("flux")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "flux: starting the aggregator and the agents"
    assert re.fullmatch(r"starting: 0\.[0-9] s so far", lines[-1])
    assert len(lines) == 3


def test_the_time_that_is_left_counts_down_and_no_line_is_repeated(capsys, monkeypatch):
    monkeypatch.setattr(Pulse, "TIMES_S", (0.01,))
    clock = Clock()
    with DemoDisplay(rounds=2, methods=1, usual_s=90.0, clock=clock) as display:
        display.method("hfedmoe")
        clock.now += 30
        display.status(status(1))
        for _ in range(8):
            time.sleep(0.02)
            clock.now += 2
        display.status(status(2, "finished"))
        time.sleep(0.05)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("starting", "comparing"))]
    left = [float(found[1]) for line in lines if (found := re.search(r"about ([\d.]+) s left", line))]
    assert len(left) > 5
    assert left == sorted(left, reverse=True), lines
    happened = [line for line in lines if "so far" not in line]
    assert len({line.partition(" (")[0] for line in happened}) == len(happened), lines
    assert all(line.startswith("round 2: ") for line in lines if "so far" in line), lines


def test_on_a_terminal_the_table_goes_when_the_run_is_over(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    monkeypatch.setattr("edgefed.cli.output.stderr_console", lambda: screen)
    with DemoDisplay(rounds=2, methods=1, usual_s=90.0) as display:
        display.method("hfedmoe")
        display.status(status(1))
        assert "hfedmoe on tiny" in screen.file.getvalue()
        before = len(screen.file.getvalue())
        display.note("hfedmoe: evaluating 3 global models", "evaluating")
        display.evaluated(1, 3)
    assert "hfedmoe on tiny" not in screen.file.getvalue()[before:].rpartition("evaluated 1 of 3")[2]
