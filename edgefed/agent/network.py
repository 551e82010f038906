"""The line to the aggregator in numbers: what transfers and the kernel told, round trips, and active measurements.

Cheapest first: real transfers (`throughput`), TCP_INFO (`tcp_info`), the time to open a connection, and only when its
owner asks, a measurement that sends bytes for nothing else (`routes.PROBE`). Nobody but the run's own aggregator is
ever contacted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from edgefed.agent.tcp_info import ConnectionRecord
from edgefed.agent.throughput import Throughput
from edgefed.errors import MalformedMessage, ServerUnreachable
from edgefed.hardware.reading import Reading, Reason
from edgefed.protocol import probe

CONNECT_TRIES = 5
SETTLE_S = 0.3
"""Beginning of a probe that is left out where the probe lasts long enough: slow start, and buffers that fill."""
ENOUGH_S = 1.0
"""A probe that lasts this long ends the doubling."""
SLICES = 7
"""Samples that one probe is cut into."""


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """The line to the aggregator as far as it is known. Rates are of bodies, bytes per second.

    ``rtt_ms`` is the kernel's smoothed round trip under the load that was, ``min_rtt_ms`` the shortest seen. A rate
    that no transfer has measured yet is missing; it is never 0.
    """

    up_bytes_per_s: Reading[float]
    down_bytes_per_s: Reading[float]
    rtt_ms: Reading[float]
    min_rtt_ms: Reading[float]
    retransmit_share: Reading[float]
    """Of the bytes that this device sent, 0..1."""
    delivery_rate_bytes_per_s: Reading[float]
    """The kernel's own estimate of the uplink, from the last large body that was sent."""

    @classmethod
    def of(cls, up: Throughput, down: Throughput, connections: ConnectionRecord) -> NetworkFacts:
        """Read the meters of a channel."""
        tcp = connections.newest
        return cls(
            up_bytes_per_s=_rate(up, "uploads"),
            down_bytes_per_s=_rate(down, "downloads"),
            rtt_ms=tcp.rtt_ms,
            min_rtt_ms=tcp.min_rtt_ms,
            retransmit_share=connections.retransmit_share,
            delivery_rate_bytes_per_s=tcp.delivery_rate_bytes_per_s,
        )

    def metrics(self) -> dict[str, float]:
        """What is known, as numbers for an update's metrics: {"network_up_bytes_per_s": ..., ...}.

        Without the kernel's estimate, which may be a lower bound, and a number cannot say so.
        """
        readings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del readings["delivery_rate_bytes_per_s"]
        return {f"network_{name}": float(reading.value) for name, reading in readings.items() if reading.known}

    @property
    def uplink_bytes_per_s(self) -> Reading[float]:
        """The best that is known of the uplink: what uploads reached, else the kernel's estimate."""
        return self.up_bytes_per_s if self.up_bytes_per_s.known else self.delivery_rate_bytes_per_s


def _rate(meter: Throughput, what: str) -> Reading[float]:
    rate = meter.bytes_per_s
    size_bytes, seconds = meter.observed
    if rate is None:
        return Reading.missing(Reason.ABSENT, what, f"{size_bytes} bytes so far say too little")
    return Reading.of(rate, f"{what}, {size_bytes / 1e6:.1f} MB in {seconds:.1f} s")


@dataclasses.dataclass(frozen=True)
class ConnectTimes:
    """Milliseconds to open a TCP connection, which is one round trip; name look-up left out."""

    samples_ms: tuple[float, ...]

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


