"""The aggregator's reports: the status message, the record of a round, its own peak memory."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from edgefed.aggregator.records import ClientRecord, RoundRecord, UpdateRecord
from edgefed.aggregator.rounds import Abandon, Action, ExtendDeadline, Fold, OpenRound, Phase, RoundState
from edgefed.progress import counted, format_seconds, round_line
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import ClientStatus, RoundStatus, RunConfig, SetAside, Status, UnitInfo
from edgefed.protocol.privacy import PrivacyStatus

logger = logging.getLogger(__name__)

SERVER_METRICS = re.compile(
    r"bytes_(up|down)_\w+|upload_ratio|model_(step|residual)_norm|late_updates|staleness|best_round|restored_round|"
    r"held_out_loss_median"
)
"""Metrics of a round that the server measures. What clients send by these names does not count."""
SHOWN_NAMES = 3
"""Clients that have left and are named to one that waits."""


@dataclasses.dataclass
class Presence:
    """What is known of a client while the server runs: its process, its last heartbeat, whether it heard `Finished`.

    ``comparing``: it evaluates the final model and will send a `Comparison`.

    ``instance``: the process that registered last. ``refused``: whether an earlier one was refused since.
    """

    instance: str = ""
    refused: bool = False
    phase: str = ""
    fraction: float = 0.0
    budget_bytes: int | None = None
    heard_finished: bool = False
    comparing: bool = False


def client_label(client: ClientRecord) -> str:
    """Name and short id of a client, for people: ``'vm' (188b3e2b)``."""
    return f"{client.name!r} ({client.client_id[:8]})"


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux: VmHWM, because ``ru_maxrss`` is inherited from a larger parent process.
    """
    if sys.platform.startswith("linux"):
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def round_status(
    current: RoundRecord,
    updates: Sequence[UpdateRecord],
    changed: Sequence[UnitInfo],
    set_aside: Sequence[SetAside] = (),
    undone: int | None = None,
    downloads: tuple[int, Mapping[str, float]] = (0, MappingProxyType({})),
    damaged: tuple[str, ...] = (),
    privacy: PrivacyStatus | None = None,
    more_metrics: Mapping[str, float] = MappingProxyType({}),
) -> RoundStatus:
    """The record of a round that was just folded, from the ``updates`` that counted."""
    return RoundStatus(
        server_round=current.server_round,
        participants=len({*current.participants, *(update.client_id for update in updates)}),
        updates=len(updates),
        seconds=max(0.0, time.time() - current.opened_at) if current.opened_at is not None else 0.0,
        uploaded_bytes=sum(update.size_bytes for update in updates),
        experts_changed=len({(unit.layer, unit.expert) for unit in changed if unit.kind == "expert"}),
        metrics=average_metrics(updates)
        | _lateness(current.server_round, updates)
        | dict(downloads[1])
        | dict(more_metrics),
        set_aside=tuple(set_aside),
        undone=undone,
        downloaded_bytes=downloads[0],
        damaged=damaged,
        privacy=privacy,
    )


def _lateness(server_round: int, updates: Sequence[UpdateRecord]) -> dict[str, float]:
    """Number of late updates, and the mean age of all updates in rounds; nothing if none was late."""
    ages = [server_round - update.server_round for update in updates]
    return (
        {"late_updates": float(sum(age > 0 for age in ages)), "staleness": sum(ages) / len(ages)} if any(ages) else {}
    )


def downloads_since(history: Sequence[RoundStatus], clients: Iterable[ClientRecord]) -> tuple[int, dict[str, float]]:
    """Bytes that clients have downloaded since the last round of ``history`` was folded.

    And metrics, where some of them were changes of blobs: the bytes of these, and what they saved.
    """
    clients = tuple(clients)
    found = {
        name: sum(getattr(client, field) for client in clients) - sum(done.metrics.get(name, 0.0) for done in history)
        for name, field in (("bytes_down_changes", "changed_bytes"), ("bytes_down_saved", "saved_bytes"))
    }
    total = sum(client.downloaded_bytes for client in clients) - sum(done.downloaded_bytes for done in history)
    return max(0, total), {name: size for name, size in found.items() if size > 0}


def log_action(action: Action) -> None:
    """Log what the state machine decided."""
    if isinstance(action, OpenRound):
        logger.info("round %d: %s to train", action.server_round, counted(len(action.clients), "client"))
    elif isinstance(action, Fold):
        logger.info("round %d: closed with %s", action.server_round, counted(len(action.clients), "update"))
    elif isinstance(action, ExtendDeadline):
        logger.warning("round %d: the deadline passed without an update; a new one starts", action.server_round)
    elif isinstance(action, Abandon):
        logger.warning(
            "round %d: all participants have left or fallen silent; waiting for clients", action.server_round
        )
    else:
        logger.info("run finished after %s", counted(action.server_round - 1, "round"))


