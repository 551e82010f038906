"""Control traffic of a fleet: requests a second and latencies of one server with 10,000 registered devices.

    python benchmarks/bench_fleet.py --json benchmarks/results/fleet.json
    AWS_ENDPOINT_URL=... python benchmarks/bench_fleet.py --blobs s3://bucket/fleet     # with object storage

Every device registers, sends a heartbeat, asks for work and for the state of an upload, and some ask for the manifest
of a model of 1,024 experts; with ``--blobs`` also for the place of a blob. The crowd is a process of its own: it plays
the devices over 64 connections, one request after another on each, so the server is never idle. No weights move.
``cpu_us``: processor time of the server for a request, which other programs disturb less than the rates: 1e6 / cpu_us
requests a second fill a core. Last, all devices beat as often as the server asks them to, for ``--steady`` seconds:
``late`` counts requests that began more than a second after their time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from aggregator_crowd import KEY
from bench_aggregator import peak_memory, wait_for
from provenance import provenance

from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.protocol import PROTOCOL_VERSION, routes
from edgefed.protocol.messages import Heartbeat, Register, RunConfig, TrainingConfig, UnitInfo, encode_message

CONNECTIONS, LAYERS, EXPERTS = 64, 16, 64
DRAWN = 100
"""Devices of the round; the others wait."""
HEARTBEAT_S = 10.0
SERVER = """
import sys
from pathlib import Path
from edgefed.aggregator.server import ServerConfig, run_server
state, ready, blobs = sys.argv[1:4]
run_server(ServerConfig(state_folder=Path(state), port=0, ready_file=Path(ready), blobs=blobs or None))
"""


class Connection:
    """One keep-alive connection of the crowd."""

    def __init__(self, url: str):
        self._host, port = url.partition("//")[2].split(":")
        self._port = int(port)

    async def open(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def call(self, verb: str, path: str, client_id: str, body: bytes = b"") -> int:
        """Status of the answer."""
        head = f"{verb} {path} HTTP/1.1\r\nHost: {self._host}\r\n{routes.CLIENT_KEY_HEADER}: {KEY}{client_id}\r\n"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = answer.partition(b"content-length:")[2].partition(b"\r\n")[0]
        await self._reader.readexactly(int(length or 0))
        return int(answer.split(b" ", 2)[1])


def requests_of(sha256: str) -> dict[str, Callable[[str], tuple[str, str, bytes]]]:
    """What a device sends, by kind: (verb, path, body)."""

    def register(client_id: str) -> tuple[str, str, bytes]:
        message = Register(
            protocol_version=PROTOCOL_VERSION, client_id=client_id, client_key=KEY + client_id, name="bench",
            memory_bytes=0, expert_share=1.0, compute_share=1.0, num_examples=10, edgefed_version="bench",
        )  # fmt: skip
        return "POST", routes.REGISTER, encode_message(message)

    def own(route: str, client_id: str) -> str:
        return routes.path_for(route, client_id=client_id, server_round=1, attempt=1)

    beat = encode_message(Heartbeat(phase="idle", fraction=0.0, server_round=1))
    kinds = {
        "register": register,
        "heartbeat": lambda client_id: ("POST", own(routes.HEARTBEAT, client_id), beat),
        "assignment": lambda client_id: ("GET", own(routes.ASSIGNMENT, client_id), b""),
        "upload_state": lambda client_id: ("GET", own(routes.UPLOAD, client_id), b""),
        "manifest": lambda client_id: ("GET", own(routes.MANIFEST, client_id), b""),
    }
    if sha256:
        kinds["blob_url"] = lambda client_id: ("GET", routes.path_for(routes.BLOB, sha256=sha256), b"")
    return kinds


async def at_once(url: str, make: Callable[[str], tuple[str, str, bytes]], devices: list[str]) -> list[float]:
    """One request of each device, as fast as the server answers. Returns seconds of each."""
    left, taken = iter(devices), []

    async def work() -> None:
        connection = await Connection(url).open()
        for client_id in left:
            verb, path, body = make(client_id)
            started = time.perf_counter()
            status = await connection.call(verb, path, client_id, body)
            taken.append(time.perf_counter() - started)
            assert status in (200, 307, 410), (verb, path, status)

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return taken


async def steadily(url: str, devices: list[str], seconds: float) -> tuple[list[float], int]:
    """Heartbeats of all devices, each every `HEARTBEAT_S`. Returns seconds of each, and how many began late."""
    make, taken, late = requests_of("")["heartbeat"], [], 0
    due = iter(range(int(len(devices) * seconds / HEARTBEAT_S)))
    start = time.perf_counter()

    async def work() -> None:
        nonlocal late
        connection = await Connection(url).open()
        for number in due:
            at = start + number * HEARTBEAT_S / len(devices)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            begun = time.perf_counter()
            late += begun > at + 1.0
            verb, path, body = make(devices[number % len(devices)])
            await connection.call(verb, path, devices[number % len(devices)], body)
            taken.append(time.perf_counter() - begun)

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return taken, late


def crowd(url: str, pid: int, devices: int, steady_s: float, sha256: str) -> None:
    """Play all devices, and print the rows."""
    names, server, rows = [f"device-{number:05d}" for number in range(devices)], psutil.Process(pid), {}

    def row(taken: list[float], cpu_s: float, seconds: float) -> dict:
        taken.sort()
        return {
            "requests": len(taken), "per_s": round(len(taken) / seconds), "cpu_us": round(1e6 * cpu_s / len(taken)),
            "p50_ms": round(1e3 * taken[len(taken) // 2], 1), "p99_ms": round(1e3 * taken[int(0.99 * len(taken))], 1),
        }  # fmt: skip

    def measured(work: Callable) -> tuple:
        before, started = sum(server.cpu_times()[:2]), time.perf_counter()
        result = asyncio.run(work())
        return result, sum(server.cpu_times()[:2]) - before, time.perf_counter() - started

    for kind, make in requests_of(sha256).items():
        those = names[: devices // 20] if kind == "manifest" else names
        result, cpu_s, seconds = measured(lambda make=make, those=those: at_once(url, make, those))
        rows[kind] = row(result, cpu_s, seconds)
        if kind == "register":
            time.sleep(2.0)  # the round begins
    (taken, late), cpu_s, seconds = measured(lambda: steadily(url, names, steady_s))
    rows["steady_heartbeats"] = {**row(taken, cpu_s, seconds), "late": late, "cores": round(cpu_s / seconds, 2)}
    print(json.dumps(rows))


def measure(devices: int, steady_s: float, blobs: str) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="edgefed-bench-"))
    try:
        units = [
            (
                UnitInfo(key=f"layers.{layer}.experts.{e}", kind="expert", layer=layer, expert=e, trainable=True),
                {name: ("F32", np.full((2, 2), layer * EXPERTS + e, dtype=np.float32)) for name in "ugd"},
            )
            for layer in range(LAYERS)
            for e in range(EXPERTS)
        ]
        run = RunConfig(
            run_id="fleet", model="synthetic", method="random", method_options={}, rounds=1, seed=0,
            training=TrainingConfig(),
        )  # fmt: skip
        policy = RoundPolicy(
            rounds=1, min_clients=devices, clients_per_round=DRAWN, client_timeout_s=600.0, max_clients=devices
        )
        create_run(folder / "state", run, policy, units)
        ready = folder / "ready.json"
        with (folder / "server.log").open("wb") as log:
            command = [sys.executable, "-c", SERVER, str(folder / "state"), str(ready), blobs]
            server = subprocess.Popen(command, stderr=log)
        try:
            wait_for(ready.exists, 60.0, "server")
            url = json.loads(ready.read_text())["url"]
            sha256 = next((folder / "state" / "blobs").glob("[0-9a-f][0-9a-f]/*")).name if blobs else ""
            words = ["--crowd", url, str(server.pid), str(devices), str(steady_s), sha256]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, timeout=600)
            peak = peak_memory(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        tracebacks = (folder / "server.log").read_text().count("Traceback")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "devices": devices, "connections": CONNECTIONS, **json.loads(done.stdout), "tracebacks": tracebacks,
        "server_peak_rss_mb": round(peak / 1e6, 1), "load_average_1min": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--steady", type=float, default=20.0)
    parser.add_argument("--blobs", default="", help="object storage, such as s3://bucket/prefix")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--crowd", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.crowd:
        url, pid, devices, steady_s, sha256 = options.crowd
        crowd(url, int(pid), int(devices), float(steady_s), sha256)
        return
    row = measure(options.devices, options.steady, options.blobs)
    print(json.dumps(row, indent=1))
    if options.json:
        options.json.write_text(json.dumps({**provenance(), "rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
