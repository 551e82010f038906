"""Watch memory while a model trains, and report when it gets tight.

    watch = PressureWatch(sensors, limits)      # a thread that samples at most twice a second
    with watch:
        for step in ...:
            ...
            if pressure := watch.pressure():    # one attribute read: no lock, no system call
                shrink(pressure.sentence)

What is tight is decided by `find_pressure`, a pure function of the last samples; the thread only asks the sensors.
MemAvailable alone is not enough on unified memory: GPU pages are in neither RSS nor cgroup, and the kernel may report
room while the driver is out of it. So swapping and the sum of all processes' GPU memory are looked at as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from edgefed.hardware.facts import MemoryKind, Reason
from edgefed.hardware.memory import GIB, format_bytes
from edgefed.hardware.nvml import SLOWED, throttle_words
from edgefed.hardware.policy import DEFAULT_POLICY

INTERVAL_S = 0.5
"""Two samples a second: memory on a GB10 was seen to collapse from 29 to 2.5 GiB in 9 s, so one a second is too few,
and more would cost time."""

UNIFIED_CEILING = 0.93
"""Share of MemTotal that all processes together may hold on the GPU of a unified device."""

CGROUP_FLOOR_BYTES = 64 * 2**20
"""Room under a container's limit below which the kernel is about to kill the process."""

LEAST_RESERVE_BYTES = 256 * 2**20
"""The least reserve, whatever the owner's limit: below half of it Linux machines become unstable."""


class Sensors(Protocol):
    """The cheap sensors of a device."""

    def sample(self) -> Any:
        """Now: an `edgefed.hardware.sampling.MemorySample`, or anything with some of its readings."""
        ...


@dataclasses.dataclass(frozen=True)
class WatchLimits:
    """What the rule compares with. Bytes; None where it does not apply.

    ``host_reserve_bytes`` and ``headroom_bytes`` are those of the budget policy; the guard acts at half of them, so a
    plan that keeps to its budget never meets it. ``own_limit_bytes`` bounds this process: resident memory on a CPU.
    """

    kind: MemoryKind
    memory_total_bytes: int | None = None
    host_reserve_bytes: int = GIB
    headroom_bytes: int = GIB // 2
    own_limit_bytes: int | None = None

    @classmethod
    def of(
        cls, kind: MemoryKind, memory_total_bytes: int | None, gpu_total_bytes: int | None, own_limit_bytes: int | None
    ) -> WatchLimits:
        """Limits by the reserve and the headroom of the budget policy."""
        return cls(
            kind,
            memory_total_bytes,
            DEFAULT_POLICY.host_reserve_bytes(memory_total_bytes or 0),
            DEFAULT_POLICY.gpu_headroom_bytes(gpu_total_bytes or 0, desktop=False),
            own_limit_bytes,
        )

    def with_reserve_at_most(self, reserve_bytes: int) -> WatchLimits:
        """The same with a smaller reserve, but never below `LEAST_RESERVE_BYTES`."""
        reserve = min(self.host_reserve_bytes, max(LEAST_RESERVE_BYTES, reserve_bytes))
        return dataclasses.replace(self, host_reserve_bytes=reserve)


@dataclasses.dataclass(frozen=True)
class Pressure:
    """Memory is tight.

    ``rule`` is a short name for programs, ``sentence`` a message for the owner, ``missing_bytes`` how much has to be
    freed, 0 where that is unknown.
    """

    rule: str
    sentence: str
    missing_bytes: int = 0


