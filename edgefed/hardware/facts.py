"""The facts about a device at one moment: plain records that `edgefed.hardware.probe` fills.

Every sensor value is a `Reading`: a number, or a named reason why it is missing. An unknown value is never 0.

    reading = Reading.of(4096, "NVML memory v2")
    reading = Reading.missing(Reason.NO_PERMISSION, "NVML memory v2", "Insufficient Permissions")
    reading.value                 # 4096, or None

Sizes are bytes, clocks MHz, power watts, temperatures degrees Celsius.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Reason(str, enum.Enum):
    """Why a sensor gave no value."""

    NOT_SUPPORTED = "not supported"
    """The device has no such sensor, or its driver does not report it."""
    NO_PERMISSION = "no permission"
    """This user may not read the value."""
    LOST = "device lost"
    """The device stopped responding."""
    ABSENT = "absent"
    """The file, library or device to ask does not exist here."""
    IMPLAUSIBLE = "implausible"
    """The sensor returned a value that cannot be true: a total of 0, a placeholder."""
    FAILED = "failed"
    """Anything else; ``detail`` has the sensor's message."""

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Reading(Generic[T]):
    """``value`` is None exactly when ``reason`` is set. ``source`` names the call or file that was asked."""

    value: T | None
    source: str
    reason: Reason | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"a reading is a value or a reason, found {self.value!r} and {self.reason!r}")

    @classmethod
    def of(cls, value: T, source: str) -> Reading[T]:
        """A reading with a value, which is not None."""
        return cls(value, source)

    @staticmethod
    def missing(reason: Reason, source: str, detail: str = "") -> Reading[Any]:
        """A reading without a value."""
        return Reading(None, source, reason, detail)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.reason is None

    def require(self) -> T:
        """The value. Raises ValueError if there is none: check `known` first."""
        if self.value is None:
            raise ValueError(f"no value: {self.describe()}")
        return self.value

    def without_value(self, source: str | None = None) -> Reading[Any]:
        """A reading of something else, or of another ``source``, that is missing for this one's reason."""
        if self.reason is None:
            raise ValueError(f"{self.source} has a value: {self.value!r}")
        return Reading(None, source or self.source, self.reason, self.detail)

    def map(self, function: Callable[[T], U]) -> Reading[U]:
        """``function`` of the value, or the same reason."""
        if self.value is None:
            return Reading(None, self.source, self.reason, self.detail)
        return Reading(function(self.value), self.source)

    def describe(self) -> str:
        """The value as text, or why there is none: ``not supported (NVML memory v2)``."""
        if self.reason is None:
            return str(self.value)
        return f"{self.reason} ({self.source}{': ' + self.detail if self.detail else ''})"


class MemoryKind(str, enum.Enum):
    """The kind of memory that holds a model."""

    DISCRETE = "discrete"
    """A GPU with memory of its own."""
    UNIFIED = "unified"
    """A GPU that shares the host's memory: Jetson, DGX Spark, GH200."""
    CPU = "cpu"
    """No GPU that can be used."""

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class GpuProcess:
    """One process on a GPU. ``used_bytes`` is missing under WSL2 and WDDM."""

    pid: int
    name: Reading[str]
    used_bytes: Reading[int]


@dataclasses.dataclass(frozen=True)
class GpuFacts:
    """One GPU, or one MIG instance of it: what NVML and CUDA say, matched by UUID.

    ``cuda_index`` is the number that torch knows it by, None when torch cannot use it. ``memory_*`` of a unified GPU
    are as NVML gave them and must not be used for a budget. ``throttle_reasons`` are NVML's bits.
    """

    nvml_index: int | None
    cuda_index: int | None
    is_mig: bool
    name: Reading[str]
    uuid: Reading[str]
    compute_capability: Reading[tuple[int, int]]
    integrated: Reading[bool]
    memory_total_bytes: Reading[int]
    memory_free_bytes: Reading[int]
    cuda_total_bytes: Reading[int]
    own_bytes: Reading[int]
    """What this process holds on it; 0 when the process list is readable and we are not in it."""
    processes: Reading[tuple[GpuProcess, ...]]
    """All others, each once."""
    display_active: Reading[bool]
    utilization_percent: Reading[int]
    sm_clock_mhz: Reading[int]
    sm_clock_max_mhz: Reading[int]
    memory_clock_mhz: Reading[int]
    temperature_celsius: Reading[float]
    power_watts: Reading[float]
    power_limit_watts: Reading[float]
    energy_joules: Reading[float]
    throttle_reasons: Reading[int]
    pcie_generation: Reading[int]
    pcie_width: Reading[int]
    ecc: Reading[bool]
    mig_enabled: Reading[bool]
    mig_index: int | None = None
    """Number of the MIG instance on the GPU ``nvml_index``; its clocks, temperature and power are the whole GPU's."""
    mig_ids: Reading[tuple[int, int]] = Reading.missing(Reason.ABSENT, "NVML", "not a MIG instance")
    """(GPU instance, compute instance): what the old names ``MIG-GPU-<uuid>/<gi>/<ci>`` end in."""


