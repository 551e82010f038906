"""Hardware facts in, findings out: every situation of driver, GPU, memory, Jetson and host."""

import dataclasses

import pytest

from edgefed.doctor import host, jetson, sensors
from edgefed.doctor.diagnosis import judge_facts, torch_command
from edgefed.doctor.finding import State
from edgefed.hardware.budget import plan_budget
from edgefed.hardware.facts import Battery, Reading, Reason
from edgefed.hardware.nvml import LIBRARY_NOT_FOUND, Answer, Setting, explain

GIB = 2**30


def named(findings, name):
    return [finding for finding in findings if finding.name == name]


def one(findings, name):
    (finding,) = named(findings, name)
    return finding


def of_memory(facts):
    return sensors.memory_findings(facts, plan_budget(facts, for_training=True), plan_budget(facts))


# --- driver and GPU ------------------------------------------------------------------------------------------------


def test_a_driver_that_works(device):
    finding = one(sensors.gpu_findings(device()), "NVIDIA driver")
    assert finding.state is State.OK
    assert "580.95.05" in finding.found
    assert "13.0" in finding.found


@pytest.mark.parametrize("setting", [Setting(), Setting(container="docker"), Setting(is_wsl=True)])
def test_a_machine_without_a_driver_is_not_an_error(device, parts, setting):
    problem, remedy = explain(Answer(None, LIBRARY_NOT_FOUND), setting)
    facts = device("cpu-vm-2core", driver=parts["broken_driver"](problem, remedy))
    finding = one(sensors.gpu_findings(facts), "NVIDIA driver")
    assert finding.state is State.NOTE
    assert finding.found == problem
    assert finding.fix == remedy


def test_a_driver_that_is_there_and_does_not_work_is_one(device, parts):
    for problem in ("the kernel module is not loaded", "library and module have different versions"):
        facts = device("cpu-vm-2core", driver=parts["broken_driver"](problem, "Reboot."))
        finding = one(sensors.gpu_findings(facts), "NVIDIA driver")
        assert (finding.state, finding.found, finding.fix) == (State.WARNING, problem, "Reboot.")


def test_a_jetson_needs_no_nvml(device, parts):
    facts = device("jetson-orin-nano-8gb", tegra=parts["jetson"](), driver=parts["broken_driver"]("no NVML here"))
    assert one(sensors.gpu_findings(facts), "NVIDIA driver").state is State.NOTE


def test_the_kind_comes_with_its_evidence(device):
    facts = device(evidence=("CUDA says not integrated", "NVML reports 24 GiB"))
    found = one(sensors.gpu_findings(facts), "memory kind").found
    assert found.startswith("discrete")
    assert "CUDA says not integrated; NVML reports 24 GiB" in found


def test_a_lost_gpu_that_torch_cannot_use_leaves_the_cpu(device):
    """As `edgefed join` does: it trains on the CPU unless the GPU was asked for."""
    lost = Reading.missing(Reason.LOST, "NVML", "GPU is lost")
    names = ("memory_free_bytes", "name", "uuid", "memory_total_bytes")
    facts = device(gpu={"nvml_index": 0, "cuda_index": None} | {name: lost for name in names})
    finding = one(judge_facts(facts), "GPU 0 lost")
    assert finding.state is State.WARNING
    assert "trains on its CPU" in finding.why
    assert plan_budget(facts, for_training=True).now_bytes > 0
    assert one(judge_facts(facts, gpu_requested=True), "GPU 0 lost").state is State.PROBLEM


def test_a_lost_gpu_is_a_problem_and_another_lost_one_a_warning(device):
    lost = Reading.missing(Reason.LOST, "NVML", "GPU is lost")
    names = ("memory_free_bytes", "temperature_celsius", "name", "uuid", "memory_total_bytes", "utilization_percent")
    facts = device(gpu={"nvml_index": 0} | {name: lost for name in names})
    finding = one(sensors.gpu_findings(facts), "GPU 0 lost")
    assert finding.state is State.PROBLEM
    assert "dmesg" in finding.command
    assert not named(sensors.gpu_findings(facts), "GPU 0")
    beside = dataclasses.replace(facts, gpu=device().gpu, gpus=(device().gpu, facts.gpu))
    assert one(sensors.gpu_findings(beside), "GPU 0 lost").state is State.WARNING
    assert not [finding for finding in sensors.gpu_findings(device()) if "lost" in finding.name]


