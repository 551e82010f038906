"""The line in numbers: marks by hand, and real transfers over loopback, free and throttled."""

from __future__ import annotations

import hashlib
import os
import socket
import time

import pytest
from fake_aggregator import FakeAggregator
from hypothesis import given
from hypothesis import strategies as st
from throttling_proxy import ThrottlingProxy

from edgefed.agent import network
from edgefed.agent.network import TransferRates, decode_marks, measure_connect, measure_line, steady_rates
from edgefed.agent.transport import AggregatorClient
from edgefed.errors import MalformedMessage, NotFound, ProtocolError, ServerUnreachable
from edgefed.protocol import PROTOCOL_VERSION, probe
from edgefed.protocol.messages import Register

CLIENT, KEY = "c" * 32, "k" * 64
RATE = 2_000_000
SIZE = 2_400_000


def line_of(rate: float, settle_s: float = 0.0, faster: float = 1.0):
    """A line that needs size / rate seconds, ``faster`` in its first seconds; sends marks like a receiver's."""
    asked: list[int] = []

    def send(size: int):
        asked.append(size)
        recorder = probe.MarkRecorder(size, lambda: now[0])
        now, left = [50.0], size
        while left:
            chunk = min(left, 4096)
            now[0] += chunk / (rate * (faster if now[0] - 50.0 < settle_s else 1.0))
            recorder.arrived(chunk)
            left -= chunk
        return recorder.marks()

    send.asked = asked
    return send


# --- marks ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3_000_000), st.integers(1, 300))
def test_a_recorder_keeps_few_marks_and_every_byte(size, chunks):
    now, chunk = [7.0], -(-size // chunks)
    recorder = probe.MarkRecorder(size, lambda: now[0])
    left = size
    while left:
        recorder.arrived(min(chunk, left))
        left -= min(chunk, left)
        now[0] += 0.01
    marks = recorder.marks()
    assert marks[0][0] == 0.0
    assert marks[-1][1] == size == recorder.size_bytes
    assert list(marks) == sorted(set(marks))
    assert len(marks) <= probe.MAX_MARKS + 2
    assert decode_marks({"marks": [list(mark) for mark in marks]}, size) == marks


def test_no_marks_give_no_rate():
    assert probe.MarkRecorder(10).marks() == ()
    assert steady_rates([]) == ((), False) == steady_rates([(0.0, 65536)])
    assert steady_rates([(0.0, 1), (0.0, 2)]) == ((), False)


def test_a_steady_line_gives_its_rate_in_seven_pieces():
    rates, settled = steady_rates(line_of(1_000_000)(4_000_000))
    assert settled
    assert len(rates) == network.SLICES
    assert rates == pytest.approx([1_000_000] * network.SLICES, rel=1e-6)


def test_the_start_of_a_transfer_is_excluded_if_enough_follows():
    marks = line_of(1_000_000, settle_s=0.25, faster=10.0)(4_000_000)
    rates, settled = steady_rates(marks)
    assert settled
    assert rates == pytest.approx([1_000_000] * network.SLICES, rel=1e-6)
    short = [mark for mark in marks if mark[0] < 2 * network.SETTLE_S]
    rates, settled = steady_rates(short)
    assert not settled
    assert max(rates) == pytest.approx(10_000_000, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 10**6)), min_size=2, max_size=70))
def test_rates_never_exceed_the_fastest_piece(steps):
    marks, at, size = [], 0.0, 0
    for seconds, more in steps:
        at, size = at + (seconds if marks else 0.0), size + more
        marks.append((at, size))
    rates, _ = steady_rates(marks)
    assert len(rates) <= network.SLICES
    assert all(rate > 0 for rate in rates)
    if rates:
        pairs = [(b[1] - a[1], b[0] - a[0]) for a in marks for b in marks if b[0] > a[0]]
        fastest = max(moved / seconds for moved, seconds in pairs)
        assert max(rates) <= fastest * 1.000001


