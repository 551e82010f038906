"""Cheap readings while work runs: memory samples, and how long this process waited for a processor.

A memory sample takes a few NVML calls and three small files: well under a millisecond.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from edgefed.hardware import cgroup
from edgefed.hardware.facts import DeviceFacts, Reading, Reason
from edgefed.hardware.gpu import Card, own_bytes
from edgefed.hardware.host_files import Files, available_memory, field_of, parse_meminfo, swapped_out_pages, sysroot
from edgefed.hardware.nvml import NOT_INITIALISED, Device, Nvml, process_library
from edgefed.hardware.tegra import zone_temperature


@dataclasses.dataclass(frozen=True)
class MemorySample:
    """One look. Sizes in bytes; ``time_s`` is `time.monotonic`."""

    time_s: float
    available_bytes: Reading[int]
    """MemAvailable of the host."""
    cgroup_room_bytes: Reading[int]
    """What the control group still allows; absent without a limit."""
    gpu_free_bytes: Reading[int]
    """NVML's free memory of the chosen GPU."""
    own_gpu_bytes: Reading[int]
    """What this process holds on it."""
    own_rss_bytes: Reading[int]
    swapped_out_pages: Reading[int]
    """Since boot: watch its growth."""
    process_bytes_sum: Reading[int]
    """What all processes hold: AnonPages + Mapped of the host (each shared page once) + NVML's bytes of all processes.

    On a chip with shared memory the GPU's pages are in no process's resident memory, so this sees what MemAvailable
    does not.
    """
    throttle_reasons: Reading[int]
    temperature_celsius: Reading[float]


class MemorySensors:
    """Samples of the device that ``facts`` describes. Safe to call from a thread of its own; never raises."""

    def __init__(
        self,
        facts: DeviceFacts,
        *,
        root: Path | None = None,
        files: Files | None = None,
        nvml: Nvml | None = None,
    ):
        self._files = files or Files(sysroot(root))
        self._nvml = nvml or process_library()
        self._card: Card | None = None
        if facts.gpu is not None and facts.gpu.nvml_index is not None:
            self._card = Card(self._nvml, Device(facts.gpu.nvml_index, facts.gpu.mig_index))
        self._levels = cgroup.levels(self._files, "memory")  # a process is rarely moved to another group
        self._why = Reading.missing(Reason.ABSENT, "NVML", "no GPU that NVML knows is used")
        self._tegra_temperature = _thermal_zone(self._files, facts)

    def sample(self) -> MemorySample:
        """Read all sensors once."""
        files, card = self._files, self._card
        text = files.text("/proc/meminfo")
        fields = parse_meminfo(text.value or "")
        if text.reason is Reason.ABSENT:
            available = files.ask("memory").map(lambda memory: memory["available"])
        else:
            available = available_memory(text, fields)
        memory: Reading[Any] = card.memory() if card else self._why
        if card and memory.reason is Reason.FAILED and self._nvml.call("nvmlDeviceGetCount").code == NOT_INITIALISED:
            self._nvml.start()  # a forked child, or a driver that was loaded anew
            memory = card.memory()
        sizes: Reading[Any] = card.sizes_by_process() if card else self._why
        return MemorySample(
            time_s=time.monotonic(),
            available_bytes=available,
            cgroup_room_bytes=_room(cgroup.read_memory_limit(files, self._levels or None)),
            gpu_free_bytes=memory.map(lambda info: info["free"]),
            own_gpu_bytes=own_bytes(sizes, files),
            own_rss_bytes=files.ask("rss"),
            swapped_out_pages=swapped_out_pages(files),
            process_bytes_sum=_process_sum(text, fields, sizes if card else None),
            throttle_reasons=card.throttle_reasons() if card else self._why,
            temperature_celsius=self._temperature(),
        )

    def _temperature(self) -> Reading[float]:
        reading = self._card.temperature() if self._card else self._why
        if reading.known or not self._tegra_temperature:
            return reading
        return zone_temperature(self._files, self._tegra_temperature)


def _room(limit: cgroup.MemoryLimit) -> Reading[int]:
    if limit.limit_bytes.value is None or limit.used_bytes.value is None:
        missing = limit.limit_bytes if limit.limit_bytes.value is None else limit.used_bytes
        return missing.without_value()
    return Reading.of(limit.limit_bytes.value - limit.used_bytes.value, limit.used_bytes.source)


def _process_sum(
    text: Reading[str], fields: dict[str, int], sizes: Reading[dict[int, int | None]] | None
) -> Reading[int]:
    resident = field_of(text, fields, "AnonPages")
    if resident.value is None or "Mapped" not in fields:
        return resident if resident.value is None else field_of(text, fields, "Mapped")
    total, source = resident.value + fields["Mapped"], f"{text.source} AnonPages + Mapped"
    if sizes is None:
        return Reading.of(total, source)
    if sizes.value is None:
        return sizes.without_value()
    known = [size for size in sizes.value.values() if size is not None]
    if len(known) < len(sizes.value):
        return Reading.missing(Reason.NOT_SUPPORTED, sizes.source, "the driver does not say how much each one holds")
    return Reading.of(total + sum(known), f"{source} + {sizes.source}")


def _thermal_zone(files: Files, facts: DeviceFacts) -> str:
    """The file behind a Jetson's headline temperature; empty elsewhere."""
    if facts.tegra is None or not facts.tegra.temperature_celsius.known:
        return ""
    words = facts.tegra.temperature_celsius.source.split()
    for zone in files.names(words[0]):
        if (files.text(f"{words[0]}/{zone}/type").value or "").strip() == words[1]:
            return f"{words[0]}/{zone}/temp"
    return ""


SOURCE = "/proc/self/task/*/schedstat"


def read_waited_s(tasks: Path = Path("/proc/self/task")) -> Reading[float]:
    """Seconds that all threads of this process together have waited in the kernel's run queues. Linux only.

    A thread that ends takes its count along, so the sum can fall; two readings around one piece of work compare well.
    """
    total, seen = 0, False
    try:
        folders = list(tasks.iterdir())
    except OSError as error:
        return Reading.missing(Reason.ABSENT, SOURCE, error.strerror or str(error))
    for folder in folders:
        try:
            # running ns, waiting ns, time slices
            total += int((folder / "schedstat").read_text().split()[1])
            seen = True
        except (OSError, ValueError, IndexError):  # the thread ended, or the kernel keeps no such account
            continue
    if not seen:
        return Reading.missing(Reason.NOT_SUPPORTED, SOURCE, "this kernel keeps no scheduling statistics")
    return Reading.of(total / 1e9, SOURCE)
