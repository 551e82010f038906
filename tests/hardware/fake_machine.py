"""A stand-in machine for tests: files below a temporary root, and a scenario for the fake driver."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgefed.hardware.cuda import CudaDevice, CudaReport, not_asked
from edgefed.hardware.facts import Reading, Reason
from edgefed.hardware.host_files import Files
from edgefed.hardware.nvml import Answer, Library
from edgefed.hardware.probe import MemorySensors, Sources, probe_device

FOLDER = Path(__file__).with_name("fake_nvml")
MEMINFO = """\
MemTotal:       32768000 kB
MemFree:         8192000 kB
MemAvailable:   24576000 kB
Buffers:          102400 kB
Cached:         15360000 kB
Shmem:            512000 kB
AnonPages:       4096000 kB
Mapped:          1024000 kB
SwapTotal:       2048000 kB
SwapFree:        1948000 kB
HugePages_Total:       4
HugePages_Free:        3
Hugepagesize:       2048 kB
"""
ORIN_MEMINFO = MEMINFO.replace("32768000", "7802076").replace("24576000", "5123456") + "NvMapMemUsed:     612344 kB\n"
PC = {
    "/proc/meminfo": MEMINFO,
    "/proc/vmstat": "nr_free_pages 5\npswpin 7\npswpout 40\n",
    "/proc/stat": "cpu  1 2 3\ncpu0 1 2 3\ncpu1 1 2 3\nbtime 1\n",
    "/proc/loadavg": "0.52 0.58 0.59 1/389 12345\n",
    "/proc/version": "Linux version 6.8.0-45-generic (buildd@lcy02) (gcc 13.2.0) #45-Ubuntu SMP\n",
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD Ryzen 7 5800X 8-Core Processor\n",
}
INA = "/sys/bus/i2c/devices/1-0040/hwmon/hwmon3"
ORIN = {
    **PC,
    "/proc/meminfo": ORIN_MEMINFO,
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
    "/proc/version": "Linux version 5.15.148-tegra (buildbrain@mobile) (gcc) #1 SMP PREEMPT\n",
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64\n",
    "/proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "/sys/firmware/devicetree/base/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "/sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "/sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "/sys/class/devfreq/17000000.gpu/governor": "nvhost_podgov\n",
    "/sys/class/devfreq/17000000.gpu/device/load": "375\n",
    "/sys/class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
    "/sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "/sys/class/thermal/thermal_zone0/temp": "48625\n",
    "/sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
    "/sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "/sys/class/thermal/thermal_zone2/type": "tj-thermal\n",
    "/sys/class/thermal/thermal_zone2/temp": "49312\n",
    "/sys/bus/i2c/devices/1-0040/name": "ina3221\n",
    f"{INA}/in1_label": "VDD_IN\n",
    f"{INA}/in1_input": "5000\n",
    f"{INA}/curr1_input": "1200\n",
    f"{INA}/in2_label": "VDD_CPU_GPU_CV\n",
    f"{INA}/in2_input": "5000\n",
    f"{INA}/curr2_input": "300\n",
    f"{INA}/in3_label": "NC\n",
    f"{INA}/in3_input": "5000\n",
    f"{INA}/curr3_input": "100\n",
    f"{INA}/in7_label": "VDD_SUM\n",
    f"{INA}/in7_input": "5000\n",
    f"{INA}/curr7_input": "1600\n",
    "/var/lib/nvpmodel/status": "pmode:0002\n",
    "/etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    "< PM_CONFIG DEFAULT=0 >\n",
}
THOR = {
    **PC,
    "/proc/version": "Linux version 6.8.12-tegra (buildbrain@mobile) (gcc) #1 SMP PREEMPT\n",
    "/etc/nv_tegra_release": "# R38 (release), REVISION: 4.0, GCID: 43, BOARD: generic, EABI: aarch64\n",
    "/proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "/sys/firmware/devicetree/base/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "/sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000\n",
    "/sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "/sys/class/devfreq/gpu-gpc-0/governor": "performance\n",
    "/sys/class/devfreq/bwmgr/cur_freq": "4266000000\n",
    "/sys/class/thermal/thermal_zone0/type": "gpu-thermal\n",
    "/sys/class/thermal/thermal_zone0/temp": "41500\n",
    "/sys/bus/i2c/devices/2-0044/hwmon/hwmon1/name": "ina238\n",
    "/sys/bus/i2c/devices/2-0044/hwmon/hwmon1/in1_label": "VIN\n",
    "/sys/bus/i2c/devices/2-0044/hwmon/hwmon1/power1_input": "38250000\n",
}


def build_driver(folder: Path, *flags: str) -> Path:
    """Compile the fake driver; the test is skipped where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    library = folder / "libnvidia-ml.so.1"
    source = str(FOLDER / "fake_nvml.c")
    subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", str(library), source], check=True, timeout=120)
    return library


