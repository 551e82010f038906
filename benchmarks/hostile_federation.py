"""The processes of `bench_hostile`: a server, and three real agents with a trainer that is quick and deterministic."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np

from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.errors import EdgefedError
from edgefed.protocol.frames import map_tensor, read_header, update_name, write_frame
from edgefed.protocol.messages import ExpertReport, RunConfig, TrainingConfig, UnitInfo

LONGEST_TEXT = 6000
CLIENTS, ROUNDS, LAYERS, EXPERTS, HIDDEN = 3, 10, 2, 4, 64


def make_run(
    folder: Path, clients: int = CLIENTS, rounds: int = ROUNDS, codecs: tuple[str, str] = ("none", "none")
) -> None:
    """A run of fedavg over a model of random numbers. ``codecs``: of updates, and of the model's steps."""
    rng, units = np.random.default_rng(0), []
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            unit = UnitInfo(
                key=f"layers.{layer}.experts.{expert}", kind="expert", layer=layer, expert=expert, trainable=True
            )
            shape = (HIDDEN, HIDDEN)
            units.append((unit, {name: ("F32", rng.standard_normal(shape, np.float32)) for name in ("up", "down")}))
    run = RunConfig(
        run_id="hostile", model="random", method="fedavg", method_options={}, rounds=rounds, seed=1,
        training=TrainingConfig(), compression=codecs[0],
    )  # fmt: skip
    policy = RoundPolicy(rounds, min_clients=clients, client_timeout_s=900.0, download_compression=codecs[1])
    create_run(folder, run, policy, units)


# --- the device: a real agent with a quick trainer ---------------------------------------------------------------


class QuickTrainer:
    """Adds noise that depends on the round and the device's name."""

    num_examples = 10

    def __init__(self, name: str):
        self._name = name

    def train_round(self, run, manifest, assignment, fetch, progress, update_path):
        from edgefed.protocol.trainer import TrainedUpdate

        time.sleep(0.05)
        paths, tensors = fetch(manifest.units), {}
        rng = np.random.default_rng([assignment.server_round, zlib.crc32(self._name.encode())])
        for unit in manifest.units:
            for name, entry in read_header(paths[unit.sha256]).items():
                old = np.array(map_tensor(paths[unit.sha256], entry))
                noise = rng.standard_normal(old.shape, np.float32) * np.float32(0.01)
                tensors[update_name(unit.key, name)] = ("F32", old + noise)
        write_frame(update_path, tensors)
        reports = tuple(
            ExpertReport(layer=unit.layer, expert=unit.expert, usage=0.1, importance=1.0, steps=1, tokens=5)
            for unit in manifest.units
        )
        return TrainedUpdate(reports, {"loss": 1.0}, 10, 10, frozenset(unit.sha256 for unit in manifest.units))

    def between_rounds(self, fetch, progress):
        pass


def run_agent(url: str, state: str, name: str) -> None:
    from edgefed.agent.agent import AgentSettings, open_agent

    settings = AgentSettings(name=name, memory_bytes=2**31, poll_s=5.0)
    try:
        with open_agent(url, state, settings, QuickTrainer(name)) as agent:
            agent.run()
    except EdgefedError as error:
        sys.exit(f"error: {error}")  # as `edgefed join` ends


# --- a federation of processes -----------------------------------------------------------------------------------


