"""Transfer rates to the aggregator: a passive meter on real transfers, and active measurements on request.

`Throughput` meters the uploads and downloads that a round makes anyway; its rates go into a client's `ExpertSurvey`.
`measure_connect` and `measure_line` belong to ``edgefed bench network``: the first opens connections, the second sends
bytes for nothing else (`routes.PROBE`). Only the run's own aggregator is ever contacted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from edgefed.errors import MalformedMessage, ServerUnreachable
from edgefed.protocol import probe

# --- passive: the pace of real transfers ------------------------------------------------------------------------

HALF_LIFE_S = 20.0
"""Busy seconds after which a byte counts half: long against one send buffer, short against an evening."""
TINY_BYTES = 64 * 1024
"""Smaller transfers last about one round trip on any line, so they are not counted."""
ENOUGH_BYTES, ENOUGH_TRANSFER_S = 256 * 1024, 0.1
"""A rate is unknown until this many bytes have moved, in this many busy seconds."""


@dataclasses.dataclass(frozen=True)
class TransferRates:
    """Rates of bodies, bytes per second. None until enough has moved in that direction; never 0."""

    up_bytes_per_s: float | None
    down_bytes_per_s: float | None

    def metrics(self) -> dict[str, float]:
        """The known rates as metrics of an update: {"network_up_bytes_per_s": ..., ...}."""
        return {f"network_{name}": rate for name, rate in dataclasses.asdict(self).items() if rate is not None}


class Throughput:
    """Bytes per second in one direction. Thread-safe; does no input or output of its own.

        rate = sum of bytes, decayed / sum of busy seconds, decayed at the same pace

    Only time during which a transfer is in progress counts, so pauses between files and idle rounds change nothing.
    Overlapping transfers share the clock: four parallel downloads give the rate of the line, not a quarter of it. The
    rate is a quotient of two sums and not a mean of rates, because a send buffer swallows the first megabytes at once
    and pays them back at the end; both are in the same sums.
    """

    def __init__(self, *, half_life_s: float = HALF_LIFE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._half_life_s = half_life_s
        self._clock = clock
        self._lock = threading.Lock()
        self._active = 0
        self._last = 0.0
        self._bytes = self._seconds = 0.0
        self._total_bytes, self._total_s = 0, 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """The rate; None before enough has moved."""
        with self._lock:
            if self._total_bytes < ENOUGH_BYTES or self._total_s < ENOUGH_TRANSFER_S:
                return None
            return self._bytes / self._seconds

    @property
    def observed(self) -> tuple[int, float]:
        """(bytes, busy seconds) since the start, without decay."""
        with self._lock:
            return self._total_bytes, self._total_s

    @property
    def active(self) -> int:
        """Number of transfers in progress."""
        with self._lock:
            return self._active

    def transfer(self, size_bytes: int) -> Transfer:
        """Context manager for one transfer of ``size_bytes``."""
        return Transfer(self, ignored=size_bytes < TINY_BYTES)

    def begin(self) -> bool:
        """Start a transfer. Returns whether the clock was running already."""
        with self._lock:
            self._active += 1
            if self._active > 1:
                return True
            self._last = self._clock()
            return False

    def moved(self, size_bytes: int) -> None:
        """Count bytes that have moved since the last event; 0 counts only the time."""
        with self._lock:
            now = self._clock()
            seconds, self._last = now - self._last, now
            self._total_bytes += size_bytes
            if seconds <= 0:
                self._bytes += size_bytes
                return
            self._total_s += seconds
            remaining = 0.5 ** (seconds / self._half_life_s)
            # The weight of these seconds at their end, each decayed by its own age; the bytes are spread evenly.
            weight = (1 - remaining) * self._half_life_s / math.log(2)
            self._bytes = self._bytes * remaining + size_bytes * weight / seconds
            self._seconds = self._seconds * remaining + weight

    def end(self) -> None:
        """End a transfer. The time since the last event is not counted."""
        with self._lock:
            self._active -= 1


class Transfer:
    """One transfer of a `Throughput`, as a context manager that may be left in any way.

    Receiving: call `moved` for every chunk. The clock starts with the first chunk, whose bytes arrived before it and
    count only while another transfer keeps the clock running. Sending: call `start` before the first chunk, `moved`
    after each, and `finish` at the answer, because only then have all bytes left. A broken transfer ends with its last
    chunk.
    """

    def __init__(self, throughput: Throughput, *, ignored: bool) -> None:
        self._throughput = throughput
        self._ignored = ignored
        self._running = False

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._running = False
            self._throughput.end()

    def start(self) -> None:
        """Start the clock now."""
        if not self._ignored and not self._running:
            self._throughput.begin()
            self._running = True

    def moved(self, size_bytes: int) -> None:
        """Count a chunk."""
        if self._ignored:
            return
        if not self._running:
            self._running = True
            if not self._throughput.begin():
                return
        self._throughput.moved(size_bytes)

    def finish(self) -> None:
        """Count the time until the other side has confirmed everything."""
        if self._running:
            self._throughput.moved(0)


# --- active: measurements that the owner asks for ---------------------------------------------------------------

CONNECT_TRIES = 5
SETTLE_S = 0.3
"""Beginning of a probe that is left out if the probe lasts long enough: slow start, and buffers that fill."""
ENOUGH_S = 1.0
"""A probe that lasts this long ends the doubling."""
SLICES = 7
"""Samples per probe."""


@dataclasses.dataclass(frozen=True)
class ConnectTimes:
    """Milliseconds to open a TCP connection, which is one round trip; without the name look-up."""

    samples_ms: tuple[float, ...]

    @property
    def min_ms(self) -> float:
        """Shortest time."""
        return min(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Median time."""
        return statistics.median(self.samples_ms)


