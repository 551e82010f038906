"""One liar among four: how far it moves the held-out loss of the other three, for each attack and each rule.

    python benchmarks/bench_liar.py --json benchmarks/results/liar.json

Three real agents train the tiny model on different text. The liar, a fourth client, sends in each round: weights times
10^6 (scale); the largest float (huge); noise of standard deviation 1 (noise); small noise as if of 10^9 examples of the
highest importance (examples); three times the last round's change, backwards (reverse). The loss is what the three
measure of the final model on their held-out text; the reference is the same run with the three alone. Each run adds a
row to the file, and the command may be interrupted and repeated; rows of another commit are measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from provenance import provenance

from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.server import AggregatorServer, ServerConfig
from edgefed.embedded import resolve_model
from edgefed.errors import ProtocolError
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.frames import map_tensor, narrow, read_header, update_name, widen, write_frame
from edgefed.protocol.messages import (
    Assignment,
    ExpertReport,
    Finished,
    Register,
    RunConfig,
    TrainingConfig,
    UpdateMeta,
)
from edgefed.runs import RunReader, import_in_subprocess

SILOS = ("email", "asyncio", "unittest")
ATTACKS = ("scale", "huge", "noise", "examples", "reverse")
TRAINING = TrainingConfig(
    local_steps=10, batch_size=4, sequence_length=64, learning_rate=1e-3, profile_tokens=512, evaluation_tokens=2048,
    evaluation_share=1.0,
)  # fmt: skip

Model = dict[str, tuple[str, np.ndarray]]


class Liar:
    """A client that speaks the protocol and trains nothing."""

    def __init__(self, url: str, attack: str, folder: Path):
        self._attack, self._folder = attack, folder
        self._client = AggregatorClient(url, "f" * 32, "liar-" * 8)
        self._before: Model | None = None
        self.refused: list[str] = []
        self._client.register(
            Register(
                protocol_version=PROTOCOL_VERSION, client_id="f" * 32, client_key="liar-" * 8, name="liar",
                memory_bytes=2**31, expert_share=1.0, compute_share=1.0, num_examples=10**9, edgefed_version="0",
            )
        )  # fmt: skip

    def run(self) -> None:
        done = 0
        while not isinstance(reply := self._client.assignment(5.0), Finished):
            if isinstance(reply, Assignment) and reply.server_round > done:
                try:
                    self._lie(reply.server_round)
                except ProtocolError as error:
                    self.refused.append(str(error))
                done = reply.server_round
        self._client.close()

    def _lie(self, server_round: int) -> None:
        units = [unit for unit in self._client.manifest(server_round).units if unit.trainable]
        model: Model = {}
        for unit in units:
            path = self._folder / unit.sha256
            if not path.exists():
                self._client.download(unit.sha256, unit.size_bytes, path)
            for name, entry in read_header(path).items():
                values = widen(np.array(map_tensor(path, entry)), entry.info.dtype).astype(np.float64)
                model[update_name(unit.key, name)] = (entry.info.dtype, values)
        rng, before = np.random.default_rng(server_round), self._before or model
        path, told = self._folder / "update.safetensors", {}
        for name, (dtype, values) in model.items():
            if self._attack == "scale":
                values = values * 1e6
            elif self._attack == "huge":
                values = np.full(values.shape, 3.0e38)
            elif self._attack == "reverse":
                values = values - 3.0 * (values - before[name][1])
            else:
                values = values + rng.normal(size=values.shape) * (1.0 if self._attack == "noise" else 0.02)
            told[name] = (dtype, narrow(values.astype(np.float32), dtype))
        self._before = model
        sha256, size_bytes = write_frame(path, told)
        reports = tuple(
            ExpertReport(layer=unit.layer, expert=unit.expert, usage=1.0, importance=1.0, steps=10, tokens=2560)
            for unit in units
            if unit.kind == "expert"
        )
        examples = 10**9 if self._attack == "examples" else 100
        self._client.upload(server_round, 1, path)
        self._client.commit(
            UpdateMeta(
                client_id="f" * 32, server_round=server_round, attempt=1, sha256=sha256, size_bytes=size_bytes,
                num_examples=examples, num_tokens=2560, experts=reports, metrics={},
            )
        )  # fmt: skip


def federate(template: Path, rounds: int, attack: str | None, robust: str) -> dict[str, object]:
    """One run. Returns the held-out loss of the three on the model after ``rounds`` rounds, and what was set aside."""
    with tempfile.TemporaryDirectory(prefix="edgefed-liar-") as name:
        folder, ready = Path(name), threading.Event()
        shutil.copytree(template, folder / "state")
        changes = {"min_clients": len(SILOS) + (attack is not None), "robust": robust}
        config = ServerConfig(state_folder=folder / "state", port=0, policy_changes=changes, exit_when_finished=True)
        server = AggregatorServer(config, on_ready=lambda _: ready.set())
        thread, agents = threading.Thread(target=server.run), []
        thread.start()
        ready.wait(60)
        for number, silo in enumerate(SILOS):
            home = folder / silo
            home.mkdir()
            identity = {"client_id": hashlib.md5(silo.encode()).hexdigest(), "client_key": "k" * 64}
            (home / "journal.json").write_text(json.dumps({"format_version": 1, **identity}))
            words = ["join", server.url, "--data", f"silo:{silo}", "--state", str(home), "--name", f"device{number}"]
            words += ["--memory", "2GiB", "--final-evaluation", "never", "-q"]
            agents.append(subprocess.Popen([sys.executable, "-m", "edgefed", *words]))
        if attack is not None:
            (folder / "liar").mkdir()
            liar = Liar(server.url, attack, folder / "liar")
            liar.run()
        for agent in agents:
            agent.wait()
        thread.join()
        with RunReader(folder / "state") as reader:
            done = reader.history()
        losses = [entry.metrics["held_out_loss_before"] for entry in done]
        return {
            "refused": [] if attack is None else liar.refused,
            "attack": attack, "robust": robust, "rounds": rounds, "losses": losses, "final_loss": losses[-1],
            "set_aside": sum(len(entry.set_aside) for entry in done), "undone": sum(e.undone is not None for e in done),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--robust", nargs="*", default=["mean"], choices=("mean", "trimmed-mean", "median"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = RunConfig(
        run_id="liar", model="tiny", method="fedavg", method_options={}, rounds=options.rounds + 1, seed=7,
        training=TRAINING,
    )  # fmt: skip
    origin = provenance()
    rows: list[dict[str, object]] = []
    if options.json and options.json.exists():
        stored = json.loads(options.json.read_text())
        rows = [
            row for row in stored["runs"] if (stored["commit"], row["rounds"]) == (origin["commit"], options.rounds)
        ]
    with tempfile.TemporaryDirectory(prefix="edgefed-liar-") as name:
        template = Path(name) / "state"
        policy = RoundPolicy(rounds=run.rounds, min_clients=3, clip=2.0, rollback=1.5, client_timeout_s=600.0)
        import_in_subprocess(resolve_model("tiny"), template, run, policy)
        for robust in options.robust:
            for attack in (None, *options.attacks):
                if any((row["attack"], row["robust"]) == (attack, robust) for row in rows):
                    continue
                row = federate(template, options.rounds, attack, robust)
                reference = next(r["final_loss"] for r in rows + [row] if r["attack"] is None and r["robust"] == robust)
                row["against_the_three_alone"] = row["final_loss"] / reference - 1
                rows.append(row)
                print(json.dumps(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps({**origin, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
