"""The pieces that the tables of `edgefed bench` are made of, and what a console can show."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table

Justify = Literal["left", "right"]
WIDE = 90
"""Columns from which a terminal gets paper figures and NF4."""
BARS = ((110, 22), (80, 12))
"""Columns from which a bar has so many cells; none below. What a number comes from needs the rest of the line."""


class Style:
    """What this console can show."""

    def __init__(self, console: Console) -> None:
        self.fancy = console.is_terminal and not console.no_color and "utf" in (console.encoding or "").lower()
        self.plus_minus = "\N{PLUS-MINUS SIGN}" if self.fancy else "+-"
        self.full, self.empty = ("\N{FULL BLOCK}", "\N{LIGHT SHADE}") if self.fancy else ("#", ".")
        self.dot = "\N{MIDDLE DOT}" if self.fancy else "-"
        self.arrow = "\N{RIGHTWARDS ARROW}" if self.fancy else "->"

    def cells(self, width: int) -> int:
        """Cells of a bar on a console so wide; 0 for no bar."""
        return next((cells for columns, cells in BARS if width >= columns), 0)

    def bar(self, start: float, end: float, cells: int) -> str:
        """The piece from ``start`` to ``end`` (0..1) of a bar; at least one cell, unless it is nothing."""
        first, last = (round(max(0.0, min(1.0, share)) * cells) for share in (start, end))
        if end > start and first == last:
            first = max(0, min(first, cells - 1))
            last = first + 1
        return self.empty * first + self.full * (last - first) + self.empty * (cells - last)


def table_of(*columns: tuple[str, Justify]) -> Table:
    """A table of (title, justify) columns; without any title it has no header."""
    titled = any(title for title, _ in columns)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1), show_header=titled)
    for index, (title, justify) in enumerate(columns):
        last = index == len(columns) - 1 and justify == "left"
        table.add_column(title, justify=justify, no_wrap=not last, overflow="ellipsis" if not last else "fold")
    return table
