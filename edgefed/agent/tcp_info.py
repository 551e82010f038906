"""What the kernel knows of our own connections: Linux's TCP_INFO, free of charge and without privileges.

The structure grew over the years; a kernel returns as much of it as it knows, so every field is checked against the
length that came back. Offsets: ``struct tcp_info`` in include/uapi/linux/tcp.h, in which fields are only ever appended.
Behind a proxy or a VPN these are the figures of the way to it.
"""

from __future__ import annotations

import dataclasses
import socket
import struct
import sys
import threading
import weakref

from edgefed.hardware.reading import Reading, Reason

MOST_BYTES = 512
"""Room for the structure; 256 bytes in Linux 6."""
NO_MIN_RTT = 0xFFFFFFFF
_TCP_INFO = 11
"""`socket.TCP_INFO` where Python has it; the same number on all Linux architectures."""
_FLAGS_AT, _RTT_AT, _RTTVAR_AT, _TOTAL_RETRANS_AT, _MIN_RTT_AT = 7, 68, 72, 100, 148
_BYTES_ACKED_AT, _DELIVERY_RATE_AT, _BYTES_SENT_AT, _BYTES_RETRANS_AT = 120, 160, 200, 208


@dataclasses.dataclass(frozen=True)
class TcpInfo:
    """One connection at one moment. Counts are since it was opened, and of what we sent.

    ``delivery_rate_bytes_per_s``: the newest estimate of what reached the other side. When the sender had too little to
    send it is a lower bound, and its ``source`` says so.
    """

    rtt_ms: Reading[float]
    rtt_variation_ms: Reading[float]
    min_rtt_ms: Reading[float]
    retransmits: Reading[int]
    """Segments."""
    bytes_acked: Reading[int]
    bytes_sent: Reading[int]
    """Retransmissions included."""
    bytes_retransmitted: Reading[int]
    delivery_rate_bytes_per_s: Reading[float]


def read_tcp_info(connection: socket.socket) -> TcpInfo:
    """Ask the kernel about a TCP socket. Never raises: what is unknown says why."""
    if sys.platform not in ("linux", "android"):  # BSDs have an option of this name with another layout
        return _unknown(Reason.NOT_SUPPORTED, f"read on Linux only, this is {sys.platform}")
    try:
        data = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, MOST_BYTES)
    except (OSError, ValueError) as error:  # closed meanwhile, no TCP socket, or a sandbox that refuses
        return _unknown(Reason.FAILED, str(error))
    return parse_tcp_info(data)


def parse_tcp_info(data: bytes) -> TcpInfo:
    """Read the bytes of a ``struct tcp_info``, as long as this kernel made it."""

    def number(name: str, offset: int, form: str = "=I") -> Reading[int]:
        source = f"TCP_INFO {name}"
        if offset + struct.calcsize(form) > len(data):
            return Reading.missing(Reason.NOT_SUPPORTED, source, f"this kernel tells {len(data)} bytes of tcp_info")
        return Reading.of(struct.unpack_from(form, data, offset)[0], source)

    def time_ms(name: str, offset: int, *unknown: int) -> Reading[float]:
        reading = number(name, offset)
        if reading.value in (0, *unknown):
            return Reading.missing(Reason.ABSENT, reading.source, "no round trip was timed yet")
        return reading.map(lambda us: us / 1e3)

    rate = number("delivery_rate", _DELIVERY_RATE_AT, "=Q")
    if rate.value == 0:
        rate = Reading.missing(Reason.ABSENT, rate.source, "nothing was delivered yet")
    elif rate.known and data[_FLAGS_AT] & (1 if sys.byteorder == "little" else 0x80):
        rate = dataclasses.replace(rate, source=f"{rate.source}, at least: the sender had pauses")
    return TcpInfo(
        rtt_ms=time_ms("rtt", _RTT_AT),
        rtt_variation_ms=time_ms("rttvar", _RTTVAR_AT),
        min_rtt_ms=time_ms("min_rtt", _MIN_RTT_AT, NO_MIN_RTT),
        retransmits=number("total_retrans", _TOTAL_RETRANS_AT),
        bytes_acked=number("bytes_acked", _BYTES_ACKED_AT, "=Q"),
        bytes_sent=number("bytes_sent", _BYTES_SENT_AT, "=Q"),
        bytes_retransmitted=number("bytes_retrans", _BYTES_RETRANS_AT, "=Q"),
        delivery_rate_bytes_per_s=rate.map(float),
    )


def _unknown(reason: Reason, detail: str) -> TcpInfo:
    missing: Reading = Reading.missing(reason, "TCP_INFO", detail)
    return TcpInfo(*[missing] * len(dataclasses.fields(TcpInfo)))


class ConnectionRecord:
    """TCP_INFO of many connections put together. Thread-safe.

    Retransmissions are summed over all connections, round trips and delivery rate are of the newest sample that has
    one, and the shortest round trip is the smallest of all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: weakref.WeakKeyDictionary[socket.socket, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._newest = _unknown(Reason.ABSENT, "no connection yet")
        self._sent = self._retransmitted = 0

    def note(self, connection: socket.socket | None, *, sending: bool) -> None:
        """Sample one connection after an exchange. ``sending``: a large body went out, so its rate says something."""
        if connection is None:
            return
        info = read_tcp_info(connection)
        with self._lock:
            old = self._newest
            delivery = info.delivery_rate_bytes_per_s
            self._newest = dataclasses.replace(
                info,
                rtt_ms=_newer(info.rtt_ms, old.rtt_ms),
                rtt_variation_ms=_newer(info.rtt_variation_ms, old.rtt_variation_ms),
                min_rtt_ms=_smaller(info.min_rtt_ms, old.min_rtt_ms),
                delivery_rate_bytes_per_s=(delivery if sending and delivery.known else old.delivery_rate_bytes_per_s),
            )
            sent, again = info.bytes_sent.value, info.bytes_retransmitted.value
            if sent is not None and again is not None:
                before = self._counted.get(connection, (0, 0))
                self._counted[connection] = (sent, again)
                self._sent += sent - before[0]
                self._retransmitted += again - before[1]

    @property
    def newest(self) -> TcpInfo:
        """Times and rate put together as described above; its counts are those of one connection."""
        with self._lock:
            return self._newest

    @property
    def retransmit_share(self) -> Reading[float]:
        """Share of the bytes sent on all connections that were sent again, 0..1."""
        with self._lock:
            if self._sent:
                return Reading.of(self._retransmitted / self._sent, "TCP_INFO bytes_retrans / bytes_sent")
            known = self._newest.bytes_retransmitted
        if known.known:
            return Reading.missing(Reason.ABSENT, "TCP_INFO bytes_sent", "nothing was sent yet")
        return Reading(None, known.source, known.reason, known.detail)


def _newer(new: Reading[float], old: Reading[float]) -> Reading[float]:
    return old if old.known and not new.known else new


def _smaller(new: Reading[float], old: Reading[float]) -> Reading[float]:
    if new.value is None or old.value is None:
        return _newer(new, old)
    return new if new.value <= old.value else old
