"""TCP_INFO: the structure by hand, and the kernel of this machine where it has one."""

from __future__ import annotations

import socket
import struct
import sys
import threading

import pytest

from edgefed.agent import tcp_info
from edgefed.agent.tcp_info import ConnectionRecord, parse_tcp_info, read_tcp_info
from edgefed.hardware.reading import Reason

linux = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is read on Linux only")


def structure(length: int = 256, *, limited: bool = False, **fields: int) -> bytes:
    """A tcp_info with the given fields, as the kernel of this byte order writes it."""
    data = bytearray(512)
    places = {
        "rtt": (68, "=I"), "rttvar": (72, "=I"), "total_retrans": (100, "=I"), "bytes_acked": (120, "=Q"),
        "min_rtt": (148, "=I"), "delivery_rate": (160, "=Q"), "bytes_sent": (200, "=Q"), "bytes_retrans": (208, "=Q"),
    }  # fmt: skip
    for name, value in fields.items():
        offset, form = places[name]
        struct.pack_into(form, data, offset, value)
    if limited:
        data[7] |= 1 if sys.byteorder == "little" else 0x80
    return bytes(data[:length])


FULL = {
    "rtt": 20_500, "rttvar": 1_250, "total_retrans": 3, "bytes_acked": 90_000, "min_rtt": 18_000,
    "delivery_rate": 1_250_000, "bytes_sent": 100_000, "bytes_retrans": 5_000,
}  # fmt: skip


def test_every_field_of_a_whole_structure():
    info = parse_tcp_info(structure(**FULL))
    assert (info.rtt_ms.value, info.rtt_variation_ms.value, info.min_rtt_ms.value) == (20.5, 1.25, 18.0)
    assert (info.retransmits.value, info.bytes_acked.value) == (3, 90_000)
    assert (info.bytes_sent.value, info.bytes_retransmitted.value) == (100_000, 5_000)
    assert info.delivery_rate_bytes_per_s.value == 1_250_000.0
    assert info.delivery_rate_bytes_per_s.source == "TCP_INFO delivery_rate"


@pytest.mark.parametrize(
    ("length", "known"),
    [
        (0, set()),
        (71, set()),
        (72, {"rtt_ms"}),
        (104, {"rtt_ms", "rtt_variation_ms", "retransmits"}),  # Linux 2.6
        (192, {"rtt_ms", "rtt_variation_ms", "retransmits", "bytes_acked", "min_rtt_ms", "delivery_rate_bytes_per_s"}),
        (207, {"rtt_ms", "rtt_variation_ms", "retransmits", "bytes_acked", "min_rtt_ms", "delivery_rate_bytes_per_s"}),
    ],
)
def test_what_an_older_kernel_does_not_tell_is_unknown(length, known):
    info = parse_tcp_info(structure(length, **FULL))
    assert {name for name, reading in vars(info).items() if reading.known} == known
    for name, reading in vars(info).items():
        if name not in known:
            assert reading.reason is Reason.NOT_SUPPORTED
            assert f"{length} bytes" in reading.detail


def test_zero_is_not_a_time_and_not_a_rate():
    info = parse_tcp_info(structure(min_rtt=tcp_info.NO_MIN_RTT))
    for reading in (info.rtt_ms, info.rtt_variation_ms, info.min_rtt_ms, info.delivery_rate_bytes_per_s):
        assert reading.reason is Reason.ABSENT
    assert info.retransmits.value == info.bytes_sent.value == 0, "counts may be 0"


def test_a_rate_of_a_sender_with_pauses_is_called_a_lower_bound():
    info = parse_tcp_info(structure(limited=True, **FULL))
    assert info.delivery_rate_bytes_per_s.value == 1_250_000.0
    assert "at least" in info.delivery_rate_bytes_per_s.source


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_other_systems_are_not_asked(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    with socket.socket() as connection:
        info = read_tcp_info(connection)
    assert all(reading.reason is Reason.NOT_SUPPORTED and platform in reading.detail for reading in vars(info).values())


@linux
def test_sockets_that_cannot_tell():
    closed = socket.socket()
    closed.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for connection in (closed, datagrams):
            info = read_tcp_info(connection)
            assert all(reading.reason is Reason.FAILED and reading.detail for reading in vars(info).values())


@linux
def test_a_real_connection():
    """The kernel's own numbers after a megabyte, on whatever kernel this is."""
    size = 1_000_000
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()

        def read() -> None:
            left = size
            while left:
                left -= len(far.recv(65536))
            far.sendall(b"x")

        reader = threading.Thread(target=read)
        reader.start()
        near.sendall(bytes(size))
        assert near.recv(1) == b"x"
        reader.join(10)
        info = read_tcp_info(near)
        far.close()
    assert 0 < info.rtt_ms.value < 10_000
    for reading in (info.bytes_sent, info.bytes_acked):
        assert not reading.known or size <= reading.value <= 2 * size
    if info.delivery_rate_bytes_per_s.known:
        assert info.delivery_rate_bytes_per_s.value > 1000


@pytest.fixture
def told(monkeypatch):
    """What the kernel says next about a socket."""
    answers: dict[socket.socket, bytes] = {}
    monkeypatch.setattr(tcp_info, "read_tcp_info", lambda connection: parse_tcp_info(answers[connection]))
    return answers


def test_a_record_sums_over_connections_and_counts_nothing_twice(told):
    record = ConnectionRecord()
    assert record.retransmit_share.reason is Reason.ABSENT
    record.note(None, sending=True)  # a transport without a socket
    one, two = socket.socket(), socket.socket()
    with one, two:
        told[one] = structure(**{**FULL, "bytes_sent": 100_000, "bytes_retrans": 0})
        record.note(one, sending=True)
        told[two] = structure(**{**FULL, "bytes_sent": 100_000, "bytes_retrans": 10_000})
        record.note(two, sending=True)
        assert record.retransmit_share.value == pytest.approx(0.05)
        told[one] = structure(**{**FULL, "bytes_sent": 300_000, "bytes_retrans": 10_000})
        for _ in range(3):
            record.note(one, sending=True)
        assert record.retransmit_share.value == pytest.approx(20_000 / 400_000)


def test_a_record_keeps_what_a_later_sample_does_not_know(told):
    record = ConnectionRecord()
    with socket.socket() as connection:
        told[connection] = structure(**FULL)
        record.note(connection, sending=True)
        told[connection] = structure(**{**FULL, "rtt": 0, "min_rtt": 19_000, "delivery_rate": 7})
        record.note(connection, sending=False)
    newest = record.newest
    assert newest.rtt_ms.value == 20.5
    assert newest.min_rtt_ms.value == 18.0
    assert newest.delivery_rate_bytes_per_s.value == 1_250_000.0, "a rate of small messages says nothing"


def test_a_record_on_a_system_without_tcp_info(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    record = ConnectionRecord()
    with socket.socket() as connection:
        record.note(connection, sending=True)
    assert record.retransmit_share.reason is Reason.NOT_SUPPORTED
    assert record.newest.rtt_ms.reason is Reason.NOT_SUPPORTED


def test_a_record_forgets_closed_connections(told):
    record = ConnectionRecord()
    for _ in range(5):
        connection = socket.socket()
        told[connection] = structure(**FULL)
        record.note(connection, sending=True)
        connection.close()
        told.clear()
        del connection
    assert len(record._counted) == 0
    assert record.retransmit_share.value == pytest.approx(0.05)
