"""What the device's sensors say while the benchmark runs, read anew at each call."""

from __future__ import annotations

import statistics
from pathlib import Path

from edgefed.bench.sustain import Sensed
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.gpu import read_gpus
from edgefed.hardware.host_files import Files, sysroot
from edgefed.hardware.nvml import process_library
from edgefed.hardware.policy import BudgetPolicy
from edgefed.hardware.reading import Reading, Reason
from edgefed.hardware.sampling import MemorySensors
from edgefed.hardware.tegra import read_tegra

CPU_ZONES = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal", "k10temp", "soc_thermal", "acpitz")
"""Thermal zones that are a processor's, the best first."""


class DeviceSensors:
    """Clock, temperature, power, throttling and energy of what speed is measured on, and the memory that is left."""

    def __init__(self, facts: DeviceFacts, *, on_gpu: bool, root: Path | None = None):
        self._facts = facts
        self._on_gpu = on_gpu
        self._files = Files(sysroot(root))
        self._memory = MemorySensors(facts, root=root)
        self._policy = BudgetPolicy()

    @property
    def is_real(self) -> bool:
        """Whether the files are this machine's, and not a stand-in's (EDGEFED_SYSROOT)."""
        return self._files.is_real

    def sense(self) -> Sensed:
        """Everything at once. Never raises."""
        if not self._on_gpu:
            return self._sense_cpu()
        gpu = self._gpu()
        missing = Reading.missing(Reason.ABSENT, "NVML", "this GPU is not known to NVML")
        tegra = read_tegra(self._files) if self._facts.tegra is not None else None

        def first(name: str, other: str) -> Reading:
            reading = getattr(gpu, name) if gpu is not None else missing
            return getattr(tegra, other) if tegra is not None and not reading.known else reading

        return Sensed(
            clock_mhz=first("sm_clock_mhz", "gpu_clock_mhz"),
            temperature_celsius=first("temperature_celsius", "temperature_celsius"),
            power_watts=first("power_watts", "power_watts"),
            throttle=gpu.throttle_reasons if gpu is not None else missing,
            energy_joules=gpu.energy_joules if gpu is not None else missing,
        )

    def energy(self) -> Reading[float]:
        """Joules, counting up."""
        return self.sense().energy_joules

    def room_bytes(self) -> int | None:
        """Bytes that may be taken without going into what belongs to the system; None when that cannot be seen."""
        sample = self._memory.sample()
        host = self._host_room(sample)
        if not self._on_gpu or self._facts.kind is MemoryKind.UNIFIED:
            return host
        if not sample.gpu_free_bytes.known:
            return None
        total = self._facts.gpu.memory_total_bytes.value or 0
        return sample.gpu_free_bytes.value - self._policy.gpu_headroom_bytes(total, False)

    def _host_room(self, sample) -> int | None:
        total = self._facts.host.memory_total_bytes.value
        if total is None or not sample.available_bytes.known:
            return None
        room = sample.available_bytes.value - self._policy.host_reserve_bytes(total)
        if sample.cgroup_room_bytes.known:
            limit = self._facts.host.cgroup_limit_bytes.value or total
            room = min(room, sample.cgroup_room_bytes.value - self._policy.host_reserve_bytes(min(limit, total)))
        elif sample.cgroup_room_bytes.reason not in (Reason.ABSENT, Reason.NOT_SUPPORTED):
            return None
        return room

    def _gpu(self):
        wanted = self._facts.gpu
        if wanted is None or wanted.nvml_index is None:
            return None
        place = (wanted.nvml_index, wanted.mig_index)
        found = read_gpus(process_library(), self._files)
        return next((gpu for gpu in found if (gpu.nvml_index, gpu.mig_index) == place), None)

    def _sense_cpu(self) -> Sensed:
        return Sensed(
            clock_mhz=self._cpu_clock(),
            temperature_celsius=self._cpu_temperature(),
            power_watts=Reading.missing(Reason.ABSENT, "processor", "power is read as energy, where there is any"),
            throttle=Reading.missing(Reason.ABSENT, "processor", "it does not tell"),
            energy_joules=self._number("/sys/class/powercap/intel-rapl:0/energy_uj", 1e-6),
        )

    def _cpu_clock(self) -> Reading[float]:
        text = self._files.text("/proc/cpuinfo")
        lines = (line for line in (text.value or "").splitlines() if line.startswith("cpu MHz"))
        clocks = [value for line in lines if (value := _float(line.partition(":")[2])) is not None]
        if clocks:
            return Reading.of(statistics.mean(clocks), text.source)
        return self._number("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 1e-3)

    def _cpu_temperature(self) -> Reading[float]:
        folder = "/sys/class/thermal"
        zones = {}
        for zone in self._files.names(folder):
            kind = (self._files.text(f"{folder}/{zone}/type").value or "").strip()
            if kind in CPU_ZONES:
                zones.setdefault(kind, f"{folder}/{zone}/temp")
        for kind in CPU_ZONES:
            if kind in zones:
                return self._number(zones[kind], 1e-3)
        return Reading.missing(Reason.ABSENT, folder, "no zone of a processor")

    def _number(self, path: str, scale: float) -> Reading[float]:
        text = self._files.text(path)
        if not text.known:
            return Reading.missing(text.reason, text.source, text.detail)
        value = _float(text.value)
        if value is None:
            return Reading.missing(Reason.FAILED, path, f"{text.value[:40]!r} is no number")
        return Reading.of(value * scale, path)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
