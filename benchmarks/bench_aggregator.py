"""The aggregator under load: peak memory, transfer and folding speed with few and with many clients.

    python benchmarks/bench_aggregator.py --json benchmarks/results/aggregator.json

A synthetic float32 model (8 layers x 32 experts, about 200 MB) is served by a real server process; K clients, threads
of another process, register, download all of it, upload a share of the experts and commit, over loopback HTTP. Then
the round is folded. Memory is the server's VmHWM. Beside each row: what memory copy, SHA-256 and the disk gave in the
same run, so that a row from a busy machine can be told from a slow server.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from provenance import provenance

from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.protocol import PROTOCOL_VERSION, routes
from edgefed.protocol.frames import encode_header
from edgefed.protocol.messages import (
    ExpertReport,
    Manifest,
    Register,
    RunConfig,
    TensorInfo,
    TrainingConfig,
    UnitInfo,
    UpdateMeta,
    decode_message,
    encode_message,
)

LAYERS, EXPERTS = 8, 32
SHAPE = (128, 512)  # one tensor is 256 KiB, an expert three of them
KEY = "benchmark client key "
CASES = ((4, 0.25), (32, 0.25), (4, 1.0))
"""(clients, share of the experts that each uploads)."""
RSS_TARGET_BYTES = 150_000_000 + 4 * SHAPE[0] * SHAPE[1]
"""150 MB and the largest tensor."""

SERVER = """
import logging, sys
from pathlib import Path
from edgefed.aggregator.server import ServerConfig, run_server
logging.basicConfig(level=logging.INFO, format="%(message)s")
run_server(ServerConfig(Path(sys.argv[1]), port=0, ready_file=Path(sys.argv[2]), fold_backend=sys.argv[3]))
"""


# --- the server side --------------------------------------------------------------------------------------------


def make_run(folder: Path, clients: int) -> None:
    """The synthetic model as a run for exactly this many clients."""
    rng = np.random.default_rng(0)

    def tensor() -> tuple[str, np.ndarray]:
        return "F32", rng.standard_normal(SHAPE, dtype=np.float32)

    units = (
        (
            UnitInfo(key=f"layers.{layer}.experts.{expert}", kind="expert", layer=layer, expert=expert, trainable=True),
            {name: tensor() for name in "ugd"},
        )
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    )
    run = RunConfig(
        run_id="bench", model="synthetic", method="random", method_options={}, rounds=1, seed=0,
        training=TrainingConfig(),
    )  # fmt: skip
    create_run(folder, run, RoundPolicy(rounds=1, min_clients=clients, client_timeout_s=600.0), units)


def measure(clients: int, share: float, backend: str) -> dict:
    """One round; returns one row."""
    folder = Path(tempfile.mkdtemp(prefix="edgefed-bench-"))
    log_path, ready = folder / "server.log", folder / "ready.json"
    try:
        make_run(folder / "state", clients)
        with log_path.open("wb") as log:
            command = [sys.executable, "-c", SERVER, str(folder / "state"), str(ready), backend]
            server = subprocess.Popen(command, stderr=log)
        try:
            wait_for(ready.exists, 30.0, "server")
            idle = peak_memory(server.pid)
            url = json.loads(ready.read_text())["url"]
            crowd = [sys.executable, __file__, "--crowd", url, "--clients", str(clients), "--share", str(share)]
            phases = json.loads(subprocess.run(crowd, stdout=subprocess.PIPE, check=True, timeout=600).stdout)
            peak, cpu = peak_memory(server.pid), psutil.Process(server.pid).cpu_times()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
        folded = re.search(r"aggregated in ([\d.]+) s", log_path.read_text())
        if folded is None:
            raise RuntimeError(f"the server did not fold: {log_path.read_text()[-2000:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fold_s = max(float(folded[1]), 0.01)  # the log has tenths
    return {
        "clients": clients,
        "share": share,
        "fold_backend": backend,
        "server_peak_rss_mb": round(peak / 1e6, 1),
        "server_idle_rss_mb": round(idle / 1e6, 1),
        "rss_target_met": peak < RSS_TARGET_BYTES,
        "server_cpu_s": round(cpu.user + cpu.system, 2),
        **phases,
        "fold_s": fold_s,
        "fold_read_gb_per_s": round(phases["uploaded_mb"] / 1e3 / fold_s, 2),
    }


def peak_memory(pid: int) -> int:
    """VmHWM of a process in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"no {what} after {timeout_s:.0f} s")
        time.sleep(0.02)


