"""The interface between the agent and a trainer, the only part of a device that knows a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from edgefed.progress import ProgressSink
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import Assignment, ExpertReport, ExpertSurvey, FileInfo, Manifest, RunConfig, UnitInfo
from edgefed.protocol.slices import UnitSlice

Fetch = Callable[[Iterable[UnitInfo | FileInfo | UnitSlice]], Mapping[str, Path]]
"""Returns local files {sha256: path} and downloads what is missing. May be called several times in a round."""


@dataclasses.dataclass(frozen=True)
class TrainedUpdate:
    """Description of an update that a trainer has written.

    ``keep``: hashes of the blobs that the next round needs; all others are deleted. A metric that is not finite is not
    sent, because JSON has no such numbers.
    """

    experts: tuple[ExpertReport, ...]
    metrics: Mapping[str, float]
    num_examples: int
    num_tokens: int
    keep: frozenset[str]
    survey: ExpertSurvey | None = None
    lora_rank: int = 0
    """Rank of the adapters on this device; 0: that of the run."""


class Trainer(Protocol):
    """Trains one round at a time. It lives as long as the agent, so the model stays loaded between rounds."""

    num_examples: int
    """Training examples on this device; known before the agent registers."""
    evaluates_global: bool
    """Whether `compare` evaluates the final global model, which then is downloaded."""

    def compare(
        self, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink, skipped: str = ""
    ) -> Comparison | None:
        """Compare the final model ``manifest`` with others on this device's held-out text, at the end of a run.

        ``skipped``: why the final model must not be downloaded; "" if it may. Returns None if there is nothing to
        compare.
        """
        ...

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

        Calls ``progress.advance`` after each step. Does not catch its StopRequested, nor the errors of ``fetch``: the
        agent decides which of them end only this round.
        """
        ...

    def between_rounds(self, fetch: Fetch, progress: ProgressSink) -> None:
        """Prepare the next round; called after an acknowledgement, while other clients still train.

        ``fetch`` has the files in `TrainedUpdate.keep`.
        """
