"""Disk, memory, sustained run, extrapolation and session, each on its own and without waiting."""

import os
import statistics

import pytest
import torch

from edgefed.bench.capacity import BLOCK, DiskTest, cached_share, drop_cache, verify_memory
from edgefed.bench.compute import Stopwatch
from edgefed.bench.report import SustainPoint
from edgefed.bench.speed import Session, judge_contention
from edgefed.bench.statistics import Entry, Sampling
from edgefed.bench.sustain import Sensed, energy, summarise_sustained
from edgefed.bench.training_step import extrapolate
from edgefed.disk import filesystem
from edgefed.hardware.facts import Reading, Reason
from edgefed.hardware.sampling import read_waited_s
from edgefed.kernels.out_of_memory import is_out_of_memory
from edgefed.progress import NullProgress

MIB = 2**20
SHORT = Sampling(repeats=3, limit_s=0.5)


# --- disk ---------------------------------------------------------------------------------------------------------


def test_the_disk_test_leaves_nothing_behind_and_counts_what_it_moved(tmp_path):
    with DiskTest(tmp_path, 4 * BLOCK) as disk:
        assert disk.size == 4 * BLOCK
        assert not disk.refused
        assert disk.write(SHORT).median > 0
        assert not list(tmp_path.iterdir())  # without a name: nothing stays even if the process is killed here
        entry = disk.read("disk expert read", 3 * MIB, True, SHORT)
    assert entry.median > 0
    assert entry.params["block_bytes"] == 3 * MIB
    assert entry.params["reads_per_sample"] == 5
    assert "cache" in entry.note or "tmpfs" in entry.note
    assert not list(tmp_path.iterdir())


def test_a_nearly_full_disk_is_not_tested(tmp_path, monkeypatch):
    class Usage:
        free = 2**30 + 3 * BLOCK

    monkeypatch.setattr("edgefed.bench.capacity.shutil.disk_usage", lambda folder: Usage)
    with DiskTest(tmp_path, 64 * MIB) as disk:
        assert "1036 MiB free, 1024 must stay free" in disk.refused


def test_a_read_before_a_write_fails(tmp_path):
    with DiskTest(tmp_path, 4 * BLOCK) as disk, pytest.raises(OSError, match="nothing was written"):
        disk.read("disk read", BLOCK, False, SHORT)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the kernel does not report what it has cached")
def test_the_page_cache_is_checked_after_it_is_dropped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB))
    with path.open("rb", buffering=0) as file:
        file.read()
        before = cached_share(file.fileno(), 8 * MIB)
        os.fsync(file.fileno())
        drop_cache(file.fileno())
        after = cached_share(file.fileno(), 8 * MIB)
    if before is None:
        pytest.skip("this filesystem does not report it")
    assert before == 1.0
    assert after <= before


def test_the_filesystem_is_that_of_the_deepest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    deep = tmp_path / "a b" / "c"
    deep.mkdir(parents=True)
    place = str(tmp_path / "a b").replace(" ", "\\040")
    mounts.write_text(f"/dev/x / ext4 rw 0 0\ntmpfs {place} tmpfs rw 0 0\nbroken\n")
    assert filesystem(deep, mounts) == "tmpfs"
    assert filesystem(tmp_path, mounts) == "ext4"
    assert filesystem(tmp_path, tmp_path / "none") == ""


# --- memory -------------------------------------------------------------------------------------------------------


def verify(asked, room, **more):
    return verify_memory(Stopwatch("cpu"), asked, room, is_out_of_memory, step_bytes=MIB, **more)


def test_the_requested_memory_is_allocated():
    seen = []
    check = verify(5 * MIB + 1, lambda: 2**40, on_bytes=seen.append)
    assert check.complete
    assert check.verified_bytes == sum(seen) == 5 * MIB + 1
    assert not check.stopped
    assert check.largest_block_bytes == check.verified_bytes
    assert check.last_speed_share > 0


def test_it_stops_at_the_reserve_and_checks_before_every_step():
    rooms = iter([10 * MIB, 5 * MIB, MIB - 1])
    check = verify(8 * MIB, lambda: next(rooms))
    assert check.verified_bytes == 2 * MIB
    assert not check.complete
    assert "above the system's reserve" in check.stopped


def test_without_a_sensor_nothing_is_allocated():
    check = verify(8 * MIB, lambda: None)
    assert check.verified_bytes == 0
    assert "free memory is unknown" in check.stopped
    assert check.largest_block_bytes is None


def test_running_out_of_memory_is_a_result_and_other_errors_are_not(monkeypatch):
    real, calls = torch.empty, []

    def failing(*size, **more):
        calls.append(size)
        if len(calls) == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 256.00 MiB")
        return real(*size, **more)

    monkeypatch.setattr(torch, "empty", failing)
    check = verify(8 * MIB, lambda: 2**40)
    assert check.out_of_memory
    assert check.verified_bytes == 3 * MIB
    assert "out of memory after" in check.stopped

    def broken(*size, **more):
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "empty", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        verify(8 * MIB, lambda: 2**40)


# --- sustained ----------------------------------------------------------------------------------------------------


def sensed(bits=0, energy_joules=None):
    absent = Reading.missing(Reason.ABSENT, "nothing")
    counted = absent if energy_joules is None else Reading.of(energy_joules, "NVML")
    return Sensed(absent, absent, absent, Reading.of(bits, "NVML"), counted)


def points(rates, power=None):
    return [SustainPoint(t_s=float(i + 1), rate=rate, power_watts=power) for i, rate in enumerate(rates)]


