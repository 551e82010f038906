"""How much memory training may use, decided from `DeviceFacts`. Arithmetic only: no sensor is asked here.

    discrete   usable = (min(free + own, 0.95 total) - context - headroom) * (1 - fragmentation)
    unified    pool   = min(MemAvailable + own, CUDA total, container room)
               usable = (pool - host_reserve - own_host_growth - context) * (1 - fragmentation)
    cpu        usable = (min(MemAvailable, container room) + own RSS - host_reserve) * 0.95

On a GPU, discrete or unified, ``usable`` is what torch may hold there in all (its reserved bytes); on the CPU it is the
whole process, resident memory with Python and libraries, which the setting `memory` bounds there too. What the process
already holds is given back before anything is subtracted, so a running agent measures the same budget as a new one.
Swap is never counted: a GPU cannot use it, and on a CPU it is far too slow. Where huge pages are reserved, the free
ones take MemAvailable's place on a unified device, because CUDA allocates from them alone there.

One departure: the reserve protects whoever shares the memory, so where a container limit decides, it is taken from that
limit and not from the whole host. Ten per cent of a 256 GiB server would leave nothing of a 16 GiB container.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgefed.errors import ConfigError
from edgefed.hardware.facts import DeviceFacts, GpuFacts, HostFacts, MemoryKind, Reading, Reason
from edgefed.hardware.occupancy import OtherAgent, OwnMemory, fair_share, held_on_gpu, other_programs
from edgefed.hardware.policy import DEFAULT_POLICY, BudgetPolicy, Term, Waterfall, gib


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """What training may use now, and on an idle device; None is unknown, and a note then says why and what to do.

    The signed sizes of ``terms`` sum up to ``now_bytes`` (no terms when it is unknown). ``origin`` is one line for
    people. ``measured_bytes`` is ``now_bytes`` without the owner's limit.
    """

    kind: MemoryKind
    now_bytes: int | None
    ideal_bytes: int | None
    terms: tuple[Term, ...]
    origin: str
    notes: tuple[str, ...] = ()
    measured_bytes: int | None = None

    @property
    def covers(self) -> str:
        """What the budget bounds, in words."""
        return "resident memory of the process" if self.kind is MemoryKind.CPU else "torch's memory on the device"


def plan_budget(
    facts: DeviceFacts, *, override_bytes: int | None = None, own: OwnMemory | None = None,
    policy: BudgetPolicy = DEFAULT_POLICY, for_training: bool = False, others: Sequence[OtherAgent] = (),
) -> MemoryBudget:  # fmt: skip
    """Decide the budget of a device.

    Never negative. Without a limit, never above what is free plus what this process holds, and it never falls when more
    is free.

    Args:
        facts: the device.
        override_bytes: the owner's limit (the setting `memory`); it wins over every measurement.
        own: what this process holds by its own account; by default NVML and /proc are asked.
        policy: the constants.
        for_training: plan the memory that training uses, which is the host's where torch cannot use the GPU; by default
            plan the memory of the hardware.
        others: the other agents that train in this memory; this agent then gets its share.

    Raises:
        ConfigError: ``override_bytes`` is not above zero.

    """
    if override_bytes is not None and override_bytes <= 0:
        raise ConfigError(f"`memory` is {override_bytes} bytes, expected more than 0")
    kind, notes = facts.kind, []
    if for_training and kind is not MemoryKind.CPU and not facts.trains_on_gpu:
        reading = facts.torch.cuda_available
        why = f" ({reading.describe()})" if not reading.known else ""
        notes.append(f"torch cannot use this GPU{why}: training uses the CPU and the host's memory")
        kind = MemoryKind.CPU
    plan = {MemoryKind.DISCRETE: _discrete, MemoryKind.UNIFIED: _unified, MemoryKind.CPU: _cpu}[kind]
    now, ideal_bytes = plan(facts, own, policy, notes)
    if now is not None and others:
        notes.append(_share(now, kind, facts, others))
    measured = None if now is None else now.left
    origin = f"unknown: {notes[-1]}" if now is None else now.line()
    if override_bytes is not None:
        return _with_limit(kind, now, override_bytes, notes)
    if now is None:
        notes.append("set `memory` to say how much training may use")
    else:
        notes += _advice(now, ideal_bytes)
    return MemoryBudget(kind, measured, ideal_bytes, now.terms if now else (), origin, tuple(notes), measured)


def _share(now: Waterfall, kind: MemoryKind, facts: DeviceFacts, others: Sequence[OtherAgent]) -> str:
    """Limit the budget to this agent's share and return a note for the owner."""
    if kind is MemoryKind.CPU:
        held = sum(agent.rss_bytes for agent in others)
    else:
        on_gpu = {each.pid: each.used_bytes.value or 0 for each in (facts.gpu and facts.gpu.processes.value) or ()}
        held = sum(on_gpu.get(agent.pid, 0) for agent in others)
    share = fair_share(now.left + held, [agent.limit_bytes for agent in others])
    who = ", ".join(f"pid {agent.pid}" for agent in others)
    now.limit("for other edgefed agents", share, f"shared with {len(others)}; each measures again before a round", who)
    agents = "another edgefed agent" if len(others) == 1 else f"{len(others)} other edgefed agents"
    return f"{agents} on this machine ({who}) may use the same memory: this one plans with its share, {gib(share)}"