def describe_round(status: RoundStatus, rounds: int, fold_s: float) -> str:
    """The line of the server's log about a round that was aggregated in ``fold_s`` seconds."""
    received = f"{status.updates} of {status.participants} clients"
    if late := status.metrics.get("late_updates"):
        received += f" ({late:.0f} late)"
    folded = f"aggregated in {format_seconds(fold_s)}"
    return round_line(status.server_round, rounds, status.metrics, status.seconds, received, folded)


def describe_comparison(comparison: Comparison) -> str:
    """The line of the server's log about what a client compared; losses in nats per token."""
    names = {
        "before": "before",
        "global_model": "global model",
        "own": "own",
        "device": "this device",
        "alone": "alone",
    }
    losses = [f"{text} {loss:.2f}" for name, text in names.items() if (loss := getattr(comparison, name)) is not None]
    found = f"on its held-out text {', '.join(losses)} nats per token" if losses else "nothing to compare"
    if shares := [f"{names[name]} {100 * share:.1f} %" for name, share in comparison.accuracies.items()]:
        found = f"answers to its held-out examples that are right: {', '.join(shares)}"
    return f"{found} (final model: {comparison.skipped})" if comparison.skipped else found


def average_metrics(updates: Sequence[UpdateRecord]) -> dict[str, float]:
    """Mean of each metric over the clients that sent it, weighted by ``num_examples``, without `SERVER_METRICS`."""
    metas = [update.meta for update in updates if update.meta is not None]
    averages = {}
    for name in sorted({name for meta in metas for name in meta.metrics if not SERVER_METRICS.fullmatch(name)}):
        pairs = [(meta.num_examples, meta.metrics[name]) for meta in metas if name in meta.metrics]
        total = sum(weight for weight, _ in pairs)
        # Divide the weights first, so that finite metrics cannot overflow.
        averages[name] = math.fsum(weight / total * value for weight, value in pairs)
    return averages


def build_status(
    run: RunConfig,
    state: RoundState,
    clients: Iterable[ClientRecord],
    presence: Mapping[str, Presence],
    history: Sequence[RoundStatus],
    now: float,
) -> Status:
    """Answer of GET status. ``quorum`` 0 means all participants."""
    return Status(
        run=run,
        state=state.phase.value,
        server_round=min(state.server_round, run.rounds),
        min_clients=state.policy.min_clients,
        quorum=state.policy.quorum or 0,
        deadline_s=None if state.deadline is None else max(0.0, state.deadline - now),
        updates_received=len(state.accepted),
        clients=tuple(
            _client_status(client, state, presence.get(client.client_id, Presence()), now)
            for client in sorted(clients, key=lambda client: client.client_id)
        ),
        history=tuple(history),
        memory_peak_bytes=peak_memory_bytes(),
    )


def _client_status(client: ClientRecord, state: RoundState, presence: Presence, now: float) -> ClientStatus:
    seen = state.last_seen.get(client.client_id)
    return ClientStatus(
        client_id=client.client_id,
        name=client.name,
        state=_client_state(client, state, now),
        phase=presence.phase,
        fraction=presence.fraction,
        memory_bytes=client.memory_bytes if presence.budget_bytes is None else presence.budget_bytes,
        expert_share=client.expert_share,
        rounds_done=client.rounds_done,
        uploaded_bytes=client.uploaded_bytes,
        downloaded_bytes=client.downloaded_bytes,
        last_seen_s=_seconds_since_seen(client, seen, now),
        metrics=client.metrics,
        device=client.device,
        comparison=client.comparison,
    )


def _seconds_since_seen(client: ClientRecord, seen: float | None, now: float) -> float:
    """Seconds since a client was last heard of; from its record if it has left."""
    if seen is None:
        return 0.0 if client.last_seen_at is None else max(0.0, time.time() - client.last_seen_at)
    return max(0.0, now - seen)


def _client_state(client: ClientRecord, state: RoundState, now: float) -> str:
    """One word: "left", "lost" (silent), "finished", "training", "done" (its update is in) or "waiting"."""
    if not client.joined:
        return "left"
    finished = state.phase is Phase.FINISHED
    if not state.is_live(client.client_id, now):
        return "finished" if finished and client.comparison is not None else "lost"  # its last message: it has ended
    if finished:
        return "finished"
    if client.client_id in state.accepted:
        return "done"
    return "training" if state.is_trainer(client.client_id) else "waiting"


def wait_reason(state: RoundState, client_id: str, now: float, gone: Iterable[str]) -> str:
    """Why a client waits. ``gone``: names of the clients that have left the run; only read where they matter."""
    if state.phase is Phase.WAITING:
        left, needed = list(gone), counted(state.policy.min_clients, "client")
        live = sum(state.is_live(other, now) for other in state.last_seen)
        names = ", ".join(left[:SHOWN_NAMES]) + (f" and {len(left) - SHOWN_NAMES} more" * (len(left) > SHOWN_NAMES))
        return f"round {state.server_round} waits: {live} of {needed} needed{f'; {names} left' if left else ''}"
    if state.phase is Phase.AGGREGATING:
        return f"round {state.server_round} is being aggregated"
    if client_id in state.accepted:
        return f"round {state.server_round} waits for other clients"
    return f"round {state.server_round} runs without this client; it can take part in the next one"
