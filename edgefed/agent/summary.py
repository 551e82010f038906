"""What an agent did in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgefed.progress import counted
from edgefed.protocol.comparison import Comparison


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What an agent did. ``finished``: the run is over; otherwise the agent was stopped.

    ``rounds``: number of acknowledged updates. ``metrics``: those of the last one. ``comparison``: losses of the final
    model and others on this device's text, None unless the run is over. ``rounds_of_run``: the rounds, also of earlier
    processes of this device, of ``run_rounds`` in all.
    """

    rounds: int
    bytes_down: int
    bytes_up: int
    seconds: float
    metrics: Mapping[str, float]
    finished: bool
    reason: str
    comparison: Comparison | None = None
    rounds_of_run: int = 0
    run_rounds: int = 0

    def __str__(self) -> str:
        """One sentence, for people."""
        what = "Run finished." if self.finished else "Stopped; the same command continues."
        return f"{what} This device trained in {self.rounds_of_run} of {counted(self.run_rounds, 'round')}."