def _with_limit(kind: MemoryKind, now: Waterfall | None, limit_bytes: int, notes: list[str]) -> MemoryBudget:
    """The owner's limit, with a note when it exceeds the measured budget."""
    if now is None:
        notes.append(f"`memory` {gib(limit_bytes)} is used unchecked: the memory could not be measured")
    elif limit_bytes > now.left:
        notes.append(
            f"`memory` {gib(limit_bytes)} is more than the {gib(now.left)} that can be used now ({now.line()}): "
            "expect to run out of memory"
        )
    measured = None if now is None else now.left
    if now is not None and limit_bytes <= now.left:
        now.take("left free by `memory`", now.left - limit_bytes, "`memory`")
        terms = now.terms
    else:
        terms = (Term("`memory`", limit_bytes, "`memory`", adds=True),)
    beside = "" if measured is None else f"; {gib(measured)} could be used"
    origin = f"{gib(limit_bytes)} by `memory`{beside}"
    return MemoryBudget(kind, limit_bytes, limit_bytes, terms, origin, tuple(notes), measured)


def _advice(now: Waterfall, ideal_bytes: int | None) -> list[str]:
    """Notes about a budget of 0, or one far below that of the idle device."""
    notes = []
    if now.left == 0:
        whole, *steps = now.terms
        largest = max(steps, key=lambda term: term.size_bytes, default=whole)
        notes.append(
            f"nothing is left for training: {gib(largest.size_bytes)} of {gib(whole.size_bytes)} {largest.name}; "
            "close other programs, or set `memory` to go below the reserves"
        )
    elif ideal_bytes is not None and now.left < 0.9 * ideal_bytes:
        notes.append(f"{gib(ideal_bytes)} could be used if nothing else ran here, {gib(now.left)} now")
    return notes


def _unknown(what: str, reading: Reading[int], notes: list[str]) -> None:
    remedy = {
        Reason.LOST: "; the GPU fell off the bus: look into dmesg, then reload the driver or reboot",
        Reason.NO_PERMISSION: "; another user may see it, or a MIG instance given to this one (`device`, its UUID)",
    }.get(reading.reason or Reason.FAILED, "")
    notes.append(f"{what} is unknown: {reading.describe()}{remedy}")


_Plan = tuple[Waterfall | None, int | None]
"""The waterfall of now, None when a reading that it needs is missing; bytes of the idle device."""


