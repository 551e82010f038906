"""Every device that NVML can pretend to be: what kind it is, what it knows, and why it does not know the rest."""

import os

import pytest
from edgefed_fake_machine import ORIN, THOR, cuda_device, cuda_report

from edgefed.errors import ConfigError, DeviceNotFound
from edgefed.hardware import host_files
from edgefed.hardware.facts import MemoryKind, Reason
from edgefed.hardware.probe import probe_device

GIB = 2**30


def test_a_desktop_card(machine):
    machine.driver("rtx4090")
    facts = machine.probe()
    gpu = facts.gpu
    assert facts.kind is MemoryKind.DISCRETE
    assert facts.driver.available
    assert not facts.driver.problem
    assert (facts.driver.driver_version.value, facts.driver.cuda_driver_version.value) == ("580.95.05", "13.0")
    assert gpu.name.value == "NVIDIA GeForce RTX 4090"
    assert gpu.compute_capability.value == (8, 9)
    assert gpu.memory_total_bytes.value == 25757220864
    assert gpu.memory_free_bytes.value == 25757220864 - 420478976 - 1610612736
    assert gpu.own_bytes.value == 0
    assert [(p.pid, p.name.value, p.used_bytes.value) for p in gpu.processes.value] == [
        (4242, "python3", 734003200),
        (1871, "Xorg", 612368384),
    ]
    assert gpu.display_active.value is True
    assert gpu.utilization_percent.value == 3
    assert (gpu.sm_clock_mhz.value, gpu.sm_clock_max_mhz.value, gpu.memory_clock_mhz.value) == (2520, 3105, 10501)
    assert (gpu.power_watts.value, gpu.power_limit_watts.value, gpu.energy_joules.value) == (61.25, 450, 123456.789)
    assert gpu.temperature_celsius.value == 47
    assert gpu.throttle_reasons.value == 1
    assert (gpu.pcie_generation.value, gpu.pcie_width.value) == (4, 16)
    assert gpu.ecc.reason is gpu.mig_enabled.reason is Reason.NOT_SUPPORTED
    assert gpu.cuda_index is None
    assert not facts.trains_on_gpu


def test_an_old_driver_gives_the_same_through_the_older_calls(machine):
    machine.driver("rtx4090", old=True)
    gpu = machine.probe().gpu
    assert gpu.memory_free_bytes.value == 25757220864 - 420478976 - 1610612736
    assert gpu.memory_free_bytes.source == "NVML GetMemoryInfo"
    assert gpu.temperature_celsius.value == 47
    assert gpu.temperature_celsius.source == "NVML GetTemperature"
    assert gpu.throttle_reasons.value == 1
    assert "ThrottleReasons" in gpu.throttle_reasons.source
    assert len(gpu.processes.value) == 2


@pytest.mark.parametrize(
    ("name", "lines", "kind"),
    [
        ("gb10", (), MemoryKind.UNIFIED),
        ("gb10", ("0.Memory = 0 0 0",), MemoryKind.UNIFIED),  # success with a total of 0
        ("gb10", ("0.Name = !999", "0.Capability = !999"), MemoryKind.DISCRETE),  # no second sign is left
        ("thor", (), MemoryKind.UNIFIED),
        ("thor", ("0.Memory = 131841916928 0 1073741824",), MemoryKind.UNIFIED),  # a later driver tells the pool
        ("orin_jetpack6", (), MemoryKind.UNIFIED),
        ("gh200", (), MemoryKind.UNIFIED),
        ("rtx_spark", (), MemoryKind.UNIFIED),
        ("rtx4090", ("0.Memory = !3",), MemoryKind.DISCRETE),  # not supported is not shared
        ("rtx4090", ("0.Memory = !999",), MemoryKind.DISCRETE),
        ("rtx4090", ("0.Memory = 0 0 0",), MemoryKind.DISCRETE),
        ("wsl2", (), MemoryKind.DISCRETE),
    ],
)
def test_the_kind_of_memory(machine, name, lines, kind):
    machine.driver(name, *lines)
    facts = machine.probe()
    assert facts.kind is kind
    assert len(facts.evidence) >= 2
    memory = facts.gpu.memory_total_bytes
    assert memory.known or memory.source.startswith("NVML GetMemoryInfo")
    if kind is MemoryKind.DISCRETE and not memory.known:
        assert any("memory of this GPU is unknown" in note and "`memory`" in note for note in facts.notes)


def test_a_total_of_zero_is_not_a_size(machine):
    machine.driver("gb10", "0.Memory = 0 0 0")
    memory = machine.probe().gpu.memory_total_bytes
    assert memory.value is None
    assert memory.reason is Reason.IMPLAUSIBLE


