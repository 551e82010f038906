"""Who occupies a device's memory: this process, other programs, and other agents of the same user.

Each agent plans with its share of the memory that agents of one machine have in common. Every agent keeps one small
file in a folder of this machine and user (`agents_folder`): its process number and start time, the memory in which it
trains (the host's, or a GPU's), and its owner's limit. An entry counts while that process lives, so a crash needs no
cleanup: whoever reads a stale entry removes it. The start time rules out a later process with the same number.

    share = (usable memory + what the other agents hold) / number of agents

An agent whose owner gave it less than that takes only its limit; the others share the rest. An agent registers before
it probes its device, so agents that start together see each other. One that started alone plans with everything; it
measures again before each round and then makes room, and in between the guard watches the memory.

Agents of other users, in other containers or in other PID namespaces do not appear here. `edgefed.hardware.budget`
applies the share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import psutil

from edgefed.hardware.facts import GpuFacts
from edgefed.hardware.memory import GIB

logger = logging.getLogger(__name__)
HOST = "host"
"""The memory of the machine, as opposed to a discrete GPU's, which is named by its UUID."""
START_TOLERANCE_S = 1.0
"""How far two readings of a process's start time may differ: it is derived from the clock and the time since boot."""


@dataclasses.dataclass(frozen=True)
class OwnMemory:
    """What this process holds, measured by itself. ``context_bytes`` None until the first kernel has run."""

    rss_bytes: int = 0
    torch_reserved_bytes: int = 0
    context_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class HeldOnGpu:
    """Bytes of this process on the GPU, and the part of them that a CUDA context occupies or will occupy."""

    size_bytes: int
    context_bytes: int
    origin: str

    def idle_context_bytes(self, own: OwnMemory | None, assumed_bytes: int) -> int:
        """Return the size of the context, whether it exists yet or not."""
        return self.context_bytes or (own and own.context_bytes) or assumed_bytes


def held_on_gpu(gpu: GpuFacts | None, own: OwnMemory | None, context_bytes: int) -> HeldOnGpu:
    """Own bytes by NVML, which counts the context; by torch, where NVML does not list us (WSL2, containers, Orin).

    A context that NVML does not list is already missing from what is free, and is not subtracted again.
    """
    listed = (gpu.own_bytes.value or 0) if gpu else 0
    reserved = own.torch_reserved_bytes if own else 0
    assumed = "assumed until the first kernel has run"
    if own is None:
        return HeldOnGpu(listed, context_bytes, assumed)
    if listed and listed >= reserved:
        if own.context_bytes is not None:
            return HeldOnGpu(listed, own.context_bytes, "measured by this process")
        if reserved:
            return HeldOnGpu(listed, listed - reserved, "measured: own NVML bytes less torch's")
        return HeldOnGpu(listed, max(listed, context_bytes), assumed)
    if reserved or own.context_bytes:
        return HeldOnGpu(reserved, 0, "already part of the used memory")
    return HeldOnGpu(0, context_bytes, assumed)


def other_programs(gpu: GpuFacts | None) -> tuple[int | None, str]:
    """Bytes of the other processes on the GPU, None unless all are known; and the two largest by name."""
    if gpu is None or gpu.processes.value is None:
        return None, ""
    processes = gpu.processes.value
    known = [(each.used_bytes.value, each) for each in processes if each.used_bytes.value is not None]
    known.sort(key=lambda pair: (-pair[0], pair[1].pid))
    names = ", ".join(
        f"{process.name.value or f'pid {process.pid}:'} {used / GIB:.1f}"
        for used, process in known[:2]
        if used >= 0.05 * GIB
    )
    return None if len(known) < len(processes) else sum(used for used, _ in known), names


@dataclasses.dataclass(frozen=True)
class OtherAgent:
    """A living agent that trains in the same memory. ``limit_bytes`` is its owner's, None without one."""

    pid: int
    rss_bytes: int
    limit_bytes: int | None


class _Entry(msgspec.Struct):
    pid: int
    started_s: float
    memory: str
    """`HOST`, a GPU's UUID, or empty before the first probe, which may turn out to be any."""
    limit_bytes: int | None


def fair_share(total_bytes: int, limits: Iterable[int | None]) -> int:
    """Bytes for one agent without a limit, if ``total_bytes`` are shared with agents that have these ``limits``."""
    limits = list(limits)
    agents = len(limits) + 1
    for limit in sorted(limit for limit in limits if limit is not None):
        if limit >= total_bytes / agents:
            break
        total_bytes -= limit
        agents -= 1
    return max(0, total_bytes) // agents


def agents_folder() -> Path:
    """Where agents register: EDGEFED_AGENTS, else a folder of this user and PID namespace among the temporary ones."""
    if chosen := os.environ.get("EDGEFED_AGENTS"):
        return Path(chosen)
    user = str(os.getuid()) if hasattr(os, "getuid") else ""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    return Path(tempfile.gettempdir(), "-".join(filter(None, ("edgefed-agents", user, namespace))))


class AgentRegistry:
    """This process's entry among the agents of the machine, and a view of the others.

    Never raises: where the folder cannot be used, or belongs to somebody else, this agent sees no others.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder if folder is not None else agents_folder()
        self._own = self._folder / f"{os.getpid()}.json"

    def enter(self, memory: str = "", limit_bytes: int | None = None) -> None:
        """Write or replace this process's entry."""
        entry = _Entry(os.getpid(), psutil.Process().create_time(), memory, limit_bytes)
        temporary = self._own.with_suffix(".tmp")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_ours():
                temporary.write_bytes(msgspec.json.encode(entry))
                os.replace(temporary, self._own)
        except OSError as error:
            logger.debug("agents on this machine do not see each other: %s", error)

    def leave(self) -> None:
        """Remove this process's entry."""
        with contextlib.suppress(OSError):
            self._own.unlink(missing_ok=True)

    def others(self, memory: str) -> tuple[OtherAgent, ...]:
        """The other living agents that train in ``memory``, or may; ordered by process number."""
        found = []
        for entry in self._entries():
            if entry.pid == os.getpid() or (memory and entry.memory and entry.memory != memory):
                continue
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(entry.pid)
                found.append(OtherAgent(entry.pid, process.memory_info().rss, entry.limit_bytes))
        return tuple(sorted(found, key=lambda agent: agent.pid))

    def _entries(self) -> Iterator[_Entry]:
        """Entries of living processes; those of ended ones are removed."""
        try:
            files = sorted(self._folder.glob("*.json")) if self._is_ours() else []
        except OSError:
            return
        for file in files:
            try:
                entry = msgspec.json.decode(file.read_bytes(), type=_Entry)
            except (OSError, msgspec.DecodeError):
                continue
            if _is_alive(entry):
                yield entry
            else:
                with contextlib.suppress(OSError):
                    file.unlink()

    def _is_ours(self) -> bool:
        """Whether the folder belongs to this user: somebody else's may say anything."""
        if not hasattr(os, "getuid"):
            return True
        found = self._folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _is_alive(entry: _Entry) -> bool:
    try:
        process = psutil.Process(entry.pid)
        same = abs(process.create_time() - entry.started_s) <= START_TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it exists, and nothing says that it is another