def measure_connect(
    base_url: str,
    *,
    tries: int = CONNECT_TRIES,
    timeout_s: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> ConnectTimes:
    """Open ``tries`` connections one after the other and close them again.

    Connects to the host of ``base_url`` (see `channel.check_base_url`) directly, not through an HTTP proxy. A try
    without an answer is left out as long as another one gets an answer. Raises ServerUnreachable.
    """
    parts = urlsplit(base_url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise ServerUnreachable(f"no address for {parts.hostname!r}: {error}") from error
    last: OSError | None = None
    for family, kind, protocol, _, address in found:  # a host with two families may answer on one only
        samples: list[float] = []
        for _ in range(tries):
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(timeout_s)
                begun = clock()
                try:
                    connection.connect(address)
                except OSError as refusal:
                    last = refusal
                    if not samples:
                        break
                else:
                    samples.append((clock() - begun) * 1e3)
        if samples:
            return ConnectTimes(tuple(samples))
    raise ServerUnreachable(f"no answer from {base_url}: {last}") from last


@dataclasses.dataclass(frozen=True)
class LineRate:
    """One direction, measured.

    ``samples``: rates of equal slices of the last probe, bytes per second; empty when even the largest probe ended too
    soon. ``seconds`` and ``size_bytes``: of that probe. ``settled``: its first `SETTLE_S` were left out.
    ``moved_bytes``: total cost of the measurement.
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
    """Double the probe from 64 KiB until it lasts ``enough_s`` or has ``most_bytes`` bytes.

    ``send(size_bytes)`` moves one probe and returns its marks: `AggregatorClient.probe_up` or ``probe_down``. Their
    errors propagate.
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
    """Rates of up to ``slices`` slices of about equal size, bytes per second, and whether the beginning is left out.

    The first ``settle_s`` seconds are left out if the probe lasts at least twice as long. The bytes of the first mark
    arrived before the clock started, so they never count.
    """
    steady = [mark for mark in marks if mark[0] >= settle_s]
    settled = len(steady) > 1 and marks[-1][0] >= 2 * settle_s
    if not settled:
        steady = list(marks)
    if len(steady) < 2:
        return (), False
    count = min(slices, len(steady) - 1)
    edges: list[probe.Mark] = []
    for index in range(count + 1):
        mark = steady[index * (len(steady) - 1) // count]
        if not edges or mark[0] > edges[-1][0]:  # two marks at the same instant have no rate between them
            edges.append(mark)
    rates = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in itertools.pairwise(edges)]
    return tuple(rates), settled and bool(rates)


def decode_marks(answer: Mapping[str, Any], size_bytes: int) -> tuple[probe.Mark, ...]:
    """Check and return the marks in a server's answer to an upload of ``size_bytes``. Raises MalformedMessage."""
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
            raise MalformedMessage(f"invalid mark of a probe of {size_bytes} bytes: {str(entry)[:80]!r}")
        marks.append((float(entry[0]), entry[1]))
    return tuple(marks)
