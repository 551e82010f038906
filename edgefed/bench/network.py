"""The connection to the aggregator as benchmark entries, and upload times on connections of known speed.

    connect       ms     open a TCP connection: one round trip
    message       ms     request and response on an open connection: round trip and server
    upload        MB/s   only with ``active``: sends up to 16 MB, which the server discards
    download      MB/s   only with ``active``

A server that does not answer, refuses the token or lacks a route yields entries with that reason. No entry contains its
address or name: a report is made to be shared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from edgefed.agent import network
from edgefed.agent.addresses import check_base_url
from edgefed.agent.transport import AggregatorClient
from edgefed.bench.statistics import MIN_SAMPLES, Entry
from edgefed.errors import ConfigError, EdgefedError, NotFound, Unauthorized
from edgefed.protocol import probe

TIMEOUT_S = 10.0
"""Time limit for each phase of a request, shorter than an agent's."""
MSS_BYTES = 1448
"""Payload of one TCP segment on Ethernet."""
ROUND_TRIPS = 4
"""Round trips of an upload: connection, offset, upload, commit."""


# --- connections of known speed ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Line:
    """An Internet connection. Rates are bytes of payload per second; ``loss`` is the share of lost packets."""

    name: str
    down_bytes_per_s: float
    up_bytes_per_s: float
    rtt_ms: float
    loss: float = 0.0
    basis: str = "stated"

    @property
    def sustained_up_bytes_per_s(self) -> float:
        """Upload rate of one TCP connection: at most MSS / RTT * sqrt(3/2 / loss) (Mathis et al., CCR 27(3), 1997).

        This holds for TCP Reno. CUBIC and BBR are faster on lossy connections, so it is a conservative estimate.
        """
        if not self.loss:
            return self.up_bytes_per_s
        return min(self.up_bytes_per_s, MSS_BYTES / (self.rtt_ms / 1e3) * math.sqrt(1.5 / self.loss))


def _line(name: str, down_mbit: float, up_mbit: float, rtt_ms: float, loss: float = 0.0) -> Line:
    return Line(name, down_mbit * 1e6 / 8, up_mbit * 1e6 / 8, rtt_ms, loss, basis="preset")


PRESETS: dict[str, Line] = {
    line.name: line
    for line in (
        _line("fibre", 500, 100, 8),
        _line("cable", 200, 15, 20),
        _line("dsl", 40, 8, 25),
        _line("lte", 40, 8, 45),
        _line("5g", 150, 20, 30),
        _line("wifi-bad", 20, 5, 60, 0.01),
        _line("starlink", 120, 12, 40),
    )
}
"""Fibre, cable and 5G are rounded medians that Ookla published for the United States in 2021 and 2022; the others are
typical figures without a single source. For planning only."""

_SCALE = {"k": 1e3, "m": 1e6, "g": 1e9}
_RATE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kKmMgG])(bit|bit/s|bps|B|B/s)\s*")
STATED_RTT_MS = 30.0


def find_line(text: str) -> Line:
    """Return a preset by name, or an uplink such as ``10mbit`` or ``1.5MB/s`` (bit, byte). Raises ConfigError."""
    if preset := PRESETS.get(text.strip().lower()):
        return preset
    found = _RATE.fullmatch(text)
    rate = float(found[1]) * _SCALE[found[2].lower()] / (1 if found[3].startswith("B") else 8) if found else 0.0
    if not rate:  # "10Mb" is ambiguous
        raise ConfigError(
            f"invalid connection {text!r}",
            remedy=f"Use one of {', '.join(PRESETS)}, or an upload rate such as 10mbit or 1.5MB/s.",
        )
    return Line(text.strip(), rate, rate, STATED_RTT_MS, basis="stated")


def upload_seconds(size_bytes: int, line: Line) -> float:
    """Return the seconds to send ``size_bytes`` with acknowledgement: bytes / rate + `ROUND_TRIPS` round trips."""
    return size_bytes / line.sustained_up_bytes_per_s + ROUND_TRIPS * line.rtt_ms / 1e3


# --- measuring --------------------------------------------------------------------------------------------------