def find_pressure(samples: Sequence[Any], limits: WatchLimits) -> Pressure | None:
    """The rule (pure): what is tight after ``samples``, oldest first; only the last three count.

    A reading that is missing says nothing: no pressure follows from it. In this order:

        own        this process's resident memory above own_limit_bytes
        cgroup     room under the container's limit below 64 MiB
        available  MemAvailable below half the host reserve               cpu, unified, and discrete (the host dies too)
        swapping   pswpout rose in each of the last two intervals         unified; else only with MemAvailable below the
                                                                          reserve, or unknown
        processes  GPU memory of all processes above 0.93 of MemTotal     unified
        gpu        free GPU memory below half the headroom                discrete
    """
    if not samples:
        return None
    last = samples[-1]
    own_bytes = _value(last, "own_rss_bytes")
    if limits.own_limit_bytes is not None and own_bytes is not None and own_bytes > limits.own_limit_bytes:
        return Pressure(
            "own",
            f"this process holds {format_bytes(own_bytes)}, its budget is {format_bytes(limits.own_limit_bytes)}",
            own_bytes - limits.own_limit_bytes,
        )
    room = _value(last, "cgroup_room_bytes")
    if room is not None and room < CGROUP_FLOOR_BYTES:
        sentence = f"only {format_bytes(room)} are left under the container's memory limit"
        return Pressure("cgroup", sentence, CGROUP_FLOOR_BYTES - room)
    available = _value(last, "available_bytes")
    if available is not None and available < limits.host_reserve_bytes / 2:
        return Pressure(
            "available",
            f"the machine has {format_bytes(available)} of memory left, "
            f"{format_bytes(limits.host_reserve_bytes / 2)} must stay free",
            limits.host_reserve_bytes // 2 - available,
        )
    # A healthy host moves idle pages to swap now and then; only where GPU pages share the pool does room mean nothing.
    if limits.kind is MemoryKind.UNIFIED or available is None or available < limits.host_reserve_bytes:
        pages = [_value(sample, "swapped_out_pages") for sample in samples[-3:]]
        if len(pages) == 3 and None not in pages and pages[0] < pages[1] < pages[2]:
            return Pressure("swapping", f"the machine is swapping: {pages[2] - pages[0]} pages in the last second")
    if limits.kind is MemoryKind.UNIFIED and limits.memory_total_bytes:
        used = _value(last, "process_bytes_sum")
        if used is not None and used > UNIFIED_CEILING * limits.memory_total_bytes:
            return Pressure(
                "processes",
                f"all processes hold {format_bytes(used)} of the {format_bytes(limits.memory_total_bytes)} "
                "that CPU and GPU share",
                used - int(UNIFIED_CEILING * limits.memory_total_bytes),
            )
    if limits.kind is MemoryKind.DISCRETE:
        free = _value(last, "gpu_free_bytes")
        if free is not None and free < limits.headroom_bytes / 2:
            sentence = f"the GPU has {format_bytes(free)} of memory left: another program uses it"
            return Pressure("gpu", sentence, limits.headroom_bytes // 2 - free)
    return None


def find_event(sample: Any) -> tuple[str, str] | None:
    """(name, sentence) of what the owner should know beside memory: a lost GPU, a throttled one. None: nothing."""
    readings = (getattr(sample, name, None) for name in ("gpu_free_bytes", "own_gpu_bytes", "throttle_reasons"))
    for reading in readings:
        if reading is not None and reading.reason is Reason.LOST:
            return "lost", f"the GPU stopped answering: {reading.describe()}"
    bits = _value(sample, "throttle_reasons")
    if bits is not None and bits & SLOWED:
        heat = _value(sample, "temperature_celsius")
        at = f" at {heat:.0f} °C" if heat is not None else ""
        return "throttled", f"the GPU is throttled{at} ({', '.join(throttle_words(bits & SLOWED))})"
    return None


def _value(sample: Any, name: str) -> Any:
    """The reading's value; None when it is missing or the sample has no such reading."""
    reading = getattr(sample, name, None)
    return None if reading is None else reading.value


class PressureWatch:
    """Samples in a daemon thread between `start` and `close`, at most every ``interval_s`` seconds.

    ``on_event`` is called from the thread, once for each kind of event until it is over:
    ``on_event("throttled", sentence)``. A sensor that raises is counted as missing: the watch never ends the training.
    """

    def __init__(
        self,
        sensors: Sensors,
        limits: WatchLimits,
        *,
        interval_s: float = INTERVAL_S,
        on_event: Callable[[str, str], None] = lambda name, sentence: None,
    ) -> None:
        self.limits = limits
        self.interval_s = max(interval_s, 0.01)
        self._sensors = sensors
        self.on_event = on_event
        self._samples: list[Any] = []
        self._pressure: Pressure | None = None
        self._overrun: Pressure | None = None
        self._lock = threading.Lock()
        self._event = ""
        self._lost = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_samples = 0
        self.seconds_sampling = 0.0

    def __enter__(self) -> PressureWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin, with nothing remembered of an earlier time."""
        self.close()
        self.relieve()
        self._event, self._lost = "", ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop,), name="edgefed-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join(timeout=5)

    def pressure(self) -> Pressure | None:
        """The current pressure, or None. Reads two attributes: cheap enough for every step.

        That this process was above its limit counts until `relieve`, as a step needs most memory in its middle: the
        sample with the most is returned.
        """
        return self._overrun or self._pressure

    def lost(self) -> str:
        """Why the GPU counts as lost; empty while it answers."""
        return self._lost

    def relieve(self) -> None:
        """Forget the samples so far, because memory was freed: only new samples count."""
        self._samples, self._pressure, self._overrun = [], None, None

    def look(self) -> Pressure | None:
        """Take one sample now and judge it. The thread does this, too."""
        with self._lock:
            return self._look()

    def _look(self) -> Pressure | None:
        started = time.perf_counter()
        samples = self._samples  # `relieve` puts another list there: a sample of before must not end up in it
        try:
            sample = self._sensors.sample()
        except Exception:  # whatever a sensor does, training goes on without it
            return self._pressure
        finally:
            self.num_samples += 1
            self.seconds_sampling += time.perf_counter() - started
        samples.append(sample)
        del samples[:-3]
        pressure = find_pressure(samples, self.limits)
        if samples is self._samples:
            self._pressure = pressure
            if pressure is not None and pressure.rule == "own":
                self._overrun = max(self._overrun or pressure, pressure, key=lambda each: each.missing_bytes)
        self._tell(find_event(sample))
        return self._pressure

    def _tell(self, event: tuple[str, str] | None) -> None:
        name, sentence = event or ("", "")
        if name == "lost":
            self._lost = sentence
        if name and name != self._event:
            with contextlib.suppress(Exception):
                self.on_event(name, sentence)
        self._event = name

    def _run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.look()
            stop.wait(self.interval_s)
