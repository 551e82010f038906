"""A recording gives the same facts again, and does not say whose machine it was."""

import dataclasses
import getpass
import json
import os
import socket

import pytest
from edgefed_fake_machine import ORIN, THOR, cuda_device, cuda_report

from edgefed.errors import ConfigError, DeviceNotFound
from edgefed.hardware.facts import GpuFacts, Reading
from edgefed.hardware.recording import SCHEMA, record_readings, replay

NO_UUID = "00000000-0000-0000-0000-000000000000"
"""What CUDA gives on a Jetson: no identifier, and it must not become one."""


def without_uuid(facts):
    """Facts as they must come back: UUIDs are hashed, and our memory grows while we look."""
    blank = Reading.of("-", "-")

    def gpu(value: GpuFacts | None):
        return value and dataclasses.replace(value, uuid=blank if value.uuid.known else value.uuid)

    host = dataclasses.replace(facts.host, own_rss_bytes=blank, own_file_bytes=blank)
    notes = tuple(note for note in facts.notes if "`device`" not in note)  # names a UUID
    return dataclasses.replace(facts, gpu=gpu(facts.gpu), gpus=tuple(map(gpu, facts.gpus)), host=host, notes=notes)


def recorded(machine, device=None):
    document = record_readings(device, sources=machine.sources())
    return document, json.loads(json.dumps(document))


@pytest.mark.parametrize("old", [False, True], ids=["driver of today", "old driver"])
@pytest.mark.parametrize("name", ["rtx4090", "gb10", "thor", "orin_jetpack6", "h200_mig", "two_gpus", "gh200", "wsl2"])
def test_every_device_comes_back(machine, name, old):
    if name in ("thor", "orin_jetpack6"):
        machine.files(THOR if name == "thor" else ORIN)
    own = os.getpid()
    machine.driver(name, *([f"0.Compute = {own}:5000 4242:100"] if name == "rtx4090" else []), old=old)
    facts = machine.probe()
    _, document = recorded(machine)
    assert without_uuid(replay(document)) == without_uuid(facts)
    if name == "rtx4090":
        assert replay(document).gpu.own_bytes.value == 5000


def test_files_alone_and_torch_come_back(plain_machine):
    plain_machine.files(ORIN)
    plain_machine.files(
        {
            "/proc/self/cgroup": "0::/user.slice/user-1000.slice/secret-project.scope\n",
            "/sys/fs/cgroup/user.slice/user-1000.slice/secret-project.scope/memory.max": "4294967296\n",
            "/sys/fs/cgroup/user.slice/user-1000.slice/secret-project.scope/memory.current": "1000\n",
        }
    )
    plain_machine.report = cuda_report(cuda_device(0, "Orin", NO_UUID, (8, 7), integrated=True, total=7 * 2**30))
    facts = plain_machine.probe()
    assert facts.trains_on_gpu
    assert facts.host.cgroup_limit_bytes.value == 2**32
    _, document = recorded(plain_machine)
    again = replay(document)
    assert "secret-project" not in json.dumps(document)
    assert again.host.cgroup_limit_bytes.value == 2**32
    assert again.host.cgroup_used_bytes.value == 1000
    same = dataclasses.replace(again, host=facts.host, notes=facts.notes)
    assert same == facts


def test_a_driver_that_does_not_start_comes_back(machine):
    machine.driver("", "init = !18")
    facts = machine.probe()
    document, _ = recorded(machine)
    assert replay(document).driver == facts.driver
    assert document["nvml"]["start"]["code"] == 18


def test_a_recording_holds_raw_codes_and_values(machine):
    machine.driver("gb10")
    document, _ = recorded(machine)
    calls = document["nvml"]["calls"]
    assert document["schema"] == SCHEMA
    assert calls["nvmlDeviceGetName(gpu0)"] == {"value": "NVIDIA GB10", "code": 0, "text": ""}
    assert calls["nvmlDeviceGetMemoryInfo(gpu0, 33554472)"]["code"] == 3
    assert calls["nvmlDeviceGetMemoryInfo(gpu0)"]["code"] == 3  # asked for the record, not needed by the probe
    assert document["files"]["text"]["/proc/meminfo"]["value"].startswith("MemTotal")