def test_gpus_are_listed_by_what_they_are(device):
    facts = device(gpu={"nvml_index": 1, "temperature_celsius": 47.0})
    assert one(sensors.gpu_findings(facts), "GPU 1").found.endswith("24.0 GiB, compute capability 8.9, 47 °C")
    instance = device(gpu={"nvml_index": 0, "is_mig": True, "mig_index": 2})
    assert named(sensors.gpu_findings(instance), "GPU 0 MIG 2")
    whole = device(gpu={"nvml_index": 0, "mig_enabled": True})
    both = dataclasses.replace(instance, gpus=(whole.gpu, instance.gpu))
    assert "only its instances compute" in one(sensors.gpu_findings(both), "GPU 0").found
    spark = device("dgx-spark", gpu={"nvml_index": 0, "memory_total_bytes": 8128 * 2**20})
    assert "GiB" not in one(sensors.gpu_findings(spark), "GPU 0").found  # a part carved out is not its memory


@pytest.mark.parametrize(
    ("bits", "state", "words"),
    [(0x1, None, ""), (0x4, State.NOTE, "power limit"), (0x24, State.WARNING, "thermal limit"),
     (0x8, State.WARNING, "hardware slowdown"), (0x80, State.WARNING, "power brake"), (0x61, None, "")],
)  # fmt: skip
def test_clocks(device, bits, state, words):
    found = named(sensors.gpu_findings(device(gpu={"throttle_reasons": bits})), "clocks")
    assert [finding.state for finding in found] == ([state] if state else [])
    assert all(words in finding.found for finding in found)


def test_sensors_that_do_not_answer_are_named_with_their_reason(device):
    refused = Reading.missing(Reason.NO_PERMISSION, "NVML", "Insufficient Permissions")
    silent = Reading.missing(Reason.NOT_SUPPORTED, "NVML")
    facts = device(gpu={"processes": refused, "power_watts": silent, "memory_free_bytes": silent})
    found = one(sensors.gpu_findings(facts), "sensors without a value").found
    assert "no permission: processes" in found
    assert "not supported: memory free, power" in found


def test_notes_of_the_facts_are_passed_on_once(device, parts):
    facts = dataclasses.replace(
        device("cpu-vm-2core", driver=parts["broken_driver"]("it is broken")),
        notes=("it is broken. Reboot.", "two GPUs are here", "two GPUs are here"),
    )
    findings = sensors.gpu_findings(facts)
    assert [finding.found for finding in named(findings, "sensors")] == ["two GPUs are here"]


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_budget_with_its_origin(device):
    finding = one(of_memory(device()), "budget (discrete)")
    assert finding.state is State.OK
    assert "GiB of 24.0" in finding.found
    assert "on an idle device" in finding.found


def test_an_unknown_budget_asks_for_a_word(device):
    facts = device(gpu={"memory_free_bytes": Reading.missing(Reason.NO_PERMISSION, "NVML", "Insufficient Permissions")})
    finding = one(of_memory(facts), "budget (discrete)")
    assert finding.state is State.WARNING
    assert "--memory" in finding.command
    assert "no permission" in finding.found


def test_no_memory_left_is_a_problem(device):
    finding = one(of_memory(device(gpu={"memory_free_bytes": 100 * 2**20})), "budget (discrete)")
    assert finding.state is State.PROBLEM
    assert "Close other programs" in finding.fix


def test_both_budgets_when_torch_cannot_use_the_gpu(device):
    findings = of_memory(device(gpu={"cuda_index": None}))
    assert one(findings, "budget (cpu)").state is State.OK
    assert "of 24.0" in one(findings, "unused (discrete)").found


