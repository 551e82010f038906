"""Puts an agent together: identity and journal, transport, and the trainer with its model."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

from edgefed.agent.agent import AgentSettings, RunSummary, open_agent
from edgefed.agent.local_trainer import LocalTrainer
from edgefed.agent.planner import DeviceLimits
from edgefed.agent.progress import ProgressSink

MAX_PROBLEMS_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """What `edgefed join` was told. Sizes are bytes, shares are 0..1."""

    server: str
    data: str
    state: Path
    name: str
    memory_bytes: int
    expert_share: float = 1.0
    compute_share: float = 1.0
    held_out_share: float = 0.1
    token: str | None = None


def run_agent(config: JoinConfig, progress: ProgressSink, stop: threading.Event) -> RunSummary:
    """Take part in the run at ``config.server`` until it is over or ``stop`` is set.

    The data is read first, so that a bad file is told before the server hears of this device. Raises what `Agent.run`
    and `LocalTrainer` raise.
    """
    trainer = LocalTrainer(
        config.data,
        config.state,
        DeviceLimits(config.memory_bytes, config.expert_share, config.compute_share),
        config.name,
        held_out_share=config.held_out_share,
    )
    for problem in trainer.corpus.problems[:MAX_PROBLEMS_SHOWN]:
        progress.message(f"{config.data} line {problem.line}: {problem.reason}")
    if len(trainer.corpus.problems) > MAX_PROBLEMS_SHOWN:
        progress.message(f"{config.data}: {len(trainer.corpus.problems)} lines cannot be used in all")
    settings = AgentSettings(
        name=config.name,
        memory_bytes=config.memory_bytes,
        expert_share=config.expert_share,
        compute_share=config.compute_share,
    )
    with open_agent(
        config.server, config.state, settings, trainer, token=config.token, progress=progress, stop=stop
    ) as agent:
        return agent.run()
