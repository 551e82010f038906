"""The rules of the memory budget: its constants, each with its reason, and the waterfall that records each deduction.

`edgefed.hardware.budget` applies them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgefed.hardware.memory import GIB

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class BudgetPolicy:
    """Every constant of the policy. Sizes are bytes, shares are of 1."""

    max_share: float = 0.95
    """Of a GPU's own memory that we ever touch. vLLM takes 0.9 of it; the rest covers what the driver reserves."""
    context_discrete_bytes: int = int(0.40 * GIB)
    """CUDA context before it can be measured: 287 MB with lazy module loading, 300-400 MB seen with torch."""
    context_unified_bytes: int = int(0.25 * GIB)
    headroom_bytes: int = int(0.5 * GIB)
    headroom_share: float = 0.04
    headroom_desktop_bytes: int = GIB
    """With a display or under WSL2: the desktop grows while we train."""
    reserve_bytes: int = GIB
    reserve_share: float = 0.10
    """Of the memory that the system shares with us: a 119 GiB machine was seen to hang with 7 GiB left."""
    host_growth_bytes: int = int(1.2 * GIB)
    """Python, torch and the CUDA libraries: 0.8 to 2 GB, in the same pool as the tensors of a unified device."""
    fragmentation: float = 0.08
    """Of torch's caching allocator."""
    fragmentation_expandable: float = 0.03
    """With ``expandable_segments:True``."""
    fragmentation_unified: float = 0.06
    expandable_segments: bool = False
    """Whether torch's allocator runs with them; see `policy_from_environment`."""
    cpu_margin: float = 0.05
    idle_host_bytes: int = int(1.25 * GIB)
    idle_host_share: float = 0.015
    """What a booted system holds by itself: 1.3 GiB of an 8 GB Jetson, 3 GiB of a 128 GB one, and a line through both.
    For the ideal budget only, where nothing is measured."""
    small_block_bytes: int = 4 * MIB
    """The kernel's largest block with 4 KiB pages. A Jetson without one fails with memory free (NvMapMemAlloc 12)."""

    def host_reserve_bytes(self, total_bytes: int) -> int:
        """What stays free for the system on a machine, or in a container, of ``total_bytes``."""
        return max(self.reserve_bytes, int(total_bytes * self.reserve_share))

    def gpu_headroom_bytes(self, total_bytes: int, desktop: bool) -> int:
        """What stays free on a GPU with its own memory for others to grow into."""
        floor = self.headroom_desktop_bytes if desktop else self.headroom_bytes
        return max(floor, int(total_bytes * self.headroom_share))

    def idle_available_bytes(self, total_bytes: int) -> int:
        """MemAvailable of a host of ``total_bytes`` on which nothing else runs: an estimate."""
        return max(0, int(total_bytes * (1 - self.idle_host_share)) - self.idle_host_bytes)

    @property
    def fragmentation_discrete(self) -> float:
        """Share that the allocator of a discrete GPU loses."""
        return self.fragmentation_expandable if self.expandable_segments else self.fragmentation


DEFAULT_POLICY = BudgetPolicy()


def policy_from_environment(environ: Mapping[str, str]) -> BudgetPolicy:
    """The policy for a torch that runs with this environment: are its allocator's segments expandable?"""
    settings = environ.get("PYTORCH_ALLOC_CONF") or environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    wishes = dict(part.partition(":")[::2] for part in settings.replace(" ", "").split(","))
    return BudgetPolicy(expandable_segments=wishes.get("expandable_segments", "").lower() == "true")


@dataclasses.dataclass(frozen=True)
class Term:
    """One step of the waterfall: ``size_bytes``, never negative, is added by the first term and taken by the others.

    ``name`` reads after a size ("0.5 GiB headroom"); ``origin`` names the sensor or the rule; ``who`` lists programs.
    """

    name: str
    size_bytes: int
    origin: str
    adds: bool = False
    who: str = ""

    @property
    def signed_bytes(self) -> int:
        """The size as it enters the sum."""
        return self.size_bytes if self.adds else -self.size_bytes


class Waterfall:
    """Subtract from a total step by step; each step is recorded, and none takes more than is left."""

    terms: tuple[Term, ...]
    left: int

    def __init__(self, name: str, size_bytes: int, origin: str):
        self.restart(name, size_bytes, origin)

    def restart(self, name: str, size_bytes: int, origin: str) -> None:
        """Forget every step: another total is what decides."""
        self.terms = (Term(name, size_bytes, origin, adds=True),)
        self.left = size_bytes

    def take(self, name: str, size_bytes: int, origin: str, who: str = "") -> None:
        """Take at most ``size_bytes`` off what is left."""
        taken = min(size_bytes, self.left)
        if taken <= 0:
            return
        if taken < size_bytes:
            origin += f"; {gib(size_bytes)} wanted, not enough was left"
        self.terms += (Term(name, taken, origin, who=who),)
        self.left -= taken

    def limit(self, name: str, most_bytes: int, origin: str, who: str = "") -> None:
        """Take what exceeds ``most_bytes``."""
        self.take(name, self.left - most_bytes, origin, who)

    def line(self) -> str:
        """``6.1 GiB of 8.0: 0.9 used by others (Xorg 0.6), 0.4 CUDA context, 0.5 headroom``; small steps left out."""
        total, kind = self.terms[0].size_bytes, self.terms[0].name
        steps = [
            f"{term.size_bytes / GIB:.1f} {term.name}{f' ({term.who})' if term.who else ''}"
            for term in self.terms[1:]
            if term.size_bytes >= 0.05 * GIB
        ]
        whole = f"{total / GIB:.1f}" if kind == "total" else f"{total / GIB:.1f} ({kind})"
        return f"{self.left / GIB:.1f} GiB of {whole}{': ' if steps else ''}{', '.join(steps)}"


def gib(size_bytes: int) -> str:
    """A size in GiB, or in MiB below 0.05 GiB."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= 0.05 * GIB else f"{size_bytes / MIB:.0f} MiB"
