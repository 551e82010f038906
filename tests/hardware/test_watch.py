"""The guard of memory while a model trains: the rule by hand, the thread with fake sensors and with fake files."""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest

from edgefed.hardware.facts import MemoryKind, Reading, Reason
from edgefed.hardware.watch import (
    CGROUP_FLOOR_BYTES,
    LEAST_RESERVE_BYTES,
    PressureWatch,
    WatchLimits,
    find_event,
    find_pressure,
)

GIB = 2**30
LIMITS = {
    kind: WatchLimits.of(kind, 32 * GIB, 24 * GIB, None) for kind in MemoryKind
}  # reserve 3.2 GiB, headroom 0.96 GiB
NAMES = (
    "available_bytes", "cgroup_room_bytes", "gpu_free_bytes", "own_gpu_bytes", "own_rss_bytes", "swapped_out_pages",
    "process_bytes_sum", "throttle_reasons", "temperature_celsius",
)  # fmt: skip
HEALTHY = {"available_bytes": 20 * GIB, "gpu_free_bytes": 8 * GIB, "own_rss_bytes": GIB, "swapped_out_pages": 5,
           "process_bytes_sum": 10 * GIB, "throttle_reasons": 0, "temperature_celsius": 60.0}  # fmt: skip


def sample(**values):
    """A sample where everything is healthy but ``values``; None: the reading is missing."""
    found = {**dict.fromkeys(NAMES), **HEALTHY, **values}
    return SimpleNamespace(
        time_s=0.0,
        **{
            name: Reading.missing(Reason.ABSENT, "test") if value is None else Reading.of(value, "test")
            for name, value in found.items()
        },
    )


def rule_of(limits, *samples):
    found = find_pressure(samples, limits)
    return found.rule if found else None


def test_limits_are_those_of_the_budget():
    limits = LIMITS[MemoryKind.DISCRETE]
    assert limits.host_reserve_bytes == int(3.2 * GIB)
    assert limits.headroom_bytes == int(0.04 * 24 * GIB)
    small = WatchLimits.of(MemoryKind.CPU, None, None, None)
    assert small.host_reserve_bytes == GIB
    assert small.headroom_bytes == GIB // 2
    assert limits.with_reserve_at_most(GIB).host_reserve_bytes == GIB
    assert limits.with_reserve_at_most(-5).host_reserve_bytes == LEAST_RESERVE_BYTES
    assert limits.with_reserve_at_most(9 * GIB) == limits


@pytest.mark.parametrize("kind", MemoryKind)
def test_a_healthy_machine_and_an_unknown_one_are_left_alone(kind):
    assert rule_of(LIMITS[kind], sample(), sample(), sample()) is None
    unknown = sample(**dict.fromkeys(NAMES))
    assert rule_of(LIMITS[kind], unknown, unknown, unknown) is None
    assert find_pressure([], LIMITS[kind]) is None


@pytest.mark.parametrize("kind", MemoryKind)
def test_half_the_reserve_is_the_border(kind):
    border = LIMITS[kind].host_reserve_bytes // 2
    assert rule_of(LIMITS[kind], sample(available_bytes=border)) is None
    assert rule_of(LIMITS[kind], sample(available_bytes=border - 1)) == "available"


def test_swapping_counts_when_it_goes_on_not_when_it_happened():
    unified, cpu = LIMITS[MemoryKind.UNIFIED], LIMITS[MemoryKind.CPU]
    rising = [sample(swapped_out_pages=pages) for pages in (5, 6, 9)]
    assert rule_of(unified, *rising) == "swapping"
    assert rule_of(unified, *rising[:2]) is None
    assert rule_of(unified, *[sample(swapped_out_pages=pages) for pages in (5, 6, 6)]) is None
    assert rule_of(unified, *[sample(swapped_out_pages=pages) for pages in (5, 900, 901, 901)]) is None
    # A host with plenty of room moves idle pages away, and that is no pressure; with little room it is.
    assert rule_of(cpu, *rising) is None
    tight = [sample(swapped_out_pages=pages, available_bytes=3 * GIB) for pages in (5, 6, 9)]
    assert rule_of(cpu, *tight) == "swapping"
    blind = [sample(swapped_out_pages=pages, available_bytes=None) for pages in (5, 6, 9)]
    assert rule_of(cpu, *blind) == "swapping"