@dataclasses.dataclass(frozen=True)
class Battery:
    """``percent`` 0..100; ``plugged`` None when the system does not say."""

    percent: float
    plugged: bool | None


@dataclasses.dataclass(frozen=True)
class HostFacts:
    """The machine around the GPU, and the limits of the container that we are in."""

    system: str
    """linux, darwin, windows."""
    kernel: Reading[str]
    machine: str
    """x86_64, aarch64, ..."""
    cpu_name: Reading[str]
    cpu_count: Reading[int]
    """Logical processors."""
    cpu_quota: Reading[float]
    """Processors that the cgroup allows; absent without a limit."""
    load_average: Reading[float]
    """Of the last minute."""
    memory_total_bytes: Reading[int]
    memory_available_bytes: Reading[int]
    huge_pages_total: Reading[int]
    huge_pages_free_bytes: Reading[int]
    swap_total_bytes: Reading[int]
    swap_used_bytes: Reading[int]
    zram_used_bytes: Reading[int]
    swapped_out_pages: Reading[int]
    """pswpout of /proc/vmstat: since boot."""
    largest_free_block_bytes: Reading[int]
    """Largest contiguous block of physical memory that the kernel could give (/proc/buddyinfo)."""
    cgroup_limit_bytes: Reading[int]
    """The tightest limit from our cgroup up to the root; absent without any."""
    cgroup_used_bytes: Reading[int]
    """What is used under that limit, reclaimable page cache excluded."""
    own_rss_bytes: Reading[int]
    battery: Reading[Battery]
    is_wsl: bool
    container: Reading[str]
    """docker, podman, lxc, kubernetes, ...; absent outside."""
    own_file_bytes: Reading[int] = Reading.missing(Reason.ABSENT, "/proc/self/statm")
    """The part of ``own_rss_bytes`` that maps files: libraries, checkpoints. The kernel can reclaim it."""
    board: Reading[str] = Reading.missing(Reason.ABSENT, "device tree, DMI")
    """Model of the board or computer: ``Raspberry Pi 5 Model B Rev 1.0``, ``NVIDIA_DGX_Spark``."""


@dataclasses.dataclass(frozen=True)
class TegraFacts:
    """A Jetson's own sensors, from sysfs."""

    l4t: Reading[str]
    """36.4.4"""
    jetpack: Reading[str]
    """6.2.1, or ">= 6" when the L4T release is not in our table."""
    model: Reading[str]
    soc: Reading[str]
    """tegra194, tegra234, tegra264"""
    gpu_clock_mhz: Reading[int]
    gpu_clock_max_mhz: Reading[int]
    gpu_governor: Reading[str]
    gpu_load_percent: Reading[float]
    memory_clock_mhz: Reading[int]
    temperatures_celsius: Reading[dict[str, float]]
    temperature_celsius: Reading[float]
    """Headline: tj, then gpu."""
    power_watts: Reading[float]
    """VIN or VDD_IN where the board has it, else the sum of its rails."""
    power_rails_watts: Reading[dict[str, float]]
    power_mode: Reading[str]
    """Name of the nvpmodel mode, or its number. Read, never set."""
    nvmap_used_bytes: Reading[int]


@dataclasses.dataclass(frozen=True)
class DriverFacts:
    """State of NVML. ``problem`` says why it is missing or does not work, ``remedy`` what to do."""

    available: bool
    driver_version: Reading[str]
    nvml_version: Reading[str]
    cuda_driver_version: Reading[str]
    """13.0"""
    problem: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class TorchFacts:
    """What the installed torch can use."""

    version: Reading[str]
    cuda_version: Reading[str]
    """The CUDA that torch was built for; absent in a CPU build."""
    cuda_available: Reading[bool]
    """False or missing with the reason: a CPU build, a driver that is too old, no device."""


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """One device: the chosen GPU, or none, and the host.

    ``kind`` is what the hardware is, by the ``evidence`` listed; whether torch can train on it is another question
    (``gpu.cuda_index``). ``notes`` are sentences for the owner: everything that is missing, wrong or assumed.
    """

    kind: MemoryKind
    evidence: tuple[str, ...]
    gpu: GpuFacts | None
    gpus: tuple[GpuFacts, ...]
    host: HostFacts
    tegra: TegraFacts | None
    driver: DriverFacts
    torch: TorchFacts
    notes: tuple[str, ...]

    @property
    def trains_on_gpu(self) -> bool:
        """Whether torch can use the chosen GPU."""
        return self.gpu is not None and self.gpu.cuda_index is not None
