"""A finding of the doctor, and the diagnosis that all findings make together."""

from __future__ import annotations

import dataclasses
import enum

from edgefed.hardware.facts import DeviceFacts


class State(str, enum.Enum):
    """Severity of a finding. A device with a problem cannot train as requested; with less it can."""

    OK = "ok"
    NOTE = "note"
    """Information; nothing to fix."""
    WARNING = "warning"
    """Training works, but slower, with less memory, or without part of this machine."""
    PROBLEM = "problem"

    def __str__(self) -> str:
        return self.value


class Group(str, enum.Enum):
    """Sections of the report, in order."""

    PACKAGES = "Python and packages"
    NATIVE = "Native part and kernels"
    GPU = "Driver and GPU"
    TORCH = "PyTorch on this device"
    MEMORY = "Memory"
    JETSON = "Jetson"
    HOST = "Host"
    NETWORK = "Network"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's result.

    ``found`` is the result, ``why`` the reason it matters, ``fix`` what to do, ``command`` a line to copy. A warning or
    a problem always has a ``fix`` or a ``command``.
    """

    group: Group
    name: str
    state: State
    found: str
    why: str = ""
    fix: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        if self.state in (State.WARNING, State.PROBLEM) and not (self.fix or self.command):
            raise ValueError(f"{self.name}: a {self.state} needs something to do about it")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything that was found on one device. ``facts`` is None when the sensors could not be asked at all.

    ``left_out`` names, in a sentence each, what was not looked at, so that silence is not taken for health;
    ``arithmetic_ran`` is False when no kernel was run, and the verdict says so.
    """

    device: str
    findings: tuple[Finding, ...]
    facts: DeviceFacts | None
    left_out: tuple[str, ...] = ()
    arithmetic_ran: bool = True

    @property
    def can_train(self) -> bool:
        """Whether nothing was found that prevents training as requested."""
        return not self.count(State.PROBLEM)

    def count(self, state: State) -> int:
        """Number of findings of one state."""
        return sum(finding.state is state for finding in self.findings)

    def in_group(self, group: Group) -> list[Finding]:
        """The findings of one chapter, in their order."""
        return [finding for finding in self.findings if finding.group is group]

    def summary(self) -> str:
        """``no problems, 1 warning: this device can train, on its CPU``."""
        counts = [_counted(self.count(State.PROBLEM), "problem"), _counted(self.count(State.WARNING), "warning")]
        verdict = "cannot train"
        if self.can_train:
            place = "its GPU" if self.facts is not None and self.facts.trains_on_gpu else "its CPU"
            verdict = f"can train, on {place}{'' if self.arithmetic_ran else ', as far as was looked'}"
        return f"{', '.join(counts)}: this device {verdict}"


def _counted(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"