def test_first_and_last_five_seconds_are_compared():
    run = summarise_sustained(
        "float32", points([10, 10, 11, 10, 10, 7, 7, 5, 5, 5, 4, 5]), 0x40 | 0x4, sensed(), sensed()
    )
    assert (run.first, run.last) == (10, 5)
    assert run.change == pytest.approx(-0.5)
    assert run.throttled
    assert run.power_limited
    assert len(run.reasons) == 2
    assert "clock_mhz" in run.unknown
    assert "throttle" not in run.unknown


def test_the_power_limit_and_an_idle_bit_do_not_count_as_throttling():
    run = summarise_sustained("float32", points([1, 1, 1]), 0x4 | 0x1, sensed(), sensed())
    assert not run.throttled
    assert run.power_limited


def test_energy_is_counted_by_the_device_or_integrated_from_power():
    assert energy(points([1, 1]), sensed(0, 100.0), sensed(0, 160.0)) == 60.0
    assert energy(points([1, 1], power=30.0), sensed(), sensed()) == 60.0
    assert energy(points([1, 1]), sensed(), sensed()) is None


# --- training step ------------------------------------------------------------------------------------------------


def test_layers_are_extrapolated_from_two_depths():
    """1 s of everything else and 2 s a layer: 16 layers take 33 s."""
    assert extrapolate({1: [3.0, 3.0, 3.0], 2: [5.0, 5.0, 5.0]}, 16) == [33.0, 33.0, 33.0]
    assert extrapolate({4: [7.0]}, 4) == [7.0]
    assert extrapolate({1: [3.0], 2: [2.9]}, 10) == [pytest.approx(2.9 + 8 * 1.45)]  # noise, not a negative cost


def test_extrapolation_shows_the_noise():
    spread = statistics.pstdev(extrapolate({1: [3.0], 2: [4.9, 5.0, 5.1]}, 16))
    assert spread > 10 * statistics.pstdev([4.9, 5.0, 5.1])


# --- session ------------------------------------------------------------------------------------------------------


def make_session():
    released = []
    return Session(NullProgress(), lambda: released.append(1)), released


def fail(error):
    def work():
        raise error

    return work


def test_a_failure_becomes_an_entry_and_the_next_test_runs():
    session, released = make_session()
    session.measure("a", "s", fail(RuntimeError("CUDA out of memory. Tried\nmore")))
    session.measure("b", "s", fail(PermissionError(13, "Permission denied", "/x")))
    session.measure("c", "s", lambda: Entry.of("c", "s", [1.0]))
    assert [entry.verdict for entry in session.entries] == ["failed", "failed", "unusable"]
    assert session.entries[0].reason.startswith("out of memory: ")
    assert "\n" not in session.entries[0].reason
    assert "Permission denied" in session.entries[1].reason
    assert len(released) == 2


def test_a_lost_gpu_skips_only_the_tests_that_need_it():
    session, _ = make_session()
    session.measure("a", "s", fail(RuntimeError("CUDA error: unspecified launch failure")))
    session.measure("b", "s", lambda: pytest.fail("the GPU is gone"))
    session.measure("c", "s", lambda: Entry.of("c", "s", [1.0]), on_device=False)
    assert [entry.verdict for entry in session.entries] == ["failed", "skipped", "unusable"]
    assert "stopped responding" in session.entries[1].reason
    assert session.warnings


def test_ctrl_c_is_recorded_and_raised_again():
    session, _ = make_session()
    with pytest.raises(KeyboardInterrupt):
        session.measure("a", "s", fail(KeyboardInterrupt()))
    assert session.entries[0].verdict == "interrupted"


def test_a_failed_part_without_entries_is_a_warning():
    session, _ = make_session()
    assert session.attempt("memory", fail(ValueError("odd"))) is None
    assert session.warnings == ["memory: ValueError: odd"]


@pytest.mark.parametrize(
    ("waited_s", "verdict", "reason"),
    [(0.0, "stable", ""), (0.4, "stable", ""), (0.6, "noisy", "waited 6% for a CPU"), (3.0, "unusable", "waited 30%")],
)
def test_a_test_that_waited_for_a_cpu_is_not_stable(waited_s, verdict, reason):
    entry = Entry.of("copy", "GB/s", [10.0] * 7)
    judged = judge_contention(entry, Reading.of(5.0, "x"), Reading.of(5.0 + waited_s, "x"), seconds=10.0)
    assert judged.verdict == verdict
    assert judged.reason.startswith(reason)


def test_without_the_kernels_accounting_only_the_spread_counts():
    entry, unknown = Entry.of("copy", "GB/s", [10.0] * 7), Reading.missing(Reason.NOT_SUPPORTED, "x")
    assert judge_contention(entry, unknown, Reading.of(9.0, "x"), 1.0) is entry
    skipped = Entry.skipped("copy", "GB/s", "no GPU")
    assert judge_contention(skipped, Reading.of(0.0, "x"), Reading.of(9.0, "x"), 1.0) is skipped


def test_the_kernels_accounting_of_waiting_is_read(tmp_path):
    for thread, text in (("1", "100 2000000000 3"), ("2", "7 500000000 1"), ("3", "garbage")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(text)
    assert read_waited_s(tmp_path).value == 2.5
    assert read_waited_s(tmp_path / "none").reason is Reason.ABSENT
    (tmp_path / "empty").mkdir()
    assert read_waited_s(tmp_path / "empty").reason is Reason.NOT_SUPPORTED
