"""Sentences for the owner about what is missing, wrong or assumed. Pure: facts in, sentences out."""

from __future__ import annotations

from edgefed.hardware.facts import DeviceFacts, GpuFacts, MemoryKind
from edgefed.hardware.matching import is_divided, is_lost
from edgefed.hardware.memory import format_bytes
from edgefed.hardware.reading import Reason

IDLE = 0x1
POWER_CAP = 0x4
"""NVML's bit for the software power limit: normal for a card at work, so reported apart."""
SLOWED = 0x8 | 0x20 | 0x40 | 0x80
THROTTLE_WORDS = {
    POWER_CAP: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def throttle_words(bits: int) -> tuple[str, ...]:
    """What slows the GPU down, in words; the power limit alone is normal for a card at work."""
    return tuple(word for bit, word in THROTTLE_WORDS.items() if bits & bit)


def notes_of(facts: DeviceFacts) -> tuple[str, ...]:
    """Everything worth a sentence, the most serious first."""
    return (*_driver(facts), *_gpus(facts), *_torch(facts), *_host(facts))


def _driver(facts: DeviceFacts) -> list[str]:
    driver = facts.driver
    return [f"{driver.problem}. {driver.remedy}"] if driver.problem else []


def _named(gpu: GpuFacts) -> str:
    number = "" if gpu.nvml_index is None else f"GPU {gpu.nvml_index} "
    return f"{number}({gpu.name.value or 'without a name'})"


def _gpus(facts: DeviceFacts) -> list[str]:
    notes = []
    for gpu in facts.gpus:
        if is_lost(gpu):
            notes.append(
                f"{_named(gpu)} does not answer any more (GPU is lost). Look for Xid lines in `sudo dmesg`; reboot or "
                "reload the driver."
            )
        parts = [part for part in facts.gpus if part.is_mig and part.nvml_index == gpu.nvml_index]
        if is_divided(gpu) and not parts:
            notes.append(
                f"{_named(gpu)} is in MIG mode and has no instance that this user can see. Create one with "
                "`nvidia-smi mig -cgi ... -C`, or switch MIG off."
            )
        elif is_divided(gpu):
            notes.append(f"{_named(gpu)} is in MIG mode: its {len(parts)} instance(s) are used, not the whole GPU.")
    gpu = facts.gpu
    if gpu is None:
        return notes
    if len([other for other in facts.gpus if not is_divided(other)]) > 1:
        notes.append(f"{_named(gpu)} {gpu.uuid.value or ''} is used; choose another with `device`.".replace("  ", " "))
    bits = gpu.throttle_reasons.value or 0
    if bits & SLOWED and not bits & IDLE:
        notes.append(f"{_named(gpu)} runs slower than it could: {', '.join(throttle_words(bits))}.")
    if gpu.processes.reason is Reason.NO_PERMISSION:
        notes.append(f"who else uses {_named(gpu)} is not visible to this user: {gpu.processes.describe()}.")
    if facts.kind is MemoryKind.DISCRETE and gpu.memory_total_bytes.known and facts.host.is_wsl:
        notes.append("WSL: Windows shares this GPU and may silently move its memory to the host's: slow, not an error.")
    return notes


def _torch(facts: DeviceFacts) -> list[str]:
    gpu, torch = facts.gpu, facts.torch
    if torch.version.reason is Reason.FAILED:
        return [f"torch cannot be imported: {torch.version.detail}. Reinstall it for this machine."]
    asked = torch.version.known
    if gpu is None or gpu.cuda_index is not None or not asked:
        return []
    if torch.cuda_available.known:
        if gpu.cuda_total_bytes.known:
            return [f"this torch ({torch.version.value}) has no code for {_named(gpu)}: install a build that has."]
        return [f"torch does not see {_named(gpu)}: look at CUDA_VISIBLE_DEVICES. Training runs on the CPU."]
    return [f"torch cannot use {_named(gpu)}: {torch.cuda_available.detail}. Training runs on the CPU."]


def _host(facts: DeviceFacts) -> list[str]:
    host, notes = facts.host, []
    if not host.memory_total_bytes.known:
        notes.append(f"the size of the host's memory is unknown: {host.memory_total_bytes.describe()}.")
    elif not host.memory_available_bytes.known:
        notes.append(f"the host's free memory is unknown: {host.memory_available_bytes.describe()}.")
    elif "estimate" in host.memory_available_bytes.source:
        notes.append(f"free memory is an estimate: {host.memory_available_bytes.source}.")
    if host.cgroup_limit_bytes.known:
        limit = format_bytes(host.cgroup_limit_bytes.value)
        where = f" in this container ({host.container.value})" if host.container.known else ""
        notes.append(f"memory is limited to {limit}{where} ({host.cgroup_limit_bytes.source}).")
        if not host.cgroup_used_bytes.known:
            notes.append(f"how much of that limit is used is unknown: {host.cgroup_used_bytes.describe()}.")
    elif host.cgroup_limit_bytes.reason is not Reason.ABSENT:
        notes.append(f"a memory limit may exist and cannot be read: {host.cgroup_limit_bytes.describe()}.")
    if host.cpu_quota.known:
        notes.append(f"{host.cpu_quota.value:g} processors are allowed ({host.cpu_quota.source}).")
    if facts.tegra is not None and not facts.tegra.l4t.known:
        notes.append(f"the L4T release is unknown: {facts.tegra.l4t.describe()}.")
    return notes
