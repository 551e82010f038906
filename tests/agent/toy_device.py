"""A device process with a trainer that needs no model: ``python toy_device.py URL STATE [STEP_SECONDS] [DEATH]``.

It sets every trainable tensor to `toy_value`, prints each event as a line, and stops on signals as the command line
does. DEATH kills the process with SIGKILL before or after a change of its journal: ``before:acknowledge``.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from edgefed.agent.agent import AgentSettings, open_agent
from edgefed.agent.backoff import BackoffSchedule, Retry
from edgefed.agent.journal import Journal
from edgefed.progress import ProgressSink, stop_signals
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, ExpertReport, Manifest, RunConfig
from edgefed.protocol.trainer import Fetch, TrainedUpdate


def toy_value(bias: float, server_round: int) -> float:
    """What a toy device with this bias makes of every trainable tensor in a round; exact in float32."""
    return bias + 10.0 * server_round


class ToyTrainer:
    """Counts its rounds."""

    def __init__(self, bias: float = 0.0, step_s: float = 0.0) -> None:
        self.num_examples, self.evaluates_global = 7, True
        self.bias = bias
        self.keeps = False
        """Whether experts stay in the cache after a round."""
        self.step_s = step_s
        self.rounds: list[int] = []

    def between_rounds(self, fetch, progress) -> None:
        """Nothing to prepare."""

    def train_round(
        self,
        run: RunConfig,
        manifest: Manifest,
        assignment: Assignment,
        fetch: Fetch,
        progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:
        self.rounds.append(assignment.server_round)
        files = fetch([*manifest.files, *manifest.units])
        progress.phase("train", run.training.local_steps, "step")
        for _ in range(run.training.local_steps):
            time.sleep(self.step_s)
            progress.advance(1)
        tensors, experts = {}, []
        for unit in manifest.units:
            entries = frames.read_header(files[unit.sha256])
            assert [entry.info for entry in entries.values()] == list(unit.tensors)
            if not unit.trainable:
                continue
            for info in unit.tensors:
                value = np.full(info.shape, toy_value(self.bias, assignment.server_round), np.float32)
                tensors[frames.update_name(unit.key, info.name)] = (info.dtype, value)
            if unit.kind == "expert":
                experts.append(
                    ExpertReport(layer=unit.layer, expert=unit.expert, usage=0.25, importance=0.0, steps=3, tokens=30)
                )
        frames.write_frame(update_path, tensors)
        return TrainedUpdate(
            experts=tuple(experts),
            metrics={"loss": 1.0 / assignment.server_round, "broken": float("nan")},
            num_examples=self.num_examples,
            num_tokens=120,
            keep=frozenset(unit.sha256 for unit in manifest.units if self.keeps or not unit.trainable),
        )


class LineProgress:
    """Every event as one line."""

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        print("phase", name, total, flush=True)

    def advance(self, n: int) -> None:
        print("advance", n, flush=True)

    def message(self, text: str) -> None:
        print("message", text, flush=True)

    def done(self) -> None:
        print("done", flush=True)


def die_at(death: str) -> None:
    when, _, name = death.partition(":")
    method = getattr(Journal, name)

    @functools.wraps(method)
    def deadly(*args, **options):
        if when == "after":
            method(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Journal, name, deadly)


def main() -> None:
    url, state, step_s = sys.argv[1], sys.argv[2], float((sys.argv[3:] or ["0"])[0])
    for death in sys.argv[4:]:
        die_at(death)
    stop = threading.Event()
    for number in stop_signals():
        signal.signal(number, lambda *_: stop.set())
    settings = AgentSettings(name="toy", memory_bytes=1 << 30, poll_s=5.0, give_up_after_s=10.0)
    retry = Retry(stop, schedule=BackoffSchedule(first_s=0.05, cap_s=0.2))
    with open_agent(
        url, state, settings, ToyTrainer(step_s=step_s), progress=LineProgress(), stop=stop, retry=retry
    ) as a:
        print("summary", a.run().reason, flush=True)


if __name__ == "__main__":
    main()
