"""Configuration of a simulation: model, methods, fleet, data, and the split of one data file among the devices.

`edgefed.simulation.config_file` reads it from a TOML file.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.disk import disk_errors
from edgefed.errors import ConfigError, DataError
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.methods.custom import is_location, load_method
from edgefed.methods.pace import check_pace
from edgefed.methods.registry import make_method
from edgefed.protocol.changes import DOWNLOADS
from edgefed.protocol.frames import COMPRESSIONS
from edgefed.protocol.messages import TrainingConfig
from edgefed.protocol.server_optimizer import ServerOptimizer


@dataclasses.dataclass(frozen=True)
class Link:
    """Connection of a device to the aggregator: Mbit/s down and up, and the round-trip time in milliseconds."""

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
    """One client.

    Attributes:
        name: Unique in the fleet.
        profile: Device profile, with the power mode and overrides applied.
        link: Connection to the aggregator.
        data: File or silo of the device's text.
        memory_bytes: Memory for training. None: what the profile leaves.
        expert_share: Largest share of the experts that the device has at a time.
        compute_share: Largest share of them that train in a step.
        host_memory_bytes: Memory of the machine around a discrete GPU.
        disk_read_mb_s: Disk reads in MB/s. None: from the profile, or usual for its disk.
        disk_write_mb_s: Disk writes, likewise.
        private: "adapter": the device has a private part (`edgefed.trainer.private_part`); or "none".
        lora_rank: Rank of its adapters. None: that of the run, or what memory has room for.
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
    private: Literal["none", "adapter"] = "none"
    lora_rank: int | None = None


@dataclasses.dataclass(frozen=True)
class MethodChoice:
    """A method with its options. ``label`` names the run in files and pictures."""

    method: str
    options: Mapping[str, float | int | str | bool] = dataclasses.field(default_factory=dict)
    label: str = ""
    location: str = dataclasses.field(default="", init=False)
    """Where a class of the user's own is, file.py:Class or module:Class."""

    def __post_init__(self) -> None:
        if is_location(self.method):
            object.__setattr__(self, "location", self.method)
            object.__setattr__(self, "method", load_method(self.method))
        if make_method(self.method, self.options).personal:  # raises ConfigError for an unknown method
            raise ConfigError(
                f"{self.method} cannot be simulated with a device clock: its clients train their own models",
                remedy="Remove it from the methods; `edgefed demo` with `method=fedmoe` and `compare` runs it.",
            )
        object.__setattr__(self, "label", self.label or self.method)
        if not all(character.isalnum() or character in "-_." for character in self.label) or self.label[0] == ".":
            raise ConfigError(
                f"invalid label {self.label!r}: it becomes a folder name; use letters, digits, '-', '_' and '.'"
            )


@dataclasses.dataclass(frozen=True)
class SplitData:
    """One .jsonl file for all devices, split by the field ``label`` (`split_records`).

    ``alpha``: parameter of the Dirichlet distribution over devices. None: each label goes to one device.
    """

    file: str
    label: str
    alpha: float | None = 0.5


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """A simulation.

    Attributes:
        fleet: The devices.
        methods: The methods, which run one after another on the same fleet.
        model: "tiny", a checkpoint folder or a hub id.
        cost_shape: Name of the model whose size determines memory and time. None: ``model`` itself.
        rounds: Rounds of each method.
        seed: Of every random draw.
        training: Settings of local training.
        server_optimizer: What makes the next model from the aggregate of a round. None: that is the next model.
        adapter_average: What is averaged of LoRA adapters, "product", "factors" or "alternate".
        stop_after: A run ends with its best model after this many rounds without a better held-out loss, which devices
            then measure. None: it plays all rounds.
        split: One data file for all devices. None: each device has its own.
        held_out_share: Share of each device's data for evaluation.
        evaluation_tokens: Held-out tokens per client for the evaluation of the global model after each round.
        evaluate_devices: Also measure the held-out loss of what each device holds, before and after its training.
        preinstalled: Devices have the initial model before the first round and download only what changed.
        target_loss: Report the time until this loss is reached.
        server_mbit: Mbit/s of the aggregator's link, which all devices share.
        gpu_optimizer: Optimizer whose costs GPUs are charged with, "adamw" or "adamw_8bit".
        compression: How updates are sent, one of `protocol.frames.COMPRESSIONS`.
        download_compression: How far the model moves in a round, one of `protocol.changes.DOWNLOADS`.
        pace: Devices train at most what they can exchange in the fleet's time (`methods.pace`) times this; 0: no limit.
        threads: Threads of torch; the last bit of results can depend on their number.
    """

    fleet: tuple[SimulatedDevice, ...]
    methods: tuple[MethodChoice, ...]
    model: str = "tiny"
    cost_shape: str | None = None
    rounds: int = 5
    seed: int = 0
    training: TrainingConfig = TrainingConfig()
    server_optimizer: ServerOptimizer | None = None
    adapter_average: str = "factors"
    stop_after: int | None = None
    split: SplitData | None = None
    held_out_share: float = 0.1
    evaluation_tokens: int = 4096
    evaluate_devices: bool = False
    preinstalled: bool = False
    target_loss: float | None = None
    server_mbit: float = 1000.0
    gpu_optimizer: str = "adamw_8bit"
    compression: str = "none"
    download_compression: str = "none"
    pace: float = 0.0
    threads: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not self.fleet:
            problems.append("fleet is empty, expected at least one device")
        if not self.methods:
            problems.append("methods is empty, expected at least one")
        for what, names in (("devices", [d.name for d in self.fleet]), ("methods", [m.label for m in self.methods])):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                problems.append(f"duplicate names of {what}: {', '.join(twice)}")
        if self.cost_shape is not None and self.cost_shape not in KNOWN_SHAPES:
            problems.append(f"cost-shape is {self.cost_shape!r}, expected one of {', '.join(KNOWN_SHAPES)}")
        least = (("rounds", 1), ("threads", 1), ("seed", 0), ("evaluation_tokens", 1))
        problems += [
            f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least {low}"
            for name, low in least
            if getattr(self, name) < low
        ]
        if self.stop_after is not None and self.stop_after < 1:
            problems.append(f"stop-after is {self.stop_after}, expected at least 1")
        if not 0 < self.held_out_share < 1:
            problems.append(f"held-out is {self.held_out_share}, expected a share between 0 and 1")
        if not 0 < self.server_mbit < 1e7:
            problems.append(f"server-mbit is {self.server_mbit}, expected Mbit/s above 0")
        if self.gpu_optimizer not in ("adamw", "adamw_8bit"):
            problems.append(f"gpu-optimizer is {self.gpu_optimizer!r}, expected adamw or adamw_8bit")
        if self.compression not in COMPRESSIONS:
            problems.append(f"compression is {self.compression!r}, expected one of {', '.join(COMPRESSIONS)}")
        if self.download_compression not in DOWNLOADS:
            known = ", ".join(DOWNLOADS)
            problems.append(f"download-compression is {self.download_compression!r}, expected one of {known}")
        if self.split is not None and self.split.alpha is not None and not 0 < self.split.alpha < 1e6:
            problems.append(f"alpha is {self.split.alpha}, expected a number above 0")
        problems += _training_problems(self.training)
        problems += [text.replace("_", "-").replace("`", "") for text in self.training.problems(self.rounds)]
        if self.adapter_average not in ("product", "factors", "alternate"):
            problems.append(f"adapter-average is {self.adapter_average!r}, expected product, factors or alternate")
        if self.server_optimizer is not None:
            problems += [text.replace("`", "") for text in self.server_optimizer.problems()]
        if problems:
            raise ConfigError("; ".join(problems))
        for choice in self.methods:
            check_pace(make_method(choice.method, choice.options), self.pace)


