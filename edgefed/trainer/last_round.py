"""What a device has of a run: the run, the newest manifest, and which units are its own. For exports.

STATE/round.json         the run and the manifest of the last round, or of the final model if the device evaluated it;
                         blobs are in STATE/blobs
STATE/own/units.json     of a method without exchange: the files of the units that this device trained for itself
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from edgefed.disk import disk_errors, write_durably
from edgefed.errors import MalformedMessage, StateCorrupt
from edgefed.protocol.messages import Manifest, RunConfig, decode_message, encode_message

ROUND_FILE = "round.json"
OWN_FOLDER = "own"
_UNITS_FILE = "units.json"
T = TypeVar("T")


class LastRound(msgspec.Struct, frozen=True):
    """The newest global model that a device has had: at the start of its last round, or the final one it evaluated."""

    run: RunConfig
    manifest: Manifest


class _OwnUnits(msgspec.Struct, frozen=True):
    files: dict[str, str]
    """Unit key -> file name."""


def save_last_round(folder: Path, run: RunConfig, manifest: Manifest) -> None:
    """Write ``round.json`` to a device's state folder. Raises StorageError."""
    write_durably(folder / ROUND_FILE, encode_message(LastRound(run, manifest)))


def load_last_round(folder: Path) -> LastRound | None:
    """The last round of a device; None if there was none. Raises StateCorrupt, StorageError."""
    return _load(folder / ROUND_FILE, LastRound)


def save_own_files(folder: Path, paths: Mapping[str, Path]) -> None:
    """Record the files of a device's own units, {unit key: path}. Raises StorageError."""
    files = {key: path.name for key, path in paths.items()}
    write_durably(folder / OWN_FOLDER / _UNITS_FILE, encode_message(_OwnUnits(files)))


def load_own_files(folder: Path) -> dict[str, Path]:
    """The files of a device's own units; empty if it has none. Raises StateCorrupt, StorageError."""
    found = _load(folder / OWN_FOLDER / _UNITS_FILE, _OwnUnits)
    return {key: folder / OWN_FOLDER / name for key, name in found.files.items()} if found else {}


def _load(path: Path, kind: type[T]) -> T | None:
    if not path.exists():
        return None
    with disk_errors(path):
        data = path.read_bytes()
    try:
        return decode_message(data, kind)
    except MalformedMessage as error:
        raise StateCorrupt(f"{path} is not a file that edgefed wrote: {error}") from error
