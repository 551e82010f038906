"""What NVML says of each GPU, as `GpuFacts`: every quantity asked on its own, with the older call where a newer fails.

    memory       GetMemoryInfo v2, then v1: only total and free agree in both (``used`` changed its meaning)
    processes    compute and graphics lists, _v3, then _v2; a process may be in both: its larger figure, not the sum
    temperature  GetTemperatureV, then GetTemperature
    throttling   GetCurrentClocksEventReasons, then ...ThrottleReasons
    MIG          instances are asked themselves; clocks, temperature and power only exist for the whole GPU

A success that cannot be true (a total of 0, 0xFFFFFFFF, PCIe x0) is a missing value, `Reason.IMPLAUSIBLE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from edgefed.hardware.facts import GpuFacts, GpuProcess, Reading, Reason
from edgefed.hardware.host_files import Files
from edgefed.hardware.nvml import FUNCTION_NOT_FOUND, Answer, Device, Nvml

MEMORY_V2 = 0x02000028
"""Version word of nvmlMemory_v2_t: version 2, 40 bytes."""
CLOCK_SM, CLOCK_MEMORY, SENSOR_GPU, BUS_PCIE = 1, 2, 0, 2
MOST_INSTANCES = 7
"""MIG cuts a GPU into at most seven."""
MOST_GPUS = 256
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The host's own, whose number is fixed in the kernel (PROC_PID_INIT_INO)."""
LARGEST_MEMORY = 2**46
"""64 TiB: a size from here on is an error word (all bits set), not a memory."""

Test = Callable[[Any], bool]


class Card:
    """One GPU or MIG instance, asked one quantity at a time."""

    def __init__(self, nvml: Nvml, device: Device):
        self.nvml = nvml
        self.device = device

    def ask(
        self, *calls: tuple[Any, ...], test: Test | None = None, scale: Callable[[Any], Any] | None = None
    ) -> Reading[Any]:
        """The first of ``calls`` (name without nvmlDevice, arguments, ...) that answers with a value that passes."""
        first: Reading[Any] | None = None
        for name, *arguments in calls:
            answer = self.nvml.call(f"nvmlDevice{name}", self.device, *arguments)
            reading = answer.reading(f"NVML {name}" + (" v2" if MEMORY_V2 in arguments else ""))
            if reading.known:
                try:
                    plausible = test is None or test(reading.value)
                    if plausible:
                        return reading.map(scale) if scale else reading
                except (TypeError, ValueError, KeyError, IndexError, AttributeError):
                    plausible = False
                reading = Reading.missing(Reason.IMPLAUSIBLE, reading.source, _brief(reading.value))
            if reading.reason is Reason.LOST:
                return reading
            # a call that this driver does not have says less than one that it has and that fails
            if first is None or answer.code != FUNCTION_NOT_FOUND and first.detail == "Function Not Found":
                first = reading
        assert first is not None  # there is at least one call
        return first

    def memory(self) -> Reading[dict[str, int]]:
        """{"total": bytes, "free": bytes, ...}."""
        return self.ask(
            ("GetMemoryInfo", MEMORY_V2),
            ("GetMemoryInfo",),
            test=lambda m: 0 < m["total"] < LARGEST_MEMORY and 0 <= m["free"] <= m["total"],
        )

    def temperature(self) -> Reading[float]:
        """Temperature of the GPU in degrees Celsius."""
        return self.ask(
            ("GetTemperatureV", SENSOR_GPU),
            ("GetTemperature", SENSOR_GPU),
            test=lambda t: -50 <= t <= 200 and t not in (0, -1),  # what drivers write for "unknown"
            scale=float,
        )

    def throttle_reasons(self) -> Reading[int]:
        """Bits of NVML's throttle reasons."""
        return self.ask(
            ("GetCurrentClocksEventReasons",), ("GetCurrentClocksThrottleReasons",), test=lambda bits: 0 <= bits < 2**32
        )

    def sizes_by_process(self) -> Reading[dict[int, int | None]]:
        """Process id -> bytes, None where the driver does not say (WDDM, WSL2). Compute and graphics together."""
        known: list[Reading[Any]] = []
        for kind in ("Compute", "Graphics"):
            name = f"Get{kind}RunningProcesses"
            reading = self.ask((f"{name}_v3",), (f"{name}_v2",), (name,), test=_are_processes)
            if not reading.known and (kind == "Compute" or reading.reason is Reason.LOST):
                return reading
            known += [reading] if reading.known else []
        sizes: dict[int, int | None] = {}
        for row in (row for reading in known for row in reading.require()):
            size = row.get("usedGpuMemory")
            if size is not None and not 0 <= size < LARGEST_MEMORY:
                size = None
            before = sizes.get(row["pid"])
            sizes[row["pid"]] = size if before is None else before if size is None else max(size, before)
        return Reading.of(sizes, "NVML running processes")


