"""Sustained speed: does the device keep its speed when it gets warm?

Matrix products run without a pause, with one point a second; the median of the first five seconds is compared with that
of the last five. A laptop, a phone or a Jetson in a case may lose a third, which no short test shows. `DeviceSensors`
reads clock, temperature, power and memory meanwhile.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from edgefed.bench.compute import Stopwatch, dtype_name, product
from edgefed.bench.report import Sustain, SustainPoint
from edgefed.hardware.facts import DeviceFacts, GpuFacts, MemoryKind, Reading, Reason
from edgefed.hardware.gpu import read_gpus
from edgefed.hardware.host_files import Files, sysroot
from edgefed.hardware.nvml import POWER_CAP, SLOWED, process_library, throttle_words
from edgefed.hardware.policy import BudgetPolicy
from edgefed.hardware.sampling import MemorySample, MemorySensors
from edgefed.hardware.tegra import read_tegra

WINDOW_S = 5.0
POINT_S = 1.0
BURST_S = 0.1
"""Length of a burst of products between two looks at the clock: the queue stays full, and Ctrl-C acts soon."""
CPU_ZONES = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal", "k10temp", "soc_thermal", "acpitz")
"""Types of thermal zones that belong to a processor, in order of preference."""


# --- sensors ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sensed:
    """Sensor values at one moment. ``throttle`` holds NVML's bits; ``energy_joules`` is a counter."""

    clock_mhz: Reading[float]
    temperature_celsius: Reading[float]
    power_watts: Reading[float]
    throttle: Reading[int]
    energy_joules: Reading[float]


class DeviceSensors:
    """Sensors of the device that speed is measured on, read anew at each call, and the memory that is left."""

    def __init__(self, facts: DeviceFacts, *, on_gpu: bool, root: Path | None = None):
        self._facts = facts
        self._on_gpu = on_gpu
        self._files = Files(sysroot(root))
        self._memory = MemorySensors(facts, root=root)
        self._policy = BudgetPolicy()

    @property
    def is_real(self) -> bool:
        """Whether the sensor files are those of this machine, not a copy of another's (EDGEFED_SYSROOT)."""
        return self._files.is_real

    def sense(self) -> Sensed:
        """Read all sensors. Never raises."""
        if not self._on_gpu:
            return self._sense_cpu()
        gpu = self._gpu()
        unknown: Reading[float] = Reading.missing(Reason.ABSENT, "NVML", "this GPU is unknown to NVML")
        tegra = read_tegra(self._files) if self._facts.tegra is not None else None
        clock = _as_float(gpu.sm_clock_mhz) if gpu else unknown
        temperature = gpu.temperature_celsius if gpu else unknown
        power = gpu.power_watts if gpu else unknown
        if tegra is not None:
            clock = clock if clock.known else _as_float(tegra.gpu_clock_mhz)
            temperature = temperature if temperature.known else tegra.temperature_celsius
            power = power if power.known else tegra.power_watts
        return Sensed(
            clock_mhz=clock,
            temperature_celsius=temperature,
            power_watts=power,
            throttle=gpu.throttle_reasons if gpu else Reading.missing(Reason.ABSENT, "NVML", unknown.detail),
            energy_joules=gpu.energy_joules if gpu else unknown,
        )

    def energy(self) -> Reading[float]:
        """Return the energy counter in joules."""
        return self.sense().energy_joules

    def room_bytes(self) -> int | None:
        """Return the bytes that may be allocated above the system's reserve; None if it is unknown."""
        sample = self._memory.sample()
        host = self._host_room(sample)
        if not self._on_gpu or self._facts.kind is MemoryKind.UNIFIED or self._facts.gpu is None:
            return host
        if sample.gpu_free_bytes.value is None:
            return None
        total = self._facts.gpu.memory_total_bytes.value or 0
        return sample.gpu_free_bytes.value - self._policy.gpu_headroom_bytes(total, False)

    def _host_room(self, sample: MemorySample) -> int | None:
        total, available = self._facts.host.memory_total_bytes.value, sample.available_bytes.value
        if total is None or available is None:
            return None
        room = available - self._policy.host_reserve_bytes(total)
        if sample.cgroup_room_bytes.value is not None:
            limit = self._facts.host.cgroup_limit_bytes.value or total
            room = min(room, sample.cgroup_room_bytes.value - self._policy.host_reserve_bytes(min(limit, total)))
        elif sample.cgroup_room_bytes.reason not in (Reason.ABSENT, Reason.NOT_SUPPORTED):
            return None
        return room

    def _gpu(self) -> GpuFacts | None:
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
            power_watts=Reading.missing(Reason.ABSENT, "processor", "a CPU reports energy, not power"),
            throttle=Reading.missing(Reason.ABSENT, "processor", "a CPU does not report throttling"),
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
        zones: dict[str, str] = {}
        for zone in self._files.names(folder):
            kind = (self._files.text(f"{folder}/{zone}/type").value or "").strip()
            if kind in CPU_ZONES:
                zones.setdefault(kind, f"{folder}/{zone}/temp")
        for kind in CPU_ZONES:
            if kind in zones:
                return self._number(zones[kind], 1e-3)
        return Reading.missing(Reason.ABSENT, folder, "no thermal zone of a processor")

    def _number(self, path: str, scale: float) -> Reading[float]:
        text = self._files.text(path)
        if text.value is None:
            return Reading(None, text.source, text.reason, text.detail)
        value = _float(text.value)
        if value is None:
            return Reading.missing(Reason.FAILED, path, f"expected a number, found {text.value[:40]!r}")
        return Reading.of(value * scale, path)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _as_float(reading: Reading[int]) -> Reading[float]:
    return Reading(reading.value, reading.source, reading.reason, reading.detail)


