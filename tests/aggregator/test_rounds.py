"""The round state machine: each rule by example, and no order of events that loses an update or stands still."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.aggregator.rounds import (
    Abandon,
    ClientJoined,
    ClientLeft,
    ClientSeen,
    ExtendDeadline,
    Finish,
    Fold,
    Folded,
    OpenRound,
    Phase,
    RoundPolicy,
    RoundState,
    Tick,
    UpdateAccepted,
    restore,
    step,
)
from edgefed.errors import ConfigError


class Machine:
    """Feeds events and remembers the actions."""

    def __init__(self, **policy):
        rules = {"rounds": 2, "min_clients": 2, "client_timeout_s": 10.0, **policy}
        self.state = RoundState(policy=RoundPolicy(**rules), seed=0)
        self.now = 0.0
        self.actions = []

    def __call__(self, kind, *args, after: float = 0.0):
        self.now += after
        self.state, actions = step(self.state, kind(self.now, *args))
        self.actions += actions
        return list(actions)


def test_a_round_opens_with_enough_clients_and_closes_with_all():
    machine = Machine()
    assert machine(ClientJoined, "a") == []
    assert machine(ClientJoined, "b") == [OpenRound(1, ("a", "b"))]
    assert machine(UpdateAccepted, "b") == []
    assert machine(UpdateAccepted, "a") == [Fold(1, ("a", "b"))]
    assert machine.state.phase is Phase.AGGREGATING
    assert machine(Folded, 1) == [OpenRound(2, ("a", "b"))]
    machine(UpdateAccepted, "a")
    machine(UpdateAccepted, "b")
    assert machine(Folded, 2) == [Finish(3)]
    assert machine.state.phase is Phase.FINISHED
    assert machine.state.server_round == 3
    assert machine(ClientJoined, "c") == []
    assert machine(Tick, after=1e6) == []


def test_a_quorum_closes_the_round_early():
    machine = Machine(min_clients=3, quorum=2)
    for client in "abc":
        machine(ClientJoined, client)
    machine(UpdateAccepted, "c")
    assert machine(UpdateAccepted, "a") == [Fold(1, ("a", "c"))]
    with pytest.raises(ValueError, match="does not accept an update"):
        machine(UpdateAccepted, "b")


def test_lost_clients_are_not_awaited_but_their_updates_count():
    machine = Machine(min_clients=3)
    for client in "abc":
        machine(ClientJoined, client)
    machine(ClientLeft, "a")
    assert machine(UpdateAccepted, "a") == []
    machine(ClientSeen, "b", after=8.0)
    assert machine(Tick, after=4.0) == []  # c is silent for 12 s, b for 4 s
    assert machine(UpdateAccepted, "b") == [Fold(1, ("a", "b"))]


def test_an_unreachable_quorum_does_not_block_a_round():
    machine = Machine(quorum=2)
    machine(ClientJoined, "a")
    machine(ClientJoined, "b")
    machine(UpdateAccepted, "a")
    assert machine(ClientLeft, "b") == [Fold(1, ("a",))]


def test_the_deadline_closes_a_round_with_an_update_and_extends_one_without():
    machine = Machine(deadline_s=5.0)
    machine(ClientJoined, "a")
    machine(ClientJoined, "b")
    assert machine(Tick, after=4.9) == []
    assert machine(Tick, after=0.1) == [ExtendDeadline(1)]
    assert machine.state.deadline == 10.0
    assert machine.state.phase is Phase.TRAINING
    machine(UpdateAccepted, "a", after=1.0)
    machine(ClientSeen, "b")
    assert machine(Tick, after=4.0) == [Fold(1, ("a",))]


def test_a_deserted_round_resumes_when_a_participant_returns():
    machine = Machine()
    machine(ClientJoined, "a")
    machine(ClientJoined, "b")
    assert machine(Tick, after=11.0) == [Abandon(1)]
    assert machine.state.phase is Phase.WAITING
    assert not machine.state.is_trainer("a")
    assert machine(ClientSeen, "a") == [OpenRound(1, ("a",))]
    assert machine.state.is_trainer("a")


def test_an_update_in_a_deserted_round_counts():
    machine = Machine()
    machine(ClientJoined, "a")
    machine(ClientJoined, "b")
    machine(ClientLeft, "a")
    machine(ClientLeft, "b")
    assert machine.state.phase is Phase.WAITING
    assert machine(UpdateAccepted, "a") == [Fold(1, ("a",))]


def test_other_clients_can_join_a_deserted_round():
    machine = Machine()
    machine(ClientJoined, "a")
    machine(ClientJoined, "b")
    machine(Tick, after=11.0)
    machine(ClientJoined, "c")
    assert machine(ClientJoined, "d") == [OpenRound(1, ("c", "d"))]


def test_a_late_client_joins_only_if_a_participant_is_missing():
    machine = Machine()
    for client in "ab":
        machine(ClientJoined, client)
    assert machine(ClientJoined, "late") == []
    assert not machine.state.is_trainer("late")
    machine(ClientLeft, "a")
    assert machine(ClientJoined, "spare") == [OpenRound(1, ("b", "spare"))]
    assert machine.state.is_trainer("spare")
    machine(UpdateAccepted, "b")
    machine(UpdateAccepted, "spare")
    assert machine(Folded, 1) == [OpenRound(2, ("b", "late", "spare"))]


def test_the_sample_of_a_round_depends_on_seed_and_round_only():
    def samples(order: str, seed: int) -> list[tuple[str, ...]]:
        policy = RoundPolicy(rounds=9, min_clients=8, clients_per_round=3)
        state, found = RoundState(policy=policy, seed=seed), []
        actions = []
        for client in order:
            state, new = step(state, ClientJoined(0.0, client))
            actions += new
        for server_round in range(1, 9):
            chosen = actions[-1].clients
            found.append(chosen)
            assert len(chosen) == 3
            for client in chosen:
                state, _ = step(state, UpdateAccepted(0.0, client))
            state, actions = step(state, Folded(0.0, server_round))
        return found

    assert samples("abcdefgh", 1) == samples("hgfedcba", 1) != samples("abcdefgh", 2)
    assert len(set(samples("abcdefgh", 1))) > 1


def test_a_late_update_counts_once_in_a_later_round():
    machine = Machine(rounds=4, quorum=1, max_staleness=1)
    machine(ClientJoined, "a")
    machine(ClientJoined, "b")
    assert machine(UpdateAccepted, "a") == [Fold(1, ("a",))]
    assert machine.state.accepts_late("b", 1), "while the round is aggregated it counts in the next"
    assert machine(UpdateAccepted, "b", True) == []
    assert not machine.state.accepts_late("b", 1)
    assert machine(Folded, 1) == [OpenRound(2, ("a",)), Fold(2, ("b",))]
    assert machine(Folded, 2) == [OpenRound(3, ("a", "b"))]
    assert not machine.state.accepts_late("a", 1), "two rounds late"
    assert machine.state.accepts_late("a", 2)
    assert machine(UpdateAccepted, "a", True) == [Fold(3, ("a",))]
    machine(Folded, 3)
    machine(UpdateAccepted, "b")
    assert not machine.state.accepts_late("a", 3), "no round follows the last one"


def test_a_late_update_opens_no_round():
    machine = Machine(quorum=1, max_staleness=1)
    machine(ClientJoined, "a")
    machine(ClientJoined, "b")
    machine(UpdateAccepted, "a")
    machine(ClientLeft, "a")
    machine(Folded, 1)
    assert machine(UpdateAccepted, "b", True) == []
    assert machine.state.phase is Phase.WAITING
    assert machine(ClientJoined, "c") == [OpenRound(2, ("c",)), Fold(2, ("b",))]


def test_after_a_restart_every_participant_is_awaited_again():
    policy = RoundPolicy(rounds=2, min_clients=2, deadline_s=5.0, client_timeout_s=10.0)
    state = restore(
        policy, 0, phase=Phase.TRAINING, server_round=1, participants="ab", accepted="a", clients="ab", now=500.0
    )
    state, actions = step(state, Tick(504.0))
    assert actions == ()
    assert state.is_trainer("b")
    assert not state.is_trainer("a")
    state, actions = step(state, Tick(505.0))
    assert actions == (Fold(1, ("a",)),)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0}, {"min_clients": 0}, {"quorum": 0}, {"clients_per_round": 0}, {"deadline_s": 0.0},
        {"deadline_s": float("nan")}, {"client_timeout_s": 0.0}, {"quorum": 3, "clients_per_round": 2},
    ],
)  # fmt: skip
def test_an_invalid_policy_is_refused(wrong):
    with pytest.raises(ConfigError):
        RoundPolicy(**{"rounds": 1, **wrong}).check()


CLIENTS = "abcd"
EVENTS = st.one_of(
    st.tuples(st.sampled_from([ClientJoined, ClientSeen, ClientLeft, UpdateAccepted]), st.sampled_from(CLIENTS)),
    st.tuples(st.just(Tick), st.sampled_from([0.1, 4.0, 11.0])),
    st.tuples(st.just(Folded), st.none()),
    st.tuples(st.just("late"), st.sampled_from(CLIENTS)),
)
POLICIES = st.builds(
    dict,
    rounds=st.integers(1, 3),
    min_clients=st.integers(1, 3),
    quorum=st.none() | st.integers(1, 3),
    deadline_s=st.none() | st.just(7.0),
    clients_per_round=st.none() | st.integers(3, 4),
    max_staleness=st.integers(0, 2),
)


@settings(max_examples=300, deadline=None)
@given(policy=POLICIES, events=st.lists(EVENTS, max_size=40))
def test_no_order_of_events_loses_an_update_or_blocks_the_run(policy, events):
    machine = Machine(**policy)
    accepted: dict[int, set[str]] = {}

    def feed(kind, value) -> None:
        state = machine.state
        if kind is Tick:
            machine(Tick, after=value)
        elif kind is Folded:
            if state.phase is Phase.AGGREGATING:
                machine(Folded, state.server_round)
        elif kind == "late":
            counted_in = state.server_round + (state.phase is Phase.AGGREGATING)
            if state.accepts_late(value, counted_in - 1):
                accepted.setdefault(counted_in, set()).add(value)
                machine(UpdateAccepted, value, True)
        elif kind is UpdateAccepted:
            if state.accepts(value):
                accepted.setdefault(state.server_round, set()).add(value)
                machine(UpdateAccepted, value)
        else:
            machine(kind, value)
        check()

    def check() -> None:
        state = machine.state
        assert state.accepted == (
            accepted.get(state.server_round, set()) if state.phase is not Phase.FINISHED else set()
        )
        if state.phase is Phase.TRAINING:
            assert state.awaited(machine.now), "a round that trains awaits a client"
        if state.phase is Phase.WAITING:
            assert state.accepted == state.late, "a round with an update of its own closes or trains"

    for kind, value in events:
        feed(kind, value)
    # However it got here: two obedient clients that stay bring the run to its end.
    for _ in range(60):
        if machine.state.phase is Phase.FINISHED:
            break
        for client in CLIENTS:
            feed(ClientJoined, client)
        for client in CLIENTS:
            if machine.state.is_trainer(client):
                feed(UpdateAccepted, client)
        feed(Folded, None)
    assert machine.state.phase is Phase.FINISHED
    folds = [action for action in machine.actions if isinstance(action, Fold)]
    assert [fold.server_round for fold in folds] == list(range(1, policy["rounds"] + 1))
    assert [set(fold.clients) for fold in folds] == [accepted[fold.server_round] for fold in folds]
