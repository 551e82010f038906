"""The network part of the benchmark: with a real server, a throttled one, an old one, and none."""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "agent"))  # throttling_proxy is a plain module

from throttling_proxy import ThrottlingProxy  # noqa: E402

from edgefed.aggregator.app import Endpoints  # noqa: E402
from edgefed.aggregator.creation import create_run  # noqa: E402
from edgefed.aggregator.probing import ProbeLimiter, ProbeLimits  # noqa: E402
from edgefed.aggregator.rounds import RoundPolicy  # noqa: E402
from edgefed.aggregator.server import AggregatorServer, ServerConfig  # noqa: E402
from edgefed.bench import network  # noqa: E402
from edgefed.bench.network import PRESETS, ROUND_TRIPS, Line, find_line, measure_network, upload_seconds  # noqa: E402
from edgefed.bench.statistics import FAILED, INTERRUPTED, SKIPPED, Entry  # noqa: E402
from edgefed.errors import ConfigError, NetworkError, ServerUnreachable  # noqa: E402
from edgefed.protocol import routes  # noqa: E402
from edgefed.protocol.messages import RunConfig, TrainingConfig, UnitInfo  # noqa: E402

TOKEN = "correct-horse-battery"
NAMES = ["connect", "message", "upload", "download"]
linux = sys.platform == "linux"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "state"
    run = RunConfig(
        run_id="r", model="toy", method="fedavg", method_options={}, rounds=1, seed=1, training=TrainingConfig()
    )
    unit = UnitInfo(key="experts.0", kind="expert", layer=0, expert=0, trainable=True)
    tensors = {"w": ("F32", np.zeros((2, 2), np.float32))}
    create_run(folder, run, RoundPolicy(rounds=1, min_clients=1), [(unit, tensors)])
    return folder


@contextlib.contextmanager
def serving(state):
    ready = threading.Event()
    server = AggregatorServer(ServerConfig(state_folder=state, port=0, token=TOKEN), on_ready=lambda _: ready.set())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def server(state):
    with serving(state) as running:
        yield running


def by_name(entries: list[Entry], url: str) -> dict[str, Entry]:
    """The entries, complete, in order, and without the server's address."""
    assert [entry.name for entry in entries] == NAMES
    assert not any(url.rpartition(":")[2] in text or "127.0.0.1" in text for text in map(repr, entries))
    return {entry.name: entry for entry in entries}


# --- measured -------------------------------------------------------------------------------------------------------


def test_only_an_active_measurement_sends_data(state, monkeypatch):
    seen, probes = [], []

    class Recording(ProbeLimiter):
        def running(self, address, size_bytes):
            probes.append(size_bytes)
            return super().running(address, size_bytes)

    monkeypatch.setattr("edgefed.aggregator.app.ProbeLimiter", Recording)
    with serving(state) as server:
        found = by_name(measure_network(server.url, TOKEN, record=seen.append), server.url)
        assert not probes
        measure_network(server.url, TOKEN, active=True, repeats=1)
        assert probes
    assert [entry.name for entry in seen] == NAMES
    for name in ("connect", "message"):
        assert found[name].measured
        assert len(found[name].samples) == 7
        assert found[name].better == "lower"
    for name in ("upload", "download"):
        assert found[name].verdict == SKIPPED
        assert "not requested" in found[name].reason


@pytest.mark.timeout(90)
def test_a_throttled_line_is_measured_in_both_directions(server):
    """1.5 MB/s up and 3 MB/s down. Bounds as wide as a busy machine needs, and far below what loopback gives."""
    up, down = 1_500_000, 3_000_000
    with ThrottlingProxy(int(server.url.rpartition(":")[2]), up=up, down=down, delay_s=0.02) as proxy:
        found = by_name(measure_network(proxy.url, TOKEN, active=True), proxy.url)
        moved = dict(proxy.moved)
    assert found["message"].median >= 40, "20 ms each way"
    for name, way, rate in (("upload", "up", up), ("download", "down", down)):
        entry = found[name]
        assert rate / 1e7 < entry.median < 3 * rate / 1e6, entry
        assert len(entry.samples) == 7
        assert entry.params["settled"]
        assert entry.params["probe_s"] >= 1.0
        assert entry.params["moved_bytes"] <= moved[way] < entry.params["moved_bytes"] + 100_000
    assert found["upload"].params["moved_bytes"] < 8_000_000, "it stops once a probe lasts a second"


# --- errors ----------------------------------------------------------------------------------------------------------


def test_no_server():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    found = by_name(measure_network(url, None, active=True), url)
    assert found["connect"].verdict == FAILED
    assert found["connect"].reason.startswith("no answer from the server")
    assert all(found[name].verdict == SKIPPED for name in NAMES[1:])


def test_an_unknown_host_is_not_named_in_the_report():
    entries = measure_network("http://no-such-host.invalid:1", None)
    assert entries[0].verdict == FAILED
    assert "no address for the server" in entries[0].reason
    assert not any("no-such-host" in repr(entry) for entry in entries)


def test_a_server_that_accepts_and_never_answers():
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        found = by_name(measure_network(url, None, active=True, timeout_s=0.3), url)
    assert found["connect"].measured
    assert found["message"].verdict == FAILED
    assert "no answer" in found["message"].reason
    assert found["upload"].reason == found["message"].reason


