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

Keys are in kebab-case, as on the command line. Every fault of a file is told at once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from edgefed.errors import ConfigError
from edgefed.hardware.memory import parse_bytes
from edgefed.hardware.profiles import effective, find_profile
from edgefed.protocol.messages import TrainingConfig
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig, SplitData

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_TOP = {
    "model": str, "cost-shape": str, "rounds": int, "seed": int, "held-out": float, "evaluation-tokens": int,
    "preinstalled": bool, "target-loss": float, "server-mbit": float, "gpu-optimizer": str, "threads": int,
}  # fmt: skip
_FIELDS = {"held-out": "held_out_share"}
_TRAINING = {
    field.name.replace("_", "-"): {"float": float, "int": int, "str": str}[getattr(field.type, "__name__", field.type)]
    for field in msgspec.structs.fields(TrainingConfig)
}
_FLEET = {
    "profile": str, "count": int, "name": str, "power-mode": str, "network": str, "down-mbit": float, "up-mbit": float,
    "latency-ms": float, "memory": str, "host-memory": str, "experts": float, "compute": float, "disk-read": float,
    "disk-write": float, "data": list,
}  # fmt: skip
_DATA = {"sources": list, "file": str, "label": str, "split": str, "alpha": float}
_METHOD = {"method": str, "label": str, "options": dict}


