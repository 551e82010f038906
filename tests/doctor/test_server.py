"""The way to an aggregator: every answer that a server, or something else at that address, may give."""

import contextlib
import http.server
import json
import socket
import threading

import pytest

from edgefed.doctor.finding import State
from edgefed.doctor.host import server_findings
from edgefed.errors import ConfigError, Unauthorized
from edgefed.protocol import PROTOCOL_VERSION, routes
from edgefed.protocol.messages import RunConfig, Status, TrainingConfig, encode_error, encode_message

HEALTHY = json.dumps({"status": "ok", "protocol_version": PROTOCOL_VERSION}).encode()
RUN = RunConfig(
    run_id="r", model="tiny", method="hfedmoe", method_options={}, rounds=5, seed=0, training=TrainingConfig()
)
STATUS = encode_message(
    Status(run=RUN, state="training", server_round=2, min_clients=1, quorum=1, deadline_s=None, updates_received=0,
           clients=(), history=(), memory_peak_bytes=0)
)  # fmt: skip


@pytest.fixture
def serve(monkeypatch):
    """serve(health, status, token=None) -> address. A reply is bytes, or (HTTP status, content type, bytes)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.ExitStack() as stack:

        def start(health, status=STATUS, token=None):
            class Handler(http.server.BaseHTTPRequestHandler):
                protocol_version = "HTTP/1.1"

                def do_GET(self):  # noqa: N802
                    reply = health if self.path == routes.HEALTH else status
                    if self.path == routes.STATUS and token and self.headers["authorization"] != f"Bearer {token}":
                        reply = (401, "application/json", encode_error(Unauthorized("this server needs a token")))
                    code, kind, body = reply if isinstance(reply, tuple) else (200, "application/json", reply)
                    self.send_response(code)
                    self.send_header("content-type", kind)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *_):
                    pass

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


def states(findings):
    return {finding.name: finding.state for finding in findings}


def test_a_server_that_is_ours(serve):
    findings = server_findings(serve(HEALTHY), None)
    assert states(findings) == {"server": State.OK, "protocol": State.OK, "token": State.OK}
    assert "run of tiny, round 2 of 5" in findings[-1].found


@pytest.mark.parametrize(
    ("token", "state", "words"), [("right", State.OK, "accepted"), ("wrong", State.PROBLEM, "not the server's"),
                                  (None, State.PROBLEM, "none was given")]
)  # fmt: skip
def test_tokens(serve, token, state, words):
    finding = server_findings(serve(HEALTHY, token="right"), token)[-1]
    assert finding.state is state
    assert words in finding.found
    assert state is State.OK or "EDGEFED_TOKEN" in finding.fix


def test_another_protocol(serve):
    for version, side in ((PROTOCOL_VERSION + 1, "device"), (0, "server")):
        health = json.dumps({"status": "ok", "protocol_version": version}).encode()
        findings = server_findings(serve(health, b'{"another": "status"}'), None)
        assert states(findings)["protocol"] is State.PROBLEM
        assert side in findings[1].fix
        assert states(findings)["token"] is State.NOTE


@pytest.mark.parametrize(
    "health",
    [
        (200, "text/html", b"<html>router</html>"),
        (404, "text/plain", b"no"),
        (502, "text/html", b"bad gateway"),
        b"{}",
        b"",
    ],
)
def test_something_else_answers(serve, health):
    (finding,) = server_findings(serve(health), None)
    assert finding.state is State.PROBLEM
    assert finding.fix


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (finding,) = server_findings(f"http://127.0.0.1:{port}", None)
    assert finding.state is State.PROBLEM
    assert "no answer" in finding.found


@pytest.mark.parametrize(("url", "token"), [("127.0.0.1:80", None), ("http://", None), ("http://127.0.0.1", "ä")])
def test_an_invalid_address_or_token_is_a_usage_error(url, token):
    with pytest.raises(ConfigError):
        server_findings(url, token)
