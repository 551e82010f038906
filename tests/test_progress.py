"""The line of a round, and what says that work goes on."""

from __future__ import annotations

import time

import pytest

from edgefed.progress import Pulse, RoundLines, counted, format_seconds, remaining, round_line

LOSSES = {"train_loss": 4.738, "held_out_loss_before": 4.61, "held_out_loss_after": 4.4849}


def test_the_line_of_a_round_begins_with_its_losses():
    assert round_line(2, 5, LOSSES, 12.3, "2 of 3 clients") == (
        "round 2/5: train 4.74, held-out 4.61 -> 4.48, 2 of 3 clients, 12 s"
    )
    assert round_line(2, 5, {}, None) == "round 2/5: done"
    assert round_line(1, 2, {"train_loss": 1.0, "held_out_accuracy_after": 0.625}, 3.0) == (
        "round 1/2: train 1.00, held-out accuracy 62.5 %, 3.0 s"
    )


def test_the_wait_of_the_last_round_is_expected_again():
    now = [0.0]
    lines = RoundLines(lambda: now[0])
    lines.begin(1)
    now[0] = 12.0
    assert lines.end(1, 3, LOSSES).endswith("4.48, 12 s")  # nothing is known of the others yet
    now[0] = 52.0
    lines.begin(2)
    now[0] = 63.0
    assert lines.end(2, 3, LOSSES).endswith("11 s, next in about 40 s")
    now[0] = 103.0
    lines.begin(3)
    assert "next" not in lines.end(3, 3, LOSSES)


def test_a_round_of_an_earlier_process_has_no_time():
    assert RoundLines().end(4, 5, LOSSES) == "round 4/5: train 4.74, held-out 4.61 -> 4.48"


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (95, "95 s"), (750, "12.5 min"), (11520, "3.2 h")])
def test_times_have_the_unit_that_fits(seconds, text):
    assert format_seconds(seconds) == text


def test_a_pulse_speaks_less_and_less_often_and_ends_with_its_work(monkeypatch):
    monkeypatch.setattr(Pulse, "TIMES_S", (0.02, 0.05, 0.1))
    spoken: list[float] = []
    with Pulse(spoken.append):
        time.sleep(0.36)
    count = len(spoken)
    assert 3 <= count <= 5  # 0.02, 0.05, 0.1, 0.2, 0.3 s
    time.sleep(0.15)
    assert len(spoken) == count
    with Pulse(spoken.append):
        pass
    assert len(spoken) == count


def test_what_remains_is_computed_where_the_whole_is_known():
    assert remaining(5, 20, 4.0) == "about 12 s left"
    assert remaining(20, 20, 4.0) == "about 0.0 s left"
    assert remaining(0, 20, 4.0) == "4.0 s so far"
    assert remaining(5, None, 70.0) == "70 s so far"
    assert (counted(1, "round"), counted(2, "round"), counted(1200, "update")) == (
        "1 round",
        "2 rounds",
        "1,200 updates",
    )