def measure_connect(
    base_url: str,
    *,
    tries: int = CONNECT_TRIES,
    timeout_s: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> ConnectTimes:
    """Open ``tries`` connections one after the other and close them again. Raises ServerUnreachable.

    Goes straight to the host of ``base_url`` (see `channel.check_base_url`), past any HTTP proxy. A try that gets no
    answer is left out as long as another gets one.
    """
    parts = urlsplit(base_url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise ServerUnreachable(f"no address for {parts.hostname!r}: {error}") from error
    error: OSError | None = None
    for family, kind, protocol, _, address in found:  # a host with two families may answer on one only
        samples = []
        for _ in range(tries):
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(timeout_s)
                begun = clock()
                try:
                    connection.connect(address)
                except OSError as refusal:
                    error = refusal
                    if not samples:
                        break
                else:
                    samples.append((clock() - begun) * 1e3)
        if samples:
            return ConnectTimes(tuple(samples))
    raise ServerUnreachable(f"no answer from {base_url}: {error}") from error


# --- active measurement -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LineRate:
    """One direction, measured. ``samples`` are the rates of equal pieces of the last probe, bytes per second.

    ``seconds`` and ``size_bytes``: of that probe. ``settled``: its first `SETTLE_S` were left out. ``moved_bytes``: all
    that the measurement cost. ``samples`` is empty when even the largest probe was over at once.
    """

    samples: tuple[float, ...]
    size_bytes: int
    seconds: float
    settled: bool
    moved_bytes: int


def measure_line(
    send: Callable[[int], tuple[probe.Mark, ...]],
    *,
    most_bytes: int = probe.MAX_PROBE_BYTES,
    enough_s: float = ENOUGH_S,
) -> LineRate:
    """Double the probe from 64 KiB until it lasts ``enough_s``, or has ``most_bytes`` bytes.

    ``send(size_bytes)`` moves one probe and returns its marks: `AggregatorClient.probe_up` or ``probe_down``, whose
    errors pass through.
    """
    size_bytes, moved_bytes = min(probe.PROBE_BLOCK_BYTES, most_bytes), 0
    while True:
        marks = send(size_bytes)
        seconds, arrived = marks[-1] if marks else (0.0, 0)
        moved_bytes += arrived
        if seconds >= enough_s or size_bytes >= most_bytes or arrived < size_bytes:
            samples, settled = steady_rates(marks)
            return LineRate(samples, arrived, seconds, settled, moved_bytes)
        size_bytes = min(2 * size_bytes, most_bytes)


def steady_rates(
    marks: Sequence[probe.Mark], *, settle_s: float = SETTLE_S, slices: int = SLICES
) -> tuple[tuple[float, ...], bool]:
    """Rates of up to ``slices`` pieces of about equal size, bytes per second, and whether the beginning was left out.

    It is left out where as much again follows. The bytes of the first mark came before the clock ran, so they never
    count.
    """
    steady = [mark for mark in marks if mark[0] >= settle_s]
    settled = len(steady) > 1 and marks[-1][0] >= 2 * settle_s
    if not settled:
        steady = list(marks)
    if len(steady) < 2:
        return (), False
    pieces = min(slices, len(steady) - 1)
    edges: list[probe.Mark] = []
    for piece in range(pieces + 1):
        mark = steady[piece * (len(steady) - 1) // pieces]
        if not edges or mark[0] > edges[-1][0]:  # marks of one instant have no rate between them
            edges.append(mark)
    rates = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.pairwise(edges)]
    return tuple(rates), settled and bool(rates)


def decode_marks(answer: dict, size_bytes: int) -> tuple[probe.Mark, ...]:
    """The marks in a server's answer to an upload of ``size_bytes``. Raises MalformedMessage for nonsense."""
    found = answer.get("marks")
    marks: list[probe.Mark] = []
    for entry in found if isinstance(found, list) else [None]:
        before = marks[-1] if marks else (0.0, 0)
        if (
            not isinstance(entry, list)
            or len(entry) != 2
            or isinstance(entry[0], bool)
            or not isinstance(entry[0], (int, float))
            or type(entry[1]) is not int
            or not (math.isfinite(entry[0]) and before[0] <= entry[0] and before[1] < entry[1] <= size_bytes)
        ):
            raise MalformedMessage(f"the marks of a probe of {size_bytes} bytes hold {str(entry)[:80]!r}")
        marks.append((float(entry[0]), entry[1]))
    return tuple(marks)