def test_gpu_pages_that_no_process_shows_count_on_unified_memory_only():
    full = sample(process_bytes_sum=int(0.94 * 32 * GIB))
    assert rule_of(LIMITS[MemoryKind.UNIFIED], full) == "processes"
    assert rule_of(LIMITS[MemoryKind.UNIFIED], sample(process_bytes_sum=int(0.92 * 32 * GIB))) is None
    assert rule_of(LIMITS[MemoryKind.DISCRETE], full) is None
    assert rule_of(dataclasses.replace(LIMITS[MemoryKind.UNIFIED], memory_total_bytes=None), full) is None


def test_a_gpu_that_fills_up_counts_on_discrete_memory_only():
    full = sample(gpu_free_bytes=int(0.04 * 24 * GIB) // 2 - 1)
    assert rule_of(LIMITS[MemoryKind.DISCRETE], full) == "gpu"
    assert rule_of(LIMITS[MemoryKind.UNIFIED], full) is None  # NVML's memory means nothing there
    assert rule_of(LIMITS[MemoryKind.CPU], full) is None


def test_a_container_and_the_owners_limit():
    limits = LIMITS[MemoryKind.CPU]
    assert rule_of(limits, sample(cgroup_room_bytes=CGROUP_FLOOR_BYTES - 1)) == "cgroup"
    assert rule_of(limits, sample(cgroup_room_bytes=CGROUP_FLOOR_BYTES)) is None
    own = dataclasses.replace(limits, own_limit_bytes=2 * GIB)
    assert rule_of(own, sample(own_rss_bytes=2 * GIB)) is None
    found = find_pressure([sample(own_rss_bytes=2 * GIB + 2**27)], own)
    assert found.rule == "own"
    assert "2.1 GiB" in found.sentence
    assert "2.0 GiB" in found.sentence


@pytest.mark.parametrize(
    ("kind", "reading", "missing"),
    [
        (MemoryKind.CPU, {"own_rss_bytes": 2 * GIB + 5}, 5),
        (MemoryKind.CPU, {"cgroup_room_bytes": CGROUP_FLOOR_BYTES - 7}, 7),
        (MemoryKind.CPU, {"available_bytes": LIMITS[MemoryKind.CPU].host_reserve_bytes // 2 - 9}, 9),
        (MemoryKind.DISCRETE, {"gpu_free_bytes": LIMITS[MemoryKind.DISCRETE].headroom_bytes // 2 - 11}, 11),
    ],
)
def test_pressure_says_how_much_is_missing(kind, reading, missing):
    limits = dataclasses.replace(LIMITS[kind], own_limit_bytes=2 * GIB)
    assert find_pressure([sample(**reading)], limits).missing_bytes == missing


def test_only_the_newest_sample_counts():
    assert rule_of(LIMITS[MemoryKind.CPU], sample(available_bytes=1), sample()) is None


def test_events_are_lost_and_sick_gpus_not_a_power_limit():
    assert find_event(sample()) is None
    assert find_event(sample(throttle_reasons=0x4)) is None  # how a card at its power limit always runs
    name, sentence = find_event(sample(throttle_reasons=0x4 | 0x20, temperature_celsius=91.0))
    assert name == "throttled"
    assert "91 °C" in sentence
    assert "software thermal limit" in sentence
    lost = sample()
    lost.gpu_free_bytes = Reading.missing(Reason.LOST, "NVML memory v2", "GPU is lost")
    name, sentence = find_event(lost)
    assert name == "lost"
    assert "NVML memory v2" in sentence


class FakeSensors:
    """Returns what ``now`` is; raises it when it is an exception."""

    def __init__(self, now):
        self.now = now
        self.asked = threading.Event()
        self.times = []

    def sample(self):
        self.times.append(time.monotonic())
        self.asked.set()
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.005)


def test_the_thread_follows_the_sensors_and_forgets_on_request():
    sensors = FakeSensors(sample())
    with PressureWatch(sensors, LIMITS[MemoryKind.CPU], interval_s=0.01) as watch:
        wait_until(lambda: watch.num_samples >= 2)
        assert watch.pressure() is None
        sensors.now = sample(available_bytes=GIB)
        wait_until(watch.pressure)
        assert watch.pressure().rule == "available"
        sensors.now = sample()
        wait_until(lambda: watch.pressure() is None)
        sensors.now = sample(available_bytes=GIB)
        wait_until(watch.pressure)
        sensors.now = RuntimeError("a sensor fails")
        asked = watch.num_samples
        wait_until(lambda: watch.num_samples > asked + 1)
        watch.relieve()
        assert watch.pressure() is None
    asked = watch.num_samples
    time.sleep(0.05)
    assert watch.num_samples == asked  # the thread is gone


def test_the_most_that_this_process_held_above_its_limit_counts_until_relief():
    """Between two steps, when the guard asks, a step's gradients are gone."""
    limits = dataclasses.replace(LIMITS[MemoryKind.CPU], own_limit_bytes=2 * GIB)
    sensors = FakeSensors(sample())
    watch = PressureWatch(sensors, limits)
    for own in (2 * GIB + 5, 2 * GIB + 50, 2 * GIB + 20, GIB):
        sensors.now = sample(own_rss_bytes=own)
        watch.look()
    assert watch.pressure().missing_bytes == 50
    watch.relieve()
    assert watch.pressure() is None
    assert watch.look() is None


def test_a_sample_from_before_relief_says_nothing_after_it():
    """The thread may be inside a slow sensor while the plan shrinks; what it then brings is of the plan before."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow:
        def sample(self):
            entered.set()
            assert go_on.wait(10)
            return sample(available_bytes=1)

    watch = PressureWatch(Slow(), LIMITS[MemoryKind.CPU])
    thread = threading.Thread(target=watch.look)
    thread.start()
    assert entered.wait(10)
    watch.relieve()
    go_on.set()
    thread.join(10)
    assert watch.pressure() is None
    watch.look()
    assert watch.pressure().rule == "available"


def test_it_samples_at_most_twice_a_second_by_default():
    sensors = FakeSensors(sample())
    with PressureWatch(sensors, LIMITS[MemoryKind.CPU]):
        wait_until(lambda: len(sensors.times) >= 3)
    assert min(b - a for a, b in zip(sensors.times, sensors.times[1:], strict=False)) >= 0.45


def test_an_event_is_reported_once_until_it_is_over():
    events, sensors = [], FakeSensors(sample(throttle_reasons=0x40))
    watch = PressureWatch(sensors, LIMITS[MemoryKind.DISCRETE], on_event=lambda name, sentence: events.append(name))
    for _ in range(3):
        watch.look()
    assert events == ["throttled"]
    assert not watch.lost()
    sensors.now = sample()
    watch.look()
    sensors.now = sample(throttle_reasons=0x40)
    watch.look()
    assert events == ["throttled", "throttled"]
    sensors.now = sample()
    sensors.now.gpu_free_bytes = Reading.missing(Reason.LOST, "NVML memory v2")
    watch.look()
    watch.look()
    assert events[2:] == ["lost"]
    assert "NVML memory v2" in watch.lost()


def test_with_real_sensors_over_fake_files(tmp_path):
    probe = pytest.importorskip("edgefed.hardware.probe")
    from edgefed.hardware.sampling import MemorySensors

    proc = tmp_path / "proc"
    proc.mkdir()

    def write(available_kb, swapped):
        (proc / "meminfo").write_text(
            f"MemTotal: 8000000 kB\nMemAvailable: {available_kb} kB\nAnonPages: 5 kB\nMapped: 5 kB\n"
        )
        (proc / "vmstat").write_text(f"pswpin 0\npswpout {swapped}\n")

    write(6_000_000, 0)
    facts = probe.probe_device("cpu", root=tmp_path, ask_torch=False)
    limits = WatchLimits.of(MemoryKind.UNIFIED, facts.host.memory_total_bytes.value, None, None)
    watch = PressureWatch(MemorySensors(facts, root=tmp_path), limits)
    assert watch.look() is None
    write(400_000, 0)
    assert watch.look().rule == "available"
    for pages in (0, 10, 20):
        write(6_000_000, pages)
        found = watch.look()
    assert found.rule == "swapping"
    assert "20 pages" in found.sentence
    (proc / "meminfo").unlink()
    (proc / "vmstat").write_bytes(b"\xff\xfe garbage")
    assert watch.look() is None