def write_root(root: Path, files: dict[str, str | bytes]) -> Path:
    for path, content in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def cuda_device(index=0, name="a GPU", uuid="", capability=(8, 9), integrated=False, total=2**34, runs_here=True):
    return CudaDevice(index, name, uuid, capability, integrated, total, runs_here)


def cuda_report(*devices: CudaDevice) -> CudaReport:
    known = Reading.of("2.9.0+cu130", "torch"), Reading.of("13.0", "torch"), Reading.of(True, "torch")
    return CudaReport(*known, devices=devices)


class NoDriver:
    """NVML of a machine without any."""

    def __init__(self, code=12, text="NVML Shared Library Not Found"):
        self.answer = Answer(None, code, text)

    def start(self):
        return self.answer

    def call(self, name, *arguments):
        return Answer(None, 1, "Uninitialized")


class Machine:
    """Files and driver that a test makes up; ``probe`` looks at them in this process, ``run`` in another one."""

    def __init__(self, folder: Path, monkeypatch, drivers: dict[str, Path]):
        self.root = write_root(folder / "root", PC)
        self.scenario = folder / "scenario.txt"
        self.scenario.write_text("")
        self._monkeypatch, self._drivers = monkeypatch, drivers
        self.nvml = NoDriver()
        self.report = not_asked()

    def files(self, files: dict[str, str | bytes]) -> None:
        write_root(self.root, files)

    def driver(self, name: str, *lines: str, old: bool = False) -> None:
        """Load the fake driver with a scenario of the folder (or an empty one) and more lines."""
        self.say(name, *lines)
        if isinstance(self.nvml, NoDriver):
            import pynvml

            self._monkeypatch.setenv("EDGEFED_FAKE_NVML", str(self.scenario))
            self._monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(self._drivers["old" if old else "new"])))
            self._monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
            self.nvml = Library()

    def say(self, name: str, *lines: str) -> None:
        """Change the scenario under a running program."""
        text = (FOLDER / "scenarios" / f"{name}.txt").read_text() if name else ""
        # replaced at once: the driver may read it at any moment
        fresh = self.scenario.with_suffix(".new")
        fresh.write_text("\n".join([text, *lines, ""]))
        os.replace(fresh, self.scenario)

    def sources(self) -> Sources:
        missing = Reading.missing(Reason.ABSENT, "torch")
        return Sources(Files(self.root), self.nvml, lambda: self.report, lambda index: missing)

    def probe(self, device: str | None = None):
        return probe_device(device, sources=self.sources())

    def sensors(self, facts) -> MemorySensors:
        return MemorySensors(facts, files=Files(self.root), nvml=self.nvml)

    def run(self, *command: str, old: bool = False, **environment: str) -> subprocess.CompletedProcess:
        """Another Python on this machine, which loads the driver as any program does."""
        variables = {
            **os.environ,
            "EDGEFED_SYSROOT": str(self.root),
            "EDGEFED_FAKE_NVML": str(self.scenario),
            "LD_LIBRARY_PATH": str(self._drivers["old" if old else "new"].parent),
            **environment,
        }
        return subprocess.run(
            [sys.executable, *command], env=variables, capture_output=True, text=True, timeout=60, check=False
        )