def test_a_board_that_names_the_chip_is_a_second_sign(machine):
    machine.driver("gb10", "0.Name = !999", "0.Capability = !999")
    machine.files({"/sys/class/dmi/id/product_name": "NVIDIA_DGX_Spark\n"})
    facts = machine.probe()
    assert facts.kind is MemoryKind.UNIFIED
    assert any("NVIDIA_DGX_Spark" in sign for sign in facts.evidence)


def test_a_card_in_a_jetson_is_still_a_card(machine):
    machine.files(THOR)
    machine.driver("rtx4090", "0.Memory = !3")
    assert machine.probe().kind is MemoryKind.DISCRETE


def test_placeholders_are_missing_values(machine):
    ones = "4294967295"
    fields = ("Clock1", "MaxClock1", "Clock2", "Temperature", "PowerUsage", "EnforcedPowerLimit", "Utilization")
    machine.driver(
        "rtx4090",
        *(f"0.{field} = {ones}" for field in fields),
        "0.Name = N/A",
        "0.Energy = 18446744073709551615",
        "0.Reasons = 18446744073709551615",
        "0.Memory = 18446744073709551615 0 0",
        "0.PcieWidth = 0",
        "0.Capability = 0.0",
    )
    gpu = machine.probe().gpu
    for name in ("sm_clock_mhz", "sm_clock_max_mhz", "memory_clock_mhz", "temperature_celsius", "power_watts", "name",
                 "power_limit_watts", "utilization_percent", "energy_joules", "throttle_reasons", "memory_total_bytes",
                 "memory_free_bytes", "pcie_width", "compute_capability"):  # fmt: skip
        assert getattr(gpu, name).reason is Reason.IMPLAUSIBLE, name


def test_an_invalid_pcie_link_is_not_reported(machine):
    machine.driver("gb10")
    assert machine.probe().gpu.pcie_generation.reason is Reason.IMPLAUSIBLE
    machine.say("rtx4090", "0.BusType = 7")
    assert machine.probe().gpu.pcie_width.reason is Reason.NOT_SUPPORTED


def test_a_forbidden_field_leaves_the_others_readable(machine):
    machine.driver("rtx4090", "0.PowerUsage = !4", "0.Compute = !4", "0.UUID = !4", "0.Clock1 = !999", "0.Name = !17")
    facts = machine.probe()
    gpu = facts.gpu
    assert gpu.power_watts.reason is gpu.processes.reason is gpu.own_bytes.reason is Reason.NO_PERMISSION
    assert gpu.uuid.reason is Reason.NO_PERMISSION
    assert gpu.sm_clock_mhz.reason is gpu.name.reason is Reason.FAILED
    assert gpu.memory_total_bytes.known
    assert any("not visible to this user" in note for note in facts.notes)


def test_our_own_process_is_counted_once_and_kept_apart(machine):
    own = os.getpid()
    machine.driver("rtx4090", f"0.Compute = {own}:1000 7:5", f"0.Graphics = {own}:3000 7:9 8:-1")
    gpu = machine.probe().gpu
    assert gpu.own_bytes.value == 3000  # the larger of both lists, not their sum
    assert [(p.pid, p.used_bytes.value) for p in gpu.processes.value] == [(7, 9), (8, None)]
    assert gpu.processes.value[0].name.reason is not None


def test_in_a_container_with_numbers_of_its_own_nothing_is_known_of_our_share(machine, monkeypatch):
    spaces = ["pid:[4026531836]", "pid:[4026532210]"]  # the host's, a container's
    known = []
    for space in spaces:
        question = ("/proc/self/ns/pid", True, lambda space=space: space)
        monkeypatch.setitem(host_files._QUESTIONS, "pid_namespace", question)
        machine.driver("rtx4090")
        known.append(machine.probe().gpu.own_bytes.value)
        machine.say("rtx4090", f"0.Compute = {os.getpid()}:700")
        known.append(machine.probe().gpu.own_bytes.value)
    assert known == [0, 700, None, 700]


def test_wsl_has_processes_without_sizes(machine):
    machine.files({"/proc/version": "Linux version 6.6.87-microsoft-standard-WSL2 (root@x) #1 SMP\n"})
    machine.driver("wsl2", f"0.Compute = 77:-1 {os.getpid()}:-1")
    facts = machine.probe()
    assert facts.host.is_wsl
    assert facts.gpu.processes.value[0].used_bytes.reason is Reason.NOT_SUPPORTED
    assert facts.gpu.own_bytes.reason is Reason.NOT_SUPPORTED  # unknown, not 0
    assert any("WSL" in note for note in facts.notes)