@pytest.mark.parametrize("token", [None, "another"])
def test_a_wrong_token(server, token):
    found = by_name(measure_network(server.url, token, active=True), server.url)
    assert found["connect"].measured
    for name in ("message", "upload", "download"):
        assert "token" in found[name].reason
        assert not found[name].measured


def test_an_older_server_has_no_probe_route(state, monkeypatch):
    table = Endpoints.routes
    monkeypatch.setattr(Endpoints, "routes", lambda self: [r for r in table(self) if r.path != routes.PROBE])
    with serving(state) as server:
        found = by_name(measure_network(server.url, TOKEN, active=True), server.url)
    assert found["message"].measured
    for name in ("upload", "download"):
        assert found[name].verdict == FAILED
        assert "too old" in found[name].reason


def test_a_server_that_limits_measurements(state, monkeypatch):
    limits = ProbeLimits(address_bytes=1000)
    monkeypatch.setattr("edgefed.aggregator.app.ProbeLimiter", functools.partial(ProbeLimiter, limits))
    with serving(state) as server:
        found = by_name(measure_network(server.url, TOKEN, active=True), server.url)
    for name in ("upload", "download"):
        assert found[name].verdict == FAILED
        assert "limits measurements" in found[name].reason


def test_a_connection_that_breaks(server, monkeypatch):
    with ThrottlingProxy(int(server.url.rpartition(":")[2]), up=1_500_000) as proxy:
        real = network.network.measure_line

        def breaking(send, **options):
            proxy.silent = True
            proxy.drop()
            return real(send, **options)

        monkeypatch.setattr(network.network, "measure_line", breaking)
        found = by_name(measure_network(proxy.url, TOKEN, active=True, timeout_s=0.5), proxy.url)
    assert found["message"].measured
    assert found["upload"].verdict == FAILED
    assert "no answer from the server" in found["upload"].reason


def test_ctrl_c_keeps_the_results_so_far(server, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(network.network, "measure_line", stop)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        measure_network(server.url, TOKEN, active=True, record=seen.append)
    assert [entry.name for entry in seen] == NAMES[:3]
    assert seen[-1].verdict == INTERRUPTED


@pytest.mark.parametrize(("url", "token"), [("host:80", None), ("http://h/path", None), ("http://h", "to\nken")])
def test_an_invalid_address_or_token(url, token):
    with pytest.raises(ConfigError):
        measure_network(url, token)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("no answer from http://box.lan:8470: [Errno 111] refused", "no answer from the server: [Errno 111] refused"),
        ("no address for 'box.lan': unknown", "no address for the server: unknown"),
        ("box.lan.example is another name", "box.lan.example is another name"),
    ],
)
def test_reasons_do_not_name_the_server(text, clean):
    assert network.explain(ServerUnreachable(text), "http://box.lan:8470") == clean


def test_a_refusal_says_when_to_try_again():
    error = NetworkError("enough")
    error.received_status, error.retry_after = 429, "17"
    assert network.explain(error, "http://h").endswith("try again in 17 s")
    error.retry_after = "Sat, 21 Nov 2026 08:00:00 GMT"
    assert network.explain(error, "http://h").endswith("try again later")


# --- lines of known speed -------------------------------------------------------------------------------------------


def test_presets():
    assert set(PRESETS) == {"fibre", "cable", "dsl", "lte", "5g", "wifi-bad", "starlink"}
    for name, line in PRESETS.items():
        assert line.name == name
        assert find_line(f" {name.upper()} ") is line
        assert 0 < line.up_bytes_per_s <= line.down_bytes_per_s
        assert 0 < line.rtt_ms < 200
    assert PRESETS["cable"].up_bytes_per_s == 1_875_000


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10mbit", 1.25e6), ("10 Mbit/s", 1.25e6), ("1.5MB/s", 1.5e6), ("800kbps", 1e5), ("8kB", 8e3), ("1Gbit", 1.25e8)],
)
def test_a_stated_uplink(text, rate):
    assert find_line(text).up_bytes_per_s == pytest.approx(rate)
    assert find_line(text).basis == "stated"


@pytest.mark.parametrize("text", ["", "fiber", "0mbit", "-1mbit", "10", "10Mb", "mbit", "1e3mbit", "9" * 400 + "mbit"])
def test_an_invalid_connection(text):
    with pytest.raises(ConfigError, match="invalid connection") as caught:
        find_line(text)
    assert "fibre" in caught.value.remedy
    assert "10mbit" in caught.value.remedy


def test_upload_times_by_hand():
    ten = find_line("10mbit")
    waits = ROUND_TRIPS * 0.030
    assert upload_seconds(12_600_000, ten) == pytest.approx(10.08 + waits)
    assert upload_seconds(0, ten) == pytest.approx(waits)
    lossy = Line("", 1e9, 1e9, 60.0, 0.01)
    assert lossy.sustained_up_bytes_per_s == pytest.approx(1448 / 0.06 * 12.247, rel=1e-3)
    assert PRESETS["wifi-bad"].sustained_up_bytes_per_s < PRESETS["wifi-bad"].up_bytes_per_s