def read_gpus(nvml: Nvml, files: Files) -> tuple[GpuFacts, ...]:
    """All GPUs in NVML's order, each followed by its MIG instances. None when they cannot be counted."""
    count = count_gpus(nvml).value or 0
    gpus = []
    for index in range(count):
        gpu = read_gpu(nvml, files, Device(index))
        gpus.append(gpu)
        if gpu.mig_enabled.value:
            gpus += [read_gpu(nvml, files, device, gpu) for device in _instances(nvml, index)]
    return tuple(gpus)


def count_gpus(nvml: Nvml) -> Reading[int]:
    """Number of GPUs that NVML reports."""
    reading = nvml.call("nvmlDeviceGetCount").reading("NVML GetCount")
    if reading.value is not None and not 0 <= reading.value <= MOST_GPUS:
        return Reading.missing(Reason.IMPLAUSIBLE, reading.source, f"{reading.value} GPUs")
    return reading


def _instances(nvml: Nvml, index: int) -> list[Device]:
    """MIG instances: numbers have gaps, so every number is tried."""
    most = nvml.call("nvmlDeviceGetMaxMigDeviceCount", Device(index))
    last = max(MOST_INSTANCES, min(most.value or 0, 64)) if most.code == 0 else MOST_INSTANCES
    return [
        device
        for device in (Device(index, number) for number in range(last))
        if nvml.call("nvmlDeviceGetUUID", device).code == 0 or nvml.call("nvmlDeviceGetName", device).code == 0
    ]


def read_gpu(nvml: Nvml, files: Files, device: Device, parent: GpuFacts | None = None) -> GpuFacts:
    """One GPU, or one MIG instance of ``parent``. Never raises; a lost GPU has `Reason.LOST` everywhere."""
    card = Card(nvml, device)

    def whole(reading: Reading[Any], name: str) -> Reading[Any]:
        """What exists only for the whole GPU: the parent's, for an instance that has none of its own."""
        if reading.known or parent is None:
            return reading
        shared: Reading[Any] = getattr(parent, name)
        return Reading.of(shared.value, f"{shared.source} of the whole GPU") if shared.known else reading

    memory = card.memory()
    own, others = _processes(card, nvml, files)
    positive = {"test": lambda value: 0 < value < 2**31}
    link = _pcie(card)
    return GpuFacts(
        nvml_index=device.index,
        cuda_index=None,
        is_mig=device.mig is not None,
        mig_index=device.mig,
        name=card.ask(("GetName",), test=is_name, scale=str.strip),
        uuid=card.ask(("GetUUID",), test=is_name, scale=str.strip),
        compute_capability=whole(
            card.ask(("GetCudaComputeCapability",), test=lambda v: 1 <= v[0] < 100 and 0 <= v[1] < 100, scale=tuple),
            "compute_capability",
        ),
        integrated=Reading.missing(Reason.ABSENT, "CUDA", "not asked"),
        memory_total_bytes=memory.map(lambda m: m["total"]),
        memory_free_bytes=memory.map(lambda m: m["free"]),
        cuda_total_bytes=Reading.missing(Reason.ABSENT, "CUDA", "not asked"),
        own_bytes=own,
        processes=others,
        display_active=card.ask(("GetDisplayActive",), test=lambda v: v in (0, 1), scale=bool),
        utilization_percent=card.ask(
            ("GetUtilizationRates",), test=lambda v: 0 <= v["gpu"] <= 100, scale=lambda v: v["gpu"]
        ),
        sm_clock_mhz=whole(card.ask(("GetClockInfo", CLOCK_SM), test=lambda v: 0 < v < 20_000), "sm_clock_mhz"),
        sm_clock_max_mhz=whole(
            card.ask(("GetMaxClockInfo", CLOCK_SM), test=lambda v: 0 < v < 20_000), "sm_clock_max_mhz"
        ),
        memory_clock_mhz=whole(
            card.ask(("GetClockInfo", CLOCK_MEMORY), test=lambda v: 0 < v < 50_000), "memory_clock_mhz"
        ),
        temperature_celsius=whole(card.temperature(), "temperature_celsius"),
        power_watts=whole(card.ask(("GetPowerUsage",), scale=lambda v: v / 1000, **positive), "power_watts"),
        power_limit_watts=whole(
            card.ask(("GetEnforcedPowerLimit",), scale=lambda v: v / 1000, **positive), "power_limit_watts"
        ),
        energy_joules=whole(
            card.ask(("GetTotalEnergyConsumption",), test=lambda v: 0 < v < 2**62, scale=lambda v: v / 1000),
            "energy_joules",
        ),
        throttle_reasons=whole(card.throttle_reasons(), "throttle_reasons"),
        pcie_generation=whole(link[0], "pcie_generation"),
        pcie_width=whole(link[1], "pcie_width"),
        ecc=whole(card.ask(("GetEccMode",), test=lambda v: v[0] in (0, 1), scale=lambda v: bool(v[0])), "ecc"),
        mig_enabled=card.ask(("GetMigMode",), test=lambda v: v[0] in (0, 1), scale=lambda v: bool(v[0])),
        mig_ids=_mig_ids(card),
    )


