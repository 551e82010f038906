"""Samples for a running training: the same numbers as a probe, taken again and again."""

import os
import threading

import pytest
from edgefed_fake_machine import ORIN

from edgefed.hardware.facts import Reason
from edgefed.hardware.probe import MemorySensors

KIB = 1024


def test_a_sample_of_a_card(machine):
    own = os.getpid()
    machine.driver("rtx4090", f"0.Compute = {own}:5000 77:100", "0.Reasons = 0x20")
    sample = machine.sensors(machine.probe()).sample()
    assert sample.available_bytes.value == 24576000 * KIB
    assert sample.swapped_out_pages.value == 40
    assert sample.gpu_free_bytes.value == 25757220864 - 420478976 - 1610612736
    assert sample.own_gpu_bytes.value == 5000
    assert sample.process_bytes_sum.value == (4096000 + 1024000) * KIB + 5000 + 100 + 612368384
    assert (sample.throttle_reasons.value, sample.temperature_celsius.value) == (0x20, 47)
    assert sample.own_rss_bytes.value > 2**20
    assert sample.cgroup_room_bytes.reason is Reason.ABSENT


def test_samples_follow_the_machine(machine):
    machine.driver("rtx4090")
    sensors = machine.sensors(machine.probe())
    first = sensors.sample()
    machine.say("rtx4090", "0.Memory = 25757220864 0 24000000000")
    machine.files({"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 10 kB\n", "/proc/vmstat": "pswpout 41\n"})
    machine.files({"/sys/fs/cgroup/memory.max": "1000", "/sys/fs/cgroup/memory.current": "400"})
    second = sensors.sample()
    assert second.gpu_free_bytes.value == 25757220864 - 24000000000 < first.gpu_free_bytes.value
    assert second.available_bytes.value == 10 * KIB
    assert second.cgroup_room_bytes.value == 600
    assert second.swapped_out_pages.value - first.swapped_out_pages.value == 1
    assert second.time_s >= first.time_s
    assert second.process_bytes_sum.reason is Reason.FAILED  # no AnonPages line: unknown, not small


def test_a_sample_of_a_mig_instance_is_the_instances(machine):
    machine.driver("h200_mig")
    sensors = machine.sensors(machine.probe("MIG-0b1c2d3e-1111-5aaa-8bbb-000000000001"))
    assert sensors.sample().gpu_free_bytes.value == 17045651456 - 13107200
    machine.say("h200_mig", "generation = 2", "0/0.Memory = 17045651456 0 0")  # cut anew: our handle is void
    sensors.sample()
    assert sensors.sample().gpu_free_bytes.value == 17045651456  # by its new handle


def test_a_sample_of_a_shared_chip_sums_what_memavailable_does_not_see(machine):
    machine.driver("gb10")
    sample = machine.sensors(machine.probe()).sample()
    assert sample.gpu_free_bytes.reason is Reason.NOT_SUPPORTED
    assert sample.process_bytes_sum.value == (4096000 + 1024000) * KIB + 741326848
    machine.say("gb10", "0.Compute = 77:-1")
    assert machine.sensors(machine.probe()).sample().process_bytes_sum.reason is Reason.NOT_SUPPORTED


FORK = """
import os
from edgefed.hardware.probe import MemorySensors, probe_device
sensors = MemorySensors(probe_device(ask_torch=False))
assert sensors.sample().gpu_free_bytes.known
child = os.fork()
if child == 0:
    os._exit(0 if sensors.sample().gpu_free_bytes.known else 3)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_sensors_work_on_in_a_forked_child(machine):
    machine.say("rtx4090")
    result = machine.run("-c", FORK)
    assert result.returncode == 0, result.stderr


def test_a_jetson_without_nvml_has_its_zones_temperature(plain_machine):
    plain_machine.files(ORIN)
    sensors = plain_machine.sensors(plain_machine.probe())
    assert sensors.sample().temperature_celsius.value == 49.312
    plain_machine.files({"/sys/class/thermal/thermal_zone2/temp": "95000\n"})
    assert sensors.sample().temperature_celsius.value == 95
    plain_machine.files({"/sys/class/thermal/thermal_zone2/temp": "hot\n"})
    assert sensors.sample().temperature_celsius.reason is Reason.FAILED
    plain_machine.files({"/sys/class/thermal/thermal_zone2/temp": "-256000\n"})
    assert sensors.sample().temperature_celsius.reason is Reason.IMPLAUSIBLE  # switched off, not cold
    sample = sensors.sample()
    assert sample.gpu_free_bytes.reason is Reason.ABSENT
    assert sample.process_bytes_sum.value == (4096000 + 1024000) * KIB


def test_a_host_without_a_gpu(plain_machine):
    sample = plain_machine.sensors(plain_machine.probe()).sample()
    assert sample.available_bytes.known
    assert sample.own_gpu_bytes.reason is Reason.ABSENT


def test_samples_while_another_thread_probes(machine):
    machine.driver("rtx4090")
    facts = machine.probe()
    sensors, missing = machine.sensors(facts), []

    def watch():
        for _ in range(50):
            sample = sensors.sample()
            missing.extend(r for r in (sample.gpu_free_bytes, sample.own_gpu_bytes) if not r.known)

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(10):
        assert machine.probe().gpu is not None
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert not missing


def test_sensors_find_this_machine_by_themselves(tmp_path, monkeypatch):
    from edgefed.hardware.probe import probe_device

    facts = probe_device("cpu", ask_torch=False)
    assert MemorySensors(facts).sample().available_bytes.value > 0
    monkeypatch.setenv("EDGEFED_SYSROOT", str(tmp_path))
    assert MemorySensors(facts).sample().available_bytes.reason is Reason.ABSENT
