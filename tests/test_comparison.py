"""The words of a comparison."""

from __future__ import annotations

import math

import pytest

from edgefed.protocol.comparison import Comparison, is_sound, verdict


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ({"before": 5.26, "global_model": 4.45, "device": 4.9, "alone": 4.87},
         "the global model is 0.42 nats better than training alone; "
         "this device's model is 0.03 nats worse than training alone."),
        ({"before": 5.26, "global_model": 4.45, "device": 4.276, "alone": 4.263},
         "this device's model is 0.01 nats worse than training alone; "
         "the global model is 0.19 nats worse than training alone."),
        ({"before": 5.26, "global_model": 4.45, "device": 4.5},
         "the global model is 0.81 nats better than the model before the run."),
        ({"before": 5.26, "before_round": 3, "global_model": 5.4},
         "the global model is 0.14 nats worse than the model before round 3."),
        ({"device": 4.263, "alone": 4.266}, "this device's model is as good as training alone."),
    ],
)  # fmt: skip
def test_the_verdict_is_honest_in_both_directions(losses, text):
    assert verdict(Comparison(server_round=6, **losses)) == f"On this device's text {text}"


def test_there_is_no_verdict_without_two_models():
    assert verdict(Comparison(server_round=6, before=1.0, alone=2.0)) == ""
    assert verdict(Comparison(server_round=6, global_model=1.0)) == ""


@pytest.mark.parametrize(
    "wrong",
    [{"before": math.inf}, {"alone": -0.1}, {"num_tokens": -1}, {"skipped": "x" * 201}, {"skipped": "\x1b[31m"}],
)
def test_a_comparison_from_the_network_has_possible_values(wrong):
    assert is_sound(Comparison(server_round=1, before=2.0))
    assert not is_sound(Comparison(server_round=1, **wrong))