def floors() -> dict:
    """What this machine does right now, in GB/s."""
    source = np.ones(64 * 2**20, np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)

    def speed(work: Callable[[], object], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        return round(times * source.nbytes / 1e9 / (time.perf_counter() - started), 2)

    with tempfile.NamedTemporaryFile(prefix="edgefed-bench-") as file:

        def write() -> None:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())

        disk = speed(write, 4)
    return {
        "memcpy_gb_per_s": speed(lambda: np.copyto(target, source), 8),
        "sha256_gb_per_s": speed(lambda: hashlib.sha256(source), 2),
        "disk_write_fsync_gb_per_s": disk,
    }


# --- the clients, a process of their own ------------------------------------------------------------------------


class Member:
    """One client of the crowd: one keep-alive connection, raw so that it costs the shared processors little."""

    def __init__(self, url: str, number: int):
        self.client_id = f"client-{number:03d}"
        host, port = url.removeprefix("http://").split(":")
        self._http = http.client.HTTPConnection(host, int(port), timeout=300, blocksize=routes.CHUNK_BYTES)
        self._block = np.random.default_rng(number).standard_normal(SHAPE, dtype=np.float32).tobytes()

    def call(self, verb: str, template: str, body: object = None, query: str = "", **values: object) -> bytes:
        path = routes.path_for(template, client_id=self.client_id, **values)
        headers = {routes.CLIENT_KEY_HEADER: KEY + self.client_id}
        if isinstance(body, tuple):  # (chunks, length)
            body, length = body
            headers["content-length"] = str(length)
        self._http.request(verb, path + query, body=body, headers=headers)
        response = self._http.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{verb} {path}: {response.status} {content[:300]!r}")
        return content

    def register(self) -> None:
        message = Register(
            protocol_version=PROTOCOL_VERSION, client_id=self.client_id, client_key=KEY + self.client_id, name="bench",
            memory_bytes=0, expert_share=1.0, compute_share=1.0, num_examples=10, edgefed_version="bench",
        )  # fmt: skip
        self.call("POST", routes.REGISTER, encode_message(message))

    def download(self, units: tuple[UnitInfo, ...]) -> int:
        buffer, total = bytearray(routes.CHUNK_BYTES), 0
        for unit in units:
            path = routes.path_for(routes.BLOB, sha256=unit.sha256)
            self._http.request("GET", path, headers={routes.CLIENT_KEY_HEADER: KEY + self.client_id})
            response = self._http.getresponse()
            while count := response.readinto(buffer):
                total += count
        return total

    def prepare(self, units: list[UnitInfo]) -> None:
        """The update and its hash, before any clock runs."""
        infos = [
            TensorInfo(name=f"{unit.key}|{info.name}", dtype="F32", shape=info.shape)
            for unit in units
            for info in unit.tensors
        ]
        self._head, self._blocks = encode_header(infos), len(infos)
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        reports = tuple(
            ExpertReport(layer=unit.layer, expert=unit.expert, usage=0.5, importance=1.0, steps=4, tokens=100)
            for unit in units
        )
        self.meta = UpdateMeta(
            client_id=self.client_id, server_round=1, attempt=1, sha256=digest.hexdigest(),
            size_bytes=len(self._head) + self._blocks * len(self._block), num_examples=10, num_tokens=1000,
            experts=reports, metrics={"loss": 1.0},
        )  # fmt: skip

    def chunks(self) -> Iterator[bytes]:
        return itertools.chain([self._head], itertools.repeat(self._block, self._blocks))

    def upload(self) -> None:
        place = {"server_round": 1, "attempt": 1}
        self.call("PUT", routes.UPLOAD, (self.chunks(), self.meta.size_bytes), "?offset=0", **place)

    def commit(self) -> None:
        self.call("POST", routes.COMMIT, encode_message(self.meta), server_round=1, attempt=1)


