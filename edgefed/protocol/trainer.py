"""What the agent needs of a trainer, the only part of a device that knows a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from edgefed.progress import ProgressSink
from edgefed.protocol.messages import Assignment, ExpertReport, ExpertSurvey, FileInfo, Manifest, RunConfig, UnitInfo

Fetch = Callable[[Iterable[UnitInfo | FileInfo]], Mapping[str, Path]]
"""Local files of units and files, {sha256: path}; downloads what is missing. May be called several times a round."""


@dataclasses.dataclass(frozen=True)
class TrainedUpdate:
    """What a trainer says of the update that it wrote.

    ``keep``: hashes that the next round still needs; all other blobs are deleted. A metric that is no finite number
    stays on the device: JSON cannot carry it.
    """

    experts: tuple[ExpertReport, ...]
    metrics: Mapping[str, float]
    num_examples: int
    num_tokens: int
    keep: frozenset[str]
    survey: ExpertSurvey | None = None


class Trainer(Protocol):
    """Trains one round at a time; lives as long as the agent, so the base model stays loaded between rounds."""

    num_examples: int
    """Training examples on this device; known before the agent registers."""

    def train_round(
        self,
        run: RunConfig,
        manifest: Manifest,
        assignment: Assignment,
        fetch: Fetch,
        progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:
        """Train one round and write the update, one tensor frame, to ``update_path``.

        Calls ``progress.advance`` after each step, and lets the StopRequested that it may raise pass. Lets every error
        of ``fetch`` pass as well: the agent knows which of them only end this round.
        """
        ...

    def between_rounds(self, fetch: Fetch, progress: ProgressSink) -> None:
        """Work for the next round that need not wait for it; called once an update was acknowledged, while others still
        train and the aggregator aggregates. ``fetch`` has the files that the update asked to keep.
        """
