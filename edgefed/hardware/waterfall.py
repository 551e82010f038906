"""A memory budget as a waterfall: a total, and every step down from it with its origin."""

from __future__ import annotations

import dataclasses

from edgefed.hardware.memory import GIB
from edgefed.hardware.policy import MIB


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
        return self.size_bytes if self.adds else -self.size_bytes


class Waterfall:
    """From a total down to what is left; every step is kept, and no step takes more than there is."""

    terms: tuple[Term, ...]
    left: int

    def __init__(self, name: str, size_bytes: int, origin: str):
        self.restart(name, size_bytes, origin)

    def restart(self, name: str, size_bytes: int, origin: str) -> None:
        """Forget every step: another total is what decides."""
        self.terms = (Term(name, size_bytes, origin, adds=True),)
        self.left = size_bytes

    def take(self, name: str, size_bytes: int, origin: str, who: str = "") -> None:
        taken = min(size_bytes, self.left)
        if taken <= 0:
            return
        if taken < size_bytes:
            origin += f"; {gib(size_bytes)} wanted, no more was left"
        self.terms += (Term(name, taken, origin, who=who),)
        self.left -= taken

    def limit(self, name: str, most_bytes: int, origin: str) -> None:
        self.take(name, self.left - most_bytes, origin)

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
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= 0.05 * GIB else f"{size_bytes / MIB:.0f} MiB"