def test_a_container_limit(device):
    host_facts = {"cgroup_limit_bytes": 8 * GIB, "cgroup_used_bytes": GIB}
    finding = one(of_memory(device("cpu-vm-2core", host=host_facts)), "container limit")
    assert finding.state is State.NOTE
    assert "8.0 GiB" in finding.found
    assert "1.0 GiB" in finding.found
    assert not named(of_memory(device("cpu-vm-2core", host={"cgroup_limit_bytes": 2**50})), "container limit")
    assert not named(of_memory(device("cpu-vm-2core")), "container limit")


def test_swap_in_use_means_too_little_memory(device):
    little = device(host={"swap_total_bytes": 64 * GIB, "swap_used_bytes": GIB})
    assert one(of_memory(little), "swap").state is State.OK
    much = device(host={"swap_total_bytes": 64 * GIB, "swap_used_bytes": 40 * GIB})
    assert one(of_memory(much), "swap").state is State.WARNING


def test_zram_and_huge_pages_are_reported(device):
    findings = of_memory(device(host={"zram_used_bytes": GIB, "huge_pages_total": 512}))
    assert "1.0 GiB" in one(findings, "zram").found
    assert "512" in one(findings, "huge pages").found
    assert not named(of_memory(device(host={"huge_pages_total": 0})), "huge pages")


# --- Jetson --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("l4t", "system", "command"),
    [
        ("36.4.4", "JetPack 6", "jp6/cu126"),
        ("38.2.1", "JetPack 7.0", "cu130"),
        ("39.2.0", "JetPack 7.2", "pip install torch"),
    ],
)
def test_the_wheel_route(device, parts, l4t, system, command):
    facts = device("jetson-orin-nano-8gb", tegra=parts["jetson"](l4t=l4t))
    finding = one(jetson.jetson_findings(facts), "wheels")
    assert system in finding.found
    assert command in finding.command
    assert torch_command(facts) == finding.command


def test_jetpack_5_is_too_old(device, parts):
    facts = device("jetson-orin-nano-8gb", tegra=parts["jetson"](l4t="35.4.1"))
    assert one(jetson.jetson_findings(facts), "wheels").state is State.WARNING
    assert torch_command(facts) == ""


@pytest.mark.parametrize("l4t", [None, "", "x", "32.7.1", "36"])
def test_an_unknown_release_has_no_route(l4t):
    assert jetson.wheel_route(l4t) is None


def test_a_jetson_in_a_container_without_its_release_file(device, parts):
    tegra = parts["jetson"](l4t=Reading.missing(Reason.ABSENT, "/etc/nv_tegra_release"))
    findings = jetson.jetson_findings(device("jetson-orin-nano-8gb", tegra=tegra))
    assert "nv_tegra_release" in one(findings, "board").command
    assert one(findings, "wheels").state is State.NOTE


def test_what_a_power_mode_costs(device, parts):
    facts = device("jetson-orin-nano-8gb", tegra=parts["jetson"](power_mode="15W"))
    finding = one(jetson.jetson_findings(facts), "power mode")
    assert finding.state is State.NOTE
    assert "61% of the arithmetic" in finding.why
    assert "67% of the memory bandwidth" in finding.why
    fastest = device("jetson-orin-nano-8gb", tegra=parts["jetson"](power_mode="MAXN_SUPER"))
    assert one(jetson.jetson_findings(fastest), "power mode").state is State.OK
    unheard_of = device("jetson-orin-nano-8gb", tegra=parts["jetson"](power_mode="mode 9"))
    assert "caps the clocks" in one(jetson.jetson_findings(unheard_of), "power mode").why
    unknown = device("jetson-orin-nano-8gb", tegra=parts["jetson"](power_mode=parts["absent"]))
    assert one(jetson.jetson_findings(unknown), "power mode").command == "nvpmodel -q"


