"""The aggregator under load: peak memory, transfer and folding speed with few and with many clients.

    python benchmarks/bench_aggregator.py --json benchmarks/results/aggregator.json
    python benchmarks/bench_aggregator.py --tls 3 --json benchmarks/results/aggregator_tls.json

A synthetic float32 model (8 layers x 32 experts, about 200 MB) is served by a real server process; K clients, threads
of another process, register, download all of it, upload a share of the experts and commit, over loopback HTTP. Then
the round is folded. Memory is the server's VmHWM. Beside each row: what memory copy, SHA-256 and the disk gave in the
same run, so that a row from a busy machine can be told from a slow server. ``--tls`` compares rounds of 4 clients and
all experts over plain HTTP and over TLS, in turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from aggregator_crowd import SHAPE, crowd
from provenance import provenance

from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.tls import make_certificate
from edgefed.protocol.messages import RunConfig, TrainingConfig, UnitInfo

LAYERS, EXPERTS = 8, 32
CASES = ((4, 0.25), (32, 0.25), (4, 1.0))
"""(clients, share of the experts that each uploads)."""
RSS_TARGET_BYTES = 150_000_000 + 4 * SHAPE[0] * SHAPE[1]
"""150 MB and the largest tensor."""

SERVER = """
import logging, sys
from pathlib import Path
from edgefed.aggregator.server import ServerConfig, run_server
logging.basicConfig(level=logging.INFO, format="%(message)s")
certificate, key = [Path(word) for word in sys.argv[4:]] or (None, None)
run_server(ServerConfig(
    Path(sys.argv[1]), port=0, ready_file=Path(sys.argv[2]), fold_backend=sys.argv[3],
    certificate=certificate, certificate_key=key,
))
"""


# --- the server side --------------------------------------------------------------------------------------------


def make_run(folder: Path, clients: int, **policy: object) -> None:
    """The synthetic model as a run that begins with this many clients."""
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
    create_run(folder, run, RoundPolicy(rounds=1, min_clients=clients, client_timeout_s=600.0, **policy), units)


def start_server(folder: Path, backend: str, tls: bool) -> tuple[subprocess.Popen[bytes], str, Path | None]:
    """Serve ``folder``/state. Returns the process, its address, and its certificate if it has one."""
    ready, secrets = folder / "ready.json", [folder / "certificate.pem", folder / "key.pem"] if tls else []
    for path, content in zip(secrets, make_certificate("127.0.0.1"), strict=False):
        path.write_bytes(content)
    command = [sys.executable, "-c", SERVER, str(folder / "state"), str(ready), backend, *map(str, secrets)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stderr=log)
    try:
        wait_for(ready.exists, 60.0, "server")
    except TimeoutError:
        server.kill()
        raise
    return server, json.loads(ready.read_text())["url"], secrets[0] if tls else None


def measure(clients: int, share: float, backend: str, tls: bool = False) -> dict:
    """One round; returns one row."""
    folder = Path(tempfile.mkdtemp(prefix="edgefed-bench-"))
    try:
        make_run(folder / "state", clients)
        server, url, certificate = start_server(folder, backend, tls)
        try:
            idle = peak_memory(server.pid)
            words = ["--crowd", url, "--clients", str(clients), "--share", str(share)]
            words += ["--certificate", str(certificate)] if certificate else []
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, timeout=600)
            phases = json.loads(done.stdout)
            peak, cpu = peak_memory(server.pid), psutil.Process(server.pid).cpu_times()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
        log = (folder / "server.log").read_text()
        folded = re.search(r"aggregated in ([\d.]+) s", log)
        if folded is None:
            raise RuntimeError(f"the server did not fold: {log[-2000:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fold_s = max(float(folded[1]), 0.01)  # the log has tenths
    return {
        "clients": clients,
        "share": share,
        "fold_backend": backend,
        "tls": tls,
        "server_peak_rss_mb": round(peak / 1e6, 1),
        "server_idle_rss_mb": round(idle / 1e6, 1),
        "rss_target_met": peak < RSS_TARGET_BYTES,
        "server_cpu_s": round(cpu.user + cpu.system, 2),
        **phases,
        "fold_s": fold_s,
        "fold_read_gb_per_s": round(phases["uploaded_mb"] / 1e3 / fold_s, 2),
    }


TLS_FIGURES = ("download_mb_per_s", "upload_and_commit_mb_per_s", "round_s", "server_cpu_s", "server_peak_rss_mb")


def compare_tls(pairs: int, backend: str) -> dict:
    """Rounds of 4 x 200 MB over plain HTTP and over TLS, in turns. Returns the rows and the medians of both."""
    rows = []
    for number in range(2 * pairs):
        row = measure(4, 1.0, backend, tls=number % 2 == 1)
        row["round_s"] = round(sum(row["seconds"].values()), 2)
        rows.append({**row, "load_average_1min": round(os.getloadavg()[0], 2)})
        print(json.dumps({name: rows[-1][name] for name in ("tls", *TLS_FIGURES, "load_average_1min")}), flush=True)
    medians = {
        kind: {name: statistics.median(row[name] for row in rows if row["tls"] == tls) for name in TLS_FIGURES}
        for kind, tls in (("plain", False), ("tls", True))
    }
    cost = {
        name: round(1 - medians["tls"][name] / medians["plain"][name], 3)
        for name in ("download_mb_per_s", "upload_and_commit_mb_per_s")
    }
    return {"medians": medians, "share_of_throughput_that_tls_costs": cost, "rows": rows}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--fold", default="auto", choices=["auto", "native", "numpy"], help="fold backend of the server"
    )
    parser.add_argument("--clients", type=int, help="one case only: this many clients")
    parser.add_argument("--share", type=float, default=0.25, help="share of the experts that each uploads")
    parser.add_argument("--tls", type=int, metavar="PAIRS", help="compare TLS with plain HTTP, in so many pairs")
    parser.add_argument("--crowd", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--certificate", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.crowd:
        print(json.dumps(crowd(args.crowd, args.clients, args.share, args.certificate)))
        return
    if args.tls:
        found = compare_tls(args.tls, args.fold)
        print(json.dumps({name: found[name] for name in ("medians", "share_of_throughput_that_tls_costs")}, indent=1))
        if args.json:
            args.json.write_text(json.dumps({"provenance": provenance(), **found}, indent=1) + "\n")
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
