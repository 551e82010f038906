"""One value from a sensor: a number, or a named reason why it is missing. An unknown value is never 0.

reading = Reading.of(4096, "NVML memory v2")
reading = Reading.missing(Reason.NO_PERMISSION, "NVML memory v2", "Insufficient Permissions")
reading.value                 # 4096, or None
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Reason(str, enum.Enum):
    """Why a sensor gave no value."""

    NOT_SUPPORTED = "not supported"
    """The device has no such sensor, or its driver does not report it."""
    NO_PERMISSION = "no permission"
    """This user may not read the value."""
    LOST = "device lost"
    """The device stopped responding."""
    ABSENT = "absent"
    """The file, library or device to ask does not exist here."""
    IMPLAUSIBLE = "implausible"
    """The sensor returned a value that cannot be true: a total of 0, a placeholder."""
    FAILED = "failed"
    """Anything else; ``detail`` has the sensor's message."""

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
        """A reading with a value, which is not None."""
        return cls(value, source)

    @staticmethod
    def missing(reason: Reason, source: str, detail: str = "") -> Reading[Any]:
        """A reading without a value."""
        return Reading(None, source, reason, detail)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.reason is None

    def require(self) -> T:
        """The value. Raises ValueError if there is none: check `known` first."""
        if self.value is None:
            raise ValueError(f"no value: {self.describe()}")
        return self.value

    def without_value(self, source: str | None = None) -> Reading[Any]:
        """A reading of something else, or of another ``source``, that is missing for this one's reason."""
        if self.reason is None:
            raise ValueError(f"{self.source} has a value: {self.value!r}")
        return Reading(None, source or self.source, self.reason, self.detail)

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