def load_simulation(path: Path) -> SimulationConfig:
    """Read a simulation from a TOML file. Data files are relative to it.

    Raises ConfigError that names every unknown key and impossible value, UnknownMethod, UnknownProfile.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return _Reader(path).config(tables)


class _Reader:
    """Takes a configuration out of parsed TOML and collects what is wrong with it."""

    def __init__(self, path: Path):
        self._path = path
        self._faults: list[str] = []
        self._numbers: dict[str, int] = {}

    def config(self, tables: dict) -> SimulationConfig:
        parts = {name: tables.pop(name, None) for name in ("methods", "training", "data", "fleet")}
        top = self._checked("", tables, _TOP)
        training = self._checked("training.", self._table("training", parts["training"]), _TRAINING)
        data = self._checked("data.", self._table("data", parts["data"]), _DATA)
        split = self._attempt(lambda: self._split(data))
        methods = [choice for entry in self._list("methods", parts["methods"])
                   if (choice := self._attempt(lambda entry=entry: self._method(entry)))]  # fmt: skip
        fleet = self._fleet(self._list("fleet", parts["fleet"]), data, split)
        fields = {_FIELDS.get(key, key.replace("-", "_")): value for key, value in top.items()}
        fields["training"] = TrainingConfig(**{key.replace("-", "_"): value for key, value in training.items()})
        if self._faults:
            raise ConfigError(f"{self._path}: {'; '.join(self._faults)}")
        try:
            return SimulationConfig(fleet=tuple(fleet), methods=tuple(methods), split=split, **fields)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error}") from None

    def _method(self, entry: object) -> MethodChoice:
        if isinstance(entry, str):
            return MethodChoice(entry)
        table = self._checked("methods.", self._table("an entry of methods", entry), _METHOD)
        if "method" not in table:
            raise ConfigError("an entry of methods names no method")
        return MethodChoice(table["method"], table.get("options", {}), table.get("label", ""))

    def _split(self, data: dict) -> SplitData | None:
        if "file" not in data:
            wrong = [key for key in ("label", "split", "alpha") if key in data]
            if wrong:
                raise ConfigError(f"data.{wrong[0]} needs data.file")
            return None
        if "sources" in data or "label" not in data:
            raise ConfigError("data has file and label, or sources")
        how = data.get("split", "dirichlet")
        if how not in ("dirichlet", "label"):
            raise ConfigError(f"data.split is {how!r}, expected dirichlet or label")
        return SplitData(
            self._source(data["file"]), data["label"], data.get("alpha", 0.5) if how == "dirichlet" else None
        )

    def _fleet(self, entries: list, data: dict, split: SplitData | None) -> list[SimulatedDevice]:
        devices: list[SimulatedDevice] = []
        shared = [self._source(source) for source in data.get("sources", [])]
        for entry in entries:
            table = self._checked("fleet.", self._table("an entry of fleet", entry), _FLEET)
            own, count = [self._source(source) for source in table.get("data", [])], table.get("count", 1)
            if count < 1:
                self._faults.append(f"fleet.count is {count}, expected at least 1")
            for index in range(count):
                name = self._name(table, count)
                if own:
                    source = own[index % len(own)]
                elif split is not None:
                    source = ""  # dealt out later
                elif shared:
                    source = shared.pop(0)
                else:
                    self._faults.append(f"there is no data for device {len(devices) + 1}: add to data.sources")
                    return devices
                device = self._attempt(lambda table=table, name=name, source=source: _device(table, name, source))
                if device is None:
                    break  # the same fault for all of this entry
                devices.append(device)
        return devices

    def _name(self, table: Mapping, count: int) -> str:
        """The entry's own name, if it is one device's; else numbered, from 1."""
        base = table.get("name") or table.get("profile", "?")
        self._numbers[base] = self._numbers.get(base, 0) + 1
        return base if count == 1 and "name" in table else f"{base}-{self._numbers[base]}"

    def _source(self, source: object) -> str:
        if not isinstance(source, str) or not source:
            self._faults.append(f"{source!r} is no source of data: expected a file or silo:NAME")
            return ""
        return source if source.startswith("silo:") else str(self._path.parent / Path(source).expanduser())

    def _attempt(self, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except ConfigError as error:
            self._faults.append(str(error))
            return None

    def _table(self, name: str, value: object) -> dict:
        if value is None or isinstance(value, dict):
            return value or {}
        self._faults.append(f"{name} is {value!r}, expected a table")
        return {}

    def _list(self, name: str, value: object) -> list:
        if value is None or isinstance(value, list):
            return value or []
        self._faults.append(f"{name} is {value!r}, expected a list")
        return []

    def _checked(self, prefix: str, table: Mapping[str, object], known: Mapping[str, type]) -> dict:
        """The entries of ``table`` that are right; faults for the others."""
        found: dict = {}
        for key, value in table.items():
            kind = known.get(key)
            if kind is None:
                self._faults.append(f"{prefix}{key} is no setting; there are {', '.join(known)}")
            elif not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (
                kind is bool
            ):
                self._faults.append(f"{prefix}{key} is {value!r}, expected {_WORDS[kind]}")
            else:
                found[key] = float(value) if kind is float else value
        return found


_WORDS = {
    bool: "true or false",
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a table",
}


def _device(table: Mapping, name: str, data: str) -> SimulatedDevice:
    if "profile" not in table:
        raise ConfigError("an entry of fleet names no profile")
    profile = effective(find_profile(table["profile"]), {}, table.get("power-mode"))
    network = table.get("network", "fibre")
    if network not in LINKS:
        raise ConfigError(f"fleet.network is {network!r}, known are {', '.join(LINKS)}")
    given = {key.replace("-", "_"): table[key] for key in ("down-mbit", "up-mbit", "latency-ms") if key in table}
    for key in ("experts", "compute"):
        if not 0 < table.get(key, 1.0) <= 1:
            raise ConfigError(f"fleet.{key} is {table[key]}, expected a share above 0 up to 1")
    for key in ("disk-read", "disk-write"):
        if not table.get(key, 1.0) > 0:
            raise ConfigError(f"fleet.{key} is {table[key]}, expected MB/s above 0")
    return SimulatedDevice(
        name=name,
        profile=profile,
        link=dataclasses.replace(LINKS[network], **given),
        data=data,
        memory_bytes=parse_bytes(table["memory"]) if "memory" in table else None,
        expert_share=table.get("experts", 1.0),
        compute_share=table.get("compute", 1.0),
        host_memory_bytes=parse_bytes(table.get("host-memory", "32GiB")),
        disk_read_mb_s=table.get("disk-read"),
        disk_write_mb_s=table.get("disk-write"),
    )