def test_mig_instances_are_devices_and_the_whole_card_is_none(machine):
    machine.driver("h200_mig")
    facts = machine.probe()
    assert [(gpu.is_mig, gpu.nvml_index, gpu.mig_index) for gpu in facts.gpus] == [
        (False, 0, None),
        (True, 0, 0),
        (True, 0, 2),
        (True, 0, 5),
    ]
    assert facts.gpus[0].memory_total_bytes.reason is Reason.NO_PERMISSION
    gpu = facts.gpu
    assert gpu.mig_index == 2
    assert gpu.memory_total_bytes.value == 75161927680
    assert gpu.compute_capability.value == (9, 0)
    assert "whole GPU" in gpu.compute_capability.source
    assert (gpu.temperature_celsius.value, gpu.power_watts.value, gpu.ecc.value) == (52, 210, True)
    assert facts.kind is MemoryKind.DISCRETE
    assert any("MIG mode: its 3 instance(s)" in note for note in facts.notes)
    assert machine.probe("mig-0b1c2d3e-3333-5aaa-8bbb-000000000003").gpu.mig_index == 5
    assert machine.probe("cuda:1").gpu.mig_index == 2  # torch has no CUDA here: numbered as they are listed


def test_instances_are_found_though_the_driver_does_not_count_them(machine):
    machine.driver("h200_mig", "0.MaxMigDeviceCount = !999")
    assert [gpu.mig_index for gpu in machine.probe().gpus] == [None, 0, 2, 5]


def test_mig_without_an_instance_leaves_the_cpu(machine):
    machine.driver("", "count = 1", "0.Name = NVIDIA A100-SXM4-40GB", "0.MigMode = 1", "0.Memory = !4")
    facts = machine.probe()
    assert facts.kind is MemoryKind.CPU
    assert facts.gpu is None
    assert len(facts.gpus) == 1
    assert any("no instance" in note and "nvidia-smi mig" in note for note in facts.notes)


def test_the_best_of_several_and_any_by_name(machine):
    machine.driver("two_gpus")
    facts = machine.probe()
    assert facts.gpu.name.value == "NVIDIA GeForce RTX 3090"
    assert len(facts.gpus) == 2
    assert any("`device`" in note for note in facts.notes)
    assert machine.probe("cuda:0").gpu.name.value == "NVIDIA GeForce GTX 1660 Ti"
    assert machine.probe("GPU-11111111-2222").gpu.nvml_index == 0
    assert machine.probe("GPU-aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeee3090").gpu.nvml_index == 1
    cpu = machine.probe("cpu")
    assert cpu.kind is MemoryKind.CPU
    assert cpu.gpu is None
    assert len(cpu.gpus) == 2
    for wanted in ("cuda:2", "GPU-deadbeef", "gpu-", "tpu", "cuda:-1", "cuda:99999999999"):
        with pytest.raises(DeviceNotFound, match="RTX 3090"):
            machine.probe(wanted)


def test_a_lost_card_is_left_for_one_that_answers(machine):
    machine.driver("two_gpus", "1.lost = 1")
    facts = machine.probe()
    assert facts.gpu.nvml_index == 0
    assert facts.gpus[1].memory_total_bytes.reason is Reason.LOST
    assert any("does not respond any more" in note and "dmesg" in note for note in facts.notes)


def test_a_card_that_is_lost_and_comes_back_while_we_run(machine):
    machine.driver("rtx4090")
    facts = machine.probe()
    sensors = machine.sensors(facts)
    assert sensors.sample().gpu_free_bytes.known
    machine.say("rtx4090", "0.lost = 1")
    sample = sensors.sample()
    assert {sample.gpu_free_bytes.reason, sample.own_gpu_bytes.reason, sample.temperature_celsius.reason} == {
        Reason.LOST
    }
    assert machine.probe().gpu.memory_free_bytes.reason is Reason.LOST
    machine.say("rtx4090", "0.Memory = 25757220864 420478976 20000000000")
    assert sensors.sample().gpu_free_bytes.value == 25757220864 - 420478976 - 20000000000
    assert machine.probe().gpu.memory_free_bytes.known


def test_a_probe_never_uses_the_handles_of_an_earlier_one(machine):
    machine.driver("rtx4090")
    machine.probe()
    machine.say("rtx4090", "generation = 2")
    assert machine.probe().gpu.memory_free_bytes.source == "NVML GetMemoryInfo v2"  # the first call succeeded


def test_a_card_that_cannot_be_opened(machine):
    machine.driver("rtx4090", "0.handle = !4")
    facts = machine.probe()
    assert facts.gpu.name.reason is facts.gpu.memory_total_bytes.reason is Reason.NO_PERMISSION
    assert facts.kind is MemoryKind.DISCRETE