@pytest.mark.parametrize(("block", "state"), [(2**20, State.WARNING), (4 * 2**20, None), (None, None)])
def test_memory_in_pieces(device, parts, block, state):
    host_facts = {} if block is None else {"largest_free_block_bytes": block}
    findings = jetson.jetson_findings(device("jetson-orin-nano-8gb", tegra=parts["jetson"](), host=host_facts))
    assert [finding.state for finding in named(findings, "fragmented memory")] == ([state] if state else [])


def test_nothing_about_jetsons_elsewhere(device):
    assert jetson.jetson_findings(device(host={"largest_free_block_bytes": 4096})) == []


# --- host ----------------------------------------------------------------------------------------------------------


def test_battery(device):
    def found(percent, plugged):
        return one(host.host_findings(device(host={"battery": Battery(percent, plugged)})), "battery")

    assert found(43, False).state is State.WARNING
    assert "43 %" in found(43, False).found
    assert found(90, True).state is State.OK
    assert found(90, None).state is State.OK
    assert not named(host.host_findings(device()), "battery")


def test_container_wsl_and_a_busy_processor(device):
    findings = host.host_findings(device(host={"container": "docker", "is_wsl": True, "load_average": 30.0}))
    assert one(findings, "container").found == "docker"
    assert "bench --verify" in one(findings, "WSL2").command
    assert one(findings, "processor").state is State.NOTE
    quiet = host.host_findings(device(host={"load_average": 0.1, "cpu_quota": 2.0}))
    assert one(quiet, "processor").state is State.OK
    assert "2 of them allowed" in one(quiet, "processor").found


def test_a_clock_before_its_own_files():
    assert host.clock_finding(0.0, 1.7e9).state is State.WARNING
    assert host.clock_finding(1.7e9, 1.7e9 + 3600).state is State.OK
    assert host.installed_time_s() > 1.5e9


def test_the_disk(tmp_path):
    probe = host.probe_disk(tmp_path / "not" / "there" / "yet", write=True)
    assert probe.folder == tmp_path
    assert probe.bytes_per_s > 0
    assert not probe.error
    assert list(tmp_path.iterdir()) == []
    assert host.probe_disk(tmp_path, write=False).bytes_per_s is None


@pytest.mark.parametrize(
    ("free", "speed", "error", "state"),
    [
        (100 * GIB, 500e6, "", State.OK),
        (100 * GIB, None, "", State.OK),
        (GIB, 500e6, "", State.WARNING),
        (100 * GIB, 8e6, "", State.WARNING),
        (0, None, "No space left on device", State.PROBLEM),
        (None, None, "Permission denied", State.PROBLEM),
    ],
)
def test_verdicts_on_a_disk(tmp_path, free, speed, error, state):
    finding = host.disk_finding(host.DiskProbe(tmp_path, free, speed, error), tmp_path / "state")
    assert finding.state is state
    assert not error or error in finding.found


def test_a_folder_that_is_not_ours(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(host.tempfile, "mkstemp", refuse)
    assert host.probe_disk(tmp_path, write=True).error == "Permission denied"


# --- all of it -----------------------------------------------------------------------------------------------------


def test_every_shipped_profile_can_be_judged(device, parts):
    from edgefed.hardware.profiles import load_profiles

    for name in load_profiles():
        tegra = parts["jetson"]() if "jetson" in name else None
        findings = judge_facts(device(name, tegra=tegra))
        assert not [finding for finding in findings if finding.name == "check"], name
        assert not [finding for finding in findings if finding.state is State.PROBLEM], name


def test_facts_of_which_nothing_is_known(device, parts):
    facts = device(
        gpu={name: parts["absent"] for name in ("name", "memory_total_bytes", "memory_free_bytes", "cuda_total_bytes",
                                                "compute_capability", "integrated", "own_bytes", "processes")},
        host={name: parts["absent"] for name in ("memory_total_bytes", "memory_available_bytes", "cpu_count",
                                                 "load_average")},
    )  # fmt: skip
    findings = judge_facts(facts)
    assert not [finding for finding in findings if finding.name == "check"]
    assert one(findings, "budget (discrete)").state is State.WARNING
