"""One value from a sensor: a number, or a named reason why there is none. Never 0 for "unknown".

reading = Reading.of(4096, "NVML memory v2")
reading = Reading.missing(Reason.NO_PERMISSION, "NVML memory v2", "Insufficient Permissions")
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Reason(str, enum.Enum):
    """Why a sensor gave no value."""

    NOT_SUPPORTED = "not supported"
    """The device has no such sensor, or its driver does not tell."""
    NO_PERMISSION = "no permission"
    """There is a value that this user may not see."""
    LOST = "device lost"
    """The device was there and does not answer any more."""
    ABSENT = "absent"
    """The file, library or device that would tell does not exist here."""
    IMPLAUSIBLE = "implausible"
    """A value came that cannot be true: a total of 0, a placeholder."""
    FAILED = "failed"
    """Anything else; ``detail`` has the sensor's own words."""

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Reading(Generic[T]):
    """``value`` is None exactly when ``reason`` is set. ``source`` names the call or file that was asked."""

    value: T | None
    source: str
    reason: Reason | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"a reading is a value or a reason, found {self.value!r} and {self.reason!r}")

    @classmethod
    def of(cls, value: T, source: str) -> Reading[T]:
        return cls(value, source)

    @classmethod
    def missing(cls, reason: Reason, source: str, detail: str = "") -> Reading[T]:
        return cls(None, source, reason, detail)

    @property
    def known(self) -> bool:
        return self.reason is None

    def map(self, function: Callable[[T], U]) -> Reading[U]:
        """``function`` of the value, or the same reason."""
        if self.value is None:
            return Reading(None, self.source, self.reason, self.detail)
        return Reading(function(self.value), self.source)

    def describe(self) -> str:
        """The value as text, or why there is none: ``not supported (NVML memory v2)``."""
        if self.reason is None:
            return str(self.value)
        return f"{self.reason} ({self.source}{': ' + self.detail if self.detail else ''})"
