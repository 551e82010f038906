"""From facts and budget to the sections of a report: host, device, memory. Nothing that names a person or a machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from edgefed import __version__
from edgefed.bench.report import Device, Host, Memory, MemoryCheck, MemoryTerm, Tool, hashed
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.hardware.reading import Reading, Reason


def tool_section(mode: str, repeats: int) -> Tool:
    """Version and, in a checkout, the commit."""
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
    """The machine without its name."""
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
    """The hardware that the budget is of, and where speed was measured."""
    gpu = facts.gpu
    capability = gpu.compute_capability.value if gpu else None
    return Device(
        id=device_id(facts),
        name=device_name(facts),
        kind=str(facts.kind),
        speed_on=speed_on,
        evidence=facts.evidence,
        compute_capability=".".join(map(str, capability)) if capability else None,
        uuid_hash=hashed(gpu.uuid.value) if gpu is not None and gpu.uuid.known else None,
        profile=profile.id if profile else None,
        power_mode=facts.tegra.power_mode.value if facts.tegra else None,
        stand_in=stand_in,
    )


def device_id(facts: DeviceFacts) -> str:
    """What edgefed calls it: cpu, cuda:0; gpu when torch has no number for it."""
    if facts.gpu is None:
        return "cpu"
    return "gpu" if facts.gpu.cuda_index is None else f"cuda:{facts.gpu.cuda_index}"


def device_name(facts: DeviceFacts) -> str:
    """For people: the board, the GPU, or the processor."""
    if facts.kind is MemoryKind.UNIFIED and facts.tegra is not None and facts.tegra.model.known:
        return facts.tegra.model.value
    if facts.gpu is not None:
        return facts.gpu.name.value or "a GPU without a name"
    return facts.host.cpu_name.value or "a processor without a name"


def memory_section(budget: MemoryBudget, check: MemoryCheck | None = None) -> Memory:
    """The budget with the origin of every number."""
    return Memory(
        kind=str(budget.kind),
        now_bytes=budget.now_bytes,
        ideal_bytes=budget.ideal_bytes,
        origin="" if budget.terms else budget.origin,
        terms=tuple(
            MemoryTerm(
                name=term.name,
                size_bytes=term.signed_bytes,
                origin=term.origin,
                who=term.who,
            )
            for term in budget.terms
        ),
        notes=budget.notes,
        check=check,
    )


def unknown_fields(facts: DeviceFacts) -> dict[str, str]:
    """Field -> why it is null, for everything that a sensor should have told; what is simply not there is left out."""
    found: dict[str, str] = {}
    parts = [("host", facts.host), ("driver", facts.driver), ("torch", facts.torch)]
    parts += [("gpu", facts.gpu)] if facts.gpu is not None else []
    parts += [("tegra", facts.tegra)] if facts.tegra is not None else []
    for name, part in parts:
        for field, value in vars(part).items():
            if isinstance(value, Reading) and not value.known and value.reason is not Reason.ABSENT:
                found[f"{name}.{field}"] = value.describe()
    return found
