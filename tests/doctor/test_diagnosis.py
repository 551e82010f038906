"""The whole examination, on this machine: what works, and what a broken package or driver does to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgefed.doctor import diagnosis
from edgefed.doctor.diagnosis import Options, examine, examine_recording, judge_facts
from edgefed.doctor.finding import Group, State
from edgefed.errors import ConfigError
from edgefed.hardware.facts import MemoryKind
from edgefed.hardware.recording import record_readings, replay

MEMINFO = """MemTotal:       7802076 kB
MemFree:         402128 kB
MemAvailable:   5123456 kB
Buffers:           61234 kB
Cached:          4623456 kB
SwapTotal:       3901038 kB
SwapFree:        3901038 kB
NvMapMemUsed:     612345 kB
"""


@pytest.fixture
def jetson_root(tmp_path):
    root = tmp_path / "jetson"
    for path, text in {
        "proc/meminfo": MEMINFO,
        "proc/vmstat": "pswpin 0\npswpout 0\n",
        "proc/buddyinfo": "Node 0, zone   Normal  90 40 20 8 0 0 0 0 0 0 0\n",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 1, BOARD: generic, EABI: aarch64\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "var/lib/nvpmodel/status": "pmode:0000",
        "sys/firmware/devicetree/base/model": "NVIDIA Jetson Orin Nano Developer Kit Super\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.fixture
def replace_module(tmp_path, monkeypatch):
    """Put a module of that name and text in the way of the installed one, for worker processes."""

    def replace(name, text):
        folder = tmp_path / "in_the_way"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)

    return replace


@pytest.fixture
def quick(tmp_path):
    return Options(state=tmp_path / "state", quick=True)


def by_name(diagnosed):
    return {finding.name: finding for finding in diagnosed.findings}


def test_this_machine_can_train_and_the_arithmetic_is_run(tmp_path):
    reported = []
    diagnosed = examine(Options(device="cpu", state=tmp_path / "state"), reported.append)
    found = by_name(diagnosed)
    assert diagnosed.can_train, [finding for finding in diagnosed.findings if finding.state is State.PROBLEM]
    for name in ("matmul float32", "matmul bfloat16", "matmul float16", "expert layer"):
        assert found[name].state is State.OK
        assert "on cpu" in found[name].found
    assert found["native library"].state in (State.OK, State.NOTE)
    assert "MB/s" in found["state folder"].found
    assert diagnosed.facts.kind is MemoryKind.CPU
    assert diagnosed.arithmetic_ran
    assert {"packages", "sensors", "expert layer", "disk"} <= set(reported)
    assert any("`server`" in sentence for sentence in diagnosed.left_out)
    assert list(tmp_path.iterdir()) == []


def test_quick_runs_no_kernel_and_says_so(quick, tmp_path):
    diagnosed = examine(quick)
    assert not any("matmul" in finding.name or "native" in finding.name for finding in diagnosed.findings)
    assert "MB/s" not in by_name(diagnosed)["state folder"].found
    assert any("`quick`" in sentence for sentence in diagnosed.left_out)
    assert not diagnosed.arithmetic_ran


def test_a_torch_that_cannot_be_imported(quick, replace_module):
    replace_module("torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    diagnosed = examine(quick)
    finding = by_name(diagnosed)["torch"]
    assert finding.state is State.PROBLEM
    assert "libcudart.so.13" in finding.found
    assert "reinstall" in finding.command
    assert not diagnosed.can_train
    assert diagnosed.in_group(Group.MEMORY), "the memory is known without torch"


def test_a_torch_that_is_not_there(quick, replace_module):
    replace_module("torch", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    diagnosed = examine(quick)
    assert by_name(diagnosed)["torch"].found == "not installed"
    assert not diagnosed.can_train


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_torch_for_another_processor(tmp_path, replace_module):
    replace_module("torch", f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})")
    diagnosed = examine(Options(state=tmp_path / "state"))
    finding = by_name(diagnosed)["torch"]
    assert finding.state is State.PROBLEM
    assert "SIGILL" in finding.found
    assert by_name(diagnosed)["native library"].state in (State.OK, State.NOTE)
    assert not any("matmul" in name for name in by_name(diagnosed)), "nothing is run on a torch that cannot load"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sensors_that_crash(quick, replace_module):
    replace_module("pynvml", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    diagnosed = examine(quick)
    assert diagnosed.facts is None
    assert not diagnosed.can_train
    finding = by_name(diagnosed)["sensors"]
    assert "SIGSEGV" in finding.found
    assert finding.command == "nvidia-smi"
    assert by_name(diagnosed)["state folder"].state is State.OK
    assert len([finding for finding in diagnosed.findings if finding.name == "sensors"]) == 1


def test_a_driver_that_hangs(quick, replace_module, monkeypatch):
    monkeypatch.setattr(diagnosis, "SENSOR_LIMIT_S", 2.0)
    replace_module("pynvml", "import time; time.sleep(600)")
    diagnosed = examine(quick)
    assert "did not end within 2 s" in by_name(diagnosed)["sensors"].found
    assert diagnosed.facts is None
    assert by_name(diagnosed)["state folder"].state is State.OK


def test_sensors_that_fail_only_beside_torch(quick, monkeypatch):
    from edgefed.isolation.worker import Outcome, Worker

    ask = Worker.call

    def call(worker, target, timeout_s, **arguments):
        if arguments.get("ask_torch"):
            return Outcome(failure="killed by SIGSEGV", died=True)
        return ask(worker, target, timeout_s, **arguments)

    monkeypatch.setattr(Worker, "call", call)
    diagnosed = examine(quick)
    assert by_name(diagnosed)["sensors"].state is State.PROBLEM
    assert diagnosed.facts is not None
    assert diagnosed.in_group(Group.MEMORY)


def test_a_device_that_is_not_here(quick, tmp_path):
    diagnosed = examine(Options(device="cuda:7", state=tmp_path / "state", quick=True))
    finding = by_name(diagnosed)["device"]
    assert finding.state is State.PROBLEM
    assert "cuda:7" in finding.found
    assert not diagnosed.can_train
    assert diagnosed.in_group(Group.MEMORY), "the rest is examined all the same"


def test_a_root_that_is_no_folder_is_the_users_mistake(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEFED_SYSROOT", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="EDGEFED_SYSROOT"):
        examine(quick)


def test_a_check_that_fails_is_a_finding(quick, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(diagnosis.packages, "package_findings", broken)
    monkeypatch.setattr(diagnosis.jetson, "jetson_findings", broken)
    findings = [finding for finding in examine(quick).findings if finding.name == "check"]
    assert {finding.group for finding in findings} == {Group.PACKAGES, Group.JETSON}
    assert all("ZeroDivisionError: by nothing" in finding.found for finding in findings)


def test_a_native_library_that_is_wrong_or_not_there(tmp_path):
    class Replying:
        def __init__(self, outcome):
            self.outcome = outcome

        def call(self, *_, **__):
            return self.outcome

    from edgefed.isolation.worker import Outcome

    missing = diagnosis.native_finding(Replying(Outcome(failure="NativeUnavailable: no _native library in /x")))
    assert missing.state is State.NOTE
    assert missing.found.startswith("no _native library")
    wrong = diagnosis.native_finding(Replying(Outcome(failure="WrongResult: other bits")))
    assert wrong.state is State.PROBLEM
    assert "other bits" in wrong.found
    crashed = diagnosis.native_finding(Replying(Outcome(failure="killed by SIGILL", died=True)))
    assert crashed.state is State.PROBLEM


@pytest.mark.parametrize(
    ("broken", "states", "l4t"),
    [
        ((), {"4-bit": State.OK, "8-bit": State.OK, "AdamW": State.OK}, None),
        (("16",), {"4-bit": State.OK, "rows": State.NOTE, "8-bit": State.OK, "AdamW": State.OK}, None),
        (("eight_bit_step",), {"4-bit": State.OK, "8-bit": State.OK, "AdamW": State.WARNING}, None),
        (("64", "16", "int8_product"), {"4-bit": State.WARNING, "8-bit": State.WARNING, "AdamW": State.OK}, "36.4.4"),
    ],
)
def test_each_kernel_of_bitsandbytes_by_what_it_computes(device, parts, broken, states, l4t):
    from edgefed.isolation.worker import Outcome

    class Replying:
        def call(self, target, timeout_s, *, device, columns=None):
            failed = str(columns or target.rpartition(":")[2]) in broken
            return Outcome(failure="RuntimeError: named symbol not found") if failed else Outcome("fine")

    facts = device("jetson-orin-nano-8gb", tegra=parts["jetson"](l4t=l4t)) if l4t else device()
    findings = diagnosis.bitsandbytes_findings(Replying(), facts, "cuda:0", lambda name: None)
    assert {finding.name.split()[-1]: finding.state for finding in findings} == states
    assert ("COMPUTE_CAPABILITY=87" in findings[0].command) is bool(l4t)


def test_a_jetson_by_its_files(quick, jetson_root, monkeypatch):
    monkeypatch.setenv("EDGEFED_SYSROOT", str(jetson_root))
    diagnosed = examine(quick)
    found = by_name(diagnosed)
    assert "Orin Nano" in diagnosed.device
    assert diagnosed.facts.kind is MemoryKind.UNIFIED
    assert "JetPack 6" in found["board"].found
    assert "jp6/cu126" in found["wheels"].command
    assert found["power mode"].found == "15W"
    assert "61% of the arithmetic" in found["power mode"].why
    assert found["fragmented memory"].state is State.WARNING


def test_a_recording_gives_the_same_findings(quick, jetson_root, monkeypatch):
    document = record_readings(root=jetson_root, ask_torch=False)
    facts = replay(document)
    replayed = examine_recording(facts)
    assert replayed.findings == examine_recording(replay(document)).findings
    monkeypatch.setenv("EDGEFED_SYSROOT", str(jetson_root))
    live = judge_facts(examine(quick).facts)
    recorded = judge_facts(facts)
    assert [(finding.group, finding.name, finding.state) for finding in recorded if finding.group is Group.JETSON] == [
        (finding.group, finding.name, finding.state) for finding in live if finding.group is Group.JETSON
    ]
    same = {"board", "wheels", "power mode", "fragmented memory", "GPU allocations", "swap", "device profile"}
    texts = [{finding.name: finding.found for finding in each if finding.name in same} for each in (live, recorded)]
    assert texts[0] == texts[1]
    assert set(texts[0]) == same
    assert any("recording" in sentence for sentence in replayed.left_out)


def test_nothing_is_left_behind(quick, tmp_path):
    before = set(Path(tmp_path).rglob("*"))
    examine(quick)
    assert set(Path(tmp_path).rglob("*")) == before


def test_a_gpu_by_its_driver_alone(tmp_path):
    """In a process of its own, with a stand-in for NVIDIA's library: the loader reads its path at the start."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    source = Path(__file__).parents[1] / "hardware" / "fake_nvml" / "fake_nvml.c"
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", str(source), "-o", str(library)], check=True
    )
    scenario = source.with_name("scenarios") / "rtx4090.txt"

    def doctor(scenario_file):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "EDGEFED_FAKE_NVML": str(scenario_file)}
        words = ["doctor", "--quick", "--json", "--state", str(tmp_path / "state")]
        done = subprocess.run(
            [sys.executable, "-m", "edgefed", *words], env=environment, capture_output=True, text=True, timeout=300
        )
        assert "Traceback" not in done.stdout + done.stderr
        data = json.loads(done.stdout)
        assert done.returncode == (0 if data["can_train"] else 1)
        return data, {finding["name"]: finding for finding in data["findings"]}

    data, found = doctor(scenario)
    assert data["facts"]["kind"] == "discrete"
    assert "RTX 4090" in data["device"]
    assert found["NVIDIA driver"]["state"] == "ok"
    assert found["device profile"]["found"].startswith("rtx-4090")
    broken = tmp_path / "mismatch.txt"
    broken.write_text("init = !18\n")
    data, found = doctor(broken)
    assert found["NVIDIA driver"]["state"] == "warning"
    assert "reboot" in found["NVIDIA driver"]["fix"].lower()
    assert data["facts"]["kind"] == "cpu"
    assert data["can_train"]
