"""Latency of control calls while a server is crowded: idle clients, idle strangers, and uploads at once.

    python benchmarks/bench_control_calls.py --json benchmarks/results/control_calls.json

The server of `bench_aggregator` has a round of 50 among 1,050 clients. The 1,000 others wait in long polls, 500
connections of strangers say nothing (the server closes them after 10 s, and others take their places), and the 50
upload 24 MB each at the same time and commit. Meanwhile a process of its own sends heartbeats, asks for assignments,
manifests and its health over 8 connections, and now and then for the status; so it measures the server, not the crowd.
Latencies are in milliseconds; ``quiet`` are those before the uploads, with the crowd waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from aggregator_crowd import KEY, Member, trust
from bench_aggregator import make_run, peak_memory, start_server
from provenance import provenance

from edgefed.protocol import routes
from edgefed.protocol.messages import Assignment, AssignmentReply, Heartbeat, Manifest, decode_message, encode_message

CALLERS = 8
UNITS_OF_AN_UPLOAD = 31
"""About 24 MB."""
TARGET_MS = 250.0


# --- the crowd, a process of its own ------------------------------------------------------------------------------


async def wait_idly(url: str, client_id: str, tls: ssl.SSLContext | None) -> None:
    """One idle client: long polls over one connection, until cancelled."""
    host, port = url.partition("//")[2].split(":")
    path = routes.path_for(routes.ASSIGNMENT, client_id=client_id)
    head = f"GET {path}?wait_s=30 HTTP/1.1\r\nHost: {host}\r\n{routes.CLIENT_KEY_HEADER}: {KEY}{client_id}\r\n\r\n"
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
            try:
                while True:
                    writer.write(head.encode())
                    answer = await reader.readuntil(b"\r\n\r\n")
                    length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
                    await reader.readexactly(int(length.partition(b":")[2]))
            finally:
                writer.close()
        await asyncio.sleep(0.2)


async def say_nothing(url: str) -> None:
    """One stranger after another."""
    host, port = url.partition("//")[2].split(":")
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, int(port))
            await reader.read()
            writer.close()
        await asyncio.sleep(0.2)


def upload(members: list[Member], units: tuple, told: list[str]) -> None:
    """All uploads at once, then their commits."""

    def work(member: Member) -> None:
        try:
            member.upload()
            member.commit()
        except Exception as error:
            told.append(f"{member.client_id}: {error!r}")

    threads = [threading.Thread(target=work, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def crowd(url: str, idle: int, strangers: int, uploads: int, certificate: Path | None) -> None:
    """Play everybody. Says who is who when all wait; begins to upload at a line of input, and then says how it went."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    tls, members = trust(certificate), []
    for number in range(idle + uploads):
        member = Member(url, number, tls)
        member.register()
        member.hang_up()
        members.append(member)
    time.sleep(1.0)  # the server's next tick draws the clients of the round
    drawn, waiting = [], []
    for member in members:
        answer = decode_message(member.call("GET", routes.ASSIGNMENT), AssignmentReply)
        (drawn if isinstance(answer, Assignment) else waiting).append(member)
    units = decode_message(drawn[0].call("GET", routes.MANIFEST, server_round=1), Manifest).units
    for number, member in enumerate(drawn):
        first = number * 5
        member.prepare([units[(first + at) % len(units)] for at in range(UNITS_OF_AN_UPLOAD)])
    for member in waiting:
        member.hang_up()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    everybody = [wait_idly(url, member.client_id, tls) for member in waiting]
    everybody += [say_nothing(url) for _ in range(strangers)]
    tasks = [asyncio.run_coroutine_threadsafe(each, loop) for each in everybody]  # the loop itself keeps none of them
    print(json.dumps({"drawn": [member.client_id for member in drawn], "waiting": waiting[0].client_id}), flush=True)
    sys.stdin.readline()
    told: list[str] = []
    started = time.monotonic()
    assert not any(task.done() for task in tasks)
    upload(drawn, units, told)
    seconds, sent = time.monotonic() - started, sum(member.meta.size_bytes for member in drawn)
    print(
        json.dumps({"uploads_s": round(seconds, 2), "uploaded_mb": round(sent / 1e6), "failed": told[:5]}), flush=True
    )
    os._exit(0)  # the idle ones just disappear


# --- what is measured ---------------------------------------------------------------------------------------------