def _discrete(facts: DeviceFacts, own: OwnMemory | None, policy: BudgetPolicy, notes: list[str]) -> _Plan:
    gpu = facts.gpu
    if gpu is None:
        notes.append("the GPU's memory is unknown: no GPU was found")
        return None, None
    total = gpu.memory_total_bytes if gpu.memory_total_bytes.known else gpu.cuda_total_bytes
    if total.value is None:
        _unknown("the GPU's total memory", gpu.memory_total_bytes, notes)
        return None, None
    total_bytes = total.value
    held = held_on_gpu(gpu, own, policy.context_discrete_bytes)
    desktop = _desktop(facts, gpu)
    if facts.host.is_wsl:
        notes.append("WSL2: Windows shares this GPU and may move its memory into system RAM without an error")

    def finish(waterfall: Waterfall, context_bytes: int) -> Waterfall:
        most = int(total_bytes * policy.max_share)
        waterfall.limit(f"above {policy.max_share:.0%}", most, "policy: leave the rest of a GPU's memory free")
        if gpu.cuda_total_bytes.value is not None:  # less where CUDA sees one MIG instance, and NVML another or the GPU
            waterfall.limit("beyond CUDA's total", gpu.cuda_total_bytes.value, gpu.cuda_total_bytes.source)
        waterfall.take("CUDA context", context_bytes, held.origin)
        rule = f"max({gib(policy.gpu_headroom_bytes(0, bool(desktop)))}, {policy.headroom_share:.0%} of total)"
        headroom = policy.gpu_headroom_bytes(total_bytes, bool(desktop))
        waterfall.take("headroom", headroom, f"policy: {rule}{f', {desktop}' if desktop else ''}")
        share = policy.fragmentation_discrete
        with_segments = "with" if policy.expandable_segments else "without"
        waterfall.take(
            "fragmentation", waterfall.left - int(waterfall.left * (1 - share)),
            f"policy: {share:.0%}, torch's allocator {with_segments} expandable segments",
        )  # fmt: skip
        return waterfall

    idle_context = held.idle_context_bytes(own, policy.context_discrete_bytes)
    ideal = finish(Waterfall("total", total.value, total.source), idle_context).left
    free = gpu.memory_free_bytes
    if free.value is None:
        _unknown("the GPU's free memory", free, notes)
        return None, ideal
    now = Waterfall("total", total.value, total.source)
    used = total.value - min(total.value, free.value + held.size_bytes)
    listed, who = other_programs(gpu)
    if listed is None:
        now.take("used by others", used, f"total less free ({free.source}); the process list does not say by whom", who)
    else:
        now.take("used by others", min(used, listed), gpu.processes.source, who)
        now.take("used by the driver", used - listed, f"total less free ({free.source}), not listed for any process")
    now = finish(now, held.context_bytes)
    return now, max(now.left, ideal)


def _desktop(facts: DeviceFacts, gpu: GpuFacts) -> str:
    """Why a desktop must be expected on this GPU; empty when none is."""
    if facts.host.is_wsl:
        return "WSL2: the Windows desktop draws with it"
    if gpu.is_mig:
        return ""
    if gpu.display_active.value is None:
        return "it is unknown whether a display is attached"
    return "a display is active" if gpu.display_active.value else ""


def _unified(facts: DeviceFacts, own: OwnMemory | None, policy: BudgetPolicy, notes: list[str]) -> _Plan:
    host, gpu = facts.host, facts.gpu
    total = host.memory_total_bytes
    if total.value is None:
        _unknown("the total memory", total, notes)
        return None, None
    total_bytes = total.value
    held = held_on_gpu(gpu, own, policy.context_unified_bytes)
    rss = (own.rss_bytes if own else host.own_rss_bytes.value) or 0
    cuda = gpu.cuda_total_bytes if gpu else None
    _unified_notes(facts, policy, notes)

    def finish(waterfall: Waterfall, room: _Room | None, rss_bytes: int, context_bytes: int) -> Waterfall:
        if cuda is not None and cuda.value is not None:
            waterfall.limit("beyond the CUDA pool", cuda.value, cuda.source)
        _take_reserve(waterfall, room, total_bytes, policy)
        growth = max(0, policy.host_growth_bytes - rss_bytes)
        waterfall.take(
            "Python and libraries to come", growth, f"policy: {gib(policy.host_growth_bytes)} less what is loaded"
        )
        waterfall.take("CUDA context", context_bytes, held.origin)
        share = policy.fragmentation_unified
        waterfall.take("fragmentation", waterfall.left - int(waterfall.left * (1 - share)), f"policy: {share:.0%}")
        return waterfall

    idle = _idle(total, policy)
    ideal = finish(idle, _Room.idle(host), 0, held.idle_context_bytes(own, policy.context_unified_bytes)).left
    huge = bool(host.huge_pages_total.value)
    free = host.huge_pages_free_bytes if huge else host.memory_available_bytes
    if free.value is None:
        _unknown("the free huge pages" if huge else "the available memory", free, notes)
        return None, ideal
    # The kernel may or may not charge GPU pages to the container: credit no more of them than it can have counted.
    charged = min(held.size_bytes, max(0, (host.cgroup_used_bytes.value or 0) - rss))
    ok, room = _container_room(host, charged, notes)
    if not ok:
        return None, ideal
    now = Waterfall("total", total.value, total.source)
    used = total.value - min(total.value, free.value + held.size_bytes)
    outside = "all but free huge pages" if huge else "used by others"
    now.take(outside, used - rss, f"total less {free.source}", other_programs(gpu)[1])
    now.take("used by this process", min(rss, used), "resident host memory of this process")
    now = finish(now, room, rss, held.context_bytes)
    return now, now.left if huge else max(now.left, ideal)


