"""Which version of each expert a device has: those that it does not train need not be downloaded whenever they change.

What a device trains it gets anew in every round. What it holds frozen, as it is or within a merged expert, changes in
the global model whenever others train it, and by little: with `Method.refresh_rounds` = r it is taken as the device
last had it until it is r rounds old. Downloads are spread: in each round it is the turn of another r-th of the experts.

    FOLDER/frozen.json      run, and for each expert unit hash, size, and the last round in which it was the newest
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgefed.disk import disk_errors, write_durably
from edgefed.errors import NotFound
from edgefed.expert_records import ExpertPlan, Role
from edgefed.protocol.messages import UnitInfo
from edgefed.protocol.trainer import Fetch

COPIES_FILE = "frozen.json"
_log = logging.getLogger("edgefed.agent")


class FrozenCopies:
    """The copies of one device in one run; ``folder`` is its state."""

    def __init__(self, folder: Path, run_id: str):
        self._path, self._run_id = folder / COPIES_FILE, run_id
        self._copies: dict[str, tuple[str, int, int]] = {}
        try:
            with disk_errors(self._path):
                kept = json.loads(self._path.read_bytes()) if self._path.exists() else {}
            if kept.get("run_id") == run_id:
                self._copies = {key: (sha256, size, last) for key, (sha256, size, last) in kept["copies"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            _log.warning("%s cannot be read, so all experts are fetched anew: %s", self._path, error)

    def view(self, units: Mapping[str, UnitInfo], server_round: int, refresh: int, fetch: Fetch) -> dict[str, UnitInfo]:
        """``units`` of a round with experts as this device has them, but for those whose turn it is.

        Where a copy is neither here nor at the aggregator any more, all experts are those of the round.
        """
        older = {}
        for key, unit in units.items():
            sha256, size_bytes, last = self._copies.get(key, (unit.sha256, 0, 0))
            turn = (unit.layer + unit.expert + server_round) % refresh == 0
            if unit.kind == "expert" and sha256 != unit.sha256 and not turn and server_round - last < refresh:
                older[key] = msgspec.structs.replace(unit, sha256=sha256, size_bytes=size_bytes)
        try:
            fetch(older.values())
        except NotFound:
            return dict(units)
        return {**units, **older}

    def keep(self, used: Mapping[str, UnitInfo], units: Mapping[str, UnitInfo], server_round: int) -> None:
        """Remember which experts a round ``used`` of its ``units``; durable when it returns."""
        copies = {}
        for key, unit in used.items():
            if unit.kind == "expert":
                last = server_round if unit.sha256 == units[key].sha256 else self._copies[key][2]
                copies[key] = (unit.sha256, unit.size_bytes, last)
        self._copies = copies
        write_durably(self._path, json.dumps({"run_id": self._run_id, "copies": copies}).encode())


def with_newest_trainable(
    units: Mapping[str, UnitInfo], newest: Mapping[str, UnitInfo], plan: ExpertPlan
) -> dict[str, UnitInfo]:
    """``units`` with experts that learn, and their adapters, as they are in ``newest``."""
    return {
        key: newest[key] if unit.kind == "expert" and plan.roles[unit.layer][unit.expert] == Role.TRAINABLE else unit
        for key, unit in units.items()
    }
