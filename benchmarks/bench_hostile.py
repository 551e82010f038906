"""An aggregator under kills, hostile requests and full disks: what is lost, counted twice, or answered with an error.

    python benchmarks/bench_hostile.py --kills 500 --requests 100000 --full-disks 50 \
        --json benchmarks/results/hostile.json

A run of a few hundred kilobytes is served by `edgefed serve` for three real agents (`hostile_federation`). Kills:
server and agents get SIGKILL at random moments, or up to 60 ms after an event in the server's log; the final model
must be bit by bit that of the undisturbed run; with ``--compression`` also no residual of a device or of the server
may be lost or counted twice. Full disks: the same, with the state on a tmpfs (needs root) that is
filled and freed. Requests: `hostile_requests`, beside an honest client whose half-finished upload must stay as it is.
Each episode adds to the counts in the file, so the command may be interrupted and repeated until the counts are
reached.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from hostile_federation import Federation, check, make_run, model_of, run_agent
from hostile_requests import Hostile, send
from provenance import provenance

TOKEN = "correct-horse-battery"
EVENTS = (b"accepted", b"closed with", b"folded", b"to train", b"joined")
THREADS = 6
REQUESTS_AT_ONCE = 5000
"""Requests of one episode; each begins with a new server."""
DISK_MB = 24


# --- the campaigns -----------------------------------------------------------------------------------------------


def calm_model(codecs: tuple[str, str]) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="edgefed-hostile-") as name:
        make_run(Path(name) / "state", codecs=codecs)
        federation = Federation(Path(name), Path(name) / "state")
        try:
            federation.wait()
        finally:
            federation.close()
        return model_of(Path(name) / "state")[0]


def kill_episode(seed: int, calm: dict[str, str], codecs: tuple[str, str]) -> dict[str, object]:
    pick, kills = random.Random(seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory(prefix="edgefed-hostile-") as name:
        make_run(Path(name) / "state", codecs=codecs)
        federation = Federation(Path(name), Path(name) / "state")
        try:
            until = time.monotonic() + 900
            while (running := federation.running()) and time.monotonic() < until:
                if pick.random() < 0.5:  # shortly after an event
                    size, limit = federation.log.stat().st_size, time.monotonic() + 3
                    word = pick.choice(EVENTS)
                    while time.monotonic() < limit and word not in federation.log.read_bytes()[size:]:
                        time.sleep(0.002)
                    time.sleep(pick.uniform(0, 0.06))
                else:
                    time.sleep(pick.uniform(0.1, 1.5))
                target = pick.choice(("server", "agent", "agent", "both"))
                if target != "server":
                    federation.restart_agent(pick.choice(running))
                    kills["agents"] += 1
                if target != "agent":
                    federation.restart_server()
                    kills["servers"] += 1
            federation.wait(60)
        finally:
            federation.close()
        return {"seed": seed, "kills": kills.total(), **kills, **check(federation, calm)}


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edgefed-disk-") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def disk_episode(seed: int, calm: dict[str, str], codecs: tuple[str, str]) -> dict[str, object]:
    pick, full = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="edgefed-hostile-") as name, small_disk() as disk:
        make_run(disk / "state", codecs=codecs)
        federation = Federation(Path(name), disk / "state")
        try:
            until = time.monotonic() + 900
            while federation.running() and time.monotonic() < until:
                time.sleep(pick.uniform(0.2, 1.5))
                full += fill(disk / "filler")
                time.sleep(pick.uniform(0.2, 2.0))
                (disk / "filler").unlink()
                if pick.random() < 0.1:
                    federation.restart_server()
            federation.wait(120)
        finally:
            federation.close()
        return {"seed": seed, "full_disks": full, **check(federation, calm)}


def fill(path: Path) -> bool:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return True


def request_episode(seed: int, count: int) -> dict[str, object]:
    statuses: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="edgefed-hostile-") as name:
        state, token = Path(name) / "state", TOKEN if seed % 4 else None
        make_run(state, clients=THREADS + 1, rounds=1)
        federation = Federation(Path(name), state, token=token or "")
        try:
            url = f"http://127.0.0.1:{federation.port}"
            ids = [f"client-{number}" for number in range(THREADS + 1)]
            http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, trust_env=False, timeout=30)
            for client_id in ids:
                message = {
                    "protocol_version": 1, "client_id": client_id, "client_key": f"{client_id}-{'k' * 32}", "name": "n",
                    "memory_bytes": 1, "expert_share": 1, "compute_share": 1, "num_examples": 5, "edgefed_version": "0",
                }  # fmt: skip
                http.post("/v1/clients", json=message).raise_for_status()
            blob = next(p for p in (state / "blobs").rglob("*") if p.is_file() and p.stat().st_size > 1000)
            whole, key = blob.read_bytes(), {"x-edgefed-client-key": f"{ids[-1]}-{'k' * 32}"}
            upload = f"/v1/clients/{ids[-1]}/rounds/1/uploads/1"
            http.put(upload, params={"offset": 0}, content=whole[:9000], headers=key).raise_for_status()
            before = [
                path.read_bytes() for path in (*(state / "blobs").glob("??/*"), next((state / "uploads").iterdir()))
            ]

            def attack(number: int) -> None:
                own = f"{ids[number]}-{'k' * 32}"
                hostile = Hostile(1000 * seed + number, ids[number], own, blob.name, token, guesses=seed % 4 == 3)
                for _ in range(count // THREADS):
                    if hostile.random.random() < 0.1:
                        frame, path = hostile.frame(whole), f"/v1/clients/{ids[number]}/rounds/1/uploads/1"
                        with contextlib.suppress(httpx.HTTPError):
                            header = {"x-edgefed-client-key": own}
                            answer = http.put(path, params={"offset": 0}, content=frame, headers=header)
                            statuses[str(answer.status_code)] += 1
                        continue
                    with contextlib.suppress(OSError):
                        statuses[send(federation.port, hostile.request())] += 1

            threads = [threading.Thread(target=attack, args=(number,)) for number in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            after = [
                path.read_bytes()
                for path in (*(state / "blobs").glob("??/*"), state / "uploads" / f"{ids[-1]}-1-1.part")
            ]
            alive = http.get("/v1/health").status_code == 200 and federation.server.poll() is None
            http.close()
        finally:
            federation.close()
        return {
            "seed": seed, "requests": statuses.total(), "statuses": dict(sorted(statuses.items())), "alive": alive,
            "server_errors": sum(n for status, n in statuses.items() if status.startswith("5")),
            "hangs": statuses["hang"], "unchanged": before == after, **federation.tracebacks(),
        }  # fmt: skip


def totals(rows: dict[str, list[dict[str, object]]]) -> dict[str, object]:
    disturbed = rows["kills"] + rows["full_disks"]
    everything = disturbed + rows["requests"]
    return {
        "kills": sum(row["kills"] for row in rows["kills"]),
        "full_disks": sum(row["full_disks"] for row in rows["full_disks"]),
        "requests": sum(row["requests"] for row in rows["requests"]),
        "runs": len(disturbed),
        "runs_with_another_model": sum(not row["equal"] for row in disturbed),
        "updates_lost": sum(row["lost"] for row in disturbed),
        "updates_counted_twice": sum(row["twice"] for row in disturbed),
        "ended_by_themselves": sum(len(row["ended"]) for row in disturbed),
        "tracebacks": sum(row["tracebacks"] for row in everything),
        "answers_5xx": sum(row["server_errors"] for row in rows["requests"]),
        "hangs": sum(row["hangs"] for row in rows["requests"]),
        "changed_by_requests": sum(not (row["unchanged"] and row["alive"]) for row in rows["requests"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--full-disks", type=int, default=0)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--compression", default="none", help="of updates; a codec, not auto")
    parser.add_argument("--download-compression", default="none", help="of the model's steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--agent", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.agent:
        run_agent(*options.agent)
        return
    rows: dict[str, list[dict[str, object]]] = {"kills": [], "full_disks": [], "requests": []}
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["episodes"]
    wanted = {"kills": options.kills, "full_disks": options.full_disks, "requests": options.requests}
    codecs = (options.compression, options.download_compression)
    calm = calm_model(codecs) if options.kills or options.full_disks else {}
    episodes = {
        "kills": lambda seed: kill_episode(seed, calm, codecs),
        "full_disks": lambda seed: disk_episode(seed, calm, codecs),
        "requests": lambda seed: request_episode(seed, min(REQUESTS_AT_ONCE, options.requests)),
    }
    while missing := [name for name, count in wanted.items() if totals(rows)[name] < count]:
        name = missing[0] if len(missing) == 1 else min(missing, key=lambda one: totals(rows)[one] / wanted[one])
        rows[name].append({**episodes[name](len(rows[name])), "commit": provenance()["commit"]})
        print(name, json.dumps(rows[name][-1]), flush=True)
        if options.json:
            temporary = options.json.with_suffix(".tmp")
            temporary.write_text(
                json.dumps({**provenance(), "codecs": codecs, "totals": totals(rows), "episodes": rows}, indent=1)
                + "\n"
            )
            shutil.move(temporary, options.json)
    print(json.dumps(totals(rows), indent=1))


if __name__ == "__main__":
    main()