def _training_problems(training: TrainingConfig) -> list[str]:
    counts = ("local_steps", "batch_size", "sequence_length", "lora_rank")
    problems = [f"{name.replace('_', '-')} is {getattr(training, name)}, expected at least 1" for name in counts
              if getattr(training, name) < 1]  # fmt: skip
    if not 0 < training.learning_rate < 1e3:
        problems.append(f"learning-rate is {training.learning_rate}, expected a number above 0")
    modes = ("full", "lora", "none")
    problems += [f"{name} is {getattr(training, name)!r}, expected one of {', '.join(modes)}"
               for name in ("experts", "router", "attention") if getattr(training, name) not in modes]  # fmt: skip
    if training.missing not in ("renormalize", "skip"):
        problems.append(f"missing is {training.missing!r}, expected renormalize or skip")
    return problems


FEWEST_RECORDS = 4
"""Fewest records of a device: with fewer, a held-out share would be empty."""


def split_records(split: SplitData, names: Sequence[str], folder: Path, seed: int) -> dict[str, str]:
    """Split the records of a file among devices. Write ``folder/NAME.jsonl`` for each; return {name: path}.

    With ``alpha``, the records of each label are divided by shares drawn from Dirichlet(alpha). Without it, each label
    goes to one device: the largest labels first, each to the device with the fewest records so far. Every record goes
    to exactly one device. The same file, names and seed give the same result.

    Raises:
        DataError: the file cannot be used, or a device would get fewer than `FEWEST_RECORDS` records.
    """
    by_label = _records_by_label(split)
    rng = np.random.default_rng([seed, 0x5EED])
    parts: list[list[str]] = [[] for _ in names]
    if split.alpha is None:
        for label in sorted(by_label, key=lambda label: (-len(by_label[label]), label)):
            min(parts, key=len).extend(by_label[label])
    else:
        for label in sorted(by_label):
            lines = [by_label[label][index] for index in rng.permutation(len(by_label[label]))]
            bounds = np.round(np.cumsum(rng.dirichlet([split.alpha] * len(names))) * len(lines)).astype(int)
            for part, start, end in zip(parts, [0, *bounds[:-1]], bounds, strict=True):
                part.extend(lines[start:end])
    for name, part in zip(names, parts, strict=True):
        if len(part) < FEWEST_RECORDS:
            raise DataError(
                f"{split.file}: too few records: device {name} would get {len(part)} of {sum(map(len, parts))}, and "
                f"needs at least {FEWEST_RECORDS}",
                remedy="Use fewer devices, a larger alpha, or a file with more records or labels.",
            )
    paths = {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in zip(names, parts, strict=True):
            path = folder / f"{name}.jsonl"
            path.write_text("".join(part[index] + "\n" for index in rng.permutation(len(part))), encoding="utf-8")
            paths[name] = str(path)
    return paths


def _records_by_label(split: SplitData) -> dict[str, list[str]]:
    """Read the file's lines by label."""
    path = Path(split.file)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"cannot split {path}: expected a .jsonl or .jsonl.gz file with a field {split.label!r}")
    by_label: dict[str, list[str]] = defaultdict(list)
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get(split.label), (str, int)):
                    raise DataError(f"{path} line {number}: field {split.label!r} must be a string or an integer")
                by_label[str(record[split.label])].append(line.strip().decode("utf-8"))
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except ValueError as error:  # JSON and UTF-8
        raise DataError(f"{path} line {number}: invalid JSON or UTF-8: {error}") from error
    if not by_label:
        raise DataError(f"{path} is empty: no record found")
    return by_label
