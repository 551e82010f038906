"""Time to quality with slow clients: rounds that wait for all, over-selection, a quorum, and asynchronous rounds.

    python benchmarks/bench_stragglers.py --json benchmarks/results/stragglers.json

The real aggregator (rounds, uploads, folding, staleness) with a virtual clock and ten clients, the slowest of which
takes 16 times as long as the fastest. They train a softmax classifier. A client has two of the ten classes, and some
classes are with slow clients only, so a rule that drops these loses them. Reported are virtual seconds until the
held-out loss reaches ``--target`` (null: not reached), the loss in the end, updates that were dropped, and the share of
the counted updates that came from the slower half of the clients.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from provenance import provenance

from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.service import Service
from edgefed.errors import RoundClosed
from edgefed.methods.registry import make_method
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.frames import map_tensor, read_header, update_name, write_frame
from edgefed.protocol.messages import (
    Assignment,
    Manifest,
    Register,
    RunConfig,
    TrainingConfig,
    UnitInfo,
    UpdateMeta,
    decode_message,
)

SECONDS = (1.0, 1.0, 1.5, 2.0, 2.0, 4.0, 4.0, 8.0, 12.0, 16.0)
"""What a round takes each client; +-20 % from round to round."""
CLASSES, FEATURES, EXAMPLES, STEPS, RATE = 10, 32, 200, 10, 0.1
POLICIES = {
    "waits for all": {},
    "over-selection, 8 of 10": {"quorum": 8},
    "quorum of 3": {"quorum": 3},
    "asynchronous, buffer of 3": {"quorum": 3, "max_staleness": 20},
}
KEY = "benchmark client key, long enough "


def softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


class Task:
    """Ten Gaussian classes. Client k has the classes k and k + 1."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self._means = self.random.normal(size=(CLASSES, FEATURES)) * 0.5
        self._test = self._draw(np.arange(2000) % CLASSES)
        labels = [self.random.choice([k, (k + 1) % CLASSES], EXAMPLES) for k in range(len(SECONDS))]
        self._data = [self._draw(each) for each in labels]

    def _draw(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._means[labels] + self.random.normal(size=(len(labels), FEATURES)), labels

    def train(self, client: int, weight: np.ndarray) -> np.ndarray:
        """``weight`` (CLASSES, FEATURES) after a few steps of gradient descent."""
        inputs, labels = self._data[client]
        weight = weight.astype(np.float64)
        for _ in range(STEPS):
            picked = self.random.integers(0, len(labels), 32)
            error = softmax(inputs[picked] @ weight.T) - np.eye(CLASSES)[labels[picked]]
            weight = weight - RATE * error.T @ inputs[picked] / len(picked)
        return weight.astype(np.float32)

    def loss(self, weight: np.ndarray) -> float:
        inputs, labels = self._test
        chosen = softmax(inputs @ weight.T.astype(np.float64))[np.arange(len(labels)), labels]
        return float(-np.log(chosen).mean())


class Federation:
    """The aggregator and its clients in virtual time."""

    def __init__(self, folder: Path, policy: dict[str, int], seed: int):
        self.now, self.task, self._folder = 0.0, Task(seed), folder
        unit = UnitInfo(key="head", kind="dense", layer=-1, expert=-1, trainable=True)
        run = RunConfig(
            run_id="stragglers", model="softmax", method="fedavg", method_options={}, rounds=10**6, seed=seed,
            training=TrainingConfig(),
        )  # fmt: skip
        rules = RoundPolicy(rounds=10**6, min_clients=len(SECONDS), client_timeout_s=1e6, **policy)
        create_run(
            folder / "state", run, rules, [(unit, {"weight": ("F32", np.zeros((CLASSES, FEATURES), np.float32))})]
        )
        self.run = ActiveRun(
            folder / "state", make_method, clock=lambda: self.now, fold_threads=1,
            keep_rounds=2 + policy.get("max_staleness", 0),
        )  # fmt: skip
        self.service = Service(self.run)
        self.counted, self.dropped, self.losses = [0] * len(SECONDS), 0, [(0.0, self.task.loss(self.model()[1]))]
        self._work: list[tuple[float, int, int, np.ndarray]] = []  # (end, client, round, weight)
        self._busy: set[int] = set()
        self._trained = [0] * len(SECONDS)
        for client in range(len(SECONDS)):
            self.service.register(
                Register(
                    protocol_version=PROTOCOL_VERSION, client_id=f"client-{client}", client_key=f"{KEY}{client}",
                    name=f"client {client}", memory_bytes=2**30, expert_share=1.0, compute_share=1.0,
                    num_examples=EXAMPLES, edgefed_version="0",
                )
            )  # fmt: skip

    def model(self, which: str = "latest") -> tuple[int, np.ndarray]:
        manifest = decode_message(self.service.manifest(which), Manifest)
        path = self.service.blob(manifest.units[0].sha256)[0]
        return manifest.server_round, np.array(map_tensor(path, read_header(path)["weight"]))

    def simulate(self, until_s: float) -> None:
        """Let clients train, in the order in which they end, until the virtual time is over."""
        self._begin()
        while self._work and self._work[0][0] <= until_s:
            self.now, client, server_round, weight = heapq.heappop(self._work)
            self._busy.discard(client)
            try:
                self._send(client, server_round, weight)
                self.counted[client] += 1
            except RoundClosed:
                self.dropped += 1
            self.run.tick()
            while self.run.fold_due:
                self.run.fold_pending()
                self.run.tick()
                self.losses.append((self.now, self.task.loss(self.model()[1])))
            self._begin()

    def _begin(self) -> None:
        for client, seconds in enumerate(SECONDS):
            if client in self._busy:
                continue
            answer = self.service.assignment(f"client-{client}", f"{KEY}{client}")
            if not isinstance(answer, Assignment) or answer.server_round == self._trained[client]:
                continue
            server_round, weight = self.model(str(answer.server_round))
            self._trained[client] = server_round
            self._busy.add(client)
            end = self.now + seconds * self.task.random.uniform(0.8, 1.2)
            heapq.heappush(self._work, (end, client, server_round, self.task.train(client, weight)))

    def _send(self, client: int, server_round: int, weight: np.ndarray) -> None:
        path, client_id, key = self._folder / "update.safetensors", f"client-{client}", f"{KEY}{client}"
        sha256, size_bytes = write_frame(path, {update_name("head", "weight"): ("F32", weight)})
        place = (client_id, key, server_round, 1)
        name, writer = self.service.open_upload(*place, 0, size_bytes)
        try:
            writer.write(path.read_bytes())
        finally:
            self.service.close_upload(name, writer)
        meta = UpdateMeta(
            client_id=client_id, server_round=server_round, attempt=1, sha256=sha256, size_bytes=size_bytes,
            num_examples=EXAMPLES, num_tokens=EXAMPLES, experts=(), metrics={},
        )  # fmt: skip
        self.service.commit(*place, meta)


def measure(policy: dict[str, int], seed: int, until_s: float, target: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="edgefed-stragglers-") as name:
        federation = Federation(Path(name), policy, seed)
        try:
            federation.simulate(until_s)
        finally:
            federation.run.close()
    reached = [at for at, loss in federation.losses if loss <= target]
    half = len(SECONDS) // 2
    return {
        "seconds_to_target": round(reached[0], 1) if reached else float("inf"),
        "final_loss": round(federation.losses[-1][1], 4),
        "rounds": len(federation.losses) - 1,
        "dropped": federation.dropped,
        "share_of_slow_half": round(sum(federation.counted[half:]) / max(1, sum(federation.counted)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="virtual seconds of each run")
    parser.add_argument("--target", type=float, default=0.8, help="held-out loss")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, policy in POLICIES.items():
        runs = [measure(policy, seed, options.seconds, options.target) for seed in range(options.seeds)]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row = {"policy": name, **policy, **{key: None if value == np.inf else value for key, value in medians.items()}}
        rows.append({**row, "seconds_of_each_seed": [str(run["seconds_to_target"]) for run in runs]})
        print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({**provenance(), "target": options.target, "seconds": options.seconds, "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
