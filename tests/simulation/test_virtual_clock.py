"""Rounds on the virtual clock: who is waited for, and what hides in the wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefed.simulation.virtual_clock import ClientTimes, VirtualClock


def test_a_round_takes_as_long_as_its_slowest_client_and_the_aggregation():
    clock = VirtualClock()
    span = clock.round({"a": ClientTimes({"train": 3.0, "upload": 1.0}), "b": ClientTimes({"train": 10.0})}, 2.0)
    assert (span.begins, span.ends, span.slowest) == (0.0, 12.0, "b")
    assert span.clients["a"].waits == 8.0
    assert span.clients["b"].waits == 2.0
    assert clock.round({"a": ClientTimes({"train": 1.0})}, 0.0).ends == 13.0


def test_work_in_the_wait_is_hidden_up_to_the_wait_and_what_is_left_delays_the_next_round():
    clock = VirtualClock()
    first = clock.round(
        {"a": ClientTimes({"train": 4.0}, in_wait=3.0), "b": ClientTimes({"train": 5.0}, in_wait=3.0)}, 1.0
    )
    assert first.seconds == 6.0  # not delayed by the work itself
    assert (first.clients["a"].hidden, first.clients["a"].waits) == (2.0, 0.0)
    assert (first.clients["b"].hidden, first.clients["b"].waits) == (1.0, 0.0)
    second = clock.round({"a": ClientTimes({"train": 4.0}), "b": ClientTimes({"train": 5.0})}, 0.0)
    assert second.clients["a"].late == 1.0
    assert second.clients["b"].late == 2.0
    assert second.seconds == 7.0


def test_equally_slow_clients_are_told_apart_by_name():
    times = {"b": ClientTimes({"train": 1.0}), "a": ClientTimes({"train": 1.0})}
    assert VirtualClock().round(times, 0.0).slowest == "a"


seconds = st.floats(0, 1e6)
fleets = st.dictionaries(st.sampled_from("abcd"), st.tuples(seconds, seconds), min_size=1)


@given(st.lists(st.tuples(fleets, seconds), min_size=1, max_size=4))
def test_every_second_of_every_client_is_accounted_for(rounds):
    clock, now = VirtualClock(), 0.0
    for fleet, aggregation in rounds:
        times = {name: ClientTimes({"train": train}, in_wait) for name, (train, in_wait) in fleet.items()}
        span = clock.round(times, aggregation)
        assert span.begins == now
        now = span.ends
        for name, client in span.clients.items():
            assert client.waits >= 0
            assert client.late >= 0
            assert 0 <= client.hidden <= times[name].in_wait
            assert client.busy + client.hidden + client.waits == pytest.approx(span.seconds, abs=1e-3)


@given(fleets, seconds)
def test_a_slower_client_never_shortens_a_round(fleet, more):
    def length(extra: float) -> float:
        times = {name: ClientTimes({"train": train}, wait) for name, (train, wait) in fleet.items()}
        first = min(times)
        times[first] = ClientTimes({"train": times[first].parts["train"] + extra}, times[first].in_wait)
        return VirtualClock().round(times, 1.0).seconds

    assert length(more) >= length(0.0)
