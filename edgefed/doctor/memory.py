"""Memory: the budget and everything that makes it smaller. Pure: facts and budget in, findings out."""

from __future__ import annotations

import re

from edgefed.doctor.finding import Finding, Group, State
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.memory import format_bytes

SWAP_SHARE = 0.25
"""Swap in use, as a share of the memory, from which on the machine is called short of memory."""

SAID_ELSEWHERE = re.compile(
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
                "So much could be used if torch could use this GPU.",
            )
        )  # fmt: skip
    for note in dict.fromkeys((*training.notes, *hardware.notes)):
        if note not in training.origin + hardware.origin and not SAID_ELSEWHERE.search(note):
            findings.append(Finding(Group.MEMORY, "budget", State.NOTE, note))
    return [*findings, *_container(facts), *_swap(facts), *_huge_pages(facts)]


def _budget(budget: MemoryBudget) -> Finding:
    where = "host memory" if budget.kind is MemoryKind.CPU else "GPU memory"
    name = f"budget ({budget.kind})"
    if budget.now_bytes is None:
        return Finding(
            Group.MEMORY, name, State.WARNING, budget.origin,
            f"How much {where} training may use cannot be planned.", "Say it yourself.",
            "edgefed join SERVER --memory 4GiB ...",
        )  # fmt: skip
    if budget.now_bytes <= 0:
        return Finding(
            Group.MEMORY, name, State.PROBLEM, f"nothing: {budget.origin}", "Not one expert fits.",
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