def crowd(url: str, clients: int, share: float) -> dict:
    """Play all clients, phase by phase, all at once within a phase. Returns seconds and rates."""
    members = [Member(url, number) for number in range(clients)]
    seconds: dict[str, float] = {}

    def phase(name: str, work: Callable[[Member], object]) -> None:
        errors: list[BaseException] = []

        def guarded(member: Member) -> None:
            try:
                work(member)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(member,)) for member in members]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        seconds[name] = time.monotonic() - started

    phase("register", Member.register)
    manifest = decode_message(members[0].call("GET", routes.MANIFEST, server_round=1), Manifest)
    for number, member in enumerate(members):  # windows that overlap, so that experts have several holders
        count = round(share * len(manifest.units))
        first = number * len(manifest.units) // clients
        member.prepare([manifest.units[(first + at) % len(manifest.units)] for at in range(count)])
    model_bytes = sum(unit.size_bytes for unit in manifest.units)
    phase("download", lambda member: member.download(manifest.units))
    phase("upload", Member.upload)
    phase("commit", Member.commit)
    started = time.monotonic()
    wait_for(lambda: b'"server_round":2' in members[0].call("GET", routes.MANIFEST, server_round="latest"), 300, "fold")
    seconds["next_model"] = time.monotonic() - started
    uploaded = sum(member.meta.size_bytes for member in members)
    return {
        "model_mb": round(model_bytes / 1e6, 1),
        "downloaded_mb": round(clients * model_bytes / 1e6, 1),
        "uploaded_mb": round(uploaded / 1e6, 1),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "download_mb_per_s": round(clients * model_bytes / 1e6 / seconds["download"]),
        "upload_mb_per_s": round(uploaded / 1e6 / seconds["upload"]),
        "upload_and_commit_mb_per_s": round(uploaded / 1e6 / (seconds["upload"] + seconds["commit"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--fold", default="auto", choices=["auto", "native", "numpy"], help="fold backend of the server"
    )
    parser.add_argument("--clients", type=int, help="one case only: this many clients")
    parser.add_argument("--share", type=float, default=0.25, help="share of the experts that each uploads")
    parser.add_argument("--crowd", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.crowd:
        print(json.dumps(crowd(args.crowd, args.clients, args.share)))
        return
    rows = []
    for clients, share in CASES if args.clients is None else [(args.clients, args.share)]:
        row = {**measure(clients, share, args.fold), **floors(), "load_average_1min": round(os.getloadavg()[0], 2)}
        row["fold_share_of_memcpy"] = round(row["fold_read_gb_per_s"] / row["memcpy_gb_per_s"], 2)
        # Folding ends with the new model on disk, so the disk is its other bound.
        row["fold_write_share_of_disk"] = round(
            row["model_mb"] / 1e3 / row["fold_s"] / row["disk_write_fsync_gb_per_s"], 2
        )
        row["upload_share_of_disk"] = round(
            row["upload_and_commit_mb_per_s"] / 1e3 / row["disk_write_fsync_gb_per_s"], 2
        )
        rows.append(row)
        print(
            f"{clients:3d} clients x {share:.0%}: peak {row['server_peak_rss_mb']:.0f} MB "
            f"(idle {row['server_idle_rss_mb']:.0f}), down {row['download_mb_per_s']} MB/s, "
            f"up {row['upload_mb_per_s']} MB/s ({row['upload_and_commit_mb_per_s']} to the acknowledgement), "
            f"fold {row['fold_s']:.2f} s = {row['fold_read_gb_per_s']:.2f} GB/s, "
            f"server {row['server_cpu_s']:.1f} CPU s",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
