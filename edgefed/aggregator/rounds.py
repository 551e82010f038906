r"""The round state machine: which clients take part in a round, and when it closes. Pure: no clock, file or socket.

    WAITING    --enough live clients-->  TRAINING  --quorum, all clients, or deadline-->  AGGREGATING
       ^  \                               |  ^
       |   `---- a participant returns --|--'                    AGGREGATING --folded--> WAITING (next round) | FINISHED
       `-------- no participant is left, and no update has arrived

`step` takes a state and an event with its time, and returns the next state and the actions to take.

Rules. A client is *live* if it was heard of within ``client_timeout_s``.
- A round opens when ``min_clients`` are live. All live clients take part, or a sample of ``clients_per_round``.
- It closes when ``quorum`` updates are accepted; or when there is an update and no live participant is missing (one
  that left or fell silent is not waited for, but its update counts if it arrives before the close); or at the deadline
  with at least one update. A quorum that the remaining participants cannot reach does not delay the close.
- At the deadline without an update the round gets a new deadline, because there is nothing to aggregate.
- If all participants are gone and there is no update, the round waits again, under the same number. If a participant
  returns, the round continues; if enough other clients are live, it opens for them in addition.
- With ``max_staleness`` an update of one of the last rounds is *late* and counts in the current one, or, while a round
  is aggregated, in the next. A client counts once in a round. A late update does not open a round.
- A client that joins during a round takes part in the next one, unless the round has become too small: fewer
  participants are live or done than ``clients_per_round``, or than ``min_clients`` where all take part.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from edgefed.aggregator.last_seen import LastSeen
from edgefed.errors import ConfigError
from edgefed.protocol.changes import DOWNLOADS, StepLimits


class Phase(str, enum.Enum):
    """Phase of the run. The values are those of `protocol.messages.Status.state`."""

    WAITING = "waiting"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class RoundPolicy:
    """When rounds open and close, and how much one client counts.

    ``quorum`` None: all participants; ``clients_per_round`` None: all live clients. ``max_examples``: the most examples
    that a client counts with; None: as `aggregation.weighed` limits it. ``clip``: limit of a client's change, in
    multiples of the round's median; None: none. ``robust``: one of `robust.RULES`. ``rollback``: a round is undone if
    the held-out loss of most clients grows to this multiple; None: never. ``max_clients``: clients that are registered
    at most. ``max_staleness``: rounds by which an update may be late and still count, with less weight
    (`edgefed.aggregator.staleness`); 0: late updates are dropped. ``stop_after``: rounds without a better held-out loss
    that end the run (`edgefed.aggregator.stopping`); None: none do. ``adapter_average``: what is averaged of LoRA
    adapters, "product" (`edgefed.aggregator.adapter_products`), "factors", or "alternate": the one that trains
    (`protocol.alternation`). ``download_compression``: one of `protocol.changes.DOWNLOADS`.
    """

    rounds: int
    min_clients: int = 2
    quorum: int | None = None
    deadline_s: float | None = None
    clients_per_round: int | None = None
    client_timeout_s: float = 60.0
    max_examples: int | None = None
    clip: float | None = None
    robust: str = "mean"
    rollback: float | None = None
    max_clients: int = 4096
    max_staleness: int = 0
    stop_after: int | None = None
    adapter_average: str = "factors"
    download_compression: str = "none"

    def step_limits(self, server_round: int) -> StepLimits:
        """What of its step the model makes in a round; all of it in the last one."""
        return DOWNLOADS[self.download_compression if server_round < self.rounds else "none"]

    def check(self) -> None:
        """Raise ConfigError for invalid values."""
        wrong = [
            f"{name} is {value}, expected at least {least}"
            for name, value, least in (
                ("rounds", self.rounds, 1),
                ("min_clients", self.min_clients, 1),
                ("quorum", self.quorum, 1),
                ("clients_per_round", self.clients_per_round, 1),
                ("max_examples", self.max_examples, 1),
                ("max_clients", self.max_clients, 1),
                ("max_staleness", self.max_staleness, 0),
                ("stop_after", self.stop_after, 1),
            )
            if value is not None and value < least
        ]
        if self.deadline_s is not None and not 0 < self.deadline_s < float("inf"):
            wrong.append(f"deadline_s is {self.deadline_s}, expected a positive number")
        for name, ratio in (("clip", self.clip), ("rollback", self.rollback)):
            if ratio is not None and not 1 <= ratio < float("inf"):
                wrong.append(f"{name} is {ratio}, expected a number from 1")
        if not 0 < self.client_timeout_s < float("inf"):
            wrong.append(f"client_timeout_s is {self.client_timeout_s}, expected a positive number")
        if self.quorum and self.clients_per_round and self.quorum > self.clients_per_round:
            wrong.append(f"quorum {self.quorum} is more than the {self.clients_per_round} clients of a round")
        if self.adapter_average not in ("product", "factors", "alternate"):
            wrong.append(f"adapter_average is {self.adapter_average!r}, expected product, factors or alternate")
        elif self.adapter_average == "product" and self.robust != "mean":
            wrong.append(f"adapter_average is product, which robust={self.robust} cannot combine; expected factors")
        if self.download_compression not in DOWNLOADS:
            known = ", ".join(DOWNLOADS)
            wrong.append(f"download_compression is {self.download_compression!r}, expected one of {known}")
        if wrong:
            raise ConfigError("; ".join(wrong))


# --- events and actions -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened at ``now`` (seconds of a monotonic clock)."""

    now: float


