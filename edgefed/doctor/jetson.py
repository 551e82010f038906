"""Jetson boards: which wheels fit, what the power mode costs, and whether the memory is in pieces. Pure."""

from __future__ import annotations

import dataclasses
import re

from edgefed.doctor.finding import Finding, Group, State
from edgefed.hardware.facts import DeviceFacts, TegraFacts
from edgefed.hardware.memory import format_bytes
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.hardware.profiles import in_power_mode, match_profile

SMALL_BLOCK_BYTES = 4 * 2**20
"""The kernel's largest block. When not one is free, large GPU allocations fail with memory left (NvMap error 12)."""
BITSANDBYTES_BUILD = "cmake -DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=87 -S . && make -j4 && pip install ."


@dataclasses.dataclass(frozen=True)
class WheelRoute:
    """Where torch comes from on one generation of JetPack. Indexes move: ``checked`` says when this was true."""

    system: str
    python: str
    command: str
    catch: str
    checked: str = "2026-11"


def wheel_route(l4t: str | None) -> WheelRoute | None:
    """The route for an L4T release such as 36.4.4; None when the release is unknown or older than JetPack 5."""
    major = int(l4t.split(".")[0]) if l4t and re.match(r"\d+\.", l4t) else 0
    if major == 35:
        return WheelRoute(
            "JetPack 5", "3.8", "",
            "its torch wheels are for Python 3.8, and edgefed needs 3.10: install JetPack 6 or newer",
        )  # fmt: skip
    if major == 36:
        return WheelRoute(
            "JetPack 6", "3.10", "pip install torch --index-url https://pypi.jetson-ai-lab.io/jp6/cu126",
            "torch from PyPI is built for CUDA 13 servers, which this driver cannot run",
        )  # fmt: skip
    if major == 38:
        return WheelRoute(
            "JetPack 7.0 or 7.1", "3.12", "pip install torch --index-url https://download.pytorch.org/whl/cu130",
            "builds for CUDA 12.8 and 12.9 have no code for Thor",
        )  # fmt: skip
    if major >= 39:
        return WheelRoute(
            "JetPack 7.2 or newer", "3.12", "pip install torch",
            "CUDA 13 wheels run on Thor; on Orin they may, which the kernel runs of this report prove or refute",
        )  # fmt: skip
    return None


def jetson_findings(facts: DeviceFacts) -> list[Finding]:
    """Findings about a Jetson; none elsewhere."""
    tegra = facts.tegra
    if tegra is None:
        return []
    return [_board(tegra), _route(tegra), _power(facts, tegra), *_fragmentation(facts), *_nvmap(tegra)]


def _board(tegra: TegraFacts) -> Finding:
    model = tegra.model.value or f"model unknown ({tegra.model.describe()})"
    if not tegra.l4t.known:
        return Finding(
            Group.JETSON, "board", State.NOTE, f"{model}, L4T unknown: {tegra.l4t.describe()}",
            "In a container the release file of the host is often missing; wheels cannot be recommended without it.",
            "Mount it into the container.", "docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro ...",
        )  # fmt: skip
    soc = f", {tegra.soc.value}" if tegra.soc.known else ""
    jetpack = tegra.jetpack.value if tegra.jetpack.known else "unknown"
    return Finding(Group.JETSON, "board", State.OK, f"{model}{soc}, L4T {tegra.l4t.value}, JetPack {jetpack}")


def _route(tegra: TegraFacts) -> Finding:
    route = wheel_route(tegra.l4t.value)
    if route is None:
        return Finding(
            Group.JETSON, "wheels", State.NOTE, f"no route is known for L4T {tegra.l4t.value or 'unknown'}",
            "A Jetson needs a torch that was built for its driver.", "See https://pypi.jetson-ai-lab.io.",
        )  # fmt: skip
    if not route.command:
        return Finding(
            Group.JETSON, "wheels", State.WARNING, f"{route.system}, Python {route.python}", route.catch,
            "Install JetPack 6 or newer.",
        )  # fmt: skip
    return Finding(
        Group.JETSON, "wheels", State.NOTE, f"{route.system}, Python {route.python} (checked {route.checked})",
        route.catch[0].upper() + route.catch[1:] + ".", "", route.command,
    )  # fmt: skip


def _power(facts: DeviceFacts, tegra: TegraFacts) -> Finding:
    mode = tegra.power_mode
    if mode.value is None:
        return Finding(
            Group.JETSON, "power mode", State.NOTE, f"unknown: {mode.describe()}",
            "It sets clocks and memory speed; measurements are comparable only in the same mode.",
            "Ask the board.", "nvpmodel -q",
        )  # fmt: skip
    if mode.value.upper().startswith("MAXN"):
        return Finding(Group.JETSON, "power mode", State.OK, f"{mode.value}, the fastest")
    return Finding(
        Group.JETSON, "power mode", State.NOTE, mode.value,
        power_mode_cost(match_profile(facts), mode.value) or "A lower mode caps the clocks of GPU and memory.",
        "The owner may choose another (edgefed never does; the board may reboot).", "sudo nvpmodel -q --verbose",
    )  # fmt: skip


def power_mode_cost(profile: DeviceProfile | None, mode: str) -> str:
    """Return a sentence with the share of the fastest mode's speed that ``mode`` gives; empty if unknown."""
    if profile is None:
        return ""
    slower = in_power_mode(profile, mode)
    shares = [
        f"{less / full:.0%} of {what}"
        for key, what in (("bf16_tflops", "the arithmetic"), ("bandwidth", "the memory bandwidth"))
        if (full := profile.value(key)) and (less := slower.value(key)) and less != full
    ]
    return f"It gives {' and '.join(shares)} of the fastest mode (profile {profile.id})." if shares else ""


def _fragmentation(facts: DeviceFacts) -> list[Finding]:
    block = facts.host.largest_free_block_bytes.value
    if block is None or block >= SMALL_BLOCK_BYTES:
        return []
    return [
        Finding(
            Group.JETSON, "fragmented memory", State.WARNING, f"the largest free block is {format_bytes(block)}",
            "The GPU may fail to allocate although memory is free (NvMap error 12), and this outlives the program.",
            "Reboot before training.", "sudo reboot",
        )
    ]  # fmt: skip


def _nvmap(tegra: TegraFacts) -> list[Finding]:
    used = tegra.nvmap_used_bytes.value
    if not used:
        return []
    return [
        Finding(Group.JETSON, "GPU allocations", State.OK, f"{format_bytes(used)} of the memory are held by the GPU")
    ]