class Federation:
    """A server and its agents, each a process that can be killed and started again."""

    def __init__(self, folder: Path, state: Path, clients: int = CLIENTS, token: str | None = None):
        self.folder, self.state, self._token, self.port = folder, state, token, 0
        self.log = folder / "server.log"
        self.log.touch()
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.ended_by_themselves: list[str] = []
        self.server = self._serve()
        for number in range(clients if token is None else 0):
            identity = {"client_id": hashlib.md5(b"%d" % number).hexdigest(), "client_key": "k" * 64}
            home = folder / f"agent{number}"
            home.mkdir(mode=0o700)
            (home / "journal.json").write_text(json.dumps({"format_version": 1, **identity}))
            self.start_agent(number)

    def _serve(self) -> subprocess.Popen[bytes]:
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        words = ["serve", "--state", str(self.state), "--port", str(self.port), "--ready-file", str(ready)]
        command = [sys.executable, "-m", "edgefed", *words]
        environment = {**os.environ, **({"EDGEFED_TOKEN": self._token} if self._token else {})}
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until = time.monotonic() + 600
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not start: {self.log.read_text(errors='replace')[-1000:]}")
            time.sleep(0.02)
        self.port = json.loads(ready.read_text())["port"]
        return process

    def start_agent(self, number: int) -> None:
        script, home = Path(__file__).with_name("bench_hostile.py"), self.folder / f"agent{number}"
        words = ["--agent", f"http://127.0.0.1:{self.port}", str(home), f"device{number}"]
        with (self.folder / "agents.log").open("ab") as log:
            self.agents[number] = subprocess.Popen([sys.executable, str(script), *words], stdout=log, stderr=log)

    def restart_server(self) -> None:
        self.server.kill()
        self.server.wait()
        self.server = self._serve()

    def restart_agent(self, number: int) -> None:
        self.agents[number].kill()
        self.agents[number].wait()
        self.start_agent(number)

    def running(self) -> list[int]:
        """Agents that have not finished. Notes what ended with an error."""
        for number, process in self.agents.items():
            if process.poll() not in (None, 0, -signal.SIGKILL):
                said = (self.folder / "agents.log").read_text(errors="replace").strip().splitlines()[-1:]
                self.ended_by_themselves.append(f"agent {number}: exit {process.returncode}: {' '.join(said)[:300]}")
                self.start_agent(number)
        if self.server.poll() is not None:
            self.ended_by_themselves.append(f"server: exit {self.server.returncode}")
            self.server = self._serve()
        return [number for number, process in self.agents.items() if process.poll() is None]

    def wait(self, limit_s: float = 600.0) -> None:
        until = time.monotonic() + limit_s
        while self.running():
            if time.monotonic() > until:
                raise RuntimeError(f"the run does not end: {self.log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.05)

    def close(self) -> None:
        for process in (*self.agents.values(), self.server):
            process.terminate()
        for process in (*self.agents.values(), self.server):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def tracebacks(self) -> dict[str, object]:
        """The number of tracebacks in all logs, and the texts of different ones."""
        found = [
            text[:LONGEST_TEXT]
            for path in sorted(self.folder.glob("*.log"))
            for text in re.findall(r"^Traceback .*?^\S.*?$", path.read_text(errors="replace"), re.DOTALL | re.MULTILINE)
        ]
        return {"tracebacks": len(found), **({"traceback_texts": sorted(set(found))[:5]} if found else {})}


def check(federation: Federation, calm: dict[str, str]) -> dict[str, object]:
    """What a disturbed run has lost or counted twice, by its database and the ledgers of its devices."""
    model, rows = model_of(federation.state)
    found = collections.Counter({(number, round_): n for (number, round_), n in ledgers(federation.folder).items()})
    stored = collections.Counter(row[0] for row in rows)
    lost = sum(1 for number, round_ in found if (round_, hashlib.md5(b"%d" % number).hexdigest()) not in rows)
    return {
        "lost": lost,
        "twice": sum(1 for n in found.values() if n > 1) + sum(1 for n in stored.values() if n > CLIENTS),
        "updates": len(rows),
        "bytes_up": uploaded_bytes(federation.state),
        "equal": model == calm,
        **federation.tracebacks(),
        "ended": federation.ended_by_themselves,
    }


def model_of(state: Path) -> tuple[dict[str, str], set[tuple[int, str]]]:
    """{unit key: sha256} of the newest model, and (round, client) of each update."""
    query = (
        "SELECT key, sha256 FROM units u WHERE server_round = (SELECT MAX(server_round) FROM units WHERE key = u.key)"
    )
    with contextlib.closing(sqlite3.connect(f"file:{state}/edgefed.db?mode=ro", uri=True)) as database:
        model = dict(database.execute(query).fetchall())
        return model, set(database.execute("SELECT server_round, client_id FROM updates").fetchall())


def uploaded_bytes(state: Path) -> int:
    """Bytes of all accepted updates."""
    with contextlib.closing(sqlite3.connect(f"file:{state}/edgefed.db?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT SUM(size_bytes) FROM updates").fetchone()[0])


def ledgers(folder: Path) -> collections.Counter[tuple[int, int]]:
    """How often each device has noted an accepted update of each round."""
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for number in range(CLIENTS):
        for line in (folder / f"agent{number}" / "ledger.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # torn by a kill
                entry = json.loads(line)
                counts[number, entry["server_round"]] += entry["outcome"] == "accepted"
    return +counts