def test_probes_double_until_one_lasts_a_second():
    send = line_of(1_000_000)
    line = measure_line(send)
    assert send.asked == [65536 << step for step in range(5)], "65 ms, 131, 262, 524, 1049"
    assert line.samples == pytest.approx([1_000_000] * network.SLICES, rel=1e-6)
    assert (line.size_bytes, line.moved_bytes, line.settled) == (1 << 20, sum(send.asked), True)


def test_probes_end_with_the_largest():
    send = line_of(1e9)
    line = measure_line(send)
    assert send.asked[-1] == probe.MAX_PROBE_BYTES == line.size_bytes
    assert len(send.asked) == 8
    assert not line.settled
    assert line.samples == pytest.approx([1e9] * network.SLICES, rel=1e-6)


def test_a_slow_line_ends_with_its_first_probe():
    send = line_of(10_000)
    assert measure_line(send).samples == pytest.approx([10_000] * network.SLICES, rel=1e-6)
    assert len(send.asked) == 1


def test_a_truncated_probe_ends_the_measurement():
    line = measure_line(lambda size: ((0.0, 10), (0.5, 1000)))
    assert line.size_bytes == 1000
    assert line.samples == pytest.approx([1980.0])


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"marks": 3}, {"marks": [3]}, {"marks": [[0.0]]}, {"marks": [[0.0, 1, 2]]}, {"marks": [["0", 1]]},
        {"marks": [[0.0, 1.5]]}, {"marks": [[0.0, True]]}, {"marks": [[False, 1]]}, {"marks": [[-1.0, 1]]},
        {"marks": [[0.0, 0]]}, {"marks": [[0.0, 101]]}, {"marks": [[1.0, 5], [0.5, 6]]}, {"marks": [[0, 5], [1.0, 5]]},
        {"marks": [[None, 1]]}, {"marks": [[float("inf"), 1]]}, {"marks": [[float("nan"), 1]]},
    ],
)  # fmt: skip
def test_invalid_marks_of_a_server_are_refused(answer):
    with pytest.raises(MalformedMessage, match="invalid mark of a probe of 100 bytes"):
        decode_marks(answer, 100)


# --- connections ----------------------------------------------------------------------------------------------------


def test_connect_times(server):
    times = measure_connect(server.url)
    assert len(times.samples_ms) == network.CONNECT_TRIES
    assert 0 < times.min_ms <= times.median_ms <= max(times.samples_ms)


def test_connect_times_use_the_given_clock(server):
    ticks = iter(range(100))
    times = measure_connect(server.url, tries=3, clock=lambda: next(ticks) * 0.25)
    assert times.samples_ms == (250.0, 250.0, 250.0)


def test_connecting_to_a_closed_port_or_unknown_host():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerUnreachable, match="no answer from"):
        measure_connect(f"http://127.0.0.1:{port}")
    with pytest.raises(ServerUnreachable, match="no address for"):
        measure_connect("http://no-such-host.invalid")


# --- passive --------------------------------------------------------------------------------------------------------


def registered(client: AggregatorClient) -> AggregatorClient:
    message = Register(
        protocol_version=PROTOCOL_VERSION, client_id=CLIENT, client_key=KEY, name="n", memory_bytes=1,
        expert_share=1.0, compute_share=1.0, num_examples=1, edgefed_version="0",
    )  # fmt: skip
    client.register(message)
    return client


def open_client(url: str, read_s: float = 15.0) -> AggregatorClient:
    return AggregatorClient(url, CLIENT, KEY, read_s=read_s, write_s=15)


def put_blob(server: FakeAggregator, size: int) -> str:
    return server.add_blob(os.urandom(size))


def test_messages_alone_give_no_rate(server):
    with open_client(server.url) as client:
        registered(client)
        for _ in range(5):
            client.manifest()
        assert client.rates == TransferRates(None, None)
        assert client.rates.metrics() == {}


