"""What a simulation found: losses and seconds by round, and where every client's time and memory went."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import msgspec

from edgefed.aggregator.metrics import LEFT
from edgefed.disk import without_nan, write_durably
from edgefed.errors import StateCorrupt
from edgefed.simulation.virtual_clock import ClientTimes, RoundWork

Way: TypeAlias = Literal["down", "up"]
WAYS: tuple[Way, ...] = ("down", "up")
LEDGER = ("upload_ratio", *(name for names in LEFT.values() for name in names))
"""Metrics of the aggregator about compression: uncompressed bytes per byte received, and L2 norms."""


@dataclasses.dataclass(frozen=True)
class ClientRound:
    """One client in one round. ``seconds`` by part; ``late``, ``waits``, ``hidden`` as in `virtual_clock.ClientSpan`.

    ``resident`` and ``trainable`` are experts per MoE layer of the trained model; bytes are those of the cost shape.
    ``memory_bytes``: peak of a step, by the memory model. ``expert_bytes``: the most that weights, gradients and
    moments of experts took in the training that really ran. ``device_losses``: held-out loss in nats per token of what
    the device holds, before and after training, if it was measured.
    """

    seconds: Mapping[str, float]
    late: float
    waits: float
    hidden: float
    resident: tuple[int, ...]
    trainable: tuple[int, ...]
    merged: tuple[int, ...]
    memory_bytes: int
    bytes_down: float
    bytes_up: float
    train_loss: float | None
    expert_bytes: int = 0
    device_losses: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class RoundResult:
    """One round.

    Attributes:
        server_round: From 1; 0 for the model before the first round.
        ends: Virtual seconds since the run began.
        aggregation: Seconds of the aggregator.
        slowest: The client that the round waited for.
        loss: Held-out loss of the new global model, mean over clients; NaN if it was not evaluated.
        accuracy: Its accuracy on held-out tokens, likewise.
        losses: Held-out loss by client.
        metrics: Results of the caller's own score.
        clients: What each client did.
        traffic: ``bytes_up_KIND`` and ``bytes_down_KIND`` of all clients, as charged, and what compression saved and
            left for later, as `LEDGER` names it.
    """

    server_round: int
    ends: float
    aggregation: float
    slowest: str
    loss: float
    accuracy: float
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    clients: Mapping[str, ClientRound]
    traffic: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def bytes_of(self, way: Way) -> float:
        """Bytes that clients sent or received, as charged."""
        return sum(client.bytes_up if way == "up" else client.bytes_down for client in self.clients.values())

    def left(self, of: str) -> float:
        """Share of the L2 norm that was left for later, of the "updates" or of the model's "step"; NaN if unknown."""
        part, whole = (self.traffic.get(name, 0.0) for name in LEFT[of])
        return part / whole if whole else math.nan


@dataclasses.dataclass(frozen=True)
class MethodRun:
    """One method on the whole fleet.

    Attributes:
        label: Names the run.
        method: The method.
        first: The model before the first round, at 0 s.
        rounds: The rounds.
        refused: {device that the method cannot run on: reason}.
        usage: {client: share of its tokens routed to each expert, by layer}, of the last profile if there is one.
        stopped: Why there are fewer rounds than requested; "" if there are not.
    """

    label: str
    method: str
    first: RoundResult
    rounds: tuple[RoundResult, ...]
    refused: Mapping[str, str]
    usage: Mapping[str, Sequence[Sequence[float]]]
    stopped: str = ""

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(virtual seconds, held-out loss) of the evaluated models, the start included."""
        return [(each.ends, each.loss) for each in (self.first, *self.rounds) if not math.isnan(each.loss)]

    def seconds_to(self, target: float, metric: str = "loss", *, higher: bool | None = None) -> float | None:
        """Virtual seconds until the end of the first round whose metric has reached ``target``; None: never.

        ``metric``: "loss", "accuracy" or one of the extra metrics. ``higher``: whether more is better (None: for all
        but the loss).
        """
        higher = metric != "loss" if higher is None else higher
        for each in (self.first, *self.rounds):
            value = getattr(each, metric) if metric in ("loss", "accuracy") else each.metrics.get(metric)
            if value is not None and (value >= target if higher else value <= target):
                return each.ends
        return None


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """All methods. ``budgets``: {client: bytes that training may use}; ``profiles``: {client: device profile}."""

    model: str
    cost_shape: str | None
    seed: int
    rounds: int
    target_loss: float | None
    budgets: Mapping[str, int]
    profiles: Mapping[str, str]
    runs: tuple[MethodRun, ...]

    def run(self, label: str) -> MethodRun:
        """The run of the method with this label."""
        return next(run for run in self.runs if run.label == label)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the seconds to the target. What was not measured is null."""
        data = cast(dict[str, Any], without_nan(dataclasses.asdict(self)))
        if self.target_loss is not None:
            data["seconds_to_target"] = {run.label: run.seconds_to(self.target_loss) for run in self.runs}
        return data


def round_traffic(
    works: Iterable[RoundWork], charged_bytes: Callable[[Mapping[str, int]], float], metrics: Mapping[str, float]
) -> dict[str, float]:
    """`RoundResult.traffic`. ``metrics``: the aggregator's of the round."""
    sizes: dict[str, float] = {}
    for work in works:
        for way, parts in (("down", work.down), ("down", work.waiting_down), ("up", work.up)):
            for kind, size in parts.items():
                name = f"bytes_{way}_{kind}"
                sizes[name] = sizes.get(name, 0.0) + charged_bytes({kind: size})
    return sizes | {name: metrics[name] for name in LEDGER if name in metrics}


class SavedRound(msgspec.Struct):
    """rounds/N.json."""

    result: RoundResult
    times: dict[str, ClientTimes]
    refused: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> SavedRound:
        """Raises StateCorrupt."""
        try:
            # The json module reads NaN, msgspec's own decoder does not.
            return msgspec.convert(json.loads(path.read_bytes()), cls)
        except ValueError as error:
            raise StateCorrupt(
                f"{path} is not a file that edgefed wrote: {error}", remedy="Delete the `out` folder and start again."
            ) from error

    def write(self, path: Path) -> None:
        """Raises StorageError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(msgspec.to_builtins(self)).encode())


def mean_loss(losses: Mapping[str, float]) -> float:
    """Mean of the clients' losses; NaN without any."""
    return sum(losses.values()) / len(losses) if losses else math.nan
