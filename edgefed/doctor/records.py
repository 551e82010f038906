"""Recordings: every raw reading of this machine in a file, and the facts back out of such a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from edgefed.disk import write_durably
from edgefed.doctor.diagnosis import IMPORT_LIMIT_S, QUERIES, SENSOR_LIMIT_S
from edgefed.doctor.isolation import Worker
from edgefed.errors import ConfigError, StorageError


@dataclasses.dataclass(frozen=True)
class Recorded:
    """``without_torch`` says why torch's part is missing; empty when it is there."""

    size_bytes: int
    without_torch: str = ""


def record_to(path: Path, device: str | None, *, force: bool) -> Recorded:
    """Read every sensor and write the recording to ``path``, whole or not at all.

    Raises ConfigError when ``path`` exists and not ``force``, DeviceNotFound, and StorageError when it cannot be
    written or the sensors cannot be read.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists", remedy="Choose another name, or set `force` to replace it.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{path} is no file that could be written", remedy="Pass a file in an existing folder.")
    without_torch = ""
    with Worker() as worker:
        outcome = worker.call(f"{QUERIES}:recording", IMPORT_LIMIT_S, device=device, ask_torch=True)
        if outcome.died:
            without_torch = outcome.failure
            outcome = worker.call(f"{QUERIES}:recording", SENSOR_LIMIT_S, device=device, ask_torch=False)
    if outcome.error is not None:
        raise outcome.error
    if not outcome.ok:
        raise StorageError(
            f"the sensors cannot be read: {outcome.failure}",
            remedy="Run `nvidia-smi`: if it fails or hangs as well, reinstall the driver or reboot.",
        )
    data = json.dumps(outcome.value, indent=1, sort_keys=True).encode()
    write_durably(path.absolute(), data, mode=0o644)
    return Recorded(len(data), without_torch)