def _unified_notes(facts: DeviceFacts, policy: BudgetPolicy, notes: list[str]) -> None:
    host = facts.host
    if host.huge_pages_total.value:
        notes.append(
            f"{host.huge_pages_total.value} huge pages are reserved: CUDA allocates from them alone here; "
            "`sysctl vm.nr_hugepages=0` frees them"
        )
    if host.zram_used_bytes.value:
        notes.append(f"zram holds {gib(host.zram_used_bytes.value)} of this memory, compressed, and may grow")
    block = host.largest_free_block_bytes.value
    if facts.tegra is not None and block is not None and block < policy.small_block_bytes:
        notes.append(
            f"the largest free block of memory is {block // 1024} KiB: large allocations may fail with memory free "
            "(NvMapMemAlloc error 12); reboot to fix it"
        )
    if facts.gpu is None or not facts.gpu.cuda_total_bytes.known:
        notes.append("the size of the CUDA pool is unknown: only the host's memory bounds the budget")


def _cpu(facts: DeviceFacts, own: OwnMemory | None, policy: BudgetPolicy, notes: list[str]) -> _Plan:
    host = facts.host
    total, available = host.memory_total_bytes, host.memory_available_bytes
    if total.value is None:
        _unknown("the total memory", total, notes)
        return None, None
    total_bytes = total.value
    rss = (own.rss_bytes if own else host.own_rss_bytes.value) or 0
    if host.zram_used_bytes.value:
        notes.append(f"zram holds {gib(host.zram_used_bytes.value)} of this memory, compressed, and may grow")

    def finish(waterfall: Waterfall, room: _Room | None) -> Waterfall:
        _take_reserve(waterfall, room, total_bytes, policy)
        margin = waterfall.left - int(waterfall.left * (1 - policy.cpu_margin))
        waterfall.take("margin", margin, f"policy: {policy.cpu_margin:.0%}")
        return waterfall

    ideal = finish(_idle(total, policy), _Room.idle(host)).left
    if available.value is None:
        _unknown("the available memory", available, notes)
        return None, ideal
    # File pages are already left out of what the container uses: only the rest of this process is given back.
    ok, room = _container_room(host, max(0, rss - (host.own_file_bytes.value or 0)), notes)
    if not ok:
        return None, ideal
    now = Waterfall("total", total.value, total.source)
    now.take("used by others", total.value - available.value - rss, f"total less {available.source}, less our own")
    now = finish(now, room)
    return now, max(now.left, ideal)


def _idle(total: Reading[int], policy: BudgetPolicy) -> Waterfall:
    idle = Waterfall("total", total.require(), total.source)
    idle.limit("the system itself", policy.idle_available_bytes(total.require()), "policy")
    return idle


@dataclasses.dataclass(frozen=True)
class _Room:
    """What a container limit leaves us, our own included."""

    size_bytes: int
    limit: Reading[int]
    origin: str

    @classmethod
    def idle(cls, host: HostFacts) -> _Room | None:
        limit = host.cgroup_limit_bytes
        return cls(limit.value, limit, limit.source) if limit.value is not None else None


def _container_room(host: HostFacts, own_bytes: int, notes: list[str]) -> tuple[bool, _Room | None]:
    """The room under the container's limit, None without one; False first when there is a limit and no answer."""
    limit, used = host.cgroup_limit_bytes, host.cgroup_used_bytes
    if limit.value is None:
        if limit.reason is Reason.ABSENT or limit.reason is Reason.NOT_SUPPORTED:
            return True, None
        _unknown("the container's memory limit", limit, notes)
        return not host.container.known, None  # outside a container there is rarely one
    if used.value is None:
        _unknown("the memory used under the container's limit", used, notes)
        return False, None
    room = max(0, limit.value - used.value + min(own_bytes, used.value))
    return True, _Room(room, limit, f"{used.source}, less our own")


def _take_reserve(waterfall: Waterfall, room: _Room | None, total_bytes: int, policy: BudgetPolicy) -> None:
    """Take the host's reserve; where the container's limit leaves less, start again from there and take its reserve."""
    reserve, of = policy.host_reserve_bytes(total_bytes), "total"
    if room is not None:
        inside = policy.host_reserve_bytes(min(total_bytes, room.limit.require()))
        if room.size_bytes - inside < waterfall.left - reserve:
            waterfall.restart("container limit", room.limit.require(), room.limit.source)
            waterfall.limit("used by others", room.size_bytes, room.origin)
            reserve, of = inside, "the limit"
    rule = f"policy: max({gib(policy.reserve_bytes)}, {policy.reserve_share:.0%} of {of})"
    waterfall.take("reserved for the system", reserve, rule)
