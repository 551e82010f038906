"""The agent against the real aggregator: what the fake one cannot promise."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from agent_rig import Device, device, ledger, start
from flaky_proxy import FlakyProxy
from toy_device import ToyTrainer, toy_value

from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator.creation import RawTensors, create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.server import AggregatorServer, ServerConfig
from edgefed.protocol import frames
from edgefed.protocol.messages import RunConfig, Status, TrainingConfig, UnitInfo

EXPERTS, SHAPE = 3, (100, 60)


def import_run(
    folder: Path, *, rounds: int, clients: int, shape: tuple[int, int] = SHAPE, compression: str = "none", **policy: str
) -> None:
    run = RunConfig(
        run_id="real", model="toy", method="fedavg", method_options={}, rounds=rounds, seed=1,
        training=TrainingConfig(local_steps=2), compression=compression,
    )  # fmt: skip

    def unit(key: str, expert: int, value: float) -> tuple[UnitInfo, RawTensors]:
        tensors = {"down_proj": ("F32", np.full(shape, value, np.float32))}
        kind = "expert" if expert >= 0 else "dense"
        layer = 0 if expert >= 0 else -1
        return UnitInfo(key=key, kind=kind, layer=layer, expert=expert, trainable=expert >= 0), tensors

    units = [unit("embed", -1, -1.0), *(unit(f"experts.{expert}", expert, expert) for expert in range(EXPERTS))]
    config = folder.parent / "config.json"
    config.write_text("{}")
    create_run(folder, run, RoundPolicy(rounds=rounds, min_clients=clients, **policy), units, [config])


@contextlib.contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[AggregatorServer]:
    ready = threading.Event()
    servers: list[AggregatorServer] = []

    def serve() -> None:
        server = AggregatorServer(ServerConfig(state_folder=folder, port=port), on_ready=lambda _: ready.set())
        servers.append(server)
        server.run()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10), "the aggregator did not start"
    try:
        yield servers[0]
    finally:
        servers[0].stop()
        thread.join(10)
        assert not thread.is_alive()


def port_of(server: AggregatorServer) -> int:
    return int(server.url.rpartition(":")[2])


def status_of(server: AggregatorServer) -> Status:
    with AggregatorClient(server.url) as client:
        return client.status()


def expert_values(server: AggregatorServer, folder: Path) -> list[float]:
    """First element of each expert in the latest global model."""
    values = []
    with AggregatorClient(server.url) as client:
        for unit in client.manifest("latest").units:
            if unit.kind == "expert":
                client.download(unit.sha256, unit.size_bytes, folder / "unit")
                tensor = frames.map_tensor(folder / "unit", frames.read_header(folder / "unit")["down_proj"])
                values.append(float(tensor.flat[0]))
    return values


@pytest.mark.timeout(60)
def test_two_devices_on_bad_networks_finish_a_run(tmp_path):
    import_run(tmp_path / "server", rounds=2, clients=2)
    with serving(tmp_path / "server") as server, contextlib.ExitStack() as stack:
        ends = []
        for name, bias in (("a", 1.0), ("b", 3.0)):
            proxy = FlakyProxy(port_of(server))
            stack.callback(proxy.close)
            proxy.cut_down += [30_000, 9_000]
            proxy.cut_up += [20_000, 40_000]
            agent = stack.enter_context(device(proxy.url, tmp_path / name, ToyTrainer(bias)))
            ends.append(start(agent))
        for thread, _ in ends:
            thread.join(30)
        assert [end[0].rounds for _, end in ends] == [2, 2]
        assert all(end[0].finished for _, end in ends)
        assert expert_values(server, tmp_path) == [toy_value(2.0, 2)] * EXPERTS
        status = status_of(server)
        assert [entry.updates for entry in status.history] == [2, 2]
        assert status.state == "finished"
        assert all(client.downloaded_bytes > 4 * 24_000 for client in status.clients)


@pytest.mark.timeout(60)
def test_server_restart_between_training_and_upload(tmp_path, wait_until):
    import_run(tmp_path / "server", rounds=2, clients=1)
    trainer = ToyTrainer(1.0, step_s=0.4)
    with serving(tmp_path / "server") as server:
        port = port_of(server)
        stack = contextlib.ExitStack()
        agent = stack.enter_context(device(server.url, tmp_path / "a", trainer))
        thread, ends = start(agent)
        wait_until(lambda: agent.progress.snapshot()[0] == "train")
    wait_until(lambda: agent.journal.record.phase == "uploading")
    with stack, serving(tmp_path / "server", port) as server:
        thread.join(30)
        assert ends[0].rounds == 2
        assert trainer.rounds == [1, 2]
        assert expert_values(server, tmp_path) == [toy_value(1.0, 2)] * EXPERTS


@pytest.mark.timeout(60)
def test_a_killed_device_resumes_its_upload(tmp_path, wait_until):
    shape = (1000, 100)
    import_run(tmp_path / "server", rounds=1, clients=1, shape=shape)
    with serving(tmp_path / "server") as server, contextlib.closing(FlakyProxy(port_of(server))) as proxy:
        uploads = tmp_path / "server" / "uploads"

        def arrived() -> int:
            return sum(path.stat().st_size for path in uploads.glob("*.part"))

        with Device(proxy.url, tmp_path / "a") as toy:
            toy.read_until("phase train")
            proxy.latency_s = 0.01  # at most 400 kB/s
            wait_until(lambda: arrived() > 0)
            toy.kill()
            proxy.drop()
        proxy.latency_s = 0.0
        wait_until(lambda: arrived() == (time.sleep(0.3), arrived())[1])  # what was under way has arrived
        before = arrived()
        with Device(proxy.url, tmp_path / "a") as toy:
            code, out, err = toy.finish()
        assert code == 0, err
        assert "message continuing the upload of round 1" in out
        (line,) = ledger(tmp_path / "a")
        size = EXPERTS * 4 * shape[0] * shape[1]
        assert 0 < before < size
        assert line["resumed"]
        assert size - before < line["bytes_up"] < size - before + 4096
        status = status_of(server)
        assert [entry.updates for entry in status.history] == [1]
        assert len(status.clients) == 1
        assert json.loads((tmp_path / "a" / "journal.json").read_text())["rounds_acknowledged"] == 1
        assert expert_values(server, tmp_path) == [toy_value(0.0, 1)] * EXPERTS


@pytest.mark.timeout(60)
def test_a_device_sends_no_update_to_a_server_whose_disk_is_full(tmp_path, monkeypatch):
    shape, real, asked = (1000, 100), shutil.disk_usage, []

    def usage(path):
        if "uploads" not in str(path):
            return real(path)
        asked.append(path)
        return SimpleNamespace(free=0 if len(asked) <= 4 else 10**12)

    import_run(tmp_path / "server", rounds=1, clients=1, shape=shape)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with serving(tmp_path / "server") as server, device(server.url, tmp_path / "a", ToyTrainer(1.0)) as agent:
        agent.run()
        assert [entry.updates for entry in status_of(server).history] == [1]
    (line,) = ledger(tmp_path / "a")
    assert len(asked) >= 5
    assert line["bytes_up"] < EXPERTS * 4 * shape[0] * shape[1] + 4096, "once, when the disk had room again"


@pytest.mark.timeout(60)
def test_the_server_does_not_wait_for_a_stopped_device(tmp_path, wait_until):
    import_run(tmp_path / "server", rounds=1, clients=2)
    stop = threading.Event()
    with serving(tmp_path / "server") as server, contextlib.ExitStack() as stack:
        quick = stack.enter_context(device(server.url, tmp_path / "a", ToyTrainer(1.0)))
        slow = stack.enter_context(device(server.url, tmp_path / "b", slow_trainer := ToyTrainer(9.0, 1.0), stop=stop))
        ends = [start(quick), start(slow)]
        wait_until(lambda: slow_trainer.rounds == [1])
        stop.set()
        for thread, _ in ends:
            thread.join(20)
        assert [end[0].reason == "stopped" for _, end in ends] == [False, True]
        assert expert_values(server, tmp_path) == [toy_value(1.0, 1)] * EXPERTS
