"""The format of a device profile: a TOML file of facts about one kind of device, each number with where it is from.

    schema = "edgefed.profile/1"
    id = "rtx-3060-12gb"
    name = "NVIDIA GeForce RTX 3060"
    kind = "discrete"                        # discrete, unified, cpu
    [match]
    gpu = ["rtx 3060"]                       # also board, cpu: see `edgefed.hardware.profiles`
    [typical]
    disk = "NVMe gen3 or gen4"               # words for people; also network
    [figures]
    memory_visible = { value = 12, unit = "GiB", basis = "datasheet", source = "..." }
    [[power_modes]]                          # a Jetson's: which figures another mode changes
    name = "15W"
    bandwidth = { value = 68, unit = "GB/s", basis = "datasheet", source = "..." }

A file is read strictly: an unknown key, a wrong unit, a number out of range is an error that names file and key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any, Literal, overload

from edgefed.errors import ConfigError
from edgefed.hardware.facts import MemoryKind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

SCHEMA = "edgefed.profile/1"
ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
BASES = ("datasheet", "measured", "derived")
"""Its maker says so; somebody ran it; follows from other figures by a rule, or from memory (``note`` says which)."""

_TFLOPS = ("TFLOPS", 0.001, 20_000.0)
FIGURES: dict[str, tuple[str, float, float] | type] = {
    "memory_total": ("GB", 0.1, 8192.0),  # on the label
    "memory_visible": ("GiB", 0.1, 8192.0),  # what the driver, or MemTotal, says
    "memory_idle": ("GiB", 0.0, 512.0),  # in use with nothing but the system and its desktop
    "bandwidth": ("GB/s", 0.5, 50_000.0),
    "shared_memory": ("KiB", 16.0, 4096.0),  # of one thread block, opted in
    "capability": str,  # CUDA compute capability
    "bf16": bool,  # in hardware
    "bf16_tflops": _TFLOPS,  # dense, fp32 accumulation, as all below
    "fp16_tflops": _TFLOPS,
    "fp32_tflops": _TFLOPS,
    "int8_tops": ("TOPS", 0.001, 40_000.0),
    "metal_fp16_tflops": _TFLOPS,  # an Apple GPU's, which edgefed does not use
    "power_limit": ("W", 0.5, 5000.0),
    "gpu_clock": ("MHz", 10.0, 10_000.0),
    "host_link": ("GB/s", 0.1, 2_000.0),  # one way, between host memory and a GPU's own
    "disk_read": ("MB/s", 0.1, 100_000.0),
    "disk_write": ("MB/s", 0.1, 100_000.0),
    "network": ("Mbit/s", 0.01, 1_000_000.0),
    "cpu_count": ("processors", 1.0, 4096.0),
}
"""Figure that a profile may state -> (unit, lowest, highest), or its type if it is not a quantity."""

REQUIRED = ("memory_visible", "memory_idle")
IN_POWER_MODE = (
    "bandwidth", "bf16_tflops", "fp16_tflops", "fp32_tflops", "int8_tops", "power_limit", "gpu_clock",
)  # fmt: skip
"""Figures that a power mode may change."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One fact. ``low`` and ``high`` bound it where sources, or machines, differ."""

    value: float | bool | str
    unit: str
    basis: str
    source: str
    note: str = ""
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class MatchRule:
    """How a device is recognised; `edgefed.hardware.profiles.match_profile` says what is compared."""

    gpu: tuple[str, ...] = ()
    board: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    any_memory: bool = False
    fallback_cpus: int = 0
    """Taken for a host that nothing else matches and that has at most so many processors; 0 for never."""


@dataclasses.dataclass(frozen=True)
class PowerMode:
    """A mode by its nvpmodel name, and the figures that it changes."""

    name: str
    figures: Mapping[str, Figure]


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """One kind of device. ``figures`` are those of its fastest power mode."""

    id: str
    name: str
    kind: MemoryKind
    figures: Mapping[str, Figure]
    aliases: tuple[str, ...] = ()
    match: MatchRule = MatchRule()
    typical_disk: str = ""
    typical_network: str = ""
    display: bool = False
    """Whether its GPU usually draws somebody's desktop."""
    machine: str = ""
    """x86_64, aarch64, arm64; empty when it may be any."""
    notes: tuple[str, ...] = ()
    power_modes: tuple[PowerMode, ...] = ()

    def number(self, key: str) -> float:
        """A figure that the format requires. Raises ConfigError when this profile does not state it."""
        value = self.value(key)
        if value is None:
            raise ConfigError(f"profile {self.id} has no figure {key!r}")
        return value

    def required(self, key: str) -> float:
        """The number of a figure that the format requires. Raises ConfigError when this profile does not state it."""
        value = self.value(key)
        if value is None:
            raise ConfigError(f"profile {self.id} has no figure {key!r}")
        return value

    @overload
    def value(self, key: Literal["capability"]) -> str | None: ...  # type: ignore[overload-overlap]
    @overload
    def value(self, key: Literal["bf16"]) -> bool | None: ...  # type: ignore[overload-overlap]
    @overload
    def value(self, key: str) -> float | None: ...
    def value(self, key: str) -> float | bool | str | None:
        """The value of a figure, None when this profile does not state it. ``key`` is one of `FIGURES`."""
        if key not in FIGURES:
            raise KeyError(key)
        figure = self.figures.get(key)
        return None if figure is None else figure.value


