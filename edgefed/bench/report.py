"""The report of a benchmark: schema ``edgefed.bench/1``, read and written as JSON, and the sections made of facts.

A report is made to be shared: GPU UUIDs are hashed; host and user names, serial numbers and addresses are left out.
A value that a sensor did not give is null, and `Report.unknown` gives the reason. Sizes are bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from edgefed import __version__
from edgefed.bench.statistics import FAILED, INTERRUPTED, MEASURED, SKIPPED, Entry
from edgefed.disk import without_nan
from edgefed.errors import ConfigError
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.facts import DeviceFacts, MemoryKind, Reading, Reason
from edgefed.hardware.profile_files import DeviceProfile

SCHEMA = "edgefed.bench/1"


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """The program that measured. ``commit`` is empty for an installed release."""

    version: str
    commit: str = ""
    mode: str
    """quick, default, full, or plan (nothing measured)."""
    repeats: int = 7


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, without its name, and its load."""

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
    """``id`` names the device of the memory budget, ``speed_on`` the one that speed was measured on ("" for none)."""

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
    """Whether a device profile replaces a device that is absent."""


class MemoryCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``verified_bytes`` were allocated and written at the same time; ``complete`` if they reach ``asked_bytes``.

    ``stopped`` is the reason if they do not. ``last_speed_share`` is the copy speed of the last blocks relative to the
    first, None with fewer than four blocks. ``largest_block_bytes`` is the largest single allocation that succeeded, at
    most ``verified_bytes``; on the CPU it is untouched address space.
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
    """One term of the memory budget. ``size_bytes`` is negative if the term reduces the budget."""

    name: str
    size_bytes: int
    origin: str
    who: str = ""
    """Programs that use the memory. Shown on the screen only; `to_json` omits them to protect the user's privacy."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The budget: ``now`` beside other programs, ``ideal`` on an idle machine; None if a sensor is missing."""

    kind: str
    now_bytes: int | None
    ideal_bytes: int | None
    origin: str
    terms: tuple[MemoryTerm, ...] = ()
    notes: tuple[str, ...] = ()
    check: MemoryCheck | None = None


class SustainPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One second of the sustained run; None without the sensor."""

    t_s: float
    rate: float
    clock_mhz: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    reasons: tuple[str, ...] = ()


class Sustain(msgspec.Struct, frozen=True, kw_only=True):
    """``change`` is last / first - 1 of the medians over the first and the last five seconds.

    ``throttled`` counts thermal and hardware reasons; ``power_limited``, a card at its power limit, is normal.
    ``energy_joules`` is the energy of the whole run if the device reports it.
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
    """How many experts of each layer fit in one budget, predicted by the memory model.

    ``mode``: "profile" (forward pass), "lora" (every resident expert has an adapter), "full" (one expert of each layer
    is trainable). ``storage``: format of frozen experts. ``experts``: resident experts of the smallest layer.
    """

    model: str
    budget: str
    """now or ideal."""
    mode: str
    storage: str
    experts: int
    of: int
    limit: str = ""
    upload_bytes: int | None = None
    """Size of one round's update: the trained parameters."""
    upload_s: float | None = None


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """Which backend computes a case here; see `edgefed.kernels.proof.BackendInUse`."""

    case: str
    backend: str
    when: str = ""
    speedup: float = 0.0
    others: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``unknown``: field -> why it is null. ``interrupted``: Ctrl-C came before the end."""

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
    """``up_bytes_per_s`` and its origin, which upload times are computed from."""
    planning: dict[str, Any] = {}
    """What ``fits`` assumes: device, optimizer, and bytes of the process besides tensors (CPU)."""
    model: dict[str, Any] = {}
    explain: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    unknown: dict[str, str] = {}
    seconds: float = 0.0
    interrupted: bool = False
    verdict: str = ""
    """What this device could do in a run, in one sentence (`edgefed.bench.verdict`)."""
    kernels: tuple[Kernel, ...] = ()
    """Of the device that speed is measured on. Proofs have their time, and how much faster than plain PyTorch."""

    def test(self, name: str) -> Entry | None:
        """Return the test of that name, None if it is missing."""
        return next((entry for entry in self.tests if entry.name == name), None)


def hashed(identifier: str) -> str:
    """Return a short hash that distinguishes devices without naming them."""
    return hashlib.sha256(f"edgefed:{identifier}".encode()).hexdigest()[:16]


def to_json(report: Report) -> str:
    """Return the report as an indented JSON document. NaN and infinity become null."""
    terms = tuple(msgspec.structs.replace(term, who="") for term in report.memory.terms)
    shared = msgspec.structs.replace(report, memory=msgspec.structs.replace(report.memory, terms=terms))
    return json.dumps(without_nan(msgspec.to_builtins(shared)), indent=2) + "\n"


def parse_report(text: str | bytes, name: str) -> Report:
    """Parse a report. Raises ConfigError with ``name`` and the place of the error."""
    remedy = "Pass a report that `edgefed bench` wrote as JSON."
    try:
        data = json.loads(text)
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{name}: invalid JSON: {error}", remedy=remedy) from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        known = isinstance(found, str) and found.startswith("edgefed.bench/")
        raise ConfigError(
            f"{name}: expected schema {SCHEMA!r}, found {found!r}",
            remedy="Measure again with this version of edgefed, or compare with the version that wrote it."
            if known
            else remedy,
        )
    try:
        report = msgspec.convert(data, Report)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: invalid {SCHEMA} report: {error}", remedy=remedy) from error
    for entry in (*report.tests, *report.network):
        if entry.verdict not in (*MEASURED, SKIPPED, FAILED, INTERRUPTED) or entry.measured != (
            entry.median is not None
        ):
            raise ConfigError(
                f"{name}: test {entry.name!r}: verdict {entry.verdict!r} does not match median {entry.median}",
                remedy=remedy,
            )
    return report


def load_report(path: Path) -> Report:
    """Read a report file. Raises ConfigError if it cannot be read or is invalid."""
    try:
        return parse_report(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


# --- sections made of facts and budget ---------------------------------------------------------------------------


def tool_section(mode: str, repeats: int) -> Tool:
    """Describe this program: its version and, in a checkout, its commit."""
    return Tool(version=__version__, commit=_commit(), mode=mode, repeats=repeats)


def _commit() -> str:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def host_section(facts: DeviceFacts, load_after: float | None = None) -> Host:
    """Describe the machine, without its name."""
    host, battery = facts.host, facts.host.battery.value
    return Host(
        os=host.system,
        kernel=host.kernel.value,
        machine=host.machine,
        cpu=host.cpu_name.value,
        cores=host.cpu_count.value,
        cpu_quota=host.cpu_quota.value,
        memory_bytes=host.memory_total_bytes.value,
        python=platform.python_version(),
        torch=facts.torch.version.value,
        cuda=facts.torch.cuda_version.value,
        driver=facts.driver.driver_version.value,
        l4t=facts.tegra.l4t.value if facts.tegra else None,
        wsl=host.is_wsl,
        container=host.container.value,
        load_before=host.load_average.value,
        load_after=load_after,
        battery_percent=battery.percent if battery else None,
        plugged=battery.plugged if battery else None,
    )


def device_section(facts: DeviceFacts, profile: DeviceProfile | None, speed_on: str, *, stand_in: bool) -> Device:
    """Describe the device of the budget, and the one that speed was measured on."""
    gpu = facts.gpu
    capability = gpu.compute_capability.value if gpu else None
    return Device(
        id=device_id(facts),
        name=device_name(facts),
        kind=str(facts.kind),
        speed_on=speed_on,
        evidence=facts.evidence,
        compute_capability=".".join(map(str, capability)) if capability else None,
        uuid_hash=hashed(gpu.uuid.value) if gpu is not None and gpu.uuid.value is not None else None,
        profile=profile.id if profile else None,
        power_mode=facts.tegra.power_mode.value if facts.tegra else None,
        stand_in=stand_in,
    )


def device_id(facts: DeviceFacts) -> str:
    """Return the device's id: cpu, cuda:0, or gpu if torch has no index for it."""
    if facts.gpu is None:
        return "cpu"
    return "gpu" if facts.gpu.cuda_index is None else f"cuda:{facts.gpu.cuda_index}"


def device_name(facts: DeviceFacts) -> str:
    """Return a readable name: the board, the GPU or the processor."""
    if facts.kind is MemoryKind.UNIFIED and facts.tegra is not None and facts.tegra.model.value is not None:
        return facts.tegra.model.value
    if facts.gpu is not None:
        return facts.gpu.name.value or "unnamed GPU"
    return facts.host.cpu_name.value or "unnamed processor"


def memory_section(budget: MemoryBudget, check: MemoryCheck | None = None) -> Memory:
    """Describe the budget with the origin of every number."""
    return Memory(
        kind=str(budget.kind),
        now_bytes=budget.now_bytes,
        ideal_bytes=budget.ideal_bytes,
        origin="" if budget.terms else budget.origin,
        terms=tuple(
            MemoryTerm(name=term.name, size_bytes=term.signed_bytes, origin=term.origin, who=term.who)
            for term in budget.terms
        ),
        notes=budget.notes,
        check=check,
    )


def unknown_fields(facts: DeviceFacts) -> dict[str, str]:
    """Map each field that is null to the reason, except where the device simply lacks the part."""
    found: dict[str, str] = {}
    for name in ("host", "driver", "torch", "gpu", "tegra"):
        part = getattr(facts, name)
        for field, value in vars(part).items() if part is not None else ():
            if isinstance(value, Reading) and not value.known and value.reason is not Reason.ABSENT:
                found[f"{name}.{field}"] = value.describe()
    return found
