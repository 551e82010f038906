"""What a device remembers of a run from round to round and across restarts: plan.json in its state folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from edgefed.disk import disk_errors, write_durably
from edgefed.errors import StateCorrupt
from edgefed.experts import ExpertPlan, RouterRecord
from edgefed.moe.step_setup import Correction
from edgefed.training.shrinking import Load

PLAN_FILE = "plan.json"
"""Profile, load, plan and correction, in the device's state folder."""

SAVED_SETUP = ("chunked_loss", "checkpointing", "optimizer", "expert_storage", "offload", "sequence_length")
"""Fields of a `StepSetup` that are the device's own; the run says the others."""


@dataclasses.dataclass
class SavedPlan:
    """``profile_round``: whose experts the profile is of. ``load``: the saved fields of a `Load`. ``failed_bytes``: the
    budget under which a plan ran out of memory, 0: none."""

    profile: RouterRecord | None = None
    profile_round: int = 0
    plan: dict | None = None
    load: dict | None = None
    correction: Correction | None = None
    failed_bytes: int = 0

    def keep(self, plan: ExpertPlan, load: Load) -> None:
        self.plan = plan.to_dict()
        self.load = {
            "setup": {name: getattr(load.setup, name) for name in SAVED_SETUP},
            "held": load.held,
            "trained": load.trained,
        }

    def write(self, path: Path, fingerprint: list) -> None:
        """Put it on disk for the run and device that ``fingerprint`` tells. Raises StorageError."""
        content = {
            "fingerprint": fingerprint,
            "profile_round": self.profile_round,
            "plan": self.plan,
            "load": self.load,
            "failed_bytes": self.failed_bytes,
            "correction": dataclasses.asdict(self.correction) if self.correction else None,
            "profile": self.profile.to_dict() if self.profile else None,
        }
        write_durably(path, json.dumps(content).encode())


def read_saved_plan(path: Path, fingerprint: list) -> SavedPlan:
    """What was written for ``fingerprint``; empty where there is nothing, or something of another run or device.

    Raises StateCorrupt, StorageError.
    """
    if not path.exists():
        return SavedPlan()
    try:
        with disk_errors(path):
            saved = json.loads(path.read_text())
        if saved["fingerprint"] != fingerprint:
            return SavedPlan()
        return SavedPlan(
            profile=RouterRecord.from_dict(saved["profile"]) if saved["profile"] else None,
            profile_round=int(saved["profile_round"]),
            plan=saved["plan"],
            load=_checked_load(saved["load"]),
            correction=Correction(**saved["correction"]) if saved["correction"] else None,
            failed_bytes=int(saved["failed_bytes"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise StateCorrupt(
            f"{path} is not what was written: {fault}", remedy="Delete the file; the device plans again."
        ) from fault


def _checked_load(load: Mapping) -> dict:
    return {
        "setup": {name: load["setup"][name] for name in SAVED_SETUP},
        "held": int(load["held"]),
        "trained": int(load["trained"]),
    }
