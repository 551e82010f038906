"""What to simulate: model, methods, fleet, data. `edgefed.simulation.config_file` reads it from a TOML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from edgefed.errors import ConfigError
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.methods.custom import is_location, load_method
from edgefed.methods.registry import make_method
from edgefed.protocol.messages import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Link:
    """A device's way to the aggregator: Mbit/s down and up, and the time of one way there and back in milliseconds."""

    down_mbit: float
    up_mbit: float
    latency_ms: float

    def __post_init__(self) -> None:
        for name in ("down_mbit", "up_mbit"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected Mbit/s above 0")
        if not 0 <= self.latency_ms < 1e5:
            raise ConfigError(f"latency-ms is {self.latency_ms}, expected milliseconds from 0")


LINKS: Mapping[str, Link] = MappingProxyType(
    {
        "lan": Link(1000, 1000, 1),
        "fibre": Link(500, 100, 8),
        "cable": Link(200, 15, 20),
        "dsl": Link(40, 8, 25),
        "5g": Link(150, 20, 30),
        "lte": Link(40, 8, 45),
        "starlink": Link(120, 12, 40),
        "wifi-bad": Link(20, 5, 60),
    }
)
"""Usual links. cable, 5g and lte are rounded from Ookla's medians for the US, 2021 to 2022; the others are assumed."""


@dataclasses.dataclass(frozen=True)
class SimulatedDevice:
    """One client. ``name`` is unique in the fleet; ``profile`` has its power mode and overrides in it already.

    ``memory_bytes`` None: what the profile leaves for training. ``host_memory_bytes``: of the machine around a discrete
    GPU. ``disk_*``: MB/s, None for what the profile says or its usual disk can.
    """

    name: str
    profile: DeviceProfile
    link: Link
    data: str
    memory_bytes: int | None = None
    expert_share: float = 1.0
    compute_share: float = 1.0
    host_memory_bytes: int = 32 << 30
    disk_read_mb_s: float | None = None
    disk_write_mb_s: float | None = None


@dataclasses.dataclass(frozen=True)
class MethodChoice:
    """A method with its options. ``label`` names the run in files and pictures."""

    method: str
    options: Mapping[str, float | int | str | bool] = dataclasses.field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        if is_location(self.method):
            object.__setattr__(self, "method", load_method(self.method))
        if make_method(self.method, self.options).personal:  # an unknown one is told before anything starts
            raise ConfigError(
                f"{self.method} trains models of the clients' own, which no cost shape describes",
                remedy="Leave it out of the methods; `edgefed demo` with `method=fedmoe` and `compare` compares it.",
            )
        object.__setattr__(self, "label", self.label or self.method)
        if not all(character.isalnum() or character in "-_." for character in self.label) or self.label[0] == ".":
            raise ConfigError(f"the label {self.label!r} names a folder: use letters, digits, '-', '_' and '.'")


@dataclasses.dataclass(frozen=True)
class SplitData:
    """One .jsonl file for all devices: records are dealt out by the field ``label``.

    ``alpha``: of the Dirichlet distribution over devices that each label's records are dealt by; None: each label goes
    to one device, in turn.
    """

    file: str
    label: str
    alpha: float | None = 0.5


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """A whole simulation. ``model``: "tiny" or what transformers loads; ``cost_shape``: None for the model's own.

    ``evaluation_tokens``: held-out tokens per client that the global model is evaluated on after each round.
    ``preinstalled``: every device has the model as it is before the first round and downloads what changes.
    ``target_loss``: quality whose time is looked for. ``server_mbit``: the aggregator's link, which all devices share.
    ``gpu_optimizer``: what devices with a GPU are charged with, "adamw" or "adamw_8bit".
    ``threads``: of torch; results of different numbers of threads may differ in the last bit.
    """

    fleet: tuple[SimulatedDevice, ...]
    methods: tuple[MethodChoice, ...]
    model: str = "tiny"
    cost_shape: str | None = None
    rounds: int = 5
    seed: int = 0
    training: TrainingConfig = TrainingConfig()
    split: SplitData | None = None
    held_out_share: float = 0.1
    evaluation_tokens: int = 4096
    preinstalled: bool = False
    target_loss: float | None = None
    server_mbit: float = 1000.0
    gpu_optimizer: str = "adamw_8bit"
    threads: int = 1

    def __post_init__(self) -> None:
        from edgefed.costs.shapes import KNOWN_SHAPES

        faults = []
        if not self.fleet:
            faults.append("the fleet is empty")
        if not self.methods:
            faults.append("no method is named")
        for what, names in (("devices", [d.name for d in self.fleet]), ("methods", [m.label for m in self.methods])):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                faults.append(f"two {what} are called {', '.join(twice)}")
        if self.cost_shape is not None and self.cost_shape not in KNOWN_SHAPES:
            faults.append(f"cost-shape is {self.cost_shape!r}, known are {', '.join(KNOWN_SHAPES)}")
        least = (("rounds", 1), ("threads", 1), ("seed", 0), ("evaluation_tokens", 1))
        faults += [f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least {low}" for name, low in least
                   if getattr(self, name) < low]  # fmt: skip
        if not 0 < self.held_out_share < 1:
            faults.append(f"held-out is {self.held_out_share}, expected a share between 0 and 1")
        if not 0 < self.server_mbit < 1e7:
            faults.append(f"server-mbit is {self.server_mbit}, expected Mbit/s above 0")
        if self.gpu_optimizer not in ("adamw", "adamw_8bit"):
            faults.append(f"gpu-optimizer is {self.gpu_optimizer!r}, expected adamw or adamw_8bit")
        if self.split is not None and self.split.alpha is not None and not 0 < self.split.alpha < 1e6:
            faults.append(f"alpha is {self.split.alpha}, expected a number above 0")
        faults += _training_faults(self.training)
        if faults:
            raise ConfigError("; ".join(faults))


def _training_faults(training: TrainingConfig) -> list[str]:
    counts = ("local_steps", "batch_size", "sequence_length", "lora_rank")
    faults = [f"{name.replace('_', '-')} is {getattr(training, name)}, expected at least 1" for name in counts
              if getattr(training, name) < 1]  # fmt: skip
    if not 0 < training.learning_rate < 1e3:
        faults.append(f"learning-rate is {training.learning_rate}, expected a number above 0")
    modes = ("full", "lora", "none")
    faults += [f"{name} is {getattr(training, name)!r}, expected {', '.join(modes)}"
               for name in ("experts", "router", "attention") if getattr(training, name) not in modes]  # fmt: skip
    if training.missing not in ("renormalize", "skip"):
        faults.append(f"missing is {training.missing!r}, expected renormalize or skip")
    return faults