class Callers:
    """Control calls over a few connections, one after another on each, until `stop`."""

    def __init__(self, url: str, client_id: str, certificate: Path | None):
        tls = trust(certificate)
        self._members = [Member(url, 0, tls) for _ in range(CALLERS)]
        for member in self._members:
            member.client_id = client_id
        self._stop = threading.Event()
        self.taken: dict[str, list[float]] = {}
        self.failed: list[str] = []

    def run(self, condition, least_s: float = 0.0) -> dict:
        """Call until ``condition()`` and for at least ``least_s``. Returns latencies."""
        self.taken, self._stop = {}, threading.Event()
        threads = [threading.Thread(target=self._call, args=(member,)) for member in self._members]
        for thread in threads:
            thread.start()
        until = time.monotonic() + least_s
        while not condition() or time.monotonic() < until:
            time.sleep(0.05)
        self._stop.set()
        for thread in threads:
            thread.join()
        every = sorted(1e3 * each for kind, values in self.taken.items() if kind != "status" for each in values)
        return {
            "calls": len(every),
            "p50_ms": round(statistics.median(every), 1),
            "p99_ms": round(every[int(0.99 * len(every))], 1),
            "max_ms": round(every[-1], 1),
            "status_max_ms": round(1e3 * max(self.taken.get("status", [0.0])), 1),
            "failed": len(self.failed),
        }

    def _call(self, member: Member) -> None:
        count = 0
        beat = encode_message(Heartbeat(phase="idle", fraction=0.0, server_round=1))
        kinds = {
            "heartbeat": lambda: member.call("POST", routes.HEARTBEAT, beat),
            "assignment": lambda: member.call("GET", routes.ASSIGNMENT),
            "manifest": lambda: member.call("GET", routes.MANIFEST, server_round="latest"),
            "health": lambda: member.call("GET", routes.HEALTH),
            "status": lambda: member.call("GET", routes.STATUS),
        }
        while not self._stop.is_set():
            count += 1
            kind = "status" if count % 25 == 0 else list(kinds)[count % 4]
            started = time.perf_counter()
            try:
                kinds[kind]()
            except (OSError, RuntimeError) as error:
                self.failed.append(f"{kind}: {error!r}")
            self.taken.setdefault(kind, []).append(time.perf_counter() - started)
            time.sleep(0.02)


def measure(idle: int, strangers: int, uploads: int, tls: bool) -> dict:
    """One crowded round; returns one row."""
    folder = Path(tempfile.mkdtemp(prefix="edgefed-bench-"))
    try:
        make_run(folder / "state", idle + uploads, clients_per_round=uploads)
        server, url, certificate = start_server(folder, "auto", tls)
        words = [str(number) for number in (idle, strangers, uploads)] + ([str(certificate)] if certificate else [])
        command = [sys.executable, __file__, "--crowd", url, *words]
        others = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert others.stdin is not None
            assert others.stdout is not None
            roles = json.loads(others.stdout.readline())
            time.sleep(3.0)  # everybody has connected
            callers = Callers(url, roles["waiting"], certificate)
            quiet = callers.run(lambda: True, least_s=5.0)
            before = psutil.Process(server.pid).cpu_times()
            lines: list[str] = []
            reader = threading.Thread(target=lambda: lines.append(others.stdout.readline()))
            reader.start()
            others.stdin.write("\n")
            others.stdin.flush()
            busy = callers.run(lambda: bool(lines))
            after, peak = psutil.Process(server.pid).cpu_times(), peak_memory(server.pid)
            files = psutil.Process(server.pid).num_fds()
        finally:
            others.kill()
            others.wait()
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        log = (folder / "server.log").read_text()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "idle_clients": idle, "strangers": strangers, "uploads": uploads, "tls": tls, "quiet": quiet, "uploading": busy,
        **json.loads(lines[0]), "server_cpu_s": round(after.user + after.system - before.user - before.system, 2),
        "server_peak_rss_mb": round(peak / 1e6, 1), "server_files": files, "tracebacks": log.count("Traceback"),
        "target_met": busy["p99_ms"] < TARGET_MS, "load_average_1min": round(os.getloadavg()[0], 2),
        "errors": callers.failed[:5],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--strangers", type=int, default=500)
    parser.add_argument("--uploads", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--crowd", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.crowd:
        url, *words = options.crowd
        crowd(url, *(int(word) for word in words[:3]), Path(words[3]) if words[3:] else None)
    rows = []
    for number in range(2 * options.repeat):
        rows.append(measure(options.idle, options.strangers, options.uploads, tls=number % 2 == 1))
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
