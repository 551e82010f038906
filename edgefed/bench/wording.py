"""How numbers and ways of training are written for people, in tables, Markdown and pictures alike."""

from __future__ import annotations

import math

from edgefed.hardware.memory import GIB

STORAGES = {"bfloat16": "bf16", "nf4": "NF4"}
MODES = {"profile": "profile", "lora": "LoRA", "full": "full"}


def number(value: float) -> str:
    """Three significant digits: 0.0123, 1.23, 12.3, 1230."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ") if abs(value) >= 10000 else f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def duration(seconds: float) -> str:
    """0.24 s, 10 s, 4.0 min, 2.1 h."""
    if seconds < 60:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
