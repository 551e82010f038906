"""What a device knows of the round that it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from edgefed.methods.interface import ExpertMethod
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import Assignment, Manifest, RunConfig, UnitInfo
from edgefed.protocol.trainer import Fetch
from edgefed.training.step_clock import StepClock


@dataclasses.dataclass
class DeviceRound:
    """State of one round.

    ``newest`` are the units of its manifest; ``units`` the versions that this device uses, some of which may be older.
    ``own`` are files of units whose weights of this device count instead of the global ones. ``phase`` names the part
    of the round for messages. ``clock`` ends its steps in time; None until they begin.
    """

    run: RunConfig
    method: ExpertMethod
    manifest: Manifest
    assignment: Assignment
    fetch: Fetch
    progress: ProgressSink
    newest: Mapping[str, UnitInfo]
    units: Mapping[str, UnitInfo]
    own: Mapping[str, Path]
    phase: str = "planning"
    clock: StepClock | None = None

    @property
    def evaluates(self) -> bool:
        """Whether the model is evaluated in this round."""
        return self.run.training.evaluates(self.manifest.server_round, self.run.rounds)