def test_nothing_in_it_says_whose_machine_it_was(machine, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "zeus-basement.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "alicia")
    container = "4f5e6d7c8b9a0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796"
    pod = "0a1b2c3d_4e5f_6071_8293_a4b5c6d7e8f9"
    machine.files(
        {
            "/proc/version": "Linux version 6.8.0-zeus-basement (alicia@zeus-basement) (gcc) #1 SMP\n",
            "/proc/cpuinfo": "model name\t: ARMv8\nSerial\t\t: 10000000abcd1234\n",
            "/proc/self/cgroup": f"0::/kubepods.slice/kubepods-pod{pod}.slice/docker-{container}.scope\n",
            "/proc/1/cgroup": "0::/lxc/alicia-box\n",
            "/sys/class/power_supply/hid-a0:b1:c2:d3:e4:f5-battery/type": "Battery\n",
        }
    )
    machine.driver("rtx4090", "0.Name = NVIDIA GeForce RTX 4090 0000:65:00.0", "process.1871 = /home/alicia/bin/tool")
    machine.report = cuda_report(cuda_device(0, "x", "6f1d0c52-91b4-4a55-8a3c-0b2f6d1e4090"))
    text = json.dumps(record_readings(sources=machine.sources()))
    for secret in ("zeus", "alicia", "example.org", "6f1d0c52", "0b2f6d1e4090", container, container[:12], pod, "alice",
                   "a4b5c6d7e8f9", "10000000abcd1234", "0000:65:00.0", "a0:b1:c2:d3:e4:f5"):  # fmt: skip
        assert secret not in text, secret
    facts = replay(json.loads(text))
    assert facts.host.container.value == "kubernetes"
    assert facts.gpu.cuda_index == 0
    assert facts.gpu.processes.value[0].name.value == "python3"


def test_variables_are_recorded_by_their_presence(plain_machine, monkeypatch):
    monkeypatch.setenv("WSL_DISTRO_NAME", "AlicesDistribution")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.11.12.13")
    document, _ = recorded(plain_machine)
    assert "AlicesDistribution" not in json.dumps(document)
    assert "10.11.12.13" not in json.dumps(document)
    facts = replay(document)
    assert facts.host.is_wsl
    assert facts.host.container.value == "kubernetes"


def test_two_recordings_of_one_machine_share_no_hash(machine):
    machine.driver("rtx4090")
    first, second = (replay(record_readings(sources=machine.sources())).gpu.uuid.value for _ in range(2))
    assert first != second
    assert first.startswith("GPU-")
    assert len(first) == len("GPU-") + 36
    salted = [record_readings(sources=machine.sources(), salt=b"s") for _ in range(2)]
    assert replay(salted[0]).gpu.uuid == replay(salted[1]).gpu.uuid


def test_a_user_with_a_common_name_does_not_break_it(plain_machine, monkeypatch):
    """Jetsons come with a user `nvidia`; another may be called `model`."""
    plain_machine.files(ORIN)
    for user in ("nvidia", "model", "kB", "tegra234", "MemTotal"):
        monkeypatch.setattr(getpass, "getuser", lambda user=user: user)
        facts = replay(record_readings(sources=plain_machine.sources()))
        assert facts.tegra.soc.value == "tegra234"
        assert facts.host.memory_total_bytes.known
        assert facts.host.cpu_name.known
        assert facts.kind == "unified"


def test_a_user_without_a_name_is_recorded_too(plain_machine, monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert record_readings(sources=plain_machine.sources())["schema"] == SCHEMA


def test_a_device_that_was_not_recorded_is_not_found(machine):
    machine.driver("rtx4090")
    document, _ = recorded(machine)
    assert replay(document, "cpu").gpu is None
    with pytest.raises(DeviceNotFound):
        replay(document, "cuda:3")


def damage(document, *path, value=None):
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), "edgefed.recording/99"),
        (("files",), None),
        (("nvml",), []),
        (("nvml", "start"), 7),
        (("torch", "devices"), [{"index": 0}]),
        (("files", "text", "/proc/meminfo"), {"value": 12, "source": "x"}),
        (("files", "text", "/proc/meminfo"), {"reason": "no such reason", "source": "x", "detail": ""}),
        (("files", "ask", "rss"), {"value": None, "source": "x"}),
        (("nvml", "calls", "nvmlDeviceGetCount()"), {"value": "many", "code": 0, "text": ""}),
        (("nvml", "calls", "nvmlDeviceGetComputeRunningProcesses_v3(gpu0)"), {"value": [[]], "code": "x", "text": ""}),
    ],
)
def test_a_damaged_recording_is_a_setting_that_is_wrong(machine, path, value):
    machine.driver("rtx4090")
    document, _ = recorded(machine)
    with pytest.raises(ConfigError, match="recording"):
        replay(damage(document, *path, value=value))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_file_that_is_not_a_recording(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.json is not a recording"):
        replay(path)
    with pytest.raises(ConfigError, match="cannot read"):
        replay(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="cannot read"):
        replay(tmp_path)


def test_a_recording_is_read_from_its_file(machine, tmp_path):
    machine.driver("rtx4090")
    (tmp_path / "x.json").write_text(json.dumps(record_readings(sources=machine.sources())))
    assert replay(tmp_path / "x.json").gpu.name.value == "NVIDIA GeForce RTX 4090"
