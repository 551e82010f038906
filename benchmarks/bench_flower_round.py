"""A round of 4 clients and 200 MB: edgefed's aggregator with TLS, and Flower's SuperLink, in turns.

    python benchmarks/bench_flower_round.py --flower BIN --json benchmarks/results/flower_round.json

``--flower``: the ``bin`` folder of an environment with ``flwr`` 1.30 and numpy, which may be another one than this.
Neither side trains. A round of edgefed is that of `bench_aggregator`: clients of raw HTTPS download the whole model,
upload and commit all experts, and wait for the next model. A round of Flower is its FedAvg over `flower_round`:
SuperLink and four SuperNodes over loopback without TLS, each client a process that Flower starts, which sends what it
got with another content. Both sides share the machine with whatever else runs, which is why they take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
from bench_aggregator import measure, wait_for
from provenance import provenance

CLIENTS, ARRAYS, ROUNDS = 4, 48, 2
"""48 arrays of 4 MiB are 201 MB, as much as the model of `bench_aggregator`."""
PORT = 18470


def edgefed_round() -> dict[str, object]:
    """One round over TLS."""
    row = measure(CLIENTS, 1.0, "auto", tls=True)
    return {
        "round_s": round(sum(row["seconds"].values()), 2),
        "server_cpu_s": row["server_cpu_s"],
        "server_peak_rss_mb": row["server_peak_rss_mb"],
    }


class Sampler:
    """The largest memory and the processor time of a process and all that it starts."""

    def __init__(self, pid: int):
        self._process, self.peak_bytes, self._seconds = psutil.Process(pid), 0, {}

    def look(self) -> None:
        """Take a sample."""
        total = 0
        for each in [self._process, *self._process.children(recursive=True)]:
            try:
                total += each.memory_info().rss
                times = each.cpu_times()
                self._seconds[each.pid] = times.user + times.system
            except psutil.Error:
                continue
        self.peak_bytes = max(self.peak_bytes, total)

    @property
    def cpu_s(self) -> float:
        """Seconds of all processes."""
        return sum(self._seconds.values())


def flower_rounds(bin_folder: Path) -> dict[str, object]:
    """`ROUNDS` rounds of Flower; the figures are of one round, without the start of its processes."""
    app, processes = Path(__file__).with_name("flower_round"), []
    with tempfile.TemporaryDirectory(prefix="edgefed-flower-") as name:
        folder = Path(name)
        shutil.copytree(app, folder / "app")
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{PORT}"\ninsecure = true\n'
        )
        environment = {
            **os.environ, "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}",
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)

        def start(program: str, *words: str) -> subprocess.Popen[bytes]:
            with (folder / f"{program}.log").open("ab") as log:
                command = [str(bin_folder / program), "--insecure", *words]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder))
            return processes[-1]

        try:
            link = start("flower-superlink", "--host", "127.0.0.1", "--port", str(PORT))
            wait_for(_answers(f"http://127.0.0.1:{PORT}/health"), 120.0, "SuperLink")
            for number in range(CLIENTS):
                nodes = ["--superlink", f"127.0.0.1:{PORT}", "--host", "127.0.0.1", "--port", str(PORT + 20 + number)]
                start("flower-supernode", *nodes, "--node-config", f"partition-id={number}")
            time.sleep(5.0)
            out, sampler = folder / "rounds.json", Sampler(link.pid)
            words = f'arrays={ARRAYS} clients={CLIENTS} rounds={ROUNDS} out="{out}"'
            command = [str(bin_folder / "flwr"), "run", str(folder / "app"), "here", "--run-config", words]
            subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=300)
            until = time.monotonic() + 1800
            while not out.exists() and link.poll() is None and time.monotonic() < until:
                sampler.look()
                time.sleep(0.2)
            seconds = json.loads(out.read_text())
        finally:
            stop(processes)
    return {
        "round_s": round(statistics.median(seconds), 2), "rounds_s": [round(each, 2) for each in seconds],
        "server_cpu_s": round(sampler.cpu_s / ROUNDS, 2), "server_peak_rss_mb": round(sampler.peak_bytes / 1e6, 1),
    }  # fmt: skip


def _answers(url: str) -> Callable[[], bool]:
    def answers() -> bool:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            return False
        return True

    return answers


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End these processes and all that they have started."""
    alive = []
    for process in processes:
        try:
            alive += [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        except psutil.NoSuchProcess:
            continue
    for each in alive:
        try:
            each.terminate()
        except psutil.NoSuchProcess:
            continue
    for each in psutil.wait_procs(alive, timeout=10)[1]:
        each.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flower", type=Path, required=True, metavar="BIN", help="folder with flower-superlink")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for _ in range(options.turns):
        for system, run in (("edgefed", edgefed_round), ("flower", lambda: flower_rounds(options.flower.absolute()))):
            load = round(os.getloadavg()[0], 2)
            rows.append({"system": system, **run(), "load_average_1min": load})
            print(json.dumps(rows[-1]), flush=True)
    medians = {
        system: {
            name: round(statistics.median(row[name] for row in rows if row["system"] == system), 2)
            for name in ("round_s", "server_cpu_s", "server_peak_rss_mb")
        }
        for system in ("edgefed", "flower")
    }
    times = {name: round(medians["flower"][name] / medians["edgefed"][name], 1) for name in medians["edgefed"]}
    found = {"medians": medians, "flower_takes_times_as_much": times}
    print(json.dumps(found, indent=1))
    if options.json:
        version = subprocess.check_output([options.flower / "flwr", "--version"], text=True).split()[-1]
        facts = {"flower": version, "model_mb": round(ARRAYS * 2**22 / 1e6, 1), "clients": CLIENTS}
        options.json.write_text(json.dumps({**provenance(), **facts, **found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
