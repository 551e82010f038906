"""The file that a benchmark leaves: schema ``edgefed.bench/1``, as JSON, CSV or Markdown rows.

The file is meant to be shared: GPU UUIDs are hashed, host and user names, serial numbers and addresses are not in it.
A value that a sensor did not give is null, and `Report.unknown` says why. Sizes are bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import msgspec

from edgefed.bench.statistics import FAILED, INTERRUPTED, MEASURED, SKIPPED, Entry
from edgefed.errors import ConfigError, StorageError

SCHEMA = "edgefed.bench/1"


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """What measured. ``commit`` is empty for an installed release."""

    version: str
    commit: str = ""
    mode: str
    """quick, default, full, or plan (nothing measured)."""
    repeats: int = 7


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and what else it was doing; no name."""

    os: str
    kernel: str | None
    machine: str
    cpu: str | None
    cores: int | None
    cpu_quota: float | None
    memory_bytes: int | None
    python: str
    torch: str | None
    cuda: str | None
    driver: str | None
    l4t: str | None
    wsl: bool
    container: str | None
    load_before: float | None
    load_after: float | None = None
    battery_percent: float | None = None
    plugged: bool | None = None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """``id`` is what the memory belongs to, ``speed_on`` where speed was measured: cpu, cuda:0, or "" for nothing."""

    id: str
    name: str
    kind: str
    speed_on: str
    evidence: tuple[str, ...] = ()
    compute_capability: str | None = None
    uuid_hash: str | None = None
    profile: str | None = None
    power_mode: str | None = None
    stand_in: bool = False
    """A profile that stands in for a device that is not here."""


class MemoryCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``verified_bytes`` were allocated and written at the same time. ``complete``: they are all that was asked for.

    ``stopped`` says why not, in words. ``last_speed_share`` is the copy speed of the last blocks relative to the first,
    None with fewer than four blocks. ``largest_block_bytes`` is the largest single allocation tried that worked, at
    most ``verified_bytes``; on the CPU it is address space, which was not touched.
    """

    asked_bytes: int
    verified_bytes: int
    complete: bool
    stopped: str = ""
    seconds: float = 0.0
    last_speed_share: float | None = None
    spilled: bool = False
    largest_block_bytes: int | None = None
    out_of_memory: bool = False


class MemoryTerm(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the waterfall. ``size_bytes`` is negative where it takes something away."""

    name: str
    size_bytes: int
    origin: str
    who: str = ""
    """Programs, for the screen: `to_json` leaves them out, for they may say more of their user than he wants to."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The budget: ``now`` with what else runs, ``ideal`` on an idle machine; None where a sensor was missing."""

    kind: str
    now_bytes: int | None
    ideal_bytes: int | None
    origin: str
    terms: tuple[MemoryTerm, ...] = ()
    notes: tuple[str, ...] = ()
    check: MemoryCheck | None = None


class SustainPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One second of the sustained run; None where there is no such sensor."""

    t_s: float
    rate: float
    clock_mhz: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    reasons: tuple[str, ...] = ()


class Sustain(msgspec.Struct, frozen=True, kw_only=True):
    """``change`` is last / first - 1 of the medians over the first and the last five seconds. ``throttled`` counts
    thermal and hardware reasons; a card at its power limit is ``power_limited``, which is normal. ``energy_joules``:
    of the whole run where the device tells it.
    """

    name: str
    unit: str
    seconds: float
    first: float
    last: float
    change: float
    throttled: bool
    power_limited: bool
    reasons: tuple[str, ...]
    points: tuple[SustainPoint, ...]
    energy_joules: float | None = None
    unknown: dict[str, str] = {}


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """How many experts of each layer a model leaves room for under one budget, predicted by the memory model.

    ``mode``: "profile" (forward), "lora" (all kept experts get adapters), "full" (one expert trains, the number is
    that of kept ones). ``storage``: how frozen experts lie in memory. ``experts`` is the smallest layer's number.
    """

    model: str
    budget: str
    """now or ideal"""
    mode: str
    storage: str
    experts: int
    of: int
    limit: str = ""
    upload_bytes: int | None = None
    """Of what would be trained: one round's update."""
    upload_s: float | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one run. ``unknown``: field -> why it is null. ``interrupted``: Ctrl-C came before the end."""

    schema: str = SCHEMA
    created: str
    tool: Tool
    host: Host
    device: Device
    memory: Memory
    tests: tuple[Entry, ...] = ()
    sustain: Sustain | None = None
    fits: tuple[Fit, ...] = ()
    network: tuple[Entry, ...] = ()
    uplink: dict[str, Any] = {}
    """``up_bytes_per_s`` and its origin, by which upload times are told."""
    planning: dict[str, Any] = {}
    """What ``fits`` assumes: device, optimizer, and bytes of the process that are no tensors (CPU)."""
    model: dict[str, Any] = {}
    explain: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    unknown: dict[str, str] = {}
    seconds: float = 0.0
    interrupted: bool = False

    def test(self, name: str) -> Entry | None:
        """The test of that name, None when there is none."""
        return next((entry for entry in self.tests if entry.name == name), None)


def hashed(identifier: str) -> str:
    """A short hash that tells two devices apart and names neither."""
    return hashlib.sha256(f"edgefed:{identifier}".encode()).hexdigest()[:16]


def to_json(report: Report) -> str:
    """The report as an indented JSON document. Numbers that JSON cannot write (NaN, infinity) become null."""
    terms = tuple(msgspec.structs.replace(term, who="") for term in report.memory.terms)
    shared = msgspec.structs.replace(report, memory=msgspec.structs.replace(report.memory, terms=terms))
    return json.dumps(_finite(msgspec.to_builtins(shared)), indent=2) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def parse_report(text: str | bytes, name: str) -> Report:
    """Read a report back. Raises ConfigError, naming ``name`` and the place, for anything that is none."""
    remedy = "Pass a report that `edgefed bench` wrote as JSON."
    try:
        data = json.loads(text)
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{name} is not JSON: {error}", remedy=remedy) from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        known = isinstance(found, str) and found.startswith("edgefed.bench/")
        raise ConfigError(
            f"{name} has schema {found!r}, expected {SCHEMA!r}",
            remedy="Measure again with this version of edgefed, or compare with the version that wrote it."
            if known
            else remedy,
        )
    try:
        report = msgspec.convert(data, Report)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name} is not a complete {SCHEMA} report: {error}", remedy=remedy) from error
    for entry in (*report.tests, *report.network):
        if entry.verdict not in (*MEASURED, SKIPPED, FAILED, INTERRUPTED) or entry.measured != (
            entry.median is not None
        ):
            raise ConfigError(
                f"{name}: test {entry.name!r} has verdict {entry.verdict!r} and median {entry.median}", remedy=remedy
            )
    return report


def load_report(path: Path) -> Report:
    """Read a report file. Raises ConfigError for one that cannot be read or is no report."""
    try:
        return parse_report(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


CSV_COLUMNS = (
    "created", "device", "speed_on", "section", "name", "unit", "median", "mad", "best", "verdict", "samples",
    "paper", "share", "derived", "note", "reason",
)  # fmt: skip


def to_csv(report: Report) -> str:
    """One line a test, network tests included; samples separated by spaces."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section, entries in (("tests", report.tests), ("network", report.network)):
        for entry in entries:
            writer.writerow([
                report.created, report.device.name, report.device.speed_on, section, entry.name, entry.unit,
                *(_cell(value) for value in (entry.median, entry.mad, entry.best)), entry.verdict,
                " ".join(_cell(sample) for sample in entry.samples), _cell(entry.paper), _cell(entry.share),
                int(entry.derived), entry.note, entry.reason,
            ])  # fmt: skip
    return out.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def write_text(path: Path, text: str) -> None:
    """Write a file whole: no half file stays behind when the disk is full. Raises StorageError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raise StorageError now rather than after two minutes: the folder is missing, or may not be written to."""
    if path.is_dir():
        raise StorageError(f"cannot write {path}: it is a folder")
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