def test_a_jetson_without_nvml_is_known_by_its_files(plain_machine):
    plain_machine.files(ORIN)
    plain_machine.files({"/etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178\n"})
    facts = plain_machine.probe()
    assert facts.kind is MemoryKind.UNIFIED
    assert facts.tegra.jetpack.value == "5.1.x"
    assert "JetPack 5.1.x brings none" in facts.driver.problem
    gpu = facts.gpu
    assert gpu.compute_capability.value == (8, 7)
    assert gpu.sm_clock_mhz.value == 306
    assert gpu.power_watts.value == 6.0
    assert gpu.memory_total_bytes.reason is Reason.ABSENT
    assert not facts.trains_on_gpu


def test_a_jetson_with_nvml_reads_from_its_files_what_nvml_lacks(machine):
    machine.files(THOR)
    machine.driver("thor")
    gpu = machine.probe().gpu
    assert gpu.name.value == "NVIDIA Thor"
    assert gpu.temperature_celsius.source.startswith("NVML")
    assert gpu.sm_clock_mhz.value == 1575
    assert gpu.power_watts.value == 38.25
    assert gpu.memory_clock_mhz.value == 4266


def test_torch_and_nvml_are_matched_by_uuid(machine):
    machine.driver("two_gpus")
    machine.report = cuda_report(
        cuda_device(0, "NVIDIA GeForce RTX 3090", "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeee3090", (8, 6), total=25769803776),
        cuda_device(1, "NVIDIA GeForce GTX 1660 Ti", "11111111-2222-4333-8444-555555551660", (7, 5)),
    )
    facts = machine.probe()
    assert [(gpu.nvml_index, gpu.cuda_index) for gpu in facts.gpus] == [(0, 1), (1, 0)]
    assert facts.gpu.cuda_index == 0
    assert facts.trains_on_gpu
    assert machine.probe("cuda:1").gpu.nvml_index == 0
    assert any("not integrated" in sign for sign in facts.evidence)


def test_an_integrated_device_is_unified_whatever_nvml_says(machine):
    machine.driver("rtx_spark", "0.Name = NVIDIA Graphics Device")
    machine.report = cuda_report(
        cuda_device(0, "x", "77aa77aa-1212-4343-8989-0123456789ab", (12, 1), integrated=True, total=46477 * 2**20)
    )
    facts = machine.probe()
    assert facts.kind is MemoryKind.UNIFIED
    assert facts.gpu.cuda_total_bytes.value == 46477 * 2**20
    assert any("carved out" in note for note in facts.notes)


def test_a_card_that_only_cuda_knows_has_cudas_memory(plain_machine):
    plain_machine.report = cuda_report(cuda_device(0, "NVIDIA L4", "", (8, 9), total=23 * GIB))
    sources = plain_machine.sources()
    from dataclasses import replace

    from edgefed.hardware.facts import Reading

    facts = probe_device(sources=replace(sources, cuda_free=lambda index: Reading.of(20 * GIB, "mem_get_info")))
    assert facts.kind is MemoryKind.DISCRETE
    assert facts.trains_on_gpu
    assert (facts.gpu.memory_total_bytes.value, facts.gpu.memory_free_bytes.value) == (23 * GIB, 20 * GIB)


def test_torch_that_cannot_use_the_card_is_said(machine):
    from edgefed.hardware.cuda import CudaReport
    from edgefed.hardware.facts import Reading

    machine.driver("rtx4090")
    absent = Reading.missing(Reason.ABSENT, "torch.version.cuda", "torch is a build for the CPU")
    machine.report = CudaReport(Reading.of("2.13.0+cpu", "torch"), absent, absent)
    facts = machine.probe()
    assert any("torch cannot use" in note and "build for the CPU" in note for note in facts.notes)
    machine.report = cuda_report(cuda_device(0, "x", "6f1d0c52-91b4-4a55-8a3c-0b2f6d1e4090", runs_here=False))
    facts = machine.probe()
    assert not facts.trains_on_gpu
    assert any("no code for" in note for note in facts.notes)


def test_throttling_is_said_in_words(machine):
    machine.driver("rtx4090", "0.Reasons = 0x24")
    assert any("power limit, software thermal limit" in note for note in machine.probe().notes)
    machine.say("rtx4090", "0.Reasons = 0x4")  # normal for a card at work
    assert not any("slower" in note for note in machine.probe().notes)


def test_a_root_that_is_not_there_is_a_setting_that_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFED_SYSROOT", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="EDGEFED_SYSROOT is .*nowhere"):
        probe_device(ask_torch=False)
    with pytest.raises(ConfigError, match="the root is"):
        probe_device(ask_torch=False, root=tmp_path / "neither")


def test_an_empty_root_says_of_everything_that_it_is_absent(tmp_path):
    facts = probe_device(root=tmp_path, ask_torch=False)
    assert facts.kind is MemoryKind.CPU
    assert facts.host.memory_total_bytes.reason is facts.host.swapped_out_pages.reason is Reason.ABSENT
    assert facts.host.own_rss_bytes.value > 0
    assert any("size of the host's memory is unknown" in note for note in facts.notes)
