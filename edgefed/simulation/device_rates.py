"""What a simulated device can do, from its profile: peaks, and the share of them that real work achieves."""

from __future__ import annotations

import dataclasses

from edgefed.errors import ConfigError
from edgefed.hardware.budget import plan_budget
from edgefed.hardware.facts import MemoryKind
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.hardware.profiles import facts_of
from edgefed.simulation.config import Link, SimulatedDevice

DISKS = (
    ("nvme gen5", 10_000.0, 8_000.0),
    ("nvme gen4", 5_000.0, 4_000.0),
    ("nvme gen3", 2_500.0, 1_800.0),
    ("nvme gen2", 400.0, 400.0),
    ("nvme", 2_500.0, 1_800.0),
    ("sata", 500.0, 450.0),
    ("microsd", 90.0, 30.0),
)
"""(words in a profile's usual disk, MB/s read, written); sequential, assumed. The first that matches counts."""
UNKNOWN_DISK = (500.0, 450.0)
LINK_SHARE = 0.8
"""Of a link's rate that copies from pinned memory reach, assumed."""
HOST_LINK_GB_S = 12.0
"""From host memory to a GPU whose profile does not say: PCIe 3.0 x16 as it is reached from pinned memory, assumed."""
HOST_MEMORY_GB_S = 40.0
"""Host memory beside a discrete GPU: two channels of DDR4-3200 as they are reached, assumed."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Share of the roofline's speed that work achieves, by phase, from one measured step.

    The defaults are those of `benchmarks/results/virtual_clock.json`: a step of a model with experts half as large as
    OLMoE-1B-7B's, with the CPU kernels. They are taken for other devices as well, whose peaks are their profiles':
    kernels are assumed to be as far from their limit everywhere.
    """

    forward: float = 0.83
    backward: float = 0.70
    optimizer: float = 0.47
    origin: str = "benchmarks/results/virtual_clock.json"

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "optimizer"):
            if not 0 < getattr(self, name) <= 2:
                raise ConfigError(f"calibration: {name} is {getattr(self, name)}, expected a share of the roofline")


@dataclasses.dataclass(frozen=True)
class DeviceRates:
    """Peaks in operations and bytes per second. ``host_link``: from host memory, None where there is only one memory.

    ``offload_bytes``: memory for what is offloaded before the disk has to take it; on a device with one memory, none.
    """

    kind: MemoryKind
    flops_half: float
    flops_single: float
    bandwidth: float
    link: Link
    disk_read: float
    disk_write: float
    host_link: float | None
    host_bandwidth: float
    offload_bytes: int

    def flops(self, width: int) -> float:
        """Operations per second with numbers of ``width`` bytes."""
        return self.flops_half if width <= 2 else self.flops_single


def device_rates(device: SimulatedDevice) -> DeviceRates:
    """Raises ConfigError when the profile states too little."""
    profile = device.profile
    single = profile.value("fp32_tflops")
    half = max((profile.value(name) or 0.0 for name in ("bf16_tflops", "fp16_tflops")), default=0.0) or single
    bandwidth = profile.value("bandwidth")
    if not half or not bandwidth:
        raise ConfigError(
            f"profile {profile.id} states no {'bandwidth' if half else 'TFLOPS that edgefed can use'}: "
            f"its speed cannot be simulated"
        )
    read, write = _disk(profile)
    discrete = profile.kind is MemoryKind.DISCRETE
    pcie = profile.value("host_link")
    link = (LINK_SHARE * pcie if pcie else HOST_LINK_GB_S) * 1e9 if discrete else None
    return DeviceRates(
        kind=profile.kind,
        flops_half=half * 1e12,
        flops_single=(single or half / 2) * 1e12,
        bandwidth=bandwidth * 1e9,
        link=device.link,
        disk_read=(device.disk_read_mb_s or profile.value("disk_read") or read) * 1e6,
        disk_write=(device.disk_write_mb_s or profile.value("disk_write") or write) * 1e6,
        host_link=link,
        host_bandwidth=HOST_MEMORY_GB_S * 1e9 if discrete else bandwidth * 1e9,
        offload_bytes=device.host_memory_bytes if discrete else 0,
    )


def _disk(profile: DeviceProfile) -> tuple[float, float]:
    words = profile.typical_disk.lower()
    return next(((read, write) for name, read, write in DISKS if name in words), UNKNOWN_DISK)


def memory_budget(device: SimulatedDevice) -> int:
    """Bytes that training may use: the owner's limit, or what the idle device leaves. Raises ConfigError."""
    budget = plan_budget(facts_of(device.profile), override_bytes=device.memory_bytes)
    if budget.now_bytes is None:
        raise ConfigError(f"how much memory {device.name} has for training is unknown: {budget.origin}")
    return budget.now_bytes
