"""A simulation as a TOML file.

    model = "tiny"
    cost-shape = "OLMoE-1B-7B"          # whose memory, operations and bytes the devices are charged with
    methods = ["hfedmoe", { method = "random", label = "redrawn", options = { redraw = true } }]
    rounds = 10
    [training]
    local-steps = 10
    [data]
    sources = ["silo:asyncio", "silo:email", "silo:xml"]
    [[fleet]]
    profile = "rtx-4090"
    network = "fibre"
    [[fleet]]
    profile = "jetson-orin-nano-8gb"
    count = 2

Keys are in kebab-case, as on the command line. All errors of a file are reported at once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from edgefed.errors import ConfigError
from edgefed.hardware.memory import parse_bytes
from edgefed.hardware.profiles import effective, find_profile
from edgefed.protocol.messages import TrainingConfig
from edgefed.protocol.server_optimizer import ServerOptimizer
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig, SplitData

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Source = Annotated[str, msgspec.Meta(min_length=1)]
T = TypeVar("T", bound=msgspec.Struct)


class _Table(msgspec.Struct, rename="kebab", omit_defaults=True):
    """A table of the file."""


class _Method(_Table):
    method: str
    options: dict[str, float | int | str | bool] = {}
    label: str = ""


class _Data(_Table):
    """``sources`` for a device each, or one ``file`` that is split."""

    sources: list[Source] | None = None
    file: Source | None = None
    label: str | None = None
    split: Literal["dirichlet", "label"] | None = None
    alpha: float | None = None


class _Fleet(_Table):
    """``count`` equal devices."""

    profile: str
    count: Annotated[int, msgspec.Meta(ge=1)] = 1
    name: str | None = None
    power_mode: str | None = None
    network: str = "fibre"
    down_mbit: float | None = None
    up_mbit: float | None = None
    latency_ms: float | None = None
    memory: str | None = None
    host_memory: str = "32GiB"
    experts: Share = 1.0
    compute: Share = 1.0
    disk_read: Positive | None = None
    disk_write: Positive | None = None
    private: Literal["none", "adapter"] = "none"
    lora_rank: Annotated[int, msgspec.Meta(ge=1)] | None = None
    data: list[Source] = []

    def device(self, name: str, data: str) -> SimulatedDevice:
        """Raises ConfigError on an unknown network or memory size, UnknownProfile."""
        if self.network not in LINKS:
            raise ConfigError(f"fleet.network is {self.network!r}, expected one of {', '.join(LINKS)}")
        rates = {key: getattr(self, key) for key in ("down_mbit", "up_mbit", "latency_ms")}
        given = {key: value for key, value in rates.items() if value is not None}
        return SimulatedDevice(
            name=name,
            profile=effective(find_profile(self.profile), {}, self.power_mode),
            link=dataclasses.replace(LINKS[self.network], **given),
            data=data,
            memory_bytes=parse_bytes(self.memory) if self.memory is not None else None,
            expert_share=self.experts,
            compute_share=self.compute,
            host_memory_bytes=parse_bytes(self.host_memory),
            disk_read_mb_s=self.disk_read,
            disk_write_mb_s=self.disk_write,
            private=self.private,
            lora_rank=self.lora_rank,
        )


class _Settings(_Table):
    """The keys outside tables; those that are absent keep the defaults of `SimulationConfig`."""

    model: str | msgspec.UnsetType = msgspec.UNSET
    cost_shape: str | msgspec.UnsetType = msgspec.UNSET
    rounds: int | msgspec.UnsetType = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET
    held_out_share: float | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="held-out")
    evaluation_tokens: int | msgspec.UnsetType = msgspec.UNSET
    evaluate_devices: bool | msgspec.UnsetType = msgspec.UNSET
    preinstalled: bool | msgspec.UnsetType = msgspec.UNSET
    target_loss: float | msgspec.UnsetType = msgspec.UNSET
    server_mbit: float | msgspec.UnsetType = msgspec.UNSET
    gpu_optimizer: str | msgspec.UnsetType = msgspec.UNSET
    compression: str | msgspec.UnsetType = msgspec.UNSET
    download_compression: str | msgspec.UnsetType = msgspec.UNSET
    pace: float | msgspec.UnsetType = msgspec.UNSET
    threads: int | msgspec.UnsetType = msgspec.UNSET
    adapter_average: str | msgspec.UnsetType = msgspec.UNSET
    stop_after: int | msgspec.UnsetType = msgspec.UNSET


def load_simulation(path: Path) -> SimulationConfig:
    """Read a simulation from a TOML file. Data files are relative to it.

    Raises ConfigError that names every unknown key and invalid value.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    errors: list[str] = []
    config = _config(path, tables, errors)
    if config is None or errors:
        raise ConfigError(f"{path}: {'; '.join(errors)}")
    return config


