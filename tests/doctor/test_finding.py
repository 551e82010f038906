"""What a finding must say, and how findings add up to a verdict."""

import pytest

from edgefed.doctor.finding import Diagnosis, Finding, Group, State


def made(*states, **more):
    findings = tuple(Finding(Group.HOST, "x", state, "found", fix="do") for state in states)
    return Diagnosis("device", findings, None, **more)


@pytest.mark.parametrize("state", [State.WARNING, State.PROBLEM])
def test_whatever_is_wrong_has_a_way_out(state):
    with pytest.raises(ValueError, match="needs something to do"):
        Finding(Group.HOST, "x", state, "found", "why")
    Finding(Group.HOST, "x", state, "found", command="do this")


def test_only_problems_keep_a_device_from_training():
    assert made(State.OK, State.NOTE, State.WARNING).can_train
    assert not made(State.OK, State.PROBLEM).can_train


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ((), "no problems, no warnings: this device can train, on its CPU"),
        ((State.WARNING,), "no problems, 1 warning: this device can train, on its CPU"),
        ((State.PROBLEM, State.PROBLEM, State.WARNING), "2 problems, 1 warning: this device cannot train"),
    ],
)
def test_the_summary_counts(states, text):
    assert made(*states).summary() == text


def test_a_verdict_without_arithmetic_says_so():
    assert made(arithmetic_ran=False).summary().endswith("as far as was looked")


def test_the_summary_names_the_gpu_that_would_be_used(device):
    facts = device("rtx-4090")
    assert "on its GPU" in Diagnosis("x", (), facts).summary()
    assert "on its CPU" in Diagnosis("x", (), device("rtx-4090", gpu={"cuda_index": None})).summary()
