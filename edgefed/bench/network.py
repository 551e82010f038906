"""The line to the aggregator as benchmark entries, and how long a round's upload takes on lines of known speed.

    connect       ms     open a TCP connection: one round trip
    message       ms     question and answer on an open connection: round trip and server
    kernel rtt    ms     what TCP_INFO says of that connection
    upload        MB/s   only when asked for: sends up to 16 MB that the server throws away
    download      MB/s   only when asked for

A server that is away, refuses the token or does not know a route gives entries that say so. Neither its address nor its
name is in any of them: a report is meant to be shared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from edgefed.agent import network
from edgefed.agent.channel import check_base_url
from edgefed.agent.transport import AggregatorClient
from edgefed.bench.statistics import MIN_SAMPLES, Entry
from edgefed.errors import ConfigError, EdgefedError, NotFound, Unauthorized
from edgefed.protocol import probe

PATIENCE_S = 10.0
"""Per phase of a request; a benchmark does not wait as long as an agent does."""
MSS_BYTES = 1448
"""Payload of one segment on an Ethernet path."""
ROUND_TRIPS = 4
"""Connection, offset, upload, commit: what one upload waits for beside its bytes."""


# --- lines of known speed ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Line:
    """An Internet access. Rates in bytes per second of payload; ``loss`` is the share of packets that get lost."""

    name: str
    down_bytes_per_s: float
    up_bytes_per_s: float
    rtt_ms: float
    loss: float = 0.0
    basis: str = "stated"

    @property
    def sustained_up_bytes_per_s(self) -> float:
        """What one TCP connection gets upwards: at most MSS / RTT * sqrt(3/2 / loss) (Mathis et al., CCR 27(3), 1997).

        That is the law of Reno; CUBIC and BBR do better on lossy lines, so it is the careful figure.
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
"""Fibre, cable and 5G are rounded from the medians that Ookla published for the United States in 2021 and 2022; the
others are typical figures without a single source. For planning, not a promise."""

_SCALE = {"k": 1e3, "m": 1e6, "g": 1e9}
_RATE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kKmMgG])(bit|bit/s|bps|B|B/s)\s*")
STATED_RTT_MS = 30.0


def find_line(text: str) -> Line:
    """A preset by name, or an uplink such as ``10mbit`` or ``1.5MB/s`` (bit, byte). Raises ConfigError."""
    if preset := PRESETS.get(text.strip().lower()):
        return preset
    found = _RATE.fullmatch(text)
    rate = float(found[1]) * _SCALE[found[2].lower()] / (1 if found[3].startswith("B") else 8) if found else 0.0
    if not rate:  # "10Mb" may be either, so it is neither
        raise ConfigError(
            f"{text!r} is no line",
            remedy=f"Name one of {', '.join(PRESETS)}, or the uplink's rate such as 10mbit or 1.5MB/s.",
        )
    return Line(text.strip(), rate, rate, STATED_RTT_MS, basis="stated")


def upload_seconds(size_bytes: int, line: Line) -> float:
    """Seconds until ``size_bytes`` are sent and acknowledged: bytes / rate + `ROUND_TRIPS` round trips."""
    return size_bytes / line.sustained_up_bytes_per_s + ROUND_TRIPS * line.rtt_ms / 1e3


# --- measuring --------------------------------------------------------------------------------------------------