def test_transfers_are_measured_while_they_run(server, tmp_path):
    path = tmp_path / "update"
    path.write_bytes(os.urandom(3_000_000))
    with open_client(server.url) as client:
        registered(client)
        for _ in range(3):
            sha256 = put_blob(server, 2_000_000)
            client.download(sha256, 2_000_000, tmp_path / sha256)
        for attempt in (1, 2):
            client.upload(1, attempt, path)
        up, down = client.up.observed, client.down.observed
        rates = client.rates
    assert up[0] == 2 * 3_000_000
    assert up[1] > 0
    assert 3 * 2_000_000 - 3 * 65536 <= down[0] < 3 * 2_000_000, "all but the first chunk of each"
    for rate, (size_bytes, seconds) in ((rates.up_bytes_per_s, up), (rates.down_bytes_per_s, down)):
        assert (rate is not None) == (seconds >= 0.1)  # on a quick machine the rate may stay unknown
        if rate is not None:
            assert rate == pytest.approx(size_bytes / seconds, rel=0.2)
    assert set(rates.metrics()) <= {"network_up_bytes_per_s", "network_down_bytes_per_s"}


@pytest.mark.timeout(60)
def test_rates_of_throttled_transfers_match_the_throttle(server, tmp_path):
    """2.4 MB at 2 MB/s each way. The bounds leave room for a machine that is busy for most of a second."""
    data = os.urandom(SIZE)
    (tmp_path / "update").write_bytes(data)
    sha256 = server.add_blob(data)
    with ThrottlingProxy(server.port, up=RATE, down=RATE) as proxy, open_client(proxy.url) as client:
        registered(client)
        client.download(sha256, SIZE, tmp_path / "blob")
        client.upload(1, 1, tmp_path / "update")
        rates = client.rates
        assert proxy.moved["down"] >= SIZE
        assert proxy.moved["up"] >= SIZE
    assert bytes(server.partial[(CLIENT, 1, 1)]) == data == (tmp_path / "blob").read_bytes()
    for rate in (rates.up_bytes_per_s, rates.down_bytes_per_s):
        assert RATE / 10 < rate < 3 * RATE


@pytest.mark.timeout(60)
def test_waiting_for_a_silent_server_does_not_lower_the_rate(server, tmp_path):
    sha256 = put_blob(server, SIZE)
    with ThrottlingProxy(server.port, down=RATE) as proxy, open_client(proxy.url, read_s=1.0) as client:
        registered(client)

        def hush(_: int) -> None:
            proxy.silent = proxy.moved["down"] > SIZE // 4

        begun = time.monotonic()
        with pytest.raises(ServerUnreachable):
            client.download(sha256, SIZE, tmp_path / "blob", hush)
        waited_s = time.monotonic() - begun - client.down.observed[1]
        assert client.down.observed[0] > 0
        assert waited_s > 0.9, "the wait in vain is not part of the rate"
        proxy.silent = False
        client.download(sha256, SIZE, tmp_path / "blob")
    assert hashlib.sha256((tmp_path / "blob").read_bytes()).hexdigest() == sha256


@pytest.mark.timeout(60)
def test_cut_connections_leave_the_meter_usable(server, tmp_path):
    sha256 = put_blob(server, SIZE)
    with ThrottlingProxy(server.port, down=RATE) as proxy, open_client(proxy.url) as client:
        registered(client)
        cuts = []

        def cut(_: int) -> None:
            if not cuts and proxy.moved["down"] > SIZE // 4:
                cuts.append(proxy.moved["down"])
                proxy.drop()

        with pytest.raises(ServerUnreachable):
            client.download(sha256, SIZE, tmp_path / "blob", cut)
        client.download(sha256, SIZE, tmp_path / "blob")
        assert client.down.active == 0
        assert RATE / 10 < client.rates.down_bytes_per_s < 3 * RATE


# --- probes against something else than a new aggregator ------------------------------------------------------------


def test_a_server_without_the_route(server):
    server.fail.append(("probe", NotFound("no route POST '/v1/probe'"), 1))
    with open_client(server.url) as client:
        with pytest.raises(ProtocolError):  # the fake aggregator has none: a bare 404
            client.probe_down(1000)
        with pytest.raises(ProtocolError):
            client.probe_up(1000)