def measure_network(
    url: str,
    token: str | None,
    *,
    active: bool = False,
    repeats: int = MIN_SAMPLES,
    record: Callable[[Entry], None] | None = None,
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Entry]:
    """Measure the connection to the aggregator at ``url``. ``record`` gets each entry as soon as it is complete.

    Without ``active`` it sends only a few hundred bytes a sample. Raises ConfigError for an invalid address or token;
    all other errors are in the entries.
    """
    base_url = check_base_url(url)
    entries: list[Entry] = []

    def add(name: str, unit: str, better: str, work: Callable[[], Entry]) -> Entry:
        try:
            entry = work()
        except KeyboardInterrupt:
            if record:
                record(Entry.interrupted(name, unit, better=better))
            raise
        except EdgefedError as error:
            entry = Entry.failed(name, unit, explain(error, base_url), better=better)
        entries.append(entry)
        if record:
            record(entry)
        return entry

    def skip(name: str, unit: str, better: str, reason: str) -> None:
        add(name, unit, better, lambda: Entry.skipped(name, unit, reason, better=better))

    with AggregatorClient(
        base_url, token=token, connect_s=timeout_s, read_s=timeout_s, write_s=timeout_s
    ) as client:  # fmt: skip
        connect = add("connect", "ms", "lower", functools.partial(_connect, base_url, repeats, timeout_s))
        rates = (("upload", client.probe_up), ("download", client.probe_down))
        if not connect.measured:
            skip("message", "ms", "lower", "the server does not answer")
            for name, _ in rates:
                skip(name, "MB/s", "higher", "the server does not answer")
            return entries
        message = add("message", "ms", "lower", lambda: _message(client, repeats, clock))
        for name, send in rates:
            if not active:
                skip(name, "MB/s", "higher", "not requested: `active` sends up to 17 MB each way")
            elif not message.measured:
                skip(name, "MB/s", "higher", message.reason)
            else:
                add(name, "MB/s", "higher", functools.partial(_rate, name, send))
    return entries


def _connect(base_url: str, repeats: int, timeout_s: float) -> Entry:
    times = network.measure_connect(base_url, tries=repeats, timeout_s=timeout_s)
    return Entry.of("connect", "ms", times.samples_ms, better="lower", params={"min_ms": times.min_ms})


def _message(client: AggregatorClient, repeats: int, clock: Callable[[], float]) -> Entry:
    samples = []
    for turn in range(repeats + 1):
        begun = clock()
        client.status()
        if turn:  # the first request opens the connection
            samples.append((clock() - begun) * 1e3)
    return Entry.of("message", "ms", samples, better="lower", note="status, connection open")


def _rate(name: str, send: Callable[[int], tuple[probe.Mark, ...]]) -> Entry:
    line = network.measure_line(send)
    params: dict[str, Any] = {
        "probe_bytes": line.size_bytes, "probe_s": round(line.seconds, 4), "moved_bytes": line.moved_bytes,
        "settled": line.settled,
    }  # fmt: skip
    if not line.samples:
        return Entry.failed(name, "MB/s", "too short to be timed", params=params)
    note = "one connection" if line.settled else "one connection, slow start included"
    return Entry.of(name, "MB/s", [rate / 1e6 for rate in line.samples], note=note, params=params)


def explain(error: EdgefedError, base_url: str) -> str:
    """Describe an error in one sentence for a report, without the server's address or name."""
    if getattr(error, "received_status", 0) == 429:
        wait_s = getattr(error, "retry_after", "")
        return (
            f"the server limits measurements{f', try again in {wait_s} s' if wait_s.isdigit() else ', try again later'}"
        )
    if isinstance(error, Unauthorized):
        return "the server requires a token; it is missing or wrong"
    if isinstance(error, NotFound) and "no route" in str(error):
        return "the server is too old to be measured: it has no probe route"
    text = str(error).replace(base_url, "the server")
    host = urlsplit(base_url).hostname or ""
    return re.sub(rf"(?<![\w.-])'?\[?{re.escape(host)}\]?'?(?![\w.-])", "the server", text) if host else text
