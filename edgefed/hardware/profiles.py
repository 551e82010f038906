"""The device profiles that edgefed ships, and what is done with them: found, matched, merged, used as a stand-in.

The files are ``profiles/*.toml``, installed as ``edgefed.profiles``; `edgefed.hardware.profile_files` is their format.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgefed.errors import ConfigError, UnknownProfile
from edgefed.hardware.facts import (
    DeviceFacts,
    DriverFacts,
    GpuFacts,
    HostFacts,
    MemoryKind,
    Reading,
    Reason,
    TorchFacts,
)
from edgefed.hardware.memory import GIB
from edgefed.hardware.profile_files import (
    ID,
    IN_POWER_MODE,
    DeviceProfile,
    Figure,
    MatchRule,
    parse_profile,
    plain_name,
)

SAME_MEMORY = 0.10
"""Two sizes this close are the same memory: firmware, ECC and drivers keep up to 8 % of the label."""


def load_profiles() -> dict[str, DeviceProfile]:
    """All shipped profiles by id, in the order of their ids. Raises ConfigError naming file and key of a broken one."""
    return dict(_shipped())


@functools.cache
def _shipped() -> tuple[tuple[str, DeviceProfile], ...]:
    files = [file for file in importlib.resources.files("edgefed.profiles").iterdir() if file.name.endswith(".toml")]
    if not files:
        raise ConfigError(
            "this installation of edgefed has no device profiles", remedy="Install edgefed again: files are missing."
        )
    profiles = {}
    for file in sorted(files, key=lambda file: file.name):
        profiles[file.name] = parse_profile(file.read_text(encoding="utf-8"), f"profiles/{file.name}")
        if f"{profiles[file.name].id}.toml" != file.name:
            raise ConfigError(f"profiles/{file.name}: id is {profiles[file.name].id!r}, expected the file's name")
    check_distinct(list(profiles.values()))
    return tuple(sorted((profile.id, profile) for profile in profiles.values()))


def check_distinct(profiles: list[DeviceProfile]) -> None:
    """Raise ConfigError when two profiles share an id, or would both match one device."""
    ids: dict[str, str] = {}
    names: dict[tuple[str, str], list[DeviceProfile]] = {}
    problems = []
    for profile in profiles:
        for name in (profile.id, *profile.aliases):
            if name in ids:
                problems.append(f"{profile.id} and {ids[name]} are both called {name!r}")
            ids[name] = profile.id
        for field in ("gpu", "board", "cpu"):
            for name in getattr(profile.match, field):
                for other in names.get((field, name), []):
                    either = profile.match.any_memory or other.match.any_memory
                    if either or _same(profile.required("memory_visible"), other.required("memory_visible")):
                        problems.append(f"{profile.id} and {other.id} both have match.{field} {name!r}")
                names.setdefault((field, name), []).append(profile)
    if problems:
        raise ConfigError(f"device profiles collide: {'; '.join(problems)}")


def find_profile(name: str) -> DeviceProfile:
    """A profile by id or alias, or from a TOML file when ``name`` is a path (ends in .toml, or has a separator).

    Raises UnknownProfile, which suggests similar names, and ConfigError for a file that is not a valid profile.
    """
    if name.endswith(".toml") or "/" in name or "\\" in name:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name} is not valid TOML: {error}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UnknownProfile(f"cannot read the device profile {name}: {reason}") from error
        return parse_profile(text, name)
    profiles = load_profiles()
    by_name = {each: profile for profile in profiles.values() for each in (profile.id, *profile.aliases)}
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in by_name:
        return by_name[wanted]
    close = [each for each in by_name if wanted and wanted in each][:4]
    close += [each for each in difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.6) if each not in close]
    hint = f"; did you mean {' or '.join(close)}?" if close else f"; available: {', '.join(profiles)}"
    raise UnknownProfile(f"unknown device profile {name!r}{hint}")


def match_profile(facts: DeviceFacts) -> DeviceProfile | None:
    """The shipped profile of this device, None when it is none of them.

    A GPU matches by its whole name and its memory (an RTX 3060 has 8 or 12 GB), a board, such as a Jetson or a
    Raspberry Pi, by the words of its model and its memory, another host by the whole name of its processor.
    """
    profiles = load_profiles().values()
    gpu = plain_name(facts.gpu.name.value or "") if facts.gpu else ""
    boards = [facts.host.board, facts.host.cpu_name, *([facts.tegra.model] if facts.tegra else [])]
    board = " | ".join(plain_name(reading.value) for reading in boards if reading.value)
    cpu = plain_name(facts.host.cpu_name.value or "")
    visible = _visible_bytes(facts).value
    for profile in profiles:
        if profile.kind is not facts.kind:
            continue
        rule = profile.match
        named = (
            (gpu in rule.gpu and facts.kind is not MemoryKind.CPU)
            or any(f" {words} " in f" {board} " for words in rule.board)
            or (facts.kind is MemoryKind.CPU and cpu in rule.cpu)
        )
        fits = rule.any_memory or (visible is not None and _same(visible / GIB, profile.required("memory_visible")))
        if named and fits:
            return profile
    if facts.kind is MemoryKind.CPU and facts.host.cpu_count.value is not None:
        for profile in profiles:
            if facts.host.cpu_count.value <= profile.match.fallback_cpus and facts.host.system == "linux":
                return profile
    return None


def _same(first: float, second: float) -> bool:
    return abs(first - second) <= SAME_MEMORY * max(first, second)


def _visible_bytes(facts: DeviceFacts) -> Reading[int]:
    if facts.kind is MemoryKind.DISCRETE and facts.gpu is not None:
        return facts.gpu.memory_total_bytes if facts.gpu.memory_total_bytes.known else facts.gpu.cuda_total_bytes
    return facts.host.memory_total_bytes


def in_power_mode(profile: DeviceProfile, mode: str) -> DeviceProfile:
    """The profile with the figures of a power mode, by nvpmodel's name (``15W``, ``MODE_15W``).

    A figure that the mode changes but the profile does not know keeps the fastest mode's value, with a note on it.
    """
    wanted = mode.upper().removeprefix("MODE_").replace(" ", "_")
    found = next((each for each in profile.power_modes if each.name.upper() == wanted), None)
    figures = dict(profile.figures)
    if not profile.power_modes or (found is None and wanted.startswith("MAXN")):
        return profile
    for key in IN_POWER_MODE:
        if found is not None and key in found.figures:
            figures[key] = found.figures[key]
        elif key in figures:
            doubt = f"of the fastest power mode; what {mode} gives is not known"
            note = "; ".join(filter(None, (figures[key].note, doubt)))
            figures[key] = dataclasses.replace(figures[key], note=note)
    return dataclasses.replace(profile, figures=figures)


def effective(profile: DeviceProfile, measured: Mapping[str, Figure], power_mode: str | None = None) -> DeviceProfile:
    """The profile in a power mode, with measured figures in place of its own."""
    if power_mode is not None:
        profile = in_power_mode(profile, power_mode)
    return dataclasses.replace(profile, figures={**profile.figures, **measured})


def profile_of(name: str, facts: DeviceFacts, measured: Mapping[str, Figure]) -> DeviceProfile:
    """A profile of the device that ``facts`` were read from, called ``name``, with figures measured on it.

    Figures that were not measured come from the matching shipped profile, with their basis and source. `to_toml` writes
    the result. Raises ConfigError for an invalid id, or if the memory of the device is unknown.
    """
    if not ID.fullmatch(name):
        raise ConfigError(f"{name!r} is not a profile id: expected lower-case letters, digits, hyphens and dots")
    total = _visible_bytes(facts)
    if total.value is None:
        raise ConfigError(f"cannot make a profile: the memory of this device is unknown: {total.describe()}")
    base = match_profile(facts)
    if base is not None and base.match.fallback_cpus:
        base = None  # a stand-in for any small host says nothing of this one
    own = {"memory_visible": Figure(total.value / GIB, "GiB", "measured", total.source)}
    free = facts.host.memory_available_bytes
    if facts.kind is MemoryKind.DISCRETE and facts.gpu is not None:
        free = facts.gpu.memory_free_bytes
    if free.value is not None:
        used = max(0, total.value - free.value) / GIB
        own["memory_idle"] = Figure(used, "GiB", "measured", free.source, note="in use when this profile was written")
    elif base is None:
        own["memory_idle"] = Figure(0.0, "GiB", "derived", "unknown", note="could not be measured")
    if facts.gpu is not None and facts.gpu.compute_capability.value is not None:
        major, minor = facts.gpu.compute_capability.value
        own["capability"] = Figure(f"{major}.{minor}", "", "measured", facts.gpu.compute_capability.source)
    if facts.host.cpu_count.value is not None and facts.kind is MemoryKind.CPU:
        own["cpu_count"] = Figure(float(facts.host.cpu_count.value), "processors", "measured", "operating system")
    gpu = facts.gpu.name.value if facts.gpu is not None and facts.kind is not MemoryKind.CPU else None
    board = facts.tegra.model.value if facts.tegra is not None else facts.host.board.value
    host = facts.host.cpu_name.value
    if facts.kind is MemoryKind.UNIFIED and board:
        rule = MatchRule(board=(plain_name(board),))
    elif gpu:
        rule = MatchRule(gpu=(plain_name(gpu),))
    else:
        rule = MatchRule(cpu=(plain_name(host),)) if host else MatchRule()
    return DeviceProfile(
        id=name,
        name=gpu or board or host or name,
        kind=facts.kind,
        figures={**(base.figures if base else {}), **own, **measured},
        match=rule,
        display=bool(facts.gpu is not None and facts.gpu.display_active.value),
        machine=facts.host.machine,
        power_modes=base.power_modes if base else (),
        notes=base.notes if base else (),
    )


def facts_of(profile: DeviceProfile) -> DeviceFacts:
    """A device as the profile describes it: idle, with all of its memory where it should be. For planning.

    Every reading names the profile as its source; figures that the profile lacks are absent.
    """
    source = f"profile {profile.id}"
    missing = functools.partial(Reading.missing, Reason.ABSENT, source, "not in a profile")
    visible = round(profile.required("memory_visible") * GIB)
    free = max(0, visible - round(profile.required("memory_idle") * GIB))
    discrete, cpu = profile.kind is MemoryKind.DISCRETE, profile.kind is MemoryKind.CPU
    capability = profile.value("capability")
    host = HostFacts(
        **{
            **dict[str, Any]((field.name, missing()) for field in dataclasses.fields(HostFacts)),
            "system": "darwin" if profile.machine == "arm64" else "linux",
            "machine": profile.machine,
            "is_wsl": False,
            "board": missing() if discrete else Reading.of(profile.name, source),
            "cpu_name": Reading.of(profile.name, source) if cpu else missing(),
            "cpu_count": Reading.of(int(cpus), source) if (cpus := profile.value("cpu_count")) else missing(),
            "memory_total_bytes": missing() if discrete else Reading.of(visible, source),
            "memory_available_bytes": missing() if discrete else Reading.of(free, source),
        }
    )
    gpu = None
    if not cpu:
        gpu = GpuFacts(
            **{
                **dict[str, Any]((field.name, missing()) for field in dataclasses.fields(GpuFacts)),
                "nvml_index": None,
                "mig_index": None,
                "cuda_index": 0,
                "is_mig": False,
                "name": Reading.of(profile.name, source),
                "compute_capability": Reading.of(tuple(int(part) for part in capability.split(".")), source)
                if capability
                else missing(),
                "integrated": Reading.of(not discrete, source),
                "memory_total_bytes": Reading.of(visible, source) if discrete else missing(),
                "memory_free_bytes": Reading.of(free, source) if discrete else missing(),
                "cuda_total_bytes": Reading.of(visible, source),
                "own_bytes": Reading.of(0, source),
                "processes": Reading.of((), source),
                "display_active": Reading.of(profile.display, source),
            }
        )
    return DeviceFacts(
        kind=profile.kind,
        evidence=(f"{profile.kind}: {source} says so",),
        gpu=gpu,
        gpus=(gpu,) if gpu else (),
        host=host,
        tegra=None,
        driver=DriverFacts(False, missing(), missing(), missing(), problem=f"{source} stands in: nothing was asked"),
        torch=TorchFacts(missing(), missing(), missing()),
        notes=(f"{source} stands in for a device: nothing was measured",),
    )
