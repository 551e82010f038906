"""What a client does, as events for a function of the user."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ClientEvent:
    """What a client does. ``kind``: "phase" when one begins, "progress" within it, "message" for a line of text."""

    kind: Literal["phase", "progress", "message"]
    text: str
    """Name of the phase ("download", "train", "upload", ...), or the message."""
    done: int = 0
    total: int | None = None
    unit: str = ""
    """Of ``done`` and ``total``: "B", "step" or "token"."""

    def __str__(self) -> str:
        if self.kind == "message":
            return self.text
        amount = "" if not self.done else f" {self.done}" + (f" of {self.total}" if self.total else "")
        return f"{self.text}{amount} {self.unit}s".rstrip() if amount else self.text


class EventSink:
    """An `edgefed.progress.ProgressSink` that calls a function."""

    def __init__(self, on_event: Callable[[ClientEvent], None] | None) -> None:
        self._on_event = on_event or (lambda event: None)
        self._event = ClientEvent("phase", "")

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        """Report the start of a phase."""
        self._event = ClientEvent("phase", name, 0, total, unit)
        self._on_event(self._event)

    def advance(self, n: int) -> None:
        """Report progress within the phase."""
        self._event = dataclasses.replace(self._event, kind="progress", done=self._event.done + n)
        self._on_event(self._event)

    def message(self, text: str) -> None:
        """Report a line of text."""
        self._on_event(ClientEvent("message", text))

    def done(self) -> None:
        """The end of a phase is not reported."""
