"""What a simulated device is charged with: its speed and memory, and the model whose work is counted.

**Rates** come from the device's profile: peaks, and the share of them that real work achieves.

**The cost shape** is the model that devices are charged with. A model small enough to be trained thirty times on one
machine is never short of anything on a real device, so training runs on a small model while memory, operations and
bytes are those of a larger one, such as OLMoE-1B-7B. Layers and experts correspond in proportion: MoE layer j of L' in
the cost shape stands for layer floor(j L / L') of the model, and a device with a quarter of that layer's experts is
charged with a quarter of these. Tokens, steps and sequences are the same in both. Arithmetic only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgefed.costs.shapes import LayerShape, ModelShape
from edgefed.costs.step_setup import ADAPTER_BYTES, StepSetup
from edgefed.errors import ConfigError
from edgefed.hardware.budget import plan_budget
from edgefed.hardware.facts import MemoryKind
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.hardware.profiles import facts_of
from edgefed.moe.units import LORA_SUFFIX
from edgefed.protocol import frames
from edgefed.protocol.alternation import LORA_A
from edgefed.protocol.messages import UnitInfo
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


# --- the cost shape ---------------------------------------------------------------------------------------------------

STEP_DEVICES: Mapping[MemoryKind, str] = {
    MemoryKind.DISCRETE: "cuda",
    MemoryKind.UNIFIED: "unified",
    MemoryKind.CPU: "cpu",
}
FILE = "file"
"""Kind of what is no unit: config.json, tokenizer.json, ..."""


def byte_kind(unit: UnitInfo) -> str:
    """``expert``, ``router`` or ``dense``, with ``:lora`` behind it for an adapter."""
    return unit.kind + (LORA_SUFFIX if unit.key.endswith(LORA_SUFFIX) else "")


def uploaded_bytes(path: Path, units: Mapping[str, UnitInfo], width: int) -> dict[str, int]:
    """Bytes of an update by kind of unit.

    Encoded tensors have as many bits a value whatever the dtype of the weights: they are counted as if the model had
    ``width`` bytes a value, as the cost shape has.
    """
    sizes: dict[str, int] = {}
    for name, entry in frames.read_header(path).items():
        key, tensor, codec = frames.split_update_name(name)
        kind, scale = byte_kind(units[key]), 1.0
        if codec and not kind.endswith(LORA_SUFFIX):  # adapters have float32 in both
            own = next(frames.ITEM_BYTES[info.dtype] for info in units[key].tensors if info.name == tensor)
            scale = own / width
        sizes[kind] = sizes.get(kind, 0) + round(entry.size_bytes * scale)
    return sizes


@dataclasses.dataclass(frozen=True)
class CostShape:
    """``shape`` is what is charged; ``experts_per_layer`` are the model's own.

    ``dtype``: of weights and activations in the cost shape; None: as the model's own. ``gpu_optimizer``: see `setup`.
    """

    shape: ModelShape
    experts_per_layer: tuple[int, ...]
    dtype: str | None = "bfloat16"
    gpu_optimizer: str = "adamw_8bit"

    @classmethod
    def same(cls, shape: ModelShape, gpu_optimizer: str = "adamw_8bit") -> CostShape:
        """The model is charged with what it is."""
        return cls(shape, shape.experts_per_layer, None, gpu_optimizer)

    def sliced(self, shares: Sequence[float]) -> CostShape:
        """With slices of experts: ``shares`` of their neurons per MoE layer of the model, () for whole experts."""
        return dataclasses.replace(self, shape=self.shape.sliced(self.shares(shares))) if shares else self

    @property
    def experts_ratio(self) -> float:
        """Experts of the cost shape for each of the model's."""
        return sum(self.shape.experts_per_layer) / sum(self.experts_per_layer)

    def layer_of(self, layer: int) -> int:
        """The model's MoE layer that stands for MoE layer ``layer`` of the cost shape."""
        return layer * len(self.experts_per_layer) // len(self.shape.experts_per_layer)

    def counts(self, counts: Sequence[float]) -> tuple[int, ...]:
        """Experts per MoE layer of the cost shape, for ``counts`` of the model's; rounded up, so none becomes none."""
        found = []
        for layer, size in enumerate(self.shape.experts_per_layer):
            at = self.layer_of(layer)
            found.append(min(size, -int(-counts[at] * size // self.experts_per_layer[at])))
        return tuple(found)

    def shares(self, shares: Sequence[float]) -> tuple[float, ...]:
        """A number of each of the model's MoE layers, for each of the cost shape."""
        return tuple(shares[self.layer_of(layer)] for layer in range(len(self.shape.experts_per_layer)))

    def setup(self, setup: StepSetup, kind: MemoryKind) -> StepSetup:
        """How a step is done on a device of this ``kind`` that is done so with the model here.

        ``gpu_optimizer`` counts on GPUs whatever is installed here: 8-bit moments barely change the training.
        """
        optimizer = setup.optimizer if kind is MemoryKind.CPU else self.gpu_optimizer
        return dataclasses.replace(
            setup, dtype=self.dtype or setup.dtype, device=STEP_DEVICES[kind], optimizer=optimizer
        )

    def byte_ratios(self, units: Sequence[UnitInfo], setup: StepSetup) -> dict[str, float]:
        """Bytes of the cost shape per byte of the model, by kind of unit; 1 for files, and where a kind has none.

        Both have adapters of the run's rank, also for a device of a smaller one.
        """
        own: dict[str, int] = {}
        for unit in units:
            own[byte_kind(unit)] = own.get(byte_kind(unit), 0) + unit.size_bytes
        of_run = (info.shape[0] for unit in units for info in unit.tensors if info.name.endswith(LORA_A))
        charged = _bytes_by_kind(self.shape, dataclasses.replace(setup, lora_rank=next(of_run, setup.lora_rank)))
        ratios = {kind: charged[kind] / size if charged.get(kind) else 1.0 for kind, size in own.items() if size}
        return {FILE: 1.0, **ratios}


def _bytes_by_kind(shape: ModelShape, setup: StepSetup) -> dict[str, float]:
    """Bytes that cross a network for the whole model, as it is stored by the aggregator: nothing quantized."""

    def adapters(pairs: Sequence[tuple[int, int]]) -> int:
        return ADAPTER_BYTES * sum(setup.lora_rank * (size_in + size_out) for size_in, size_out in pairs)

    def total(size: Callable[[LayerShape], float]) -> float:
        return float(sum(size(layer) for layer in shape.layers))

    def routers(layer: LayerShape) -> int:
        return sum(i * o for i, o in layer.router_matrices) + sum(layer.router_vectors)

    experts = total(lambda layer: layer.num_experts * layer.parameters_per_expert)
    return {
        "expert": experts * setup.width,
        "router": total(routers) * setup.width,
        "dense": (shape.num_parameters - experts - total(routers)) * setup.width + shape.own_dtype_bytes,
        "expert:lora": total(lambda layer: layer.num_experts * adapters(layer.expert_matrices)),
        "router:lora": total(lambda layer: adapters(layer.router_matrices)),
        "dense:lora": total(lambda layer: adapters(layer.attention_matrices)),
    }