def measure_network(
    url: str,
    token: str | None,
    *,
    active: bool = False,
    repeats: int = MIN_SAMPLES,
    record: Callable[[Entry], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Entry]:
    """Measure the line to the aggregator at ``url``. ``record`` gets each entry as soon as there is one.

    Without ``active`` it sends a few hundred bytes a sample and no more. Raises ConfigError for an address or a token
    that cannot be one; everything else that goes wrong is in the entries.
    """
    base_url = check_base_url(url)
    entries: list[Entry] = []

    def keep(name: str, unit: str, better: str, work: Callable[[], Entry]) -> Entry:
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
        keep(name, unit, better, lambda: Entry.skipped(name, unit, reason, better=better))

    patience = {"connect_s": PATIENCE_S, "read_s": PATIENCE_S, "write_s": PATIENCE_S}
    with AggregatorClient(base_url, token=token, **patience) as client:
        there = keep("connect", "ms", "lower", functools.partial(_connect, base_url, repeats))
        rates = (("upload", client.probe_up), ("download", client.probe_down))
        if not there.measured:
            for name in ("message", "kernel rtt"):
                skip(name, "ms", "lower", "the server does not answer")
            for name, _ in rates:
                skip(name, "MB/s", "higher", "the server does not answer")
            return entries
        round_trips: list[float] = []
        message = keep("message", "ms", "lower", lambda: _message(client, repeats, round_trips, clock))
        keep("kernel rtt", "ms", "lower", lambda: _kernel(client, round_trips))
        for name, send in rates:
            if not active:
                skip(name, "MB/s", "higher", "not asked for: `active` sends up to 17 MB each way")
            elif not message.measured:
                skip(name, "MB/s", "higher", message.reason)
            else:
                keep(name, "MB/s", "higher", functools.partial(_rate, name, send, client))
    return entries


def _connect(base_url: str, repeats: int) -> Entry:
    times = network.measure_connect(base_url, tries=repeats, timeout_s=PATIENCE_S)
    return Entry.of("connect", "ms", times.samples_ms, better="lower", params={"min_ms": times.min_ms})


def _message(client: AggregatorClient, repeats: int, round_trips: list[float], clock: Callable[[], float]) -> Entry:
    samples = []
    for turn in range(repeats + 1):
        begun = clock()
        client.status()
        if turn:  # the first one opens the connection
            samples.append((clock() - begun) * 1e3)
            rtt_ms = client.network_facts().rtt_ms.value
            if rtt_ms is not None:
                round_trips.append(rtt_ms)
    return Entry.of("message", "ms", samples, better="lower", note="status, connection open")


def _kernel(client: AggregatorClient, round_trips: list[float]) -> Entry:
    facts = client.network_facts()
    if not round_trips:
        return Entry.skipped("kernel rtt", "ms", facts.rtt_ms.describe(), better="lower")
    params = {"min_rtt_ms": facts.min_rtt_ms.value, "retransmit_share": facts.retransmit_share.value}
    return Entry.of("kernel rtt", "ms", round_trips, better="lower", note="TCP_INFO, smoothed", params=params)


def _rate(name: str, send: Callable[[int], tuple[probe.Mark, ...]], client: AggregatorClient) -> Entry:
    line = network.measure_line(send)
    params = {
        "probe_bytes": line.size_bytes, "probe_s": round(line.seconds, 4), "moved_bytes": line.moved_bytes,
        "settled": line.settled,
    }  # fmt: skip
    if name == "upload":
        params["retransmit_share"] = client.network_facts().retransmit_share.value
    if not line.samples:
        return Entry.failed(name, "MB/s", "over too soon to be timed", params=params)
    note = "one connection" if line.settled else "one connection, slow start included"
    return Entry.of(name, "MB/s", [rate / 1e6 for rate in line.samples], note=note, params=params)


def explain(error: EdgefedError, base_url: str) -> str:
    """One sentence for a report: what went wrong, without the server's address or name."""
    if getattr(error, "received_status", 0) == 429:
        wait_s = getattr(error, "retry_after", "")
        return f"the server has measured enough for now{f', again in {wait_s} s' if wait_s.isdigit() else ''}"
    if isinstance(error, Unauthorized):
        return "the server needs a token, and got none or another one"
    if isinstance(error, NotFound) and "no route" in str(error):
        return "the server is older and cannot be measured: it has no probe route"
    text = str(error).replace(base_url, "the server")
    host = urlsplit(base_url).hostname or ""
    return re.sub(rf"(?<![\w.-])'?\[?{re.escape(host)}\]?'?(?![\w.-])", "the server", text) if host else text