@dataclasses.dataclass(frozen=True)
class Tick(Event):
    """Time passed."""


@dataclasses.dataclass(frozen=True)
class ClientJoined(Event):
    """A client has registered, or registered again."""

    client_id: str


@dataclasses.dataclass(frozen=True)
class ClientSeen(Event):
    """A client was heard of. Ignored for clients that have not joined, or have left."""

    client_id: str


@dataclasses.dataclass(frozen=True)
class ClientLeft(Event):
    """A client has left."""

    client_id: str


@dataclasses.dataclass(frozen=True)
class UpdateAccepted(Event):
    """An update is safe on disk. Only for clients that `RoundState.accepts`, or `accepts_late` if it is ``late``."""

    client_id: str
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Folded(Event):
    """The round was aggregated; the next global model exists. ``last``: it ends the run early."""

    server_round: int
    last: bool = False


@dataclasses.dataclass(frozen=True)
class OpenRound:
    """Training begins, or continues with more or returned participants.

    ``clients``: those that have to train: live participants without an update.
    """

    server_round: int
    clients: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fold:
    """Aggregate these clients' updates, then report `Folded`."""

    server_round: int
    clients: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ExtendDeadline:
    """The deadline passed without an update; a new one starts."""

    server_round: int


@dataclasses.dataclass(frozen=True)
class Abandon:
    """All participants are gone without an update: the round waits for clients again."""

    server_round: int


@dataclasses.dataclass(frozen=True)
class Finish:
    """The last round is done; ``server_round`` is the number of the final model's manifest."""

    server_round: int


Action = OpenRound | Fold | ExtendDeadline | Abandon | Finish


