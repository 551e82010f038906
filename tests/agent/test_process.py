"""A real agent process: killed, restarted, interrupted."""

from __future__ import annotations

import json
import os
import signal
import time

import msgspec
import pytest
from agent_rig import Device
from fake_aggregator import EXPERTS
from toy_device import toy_value

from edgefed.progress import stop_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.mark.timeout(40)
def test_killed_during_training(server, tmp_path, wait_until):
    with Device(server.url, tmp_path, step_s=0.5) as device:
        device.read_until("phase train")
        device.read_until("advance")
        device.kill()
    assert server.accepted == {}
    with Device(server.url, tmp_path) as device:
        code, out, err = device.finish()
    assert code == 0, err
    assert len(server.clients) == 1
    assert server.registrations == 2
    assert [(meta.server_round, meta.attempt) for meta in server.accepted.values()] == [(1, 2), (2, 1)]
    assert len(server.commits) == 2
    assert [server.value_of(expert) for expert in range(EXPERTS)] == [toy_value(0.0, 2)] * EXPERTS


@pytest.mark.timeout(40)
def test_killed_during_an_upload(server, tmp_path, wait_until):
    server.stall_upload_at = 40_000
    with Device(server.url, tmp_path) as device:
        wait_until(lambda: server.puts and server.puts[-1][1] == 40_000)
        device.kill()
    server.stall_upload_at = None
    before = len(server.blob_requests)
    with Device(server.url, tmp_path) as device:
        code, out, err = device.finish()
    assert code == 0, err
    assert "message continuing the upload of round 1" in out
    assert out.count("phase train") == 1
    assert [offset for offset, _ in server.puts] == [0, 40_000, 0]  # went on at the server's offset
    assert len(server.clients) == 1
    assert len(server.commits) == 2 == len(server.accepted)
    assert {meta.attempt for meta in server.commits} == {1}
    assert server.value_of(0) == toy_value(0.0, 2)
    assert len(server.blob_requests) > before
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["server_round"], line["resumed"]) for line in lines] == [(1, True), (2, False)]
    assert lines[0]["bytes_down"] > 5 * 16_384
    assert "train" in lines[0]["seconds"]


@pytest.mark.timeout(40)
def test_killed_between_commit_and_acknowledgement(server, tmp_path, wait_until):
    server.run = msgspec.structs.replace(server.run, rounds=1)
    server.quorum = 2  # the round stays open, so the repetition meets it
    server.lose_acknowledgements = 10**6
    with Device(server.url, tmp_path) as device:
        wait_until(lambda: len(server.commits) >= 1)
        device.kill()
    server.lose_acknowledgements = 0
    assert len(server.accepted) == 1
    with Device(server.url, tmp_path) as device:
        device.read_until("message continuing")
        wait_until(lambda: "idle" in (tmp_path / "journal.json").read_text())
        device.process.send_signal(signal.SIGTERM)
        code, out, err = device.finish()
    assert code == 0, err
    assert len(server.accepted) == 1
    assert len(server.puts) == 1
    assert {meta.attempt for meta in server.commits} == {1}


@pytest.mark.timeout(40)
@pytest.mark.parametrize("number", stop_signals())
def test_interrupt_leaves_cleanly(server, tmp_path, number):
    with Device(server.url, tmp_path, step_s=0.5) as device:
        device.read_until("phase train")
        started = time.monotonic()
        device.process.send_signal(number)
        code, out, err = device.finish()
    assert code == 0
    assert "Traceback" not in err
    assert out.rstrip().endswith("summary stopped")
    assert server.left == ["stopped by its user"]
    assert time.monotonic() - started < 5
    assert json.loads((tmp_path / "journal.json").read_text())["phase"] == "training"


@pytest.mark.timeout(40)
def test_interrupt_while_the_server_hangs(server, tmp_path, wait_until):
    server.stall_upload_at = 10_000
    with Device(server.url, tmp_path) as device:
        wait_until(lambda: server.puts and server.puts[-1][1] == 10_000)
        started = time.monotonic()
        device.process.send_signal(signal.SIGINT)
        code, out, err = device.finish()
    assert code == 0
    assert "Traceback" not in err
    assert time.monotonic() - started < 5
    assert json.loads((tmp_path / "journal.json").read_text())["phase"] == "uploading"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_sighup_stops_a_device_unless_nohup_ignores_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
