"""The line of a round."""

from __future__ import annotations

import pytest

from edgefed.progress import RoundLines, format_seconds, round_line

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