# --- the machine ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RoundState:
    """State of the machine. ``last_seen``: the clients that have joined and not left.

    ``accepted``: clients whose updates the round counts. ``late``: those of them whose update is late. ``carried``:
    clients with a late update for the next round, since this one is being aggregated.
    """

    policy: RoundPolicy
    seed: int
    phase: Phase = Phase.WAITING
    server_round: int = 1
    last_seen: Mapping[str, float] = dataclasses.field(default_factory=dict)
    participants: frozenset[str] = frozenset()
    accepted: frozenset[str] = frozenset()
    deadline: float | None = None
    late: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()

    def is_live(self, client_id: str, now: float) -> bool:
        """Whether a client was heard of within the time-out."""
        seen = self.last_seen.get(client_id)
        return seen is not None and now - seen <= self.policy.client_timeout_s

    def live(self, now: float) -> list[str]:
        """Live clients, sorted."""
        return sorted(client_id for client_id in self.last_seen if self.is_live(client_id, now))

    def awaited(self, now: float) -> list[str]:
        """Live participants whose update is missing, sorted."""
        return sorted(c for c in self.participants if c not in self.accepted and self.is_live(c, now))

    def accepts(self, client_id: str) -> bool:
        """Whether an update of this client for this round would count."""
        open_ = self.phase in (Phase.WAITING, Phase.TRAINING)
        return open_ and client_id in self.participants and client_id not in self.accepted

    def accepts_late(self, client_id: str, server_round: int) -> bool:
        """Whether an update for this earlier round would count, if the client took part in that one."""
        next_round = self.server_round + (self.phase is Phase.AGGREGATING)
        if self.phase is Phase.FINISHED or next_round > self.policy.rounds:
            return False
        counted = self.carried if self.phase is Phase.AGGREGATING else self.accepted
        return 0 < next_round - server_round <= self.policy.max_staleness and client_id not in counted

    def is_trainer(self, client_id: str) -> bool:
        """Whether this client has to train now."""
        return self.phase is Phase.TRAINING and self.accepts(client_id)


def step(state: RoundState, event: Event) -> tuple[RoundState, tuple[Action, ...]]:
    """The state after ``event``, and the actions in order. Raises ValueError for an impossible event."""
    actions: list[Action] = []
    now = event.now
    if isinstance(event, ClientJoined):
        state = _joined(state, event.client_id, now, actions)
    elif isinstance(event, ClientSeen) and event.client_id in state.last_seen:
        state = dataclasses.replace(state, last_seen=LastSeen.of(state.last_seen).seen(event.client_id, now))
    elif isinstance(event, ClientLeft):
        state = dataclasses.replace(state, last_seen=LastSeen.of(state.last_seen).without(event.client_id))
    elif isinstance(event, UpdateAccepted):
        state = _accepted(state, event.client_id, event.late)
    elif isinstance(event, Folded):
        state = _folded(state, event, actions)
    state = _settle(state, now, actions)
    return state, tuple(actions)


def restore(
    policy: RoundPolicy,
    seed: int,
    *,
    phase: Phase,
    server_round: int,
    participants: Iterable[str],
    accepted: Iterable[str],
    clients: Iterable[str],
    now: float,
    late: Iterable[str] = (),
    lost: Mapping[str, float] = MappingProxyType({}),
) -> RoundState:
    """The state after a restart. A deadline starts again, and every client counts as just seen: none could reach us.

    ``lost``: seconds of silence of those of ``clients`` that had fallen silent before. They are live again once they
    are heard of.
    """
    shortest = 1.01 * policy.client_timeout_s
    last_seen = {c: now for c in clients} | {c: now - max(seconds, shortest) for c, seconds in lost.items()}
    deadline = now + policy.deadline_s if phase is Phase.TRAINING and policy.deadline_s is not None else None
    return RoundState(
        policy=policy, seed=seed, phase=phase, server_round=server_round, last_seen=last_seen,
        participants=frozenset(participants), accepted=frozenset(accepted), deadline=deadline,
        late=frozenset(late),
    )  # fmt: skip


def after_standstill(state: RoundState, seconds: float) -> RoundState:
    """The state after this process stood still: the time does not count, since no client could reach it."""
    last_seen = {client_id: at + seconds for client_id, at in state.last_seen.items()}
    deadline = None if state.deadline is None else state.deadline + seconds
    return dataclasses.replace(state, last_seen=last_seen, deadline=deadline)