def _config(path: Path, tables: dict[str, Any], errors: list[str]) -> SimulationConfig | None:
    """The configuration; None where it cannot be made. Appends to ``errors``."""
    parts = {name: tables.pop(name, None) for name in ("methods", "training", "data", "fleet", "server-optimizer")}
    settings = _read(_Settings, tables, "", errors)
    training = _read(TrainingConfig, parts["training"] or {}, "training.", errors)
    optimizer = None
    if parts["server-optimizer"] is not None:
        optimizer = _read(ServerOptimizer, parts["server-optimizer"], "server-optimizer.", errors)
    data = _read(_Data, parts["data"] or {}, "data.", errors)
    methods = list(_methods(parts["methods"], errors))
    entries = [_read(_Fleet, entry, "fleet.", errors) for entry in _entries("fleet", parts["fleet"], errors)]
    split = None
    if data is not None:
        try:
            split = _split(path, data)
        except ConfigError as error:
            errors.append(str(error))
    shared = list(data.sources or []) if data is not None else []
    fleet = list(_fleet(path, [entry for entry in entries if entry], shared, split, errors))
    if settings is None or training is None or errors:
        return None
    try:
        return SimulationConfig(
            fleet=tuple(fleet), methods=tuple(methods), split=split,
            training=training, server_optimizer=optimizer,
            **{name: value for name, value in msgspec.structs.asdict(settings).items() if value is not msgspec.UNSET},
        )  # fmt: skip
    except ConfigError as error:
        errors.append(str(error))
        return None


def _read(kind: type[T], table: object, prefix: str, errors: list[str]) -> T | None:
    """A table as ``kind``, each key checked on its own; None if a key is invalid or missing. Appends to ``errors``."""
    if not isinstance(table, dict):
        errors.append(f"{prefix.rstrip('.')} is {table!r}, expected a table")
        return None
    fields = {field.encode_name.replace("_", "-"): field for field in msgspec.structs.fields(kind)}
    found, values = len(errors), {}
    for key, value in table.items():
        if key not in fields:
            errors.append(f"unknown key {prefix}{key}, expected one of {', '.join(fields)}")
            continue
        try:
            values[fields[key].name] = msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            text = str(error)
            errors.append(f"{prefix}{key} is {value!r}: {text[:1].lower()}{text[1:]}")
    errors += [f"{prefix}{key} is missing" for key, field in fields.items() if field.required and key not in table]
    return kind(**values) if len(errors) == found else None


def _entries(name: str, value: object, errors: list[str]) -> list[Any]:
    if value is None or isinstance(value, list):
        return value or []
    errors.append(f"{name} is {value!r}, expected a list")
    return []


def _methods(value: object, errors: list[str]) -> Iterator[MethodChoice]:
    for entry in _entries("methods", value, errors):
        choice = _Method(entry) if isinstance(entry, str) else _read(_Method, entry, "methods.", errors)
        if choice is None:
            continue
        try:
            yield MethodChoice(choice.method, choice.options, choice.label)
        except ConfigError as error:
            errors.append(str(error))


def _split(path: Path, data: _Data) -> SplitData | None:
    if data.file is None:
        wrong = [key for key in ("label", "split", "alpha") if getattr(data, key) is not None]
        if wrong:
            raise ConfigError(f"data.{wrong[0]} needs data.file")
        return None
    if data.sources is not None or data.label is None:
        raise ConfigError("data needs either file and label, or sources")
    alpha = 0.5 if data.alpha is None else data.alpha
    return SplitData(_relative(path, data.file), data.label, None if data.split == "label" else alpha)


def _fleet(
    path: Path, entries: list[_Fleet], shared: list[str], split: SplitData | None, errors: list[str]
) -> Iterator[SimulatedDevice]:
    """The devices, each with data of its own: of its entry, of the split file, or the next of ``shared``."""
    numbers: dict[str, int] = {}
    total = 0
    for entry in entries:
        for index in range(entry.count):
            base = entry.name or entry.profile
            numbers[base] = numbers.get(base, 0) + 1
            name = base if entry.count == 1 and entry.name else f"{base}-{numbers[base]}"
            total += 1
            if entry.data:
                data = _relative(path, entry.data[index % len(entry.data)])
            elif split is not None:
                data = ""  # dealt out later
            elif shared:
                data = _relative(path, shared.pop(0))
            else:
                errors.append(f"no data for device {total}: add to data.sources")
                return
            try:
                yield entry.device(name, data)
            except ConfigError as error:
                errors.append(str(error))
                break  # the same for every device of this entry


def _relative(path: Path, source: str) -> str:
    """A source of data as `load_corpus` takes it; files are relative to ``path``'s folder."""
    return source if source.startswith("silo:") else str(path.parent / Path(source).expanduser())
