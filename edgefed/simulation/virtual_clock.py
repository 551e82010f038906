"""Time of a simulated federation: rounds end with their slowest client, and waiting is work's chance to hide. Pure.

a client     parts (download .. upload), then, where a method has it, work for its next round
a round      ends when the last update is in and aggregated
hidden       work for the next round that was done before this one had ended; what is left delays the next
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgefed.simulation.device_rates import ClientTimes


@dataclasses.dataclass(frozen=True)
class ClientSpan:
    """Where one client's time of a round went, in seconds. ``late``: what was left of the work that the round before
    should have hidden; ``waits``: idle until the round was over; ``hidden``: work within that wait.
    """

    parts: Mapping[str, float]
    late: float
    waits: float
    hidden: float

    @property
    def busy(self) -> float:
        return self.late + sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class RoundSpan:
    """One round; ``begins`` and ``ends`` in seconds since the first one began. ``slowest``: who it waited for."""

    begins: float
    ends: float
    aggregation: float
    slowest: str
    clients: Mapping[str, ClientSpan]

    @property
    def seconds(self) -> float:
        return self.ends - self.begins


class VirtualClock:
    """Adds up rounds. ``now``: seconds since the run began."""

    def __init__(self) -> None:
        self.now = 0.0
        self._left: dict[str, float] = {}

    def round(self, times: Mapping[str, ClientTimes], aggregation: float) -> RoundSpan:
        """Let one round pass. ``times`` of every client that took part, at least one."""
        busy = {name: self._left.get(name, 0.0) + each.busy for name, each in times.items()}
        slowest = max(sorted(busy), key=busy.__getitem__)
        length = busy[slowest] + aggregation
        clients = {}
        for name, each in times.items():
            waits = length - busy[name]
            hidden = min(waits, each.in_wait)
            clients[name] = ClientSpan(dict(each.parts), self._left.get(name, 0.0), waits - hidden, hidden)
            self._left[name] = each.in_wait - hidden
        begins, self.now = self.now, self.now + length
        return RoundSpan(begins, self.now, aggregation, slowest, clients)