def _joined(state: RoundState, client_id: str, now: float, actions: list[Action]) -> RoundState:
    state = dataclasses.replace(state, last_seen=LastSeen.of(state.last_seen).seen(client_id, now))
    if state.phase is Phase.TRAINING and client_id not in state.participants:
        there = sum(1 for c in state.participants if c in state.accepted or state.is_live(c, now))
        if there < (state.policy.clients_per_round or state.policy.min_clients):
            state = dataclasses.replace(state, participants=state.participants | {client_id})
            actions.append(OpenRound(state.server_round, tuple(state.awaited(now))))
    return state


def _accepted(state: RoundState, client_id: str, late: bool) -> RoundState:
    if late and state.phase is Phase.AGGREGATING:
        return dataclasses.replace(state, carried=state.carried | {client_id})
    if not (late or state.accepts(client_id)) or client_id in state.accepted:
        raise ValueError(f"round {state.server_round} does not accept an update of client {client_id!r}")
    accepted, found_late = state.accepted | {client_id}, state.late | {client_id} if late else state.late
    return dataclasses.replace(state, accepted=accepted, late=found_late)


def _folded(state: RoundState, event: Folded, actions: list[Action]) -> RoundState:
    server_round = event.server_round
    if state.phase is not Phase.AGGREGATING or server_round != state.server_round:
        raise ValueError(f"round {server_round} was folded, but round {state.server_round} is {state.phase.value}")
    phase = Phase.FINISHED if event.last or server_round >= state.policy.rounds else Phase.WAITING
    if phase is Phase.FINISHED:
        actions.append(Finish(server_round + 1))
    return dataclasses.replace(
        state, phase=phase, server_round=server_round + 1, participants=frozenset(), accepted=state.carried,
        late=state.carried, carried=frozenset(), deadline=None,
    )  # fmt: skip


def _settle(state: RoundState, now: float, actions: list[Action]) -> RoundState:
    """Apply the rules of the module docstring. One pass suffices: an opened round has a live participant."""
    if state.phase is Phase.WAITING:
        state = _open_if_possible(state, now, actions)
    if state.phase is not Phase.TRAINING:
        return state
    awaited, accepted = state.awaited(now), len(state.accepted)
    overdue = state.deadline is not None and now >= state.deadline
    reached = state.policy.quorum is not None and accepted >= state.policy.quorum
    if accepted and (reached or overdue or not awaited):
        actions.append(Fold(state.server_round, tuple(sorted(state.accepted))))
        return dataclasses.replace(state, phase=Phase.AGGREGATING, deadline=None)
    if not awaited:
        actions.append(Abandon(state.server_round))
        return dataclasses.replace(state, phase=Phase.WAITING, deadline=None)
    if overdue:
        actions.append(ExtendDeadline(state.server_round))
        return dataclasses.replace(state, deadline=_deadline(state.policy, now))
    return state


def _open_if_possible(state: RoundState, now: float, actions: list[Action]) -> RoundState:
    returned = bool(state.accepted - state.late) or bool(state.awaited(now))
    chosen: list[str] = []
    if not returned:
        if len(state.last_seen) < state.policy.min_clients:
            return state  # without a look at each of them: this runs at every request
        live, policy = state.live(now), state.policy
        if len(live) < policy.min_clients:
            return state
        chosen = live
        if policy.clients_per_round is not None and policy.clients_per_round < len(live):
            # A string seeds Python's generator identically on all platforms and versions.
            chosen = sorted(random.Random(f"{state.seed}/{state.server_round}").sample(live, policy.clients_per_round))
    state = dataclasses.replace(
        state,
        phase=Phase.TRAINING,
        participants=state.participants | set(chosen),
        deadline=_deadline(state.policy, now),
    )
    if awaited := state.awaited(now):  # otherwise the round closes at once
        actions.append(OpenRound(state.server_round, tuple(awaited)))
    return state


def _deadline(policy: RoundPolicy, now: float) -> float | None:
    return None if policy.deadline_s is None else now + policy.deadline_s