def parse_profile(text: str, origin: str) -> DeviceProfile:
    """Read one profile. ``origin`` is its file, for messages. Raises ConfigError with every problem of the file."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from error
    reader = _Reader(tables)
    profile = reader.profile()
    if reader.problems:
        raise ConfigError(
            f"{origin} is not a valid device profile: {'; '.join(reader.problems)}",
            remedy="Correct the file; `as_profile` of `edgefed bench` writes a valid one.",
        )
    return profile


class _Reader:
    """Takes a profile out of parsed TOML and collects its problems."""

    def __init__(self, tables: dict[str, Any]):
        self.tables = tables
        self.problems: list[str] = []

    def profile(self) -> DeviceProfile:
        known = {"schema", "id", "name", "kind", "aliases", "display", "machine", "notes"}
        known |= {"match", "typical", "figures", "power_modes"}
        self.unknown("", self.tables, known)
        if self.tables.get("schema") != SCHEMA:
            self.problems.append(f"schema is {self.tables.get('schema')!r}, expected {SCHEMA!r}")
        kind = self.text("kind", self.tables)
        if kind not in {each.value for each in MemoryKind}:
            self.problems.append(f"kind is {kind!r}, expected discrete, unified or cpu")
            kind = MemoryKind.CPU
        identity = self.identity("id", self.text("id", self.tables))
        aliases = tuple(self.identity("aliases", alias) for alias in self.texts("aliases", self.tables))
        typical = self.table("typical")
        self.unknown("typical.", typical, {"disk", "network"})
        figures = self.table("figures")
        self.unknown("figures.", figures, FIGURES)
        for key in REQUIRED:
            if key not in figures:
                self.problems.append(f"figures.{key} is missing")
        return DeviceProfile(
            id=identity,
            name=self.text("name", self.tables),
            kind=MemoryKind(kind),
            figures=self.figures("figures.", figures),
            aliases=aliases,
            match=self.match(),
            typical_disk=self.text("typical.disk", typical, default=""),
            typical_network=self.text("typical.network", typical, default=""),
            display=self.truth("display", self.tables),
            machine=self.text("machine", self.tables, default=""),
            notes=self.texts("notes", self.tables),
            power_modes=self.power_modes(),
        )

    def match(self) -> MatchRule:
        table = self.table("match")
        self.unknown("match.", table, {"gpu", "board", "cpu", "any_memory", "fallback_cpus"})
        cpus = table.get("fallback_cpus", 0)
        if not isinstance(cpus, int) or isinstance(cpus, bool) or cpus < 0:
            self.problems.append(f"match.fallback_cpus is {cpus!r}, expected a whole number from 0")
            cpus = 0
        names = {key: self.texts(f"match.{key}", table) for key in ("gpu", "board", "cpu")}
        for key, values in names.items():
            for value in values:
                if value != plain_name(value):
                    self.problems.append(f"match.{key} has {value!r}, expected the plain name {plain_name(value)!r}")
            if len(set(values)) < len(values):
                self.problems.append(f"match.{key} has the same name twice")
        return MatchRule(**names, any_memory=self.truth("match.any_memory", table), fallback_cpus=cpus)

    def power_modes(self) -> tuple[PowerMode, ...]:
        modes = self.tables.get("power_modes", [])
        if not isinstance(modes, list) or not all(isinstance(mode, dict) for mode in modes):
            self.problems.append("power_modes must be tables, each [[power_modes]]")
            return ()
        found: list[PowerMode] = []
        for number, mode in enumerate(modes):
            prefix = f"power_modes[{number}]."
            self.unknown(prefix, mode, {"name", *IN_POWER_MODE})
            name = self.text(f"{prefix}name", mode)
            if any(name == other.name for other in found):
                self.problems.append(f"{prefix}name is {name!r}, which another mode has already")
            found.append(PowerMode(name, self.figures(prefix, {k: v for k, v in mode.items() if k in IN_POWER_MODE})))
        return tuple(found)

    def figures(self, prefix: str, table: Mapping[str, object]) -> dict[str, Figure]:
        return {key: self.figure(prefix + key, key, entry) for key, entry in table.items() if key in FIGURES}

    def figure(self, where: str, key: str, entry: object) -> Figure:
        kind = FIGURES[key]
        unit = kind[0] if isinstance(kind, tuple) else ""
        empty = Figure(0.0, unit, BASES[0], "")
        if not isinstance(entry, dict):
            self.problems.append(f"{where} is {entry!r}, expected {{ value, unit, basis, source }}")
            return empty
        bounds = {"low", "high"} if isinstance(kind, tuple) else set()
        self.unknown(f"{where}.", entry, {"value", "unit", "basis", "source", "note", *bounds})
        if entry.get("unit", "") != unit:
            self.problems.append(f"{where}.unit is {entry.get('unit', '')!r}, expected {unit!r}")
        if entry.get("basis") not in BASES:
            self.problems.append(f"{where}.basis is {entry.get('basis')!r}, expected {', '.join(BASES)}")
        value: Any = entry.get("value")
        low = high = None
        if isinstance(kind, tuple):
            value = self.number(f"{where}.value", value, kind)
            low, high = (
                self.number(f"{where}.{name}", entry[name], kind) if name in entry else None for name in ("low", "high")
            )
            if not (low or -math.inf) <= value <= (high or math.inf):
                self.problems.append(f"{where}.value is {value:g}, expected a number between its low and high")
        elif kind is bool:
            if not isinstance(value, bool):
                self.problems.append(f"{where}.value is {value!r}, expected true or false")
        elif not isinstance(value, str) or not re.fullmatch(r"\d{1,2}\.\d", value):
            self.problems.append(f'{where}.value is {value!r}, expected text such as "8.9"')
        source = self.text(f"{where}.source", entry)
        return Figure(value, unit, str(entry.get("basis")), source, self.text(f"{where}.note", entry, ""), low, high)

    def number(self, where: str, value: object, kind: tuple[str, float, float]) -> float:
        unit, low, high = kind
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            self.problems.append(f"{where} is {value!r}, expected a number of {unit} from {low:g} to {high:g}")
            return low
        return float(value)

    def unknown(self, prefix: str, table: Mapping[str, object], known: Collection[str]) -> None:
        self.problems += [f"{prefix}{key} is not a key of a profile" for key in table if key not in known]

    def table(self, key: str) -> dict[str, Any]:
        value = self.tables.get(key, {})
        if not isinstance(value, dict):
            self.problems.append(f"{key} is {value!r}, expected a table [{key}]")
            return {}
        return value

    def text(self, where: str, table: Mapping[str, object], default: str | None = None) -> str:
        value = table.get(where.rpartition(".")[2], default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            self.problems.append(f"{where} is {value!r}, expected text")
            return ""
        return value

    def texts(self, where: str, table: Mapping[str, object]) -> tuple[str, ...]:
        value = table.get(where.rpartition(".")[2], [])
        if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
            self.problems.append(f"{where} is {value!r}, expected a list of strings")
            return ()
        return tuple(value)

    def truth(self, where: str, table: Mapping[str, object]) -> bool:
        value = table.get(where.rpartition(".")[2], False)
        if not isinstance(value, bool):
            self.problems.append(f"{where} is {value!r}, expected true or false")
        return value is True

    def identity(self, where: str, value: str) -> str:
        if value and not ID.fullmatch(value):
            self.problems.append(f"{where} has {value!r}, expected lower-case letters, digits, hyphens and dots")
        return value


def plain_name(name: str) -> str:
    """A device's name as profiles compare it: ``NVIDIA GeForce GTX 1660 Ti with Max-Q Design`` is ``gtx 1660 ti``.

    In lower case, without the maker, the brand and "with Max-Q"; words that distinguish devices stay ("laptop gpu").
    """
    lowered = re.sub(r"[_\s]+", " ", name.lower().replace("(r)", " ").replace("(tm)", " "))
    return " ".join(re.sub(r"\bnvidia\b|\bgeforce\b|\bwith max-q( design)?\b|\(nvgpu\)", " ", lowered).split())


def to_toml(profile: DeviceProfile) -> str:
    """The profile as a file that `parse_profile` reads back to an equal one."""
    lines = [f"schema = {_quote(SCHEMA)}", f"id = {_quote(profile.id)}", f"name = {_quote(profile.name)}"]
    lines.append(f"kind = {_quote(profile.kind.value)}")
    optional = {"aliases": profile.aliases, "machine": profile.machine, "display": profile.display,
                "notes": profile.notes}  # fmt: skip
    lines += [f"{key} = {_quote(value)}" for key, value in optional.items() if value]
    match = {name: value for name, value in dataclasses.asdict(profile.match).items() if value}
    typical = {"disk": profile.typical_disk, "network": profile.typical_network}
    for title, table in (("match", match), ("typical", {key: text for key, text in typical.items() if text})):
        if table:
            lines += ["", f"[{title}]", *(f"{key} = {_quote(value)}" for key, value in table.items())]
    lines += ["", "[figures]", *(f"{key} = {_inline(figure)}" for key, figure in profile.figures.items())]
    for mode in profile.power_modes:
        lines += ["", "[[power_modes]]", f"name = {_quote(mode.name)}"]
        lines += [f"{key} = {_inline(figure)}" for key, figure in mode.figures.items()]
    return "\n".join(lines) + "\n"


def _inline(figure: Figure) -> str:
    entries = {key: value for key, value in dataclasses.asdict(figure).items() if value is not None and value != ""}
    return "{ " + ", ".join(f"{key} = {_quote(value)}" for key, value in entries.items()) + " }"


def _quote(value: object) -> str:
    """A TOML value. JSON's strings are TOML's, but for DEL, which TOML wants escaped."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_quote(each) for each in value) + "]"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