# --- the sustained run ------------------------------------------------------------------------------------------


def run_sustained(
    watch: Stopwatch,
    dtype: torch.dtype,
    n: int,
    seconds: float,
    sense: Callable[[], Sensed],
    *,
    on_point: Callable[[float], None] = lambda seconds: None,
    clock: Callable[[], float] = time.monotonic,
) -> Sustain:
    """Multiply (n, n) matrices in ``dtype`` for ``seconds`` (at least two points). ``on_point`` gets seconds done.

    Raises what the products raise, a lost device included.
    """
    work = product(watch, dtype, n)
    calls, _ = watch.calls_for(work, BURST_S)
    flops = 2 * n**3 * calls
    before = sense()
    points: list[SustainPoint] = []
    all_bits, last = 0, before
    started = clock()
    while not points or points[-1].t_s < seconds or len(points) < 2:
        since, done = clock(), 0
        while clock() - since < POINT_S:
            for _ in range(calls):
                work()
            watch.synchronize()
            done += 1
        now = clock()
        last = sense()
        bits = last.throttle.value or 0
        all_bits |= bits
        points.append(
            SustainPoint(
                t_s=round(now - started, 3),
                rate=done * flops / (now - since) / 1e12,
                clock_mhz=last.clock_mhz.value,
                temperature_celsius=last.temperature_celsius.value,
                power_watts=last.power_watts.value,
                reasons=throttle_words(bits),
            )
        )
        on_point(now - started)
    return summarise_sustained(dtype_name(dtype), points, all_bits, before, last)


def summarise_sustained(dtype: str, points: list[SustainPoint], bits: int, before: Sensed, after: Sensed) -> Sustain:
    """Make the report of a run from its points. Pure."""
    end = points[-1].t_s
    window = min(WINDOW_S, end / 2)
    first = statistics.median([point.rate for point in points if point.t_s <= window] or [points[0].rate])
    last = statistics.median([point.rate for point in points if point.t_s > end - window])
    return Sustain(
        name=f"matmul {dtype}",
        unit="TFLOPS",
        seconds=end,
        first=first,
        last=last,
        change=last / first - 1,
        throttled=bool(bits & SLOWED),
        power_limited=bool(bits & POWER_CAP),
        reasons=throttle_words(bits),
        points=tuple(points),
        energy_joules=energy(points, before, after),
        unknown={
            field.name: reading.describe()
            for field in dataclasses.fields(after)
            if not (reading := getattr(after, field.name)).known
        },
    )


def energy(points: list[SustainPoint], before: Sensed, after: Sensed) -> float | None:
    """Return the joules of a run: from the device's counter, else by integrating its power; None without either."""
    if before.energy_joules.value is not None and after.energy_joules.value is not None:
        return after.energy_joules.value - before.energy_joules.value
    total, start = 0.0, 0.0
    for point in points:
        if point.power_watts is None:
            return None
        total, start = total + point.power_watts * (point.t_s - start), point.t_s
    return total
