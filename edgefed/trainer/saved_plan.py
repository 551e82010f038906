"""What a device remembers of a run from round to round and across restarts: plan.json in its state folder.

Names in the file are those of the first version, so that plans of every version can be read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from edgefed.costs.step_setup import Correction, StepPlan, StepSetup
from edgefed.disk import disk_errors, write_durably
from edgefed.errors import StateCorrupt
from edgefed.expert_records import ActivationProfile, ExpertPlan

PLAN_FILE = "plan.json"


class SavedSetup(msgspec.Struct, frozen=True):
    """The fields of a `StepSetup` that the device chose; the run determines the others."""

    chunked_loss: bool
    checkpointing: bool
    optimizer: str
    expert_storage: str | None
    offload: bool
    sequence_length: int
    streamed_layers: int = 0
    lora_rank: int | None = None


class SavedStepPlan(msgspec.Struct, frozen=True):
    """The device's part of a `StepPlan`."""

    setup: SavedSetup
    resident: int = msgspec.field(name="held")
    trainable: int = msgspec.field(name="trained")

    @classmethod
    def of(cls, step_plan: StepPlan) -> SavedStepPlan:
        """What is saved of ``step_plan``."""
        setup = {name: getattr(step_plan.setup, name) for name in SavedSetup.__struct_fields__}
        return cls(SavedSetup(**setup), step_plan.resident, step_plan.trainable)

    def step_plan(self, setup: StepSetup) -> StepPlan:
        """The step plan, with what the run determines from ``setup``. Raises ConfigError on an unknown value."""
        own = msgspec.structs.asdict(self.setup)
        own["lora_rank"] = self.setup.lora_rank or setup.lora_rank  # an earlier version has written none
        return StepPlan(dataclasses.replace(setup, **own), self.resident, self.trainable)


@dataclasses.dataclass
class SavedPlan:
    """The memory of one device in one run.

    ``profile_round`` is the round whose experts ``profile`` is of; ``failed_bytes`` the budget under which a plan ran
    out of memory, 0 for none.
    """

    profile: ActivationProfile | None = None
    profile_round: int = 0
    plan: ExpertPlan | None = None
    step: SavedStepPlan | None = None
    correction: Correction | None = None
    failed_bytes: int = 0

    def write(self, path: Path, fingerprint: list[Any]) -> None:
        """Save to ``path`` for the run and device of ``fingerprint``. Raises StorageError."""
        content = _File(
            fingerprint=fingerprint,
            profile_round=self.profile_round,
            plan=self.plan.to_dict() if self.plan else None,
            step=self.step,
            failed_bytes=self.failed_bytes,
            correction=self.correction,
            profile=self.profile.to_dict() if self.profile else None,
        )
        write_durably(path, msgspec.json.encode(content))


class _Header(msgspec.Struct):
    fingerprint: list[Any]


class _File(_Header, kw_only=True):
    profile_round: int
    plan: dict[str, Any] | None
    step: SavedStepPlan | None = msgspec.field(name="load")
    failed_bytes: int
    correction: Correction | None
    profile: dict[str, Any] | None


def read_saved_plan(path: Path, fingerprint: list[Any]) -> SavedPlan:
    """What was saved for ``fingerprint``; empty if there is no file, or one of another run or device.

    Raises StateCorrupt, StorageError.
    """
    if not path.exists():
        return SavedPlan()
    with disk_errors(path):
        data = path.read_bytes()
    try:
        if msgspec.json.decode(data, type=_Header).fingerprint != fingerprint:
            return SavedPlan()
        return _saved_plan(msgspec.json.decode(data, type=_File))
    except (ValueError, KeyError, TypeError) as error:  # msgspec's errors are ValueErrors
        raise StateCorrupt(
            f"{path} is not a plan that edgefed wrote: {error}", remedy="Delete the file; the device plans again."
        ) from error


def load_saved_plan(folder: Path) -> tuple[str, SavedPlan]:
    """The id of the run, and what was saved for it, in a device's state folder.

    Raises FileNotFoundError when the device has not planned yet, StateCorrupt.
    """
    path = folder / PLAN_FILE
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        return str(next(iter(file.fingerprint), "")), _saved_plan(file)
    except (ValueError, KeyError, TypeError) as error:
        raise StateCorrupt(f"{path} is not a plan that edgefed wrote: {error}") from error


def load_plan(folder: Path) -> tuple[ActivationProfile | None, ExpertPlan]:
    """The profile and the plan in a device's state folder, whatever the run.

    Raises FileNotFoundError when it has not planned yet, StateCorrupt.
    """
    _, saved = load_saved_plan(folder)
    if saved.plan is None:
        raise StateCorrupt(f"{folder / PLAN_FILE} is not a plan that edgefed wrote: no plan in it")
    return saved.profile, saved.plan


def _saved_plan(file: _File) -> SavedPlan:
    return SavedPlan(
        profile=ActivationProfile.from_dict(file.profile) if file.profile else None,
        profile_round=file.profile_round,
        plan=ExpertPlan.from_dict(file.plan) if file.plan else None,
        step=file.step,
        correction=file.correction,
        failed_bytes=file.failed_bytes,
    )
