"""Limits of the control groups that this process is in: version 2, version 1, and both at once.

A limit may stand at any level from our own group up to the root, so every level is read. Inside a container the group's
path often does not exist below the mount (another cgroup namespace): then the mount's root is our group.

    limit = least limit of any level        used = limit - least room of any level
    room of a level = its limit - (its usage - its reclaimable cache)

Reclaimable are file pages, active or not, and reclaimable slab: a container that has read a large checkpoint shows
nearly all of it as active file pages. Shared memory and tmpfs are not among them: the kernel cannot drop those.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Protocol

from edgefed.hardware.facts import Reading, Reason

MOUNT = "/sys/fs/cgroup"
NO_LIMIT = 2**60
"""Version 1 writes about 2**63 (rounded down to a page) for "none"."""


RECLAIMABLE = {
    2: ("inactive_file", "active_file", "slab_reclaimable"),
    1: ("total_inactive_file", "total_active_file"),
}
"""Lines of memory.stat by version of control groups. Version 1 does not count slab in its usage."""


class TextFiles(Protocol):
    """What is read of a filesystem; `edgefed.hardware.host_files.Files` implements it."""

    def text(self, path: str) -> Reading[str]:
        """The file at the absolute ``path``."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is something at ``path``."""
        ...


@dataclasses.dataclass(frozen=True)
class MemoryLimit:
    """Both readings are absent without a limit. ``limit_bytes - used_bytes`` is what may still be taken."""

    limit_bytes: Reading[int]
    used_bytes: Reading[int]


def read_memory_limit(files: TextFiles, found: list[tuple[int, str]] | None = None) -> MemoryLimit:
    """The tightest memory limit and what is used of it, at the levels ``found`` before, else at all."""
    limits: list[tuple[int, str]] = []
    rooms: list[tuple[int, str]] = []
    unread: Reading[int] | None = None
    forbidden: Reading[int] | None = None
    for version, folder in levels(files, "memory") if found is None else found:
        for name in ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",):
            limit = _number(files, f"{folder}/{name}")
            if limit.reason in (Reason.NO_PERMISSION, Reason.FAILED):
                forbidden = forbidden or limit
            if limit.value is None or limit.value >= NO_LIMIT:
                continue
            limits.append((limit.value, limit.source))
            used = _used(files, version, folder)
            if used.value is not None:
                rooms.append((max(0, limit.value - used.value), used.source))
            else:
                unread = unread or used
        # version 1 also reports the lowest limit above the container's root, where no file can be read
        least = _statistic(files, folder, "hierarchical_memory_limit") if version == 1 else None
        if least is not None and least < NO_LIMIT:
            limits.append((least, f"{folder}/memory.stat hierarchical_memory_limit"))
            if (used := _used(files, version, folder)).value is not None:
                rooms.append((max(0, least - used.value), used.source))
    if not limits:
        missing = forbidden or Reading.missing(Reason.ABSENT, MOUNT, "no memory limit")
        return MemoryLimit(missing, missing.without_value())
    least_limit, source = min(limits)
    if not rooms:
        assert unread is not None  # each limit has a room or an unread usage
        return MemoryLimit(Reading.of(least_limit, source), unread)
    room, room_source = min(rooms)
    return MemoryLimit(Reading.of(least_limit, source), Reading.of(max(0, least_limit - room), room_source))


def read_cpu_quota(files: TextFiles) -> Reading[float]:
    """Processors that the tightest quota allows; absent without one."""
    quotas = []
    for version, folder in levels(files, "cpu"):
        if version == 2:
            match = re.match(r"(\d{1,15}) (\d{1,15})\s*$", files.text(f"{folder}/cpu.max").value or "")
            quota, period, source = (int(match[1]), int(match[2]), "cpu.max") if match else (-1, 0, "")
        else:
            quota = _number(files, f"{folder}/cpu.cfs_quota_us").value or -1
            period, source = _number(files, f"{folder}/cpu.cfs_period_us").value or 0, "cpu.cfs_quota_us"
        if quota > 0 and period > 0:
            quotas.append((quota / period, f"{folder}/{source}"))
    if not quotas:
        return Reading.missing(Reason.ABSENT, MOUNT, "no CPU quota")
    return Reading.of(*min(quotas))


def levels(files: TextFiles, controller: str) -> list[tuple[int, str]]:
    """(version, folder) of our group and all its ancestors, for each hierarchy that may hold the controller."""
    own = {2: "/", 1: "/"}
    for match in re.finditer(r"^\d+:([^:\n]*):(/.*)$", files.text("/proc/self/cgroup").value or "", re.MULTILINE):
        if not match[1]:
            own[2] = match[2]
        elif controller in match[1].split(","):
            own[1] = match[2]
    found = []
    v1_names = (controller, "cpu,cpuacct", "cpuacct,cpu") if controller == "cpu" else (controller,)
    mounts = [(2, MOUNT), (2, f"{MOUNT}/unified"), *((1, f"{MOUNT}/{name}") for name in v1_names)]
    for version, mount in mounts:
        if not files.exists(mount):
            continue
        parts = [part for part in own[version].split("/") if part and part != "."]
        if ".." in parts or not files.exists("/".join([mount, *parts])):
            parts = []
        found += [(version, "/".join([mount, *parts[:depth]])) for depth in range(len(parts), -1, -1)]
    return found


def _number(files: TextFiles, path: str) -> Reading[int]:
    text = files.text(path)
    if text.value is None:
        return text.without_value(path)
    word = text.value.strip()
    if word == "max" or word == "-1":
        return Reading.missing(Reason.ABSENT, path, "no limit")
    if not re.fullmatch(r"[0-9]{1,20}", word):
        return Reading.missing(Reason.FAILED, path, f"{word[:40]!r} is not a number")
    return Reading.of(int(word), path)


def _used(files: TextFiles, version: int, folder: str) -> Reading[int]:
    """Usage of one level without what the kernel reclaims before it kills a process."""
    usage = _number(files, f"{folder}/{'memory.current' if version == 2 else 'memory.usage_in_bytes'}")
    reclaimable = sum(_statistic(files, folder, name) or 0 for name in RECLAIMABLE[version])
    if usage.value is None or not reclaimable:
        return usage
    return Reading.of(max(0, usage.value - reclaimable), f"{usage.source} - reclaimable cache")


def _statistic(files: TextFiles, folder: str, name: str) -> int | None:
    match = re.search(rf"^{name} (\d{{1,20}})$", files.text(f"{folder}/memory.stat").value or "", re.MULTILINE)
    return int(match[1]) if match else None
