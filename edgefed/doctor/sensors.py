"""Findings about driver, GPU and memory: the hardware facts and budgets, judged. Pure: facts in, findings out."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from edgefed.doctor.finding import Finding, Group, State
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.facts import DeviceFacts, GpuFacts, MemoryKind, Reading, Reason
from edgefed.hardware.matching import is_divided, is_lost
from edgefed.hardware.memory import format_bytes
from edgefed.hardware.nvml import IDLE, POWER_CAP, SLOWED, throttle_words
from edgefed.hardware.profiles import match_profile

NO_DRIVER = "no NVIDIA driver found"
"""How `edgefed.hardware.nvml.explain` begins when there may well be no NVIDIA GPU at all: then nothing is wrong."""
FACT_NOTES_SHOWN_ELSEWHERE = re.compile(
    "does not respond any more|is throttled|^torch |^this torch |memory is limited to"
    "|processors are allowed|L4T release is unknown|^WSL"
)
"""Notes of the facts that a finding says with its fix. One that escapes this is said twice, no more."""

UNIT = re.compile("_(bytes|mhz|percent|celsius|watts|joules)$")


def gpu_findings(facts: DeviceFacts, *, gpu_requested: bool = False) -> list[Finding]:
    """Findings about the driver, each GPU, and the sensors without a value.

    A lost GPU is a problem where training would use it (torch still lists it), or where ``gpu_requested``; otherwise
    the device trains on its CPU, and the lost GPU is a warning.
    """
    findings = [_driver(facts), _kind(facts), _profile(facts)]
    for gpu in facts.gpus:
        chosen = gpu == facts.gpu
        findings.append(
            _lost(gpu, facts, chosen and (gpu_requested or facts.trains_on_gpu))
            if is_lost(gpu)
            else _one_gpu(gpu, chosen, facts.kind)
        )
    if facts.gpu is not None and not is_lost(facts.gpu):
        findings += [*_throttled(facts.gpu), *_unanswered(facts.gpu)]
    for note in dict.fromkeys(facts.notes):
        said = facts.driver.problem and facts.driver.problem in note
        if not said and not FACT_NOTES_SHOWN_ELSEWHERE.search(note):
            findings.append(Finding(Group.GPU, "sensors", State.NOTE, note))
    return findings


def _driver(facts: DeviceFacts) -> Finding:
    driver = facts.driver
    if driver.available and not driver.problem:
        cuda = driver.cuda_driver_version
        return Finding(
            Group.GPU, "NVIDIA driver", State.OK,
            f"{driver.driver_version.describe()}, CUDA up to {cuda.value if cuda.known else 'unknown'}",
        )  # fmt: skip
    if facts.tegra is not None and not driver.available:
        return Finding(
            Group.GPU, "NVIDIA driver", State.NOTE, driver.problem, "A Jetson is measured through its own files.",
        )  # fmt: skip
    if driver.problem.startswith(NO_DRIVER) and not facts.gpus:
        return Finding(
            Group.GPU, "NVIDIA driver", State.NOTE, driver.problem, "This device trains on its CPU.", driver.remedy
        )
    return Finding(
        Group.GPU, "NVIDIA driver", State.WARNING, driver.problem,
        "Until this is fixed, the device trains on its CPU.", driver.remedy or "Reinstall the NVIDIA driver.",
    )  # fmt: skip


def _kind(facts: DeviceFacts) -> Finding:
    meaning = {
        MemoryKind.DISCRETE: "a GPU with memory of its own",
        MemoryKind.UNIFIED: "a GPU that shares the host's memory",
        MemoryKind.CPU: "the host's memory",
    }[facts.kind]
    evidence = "; ".join(facts.evidence)
    return Finding(
        Group.GPU, "memory kind", State.OK, f"{facts.kind}, {meaning}{', because ' + evidence if evidence else ''}"
    )


def _profile(facts: DeviceFacts) -> Finding:
    profile = match_profile(facts)
    if profile is None:
        return Finding(
            Group.GPU, "device profile", State.NOTE, "no shipped profile matches this device",
            "`edgefed bench` cannot compare this device with its data sheet.",
            "Measure one.", "edgefed bench --as-profile NAME > NAME.toml",
        )  # fmt: skip
    return Finding(Group.GPU, "device profile", State.OK, f"{profile.id} ({profile.name})")


def _label(gpu: GpuFacts) -> str:
    if gpu.nvml_index is None:
        return "GPU"
    return f"GPU {gpu.nvml_index}" if gpu.mig_index is None else f"GPU {gpu.nvml_index} MIG {gpu.mig_index}"


def _one_gpu(gpu: GpuFacts, chosen: bool, kind: MemoryKind) -> Finding:
    parts = [gpu.name.value or f"name unknown: {gpu.name.describe()}"]
    total = gpu.memory_total_bytes if gpu.memory_total_bytes.known else gpu.cuda_total_bytes
    if total.value is not None and not (chosen and kind is MemoryKind.UNIFIED):  # NVML's number is not a size there
        parts.append(format_bytes(total.value))
    if gpu.compute_capability.value:
        parts.append("compute capability {}.{}".format(*gpu.compute_capability.value))
    if gpu.temperature_celsius.value is not None:
        parts.append(f"{gpu.temperature_celsius.value:.0f} °C")
    idle = "only its instances compute" if is_divided(gpu) else "not used, see `device`"
    return Finding(Group.GPU, _label(gpu), State.OK, ", ".join(parts) + ("" if chosen else f"; {idle}"))


def _lost(gpu: GpuFacts, facts: DeviceFacts, needed: bool) -> Finding:
    cost = "" if needed or facts.trains_on_gpu else " Until it is back, the device trains on its CPU."
    return Finding(
        Group.GPU, f"{_label(gpu)} lost", State.PROBLEM if needed else State.WARNING,
        f"{gpu.name.value or 'the GPU'} does not respond any more",
        f"It fell off the bus: power supply, riser, overheating, or a driver error. Nothing can run on it.{cost}",
        "Look for 'Xid' in the kernel's log, then reboot.", "sudo dmesg | grep -i -e xid -e nvrm",
    )  # fmt: skip


def _throttled(gpu: GpuFacts) -> list[Finding]:
    bits = gpu.throttle_reasons.value or 0
    clock, most = gpu.sm_clock_mhz.value, gpu.sm_clock_max_mhz.value
    at = f" at {clock} of {most} MHz" if clock and most else ""
    if bits & SLOWED and not bits & IDLE:
        return [
            Finding(
                Group.GPU, "clocks", State.WARNING, f"slowed down{at}: {', '.join(throttle_words(bits))}",
                "Training takes longer, and measurements taken now do not apply to a cool GPU.",
                "Let it cool down: fans, dust, air; check the power cables; then run this again.",
            )
        ]  # fmt: skip
    if bits & POWER_CAP and not bits & IDLE:
        return [Finding(Group.GPU, "clocks", State.NOTE, f"at its power limit{at}", "Normal for a card under load.")]
    return []


def _unanswered(gpu: GpuFacts) -> list[Finding]:
    """One finding for all sensors without a value, by reason; a lost GPU has its own, and most have no ECC and MIG."""
    by_reason: dict[Reason, list[str]] = {}
    for name, reading in _readings(gpu):
        if reading.reason not in (None, Reason.LOST, Reason.ABSENT) and name not in ("ecc", "mig_enabled"):
            by_reason.setdefault(reading.reason, []).append(UNIT.sub("", name).replace("_", " "))
    if not by_reason:
        return []
    found = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())
    return [
        Finding(
            Group.GPU, "sensors without a value", State.NOTE, found,
            "An unknown value is never treated as 0.",
        )
    ]  # fmt: skip


def _readings(gpu: GpuFacts) -> list[tuple[str, Reading[Any]]]:
    values = [(field.name, getattr(gpu, field.name)) for field in dataclasses.fields(gpu)]
    return [(name, value) for name, value in values if isinstance(value, Reading)]


SWAP_SHARE = 0.25
"""Swap in use, as a share of the memory, from which on the machine is called short of memory."""

BUDGET_NOTES_SHOWN_ELSEWHERE = re.compile(
    "could be used if nothing else ran|^torch cannot use this GPU|^nothing is left for|^set `memory`|^WSL"
)
"""Notes of a budget that a finding says with its fix. One that escapes this is said twice, no more."""


def memory_findings(facts: DeviceFacts, training: MemoryBudget, hardware: MemoryBudget) -> list[Finding]:
    """Findings about both budgets and the host's memory.

    ``training`` is the memory that training really uses, ``hardware`` the device's own; they differ when torch cannot
    use the GPU.
    """
    findings = [_budget(training)]
    if hardware.kind is not training.kind:
        findings.append(
            Finding(
                Group.MEMORY, f"unused ({hardware.kind})", State.NOTE,
                f"{hardware.origin}; on an idle device {_size(hardware.ideal_bytes)}",
                "Training could use it if torch supported this GPU.",
            )
        )  # fmt: skip
    for note in dict.fromkeys((*training.notes, *hardware.notes)):
        if note not in training.origin + hardware.origin and not BUDGET_NOTES_SHOWN_ELSEWHERE.search(note):
            findings.append(Finding(Group.MEMORY, "budget", State.NOTE, note))
    return [*findings, *_container(facts), *_swap(facts), *_huge_pages(facts)]


def _budget(budget: MemoryBudget) -> Finding:
    where = "host memory" if budget.kind is MemoryKind.CPU else "GPU memory"
    name = f"budget ({budget.kind})"
    if budget.now_bytes is None:
        return Finding(
            Group.MEMORY, name, State.WARNING, budget.origin,
            f"The {where} for training cannot be planned.", "Set it explicitly.",
            "edgefed join SERVER --memory 4GiB ...",
        )  # fmt: skip
    if budget.now_bytes <= 0:
        return Finding(
            Group.MEMORY, name, State.PROBLEM, f"nothing: {budget.origin}", "No expert fits.",
            "Close other programs; or set `memory` to go below the reserves, at your own risk.",
        )  # fmt: skip
    return Finding(Group.MEMORY, name, State.OK, f"{budget.origin}; on an idle device {_size(budget.ideal_bytes)}")


def _container(facts: DeviceFacts) -> list[Finding]:
    limit, used = facts.host.cgroup_limit_bytes, facts.host.cgroup_used_bytes
    if limit.value is None:
        return []
    total = facts.host.memory_total_bytes.value
    if total is not None and limit.value >= total:
        return []
    inside = f"{format_bytes(used.value)} of it in use" if used.value is not None else "its use unknown"
    why = f"The container may not use more of the host's {format_bytes(total)}." if total else ""
    return [
        Finding(
            Group.MEMORY, "container limit", State.NOTE, f"{format_bytes(limit.value)} ({limit.source}), {inside}", why,
            "Start the container with a larger --memory if the budget is too small.",
        )
    ]  # fmt: skip


def _swap(facts: DeviceFacts) -> list[Finding]:
    host = facts.host
    findings = []
    total, used = host.memory_total_bytes.value, host.swap_used_bytes.value
    if total and used is not None and used > SWAP_SHARE * total:
        findings.append(
            Finding(
                Group.MEMORY, "swap", State.WARNING, f"{format_bytes(used)} in use",
                "The machine is short of memory; swap is never counted as room, and a GPU cannot use it.",
                "Close other programs before training.",
            )
        )  # fmt: skip
    elif host.swap_total_bytes.value:
        findings.append(
            Finding(
                Group.MEMORY, "swap", State.OK,
                f"{format_bytes(host.swap_total_bytes.value)}, {_size(used)} in use; never counted as room",
            )
        )  # fmt: skip
    if host.zram_used_bytes.value:
        findings.append(
            Finding(
                Group.MEMORY, "zram", State.NOTE, f"{format_bytes(host.zram_used_bytes.value)} of swap kept in memory",
                "Compressed swap takes memory as it fills.",
            )
        )  # fmt: skip
    return findings


def _huge_pages(facts: DeviceFacts) -> list[Finding]:
    host = facts.host
    if not host.huge_pages_total.value or facts.kind is MemoryKind.UNIFIED:  # there the budget itself says it
        return []
    return [
        Finding(
            Group.MEMORY, "huge pages", State.NOTE, f"{host.huge_pages_total.value} are reserved",
            "Ordinary programs cannot use that memory.", "Give it back if nothing here needs it.",
            "sudo sysctl vm.nr_hugepages=0",
        )
    ]  # fmt: skip


def _size(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else format_bytes(size_bytes)
