"""The driver's library: found or not, hidden, forked, of another year; and how each of it is explained."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest
from edgefed_fake_machine import build_driver

from edgefed.hardware.facts import MemoryKind


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("init = !9", "not loaded", "modprobe"),
        ("init = !18", "different versions", "Reboot"),
        ("init = !4", "may not open", "/dev/nvidia"),
        ("init = !999", "Unknown Error", "dmesg"),
        ("init = !15", "GPU is lost", "dmesg"),
        ("count = 0", "no GPU", "lspci"),
        ("count = !999", "cannot be counted", "nvidia-smi"),
        ("count = 4294967295", "cannot be counted", "nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_work_is_explained(machine, line, problem, remedy):
    machine.driver("", line)
    facts = machine.probe()
    assert facts.kind is MemoryKind.CPU
    assert facts.gpus == ()
    assert problem in facts.driver.problem
    assert remedy in facts.driver.remedy
    assert any(problem in note for note in facts.notes)
    assert problem in facts.evidence[0]


def test_a_driver_that_is_updated_or_unloaded_under_us_is_noticed(machine):
    machine.driver("rtx4090")
    assert machine.probe().gpu is not None
    machine.say("", "init = !18")
    assert "different versions" in machine.probe().driver.problem
    machine.say("rtx4090")
    assert machine.probe().gpu is not None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no NVIDIA driver found"),
        ({"/.dockerenv": ""}, "--gpus all"),
        ({"/proc/version": "Linux version 6.6.87-microsoft-standard-WSL2\n"}, "on Windows"),
        ({"/dev/nvidia0": "", "/dev/nvidiactl": ""}, "libnvidia-ml.so.1 is not found"),
    ],
)
def test_no_library_is_explained_by_where_we_are(plain_machine, files, words):
    plain_machine.files(files)
    facts = plain_machine.probe()
    assert facts.kind is MemoryKind.CPU
    assert words in f"{facts.driver.problem} {facts.driver.remedy}"


SHOW = """
import json
from edgefed.hardware.probe import probe_device
facts = probe_device(ask_torch=False)
gpu = facts.gpu
print(json.dumps([facts.kind, facts.driver.problem, gpu and gpu.name.value, gpu and gpu.memory_free_bytes.value]))
"""


@pytest.mark.parametrize("old", [False, True], ids=["driver of today", "old driver"])
def test_another_process_finds_the_driver_as_any_program_does(machine, old):
    machine.say("rtx4090")
    result = machine.run("-c", SHOW, old=old)
    assert result.returncode == 0, result.stderr
    free = 25757220864 - 420478976 - 1610612736
    assert json.loads(result.stdout) == ["discrete", "", "NVIDIA GeForce RTX 4090", free]


@pytest.mark.skipif(sys.platform != "linux", reason="WSL is a Linux")
def test_the_library_that_windows_puts_aside_is_found(machine, tmp_path):
    (tmp_path / "wsl").mkdir()
    library = build_driver(tmp_path / "wsl", "-Wl,-soname,libnvidia-ml.so.1")
    machine.say("rtx4090")
    aside = f"import edgefed.hardware.nvml as nvml\nnvml.WSL_LIBRARY = {str(library)!r}\n"
    found = json.loads(machine.run("-c", aside + SHOW, LD_LIBRARY_PATH="").stdout)
    assert found[0] == "discrete"
    assert found[2] == "NVIDIA GeForce RTX 4090"
    library.write_bytes(b"no library")
    kind, problem, _, _ = json.loads(machine.run("-c", aside + SHOW, LD_LIBRARY_PATH="").stdout)
    assert kind == "cpu"
    assert "no NVIDIA driver found" in problem


SHADOW = "__file__ = 'site-packages/pynvml/__init__.py'\ndef nvmlInit(): pass\n"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (SHADOW, "the retired package pynvml hides nvidia-ml-py"),
        ("raise ImportError('no module named pynvml')", "nvidia-ml-py is not installed"),
        ("raise RuntimeError('boom')", "cannot be imported: RuntimeError: boom"),
    ],
)
def test_a_package_in_the_place_of_nvidia_ml_py_is_named(machine, tmp_path, module, words):
    (tmp_path / "shadow" / "pynvml").mkdir(parents=True)
    (tmp_path / "shadow" / "pynvml" / "__init__.py").write_text(module)
    machine.say("rtx4090")
    result = machine.run("-c", SHOW, PYTHONPATH=str(tmp_path / "shadow"))
    assert result.returncode == 0, result.stderr
    kind, problem, _, _ = json.loads(result.stdout)
    assert kind == "cpu"
    assert words in problem


def test_a_dead_package_that_still_works_is_used_and_named(machine, tmp_path):
    import pynvml

    (tmp_path / "shadow" / "pynvml").mkdir(parents=True)
    shutil.copy(pynvml.__file__, tmp_path / "shadow" / "pynvml" / "__init__.py")  # pynvml 11 was such a copy
    machine.say("rtx4090")
    result = machine.run("-c", SHOW, PYTHONPATH=str(tmp_path / "shadow"))
    kind, problem, name, _ = json.loads(result.stdout)
    assert (kind, name) == ("discrete", "NVIDIA GeForce RTX 4090")
    assert "pynvml hides nvidia-ml-py" in problem


FORK = """
import os
from edgefed.hardware.probe import probe_device
assert probe_device(ask_torch=False).gpu is not None
child = os.fork()
if child == 0:
    facts = probe_device(ask_torch=False)
    own = os.getpid()
    os._exit(0 if facts.gpu is not None and all(p.pid != own for p in facts.gpu.processes.value) else 3)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


FORK_IN_A_CALL = """
import os, threading
import pynvml
from edgefed.hardware.nvml import process_library
from edgefed.hardware.probe import probe_device
assert probe_device(ask_torch=False).gpu is not None
held, release = threading.Event(), threading.Event()
count = pynvml.nvmlDeviceGetCount

def slow_count():
    held.set()
    release.wait(30)
    return count()

pynvml.nvmlDeviceGetCount = slow_count
threading.Thread(target=process_library().start, daemon=True).start()  # holds the library's lock while it counts
held.wait(30)
pynvml.nvmlDeviceGetCount = count
child = os.fork()
if child == 0:
    import signal
    signal.alarm(20)
    os._exit(0 if probe_device(ask_torch=False).gpu is not None else 3)
_, status = os.waitpid(child, 0)
release.set()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_is_forked_in_the_middle_of_a_call_does_not_wait_for_ever(machine):
    machine.say("rtx4090")
    result = machine.run("-c", FORK_IN_A_CALL)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_nvml_of_its_own(machine):
    machine.say("rtx4090")
    result = machine.run("-c", FORK)
    assert result.returncode == 0, result.stderr


def test_the_fake_driver_is_found_by_its_path_alone(fake_drivers):
    """The test's own footing: the two builds differ in what a driver of 2020 does not have."""
    new, old = (ctypes.CDLL(str(fake_drivers[name])) for name in ("new", "old"))
    assert hasattr(new, "nvmlDeviceGetMemoryInfo_v2")
    assert not hasattr(old, "nvmlDeviceGetMemoryInfo_v2")


def test_probing_imports_neither_torch_nor_a_driver_before_it_is_asked():
    code = "import edgefed.hardware.probe, sys; print([m for m in ('torch', 'pynvml') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[]\n"