def _mig_ids(card: Card) -> Reading[tuple[int, int]]:
    """(GPU instance, compute instance) of a MIG instance."""
    if card.device.mig is None:
        return Reading.missing(Reason.ABSENT, "NVML GetGpuInstanceId", "not a MIG instance")
    ids = [
        card.ask((name,), test=lambda number: 0 <= number < 2**16)
        for name in ("GetGpuInstanceId", "GetComputeInstanceId")
    ]
    missing = next((reading for reading in ids if not reading.known), None)
    return missing or Reading.of((int(ids[0].require()), int(ids[1].require())), "NVML instance ids")


def is_name(value: Any) -> bool:
    """Whether a text names something; drivers also write "N/A" and "[Not Supported]" where they know nothing."""
    word = value.strip().strip("[]").lower()
    return bool(word) and word not in ("n/a", "not supported", "unknown", "unknown error", "none", "(null)")


def _pcie(card: Card) -> tuple[Reading[int], Reading[int]]:
    """(generation, width) of the link. Chips without PCI Express report a generation 1 x1 that means nothing."""
    bus = card.ask(("GetBusType",))
    if bus.known and bus.value != BUS_PCIE:
        missing = Reading.missing(Reason.NOT_SUPPORTED, bus.source, "not on PCI Express")
        return missing, missing
    generation = card.ask(("GetCurrPcieLinkGeneration",), test=lambda v: 1 <= v <= 10)
    width = card.ask(("GetCurrPcieLinkWidth",), test=lambda v: 1 <= v <= 32)
    best = (card.ask(("GetMaxPcieLinkGeneration",)).value, card.ask(("GetMaxPcieLinkWidth",)).value)
    if (generation.value, width.value) == (1, 1) and best in ((1, 1), (None, None)):
        missing = Reading.missing(Reason.IMPLAUSIBLE, generation.source, "generation 1 x1 is a placeholder")
        return missing, missing
    return generation, width


def _processes(card: Card, nvml: Nvml, files: Files) -> tuple[Reading[int], Reading[tuple[GpuProcess, ...]]]:
    """(our own bytes, all others)."""
    sizes = card.sizes_by_process()
    if sizes.value is None:
        return sizes.without_value(), sizes.without_value()
    own_pid = files.ask("pid").value
    others = []
    for pid, size in sizes.value.items():
        if pid != own_pid:
            others.append(GpuProcess(pid, _process_name(nvml, files, pid), _used(size, sizes.source)))
    return own_bytes(sizes, files), Reading.of(tuple(others), sizes.source)


def own_bytes(sizes: Reading[dict[int, int | None]], files: Files) -> Reading[int]:
    """What this process holds, from the list of all; 0 only when the list would show us."""
    own_pid = files.ask("pid").value
    if sizes.value is None:
        return sizes.without_value()
    if isinstance(own_pid, int) and own_pid in sizes.value:
        return _used(sizes.value[own_pid], sizes.source)
    space = files.ask("pid_namespace")
    if space.known and space.value != FIRST_PID_NAMESPACE:
        detail = "the driver lists processes by the host's numbers, and this is a container with numbers of its own"
        return Reading.missing(Reason.NOT_SUPPORTED, sizes.source, detail)
    return Reading.of(0, sizes.source)


def _brief(value: Any) -> str:
    """An implausible value for people: the two sizes of a memory, the start of anything else."""
    if isinstance(value, dict) and {"total", "free"} <= value.keys():
        return f"a total of {value['total']} bytes, {value['free']} of them free"
    return repr(value)[:80]


def _are_processes(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row["pid"], int) for row in rows)


def _used(size: int | None, source: str) -> Reading[int]:
    if size is None:
        return Reading.missing(Reason.NOT_SUPPORTED, source, "the driver does not say how much (WSL2, WDDM)")
    return Reading.of(size, source)


def _process_name(nvml: Nvml, files: Files, pid: int) -> Reading[str]:
    """The program's name without its folder, which may name its user."""
    answer: Answer = nvml.call("nvmlSystemGetProcessName", pid)
    reading = answer.reading("NVML SystemGetProcessName")
    if reading.known and isinstance(reading.value, str) and (name := re.split(r"[/\\]", reading.value.strip())[-1]):
        return Reading.of(name[:80], reading.source)
    command = files.text(f"/proc/{pid}/comm")
    if command.value is not None and command.value.strip():
        return Reading.of(command.value.strip()[:80], command.source)
    missing = reading if not reading.known else command
    return Reading.missing(missing.reason or Reason.FAILED, missing.source, missing.detail)
