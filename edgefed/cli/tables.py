"""Tables that fit: where a terminal is narrow, less important columns go first, and no value loses its unit.

A column that is always shown has ``drop`` 0. Of the others, those with the largest ``drop`` are left out first, until
the table fits with its names cut in the middle to `SHORT_NAME` and its titles wrapped. Only a table whose values alone
are wider than the terminal wraps values.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from edgefed.protocol.comparison import Comparison

GAP = 2
"""Spaces between two columns."""
SHORT_NAME, SHORTEST_NAME = 12, 7
"""Characters to which names are cut before columns are left out, and where no column can be left out."""
SHORT_TEXT = 16
"""Characters of a column that wraps, before columns are left out."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Its title, which wraps between words. "" for none.
        drop: 0: always shown. Columns with larger numbers are left out first.
        name: Its values are names: aligned left, and cut in the middle where the table is too wide.
        wraps: Its values are sentences: aligned left, and wrapped where the table is too wide.
        left: Its values are aligned left.
    """

    title: str
    drop: int = 0
    name: bool = False
    wraps: bool = False
    left: bool = False


class FittedTable:
    """A table that chooses its columns by the width of the console that prints it."""

    def __init__(self, *columns: Column, title: str | None = None):
        self._columns, self._title = columns, title
        self._rows: list[tuple[Text, ...]] = []
        self._sections: set[int] = set()

    def add_row(self, *cells: str | Text) -> None:
        """Add a row; strings are shown as they are, without markup."""
        assert len(cells) == len(self._columns), "one cell for each column"
        self._rows.append(tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells))

    def add_section(self) -> None:
        """Leave the next rows apart from the ones before."""
        self._sections.add(len(self._rows))

    @property
    def num_rows(self) -> int:
        """Rows without the title."""
        return len(self._rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table as wide as the console."""
        shown, widths = self._fit(options.max_width)
        if self._title is not None:  # not Rich's, which wraps at the width of the table
            yield Text(self._title, style="italic")
        titled = any(self._columns[index].title for index in shown)
        table = Table(
            box=None, pad_edge=False, header_style="bold", padding=(0, 1), show_header=titled,
        )  # fmt: skip
        for index in shown:
            column = self._columns[index]
            aligned: Literal["left", "right"] = "left" if column.name or column.wraps or column.left else "right"
            title = "\n".join(textwrap.wrap(column.title, max(1, widths[index]), break_long_words=False))
            table.add_column(
                Text(title), justify=aligned, width=widths[index], overflow="fold", vertical="top", no_wrap=False
            )
        for number, row in enumerate(self._rows):
            if number in self._sections:
                table.add_row(*["" for _ in shown])
            table.add_row(*(_cut(row[index], widths[index], self._columns[index]) for index in shown))
        yield table

    def _fit(self, width: int) -> tuple[list[int], dict[int, int]]:
        """Return the columns to show and the width of each."""
        shown = list(range(len(self._columns)))
        while True:
            least = {index: self._least(index, SHORT_NAME) for index in shown}
            droppable = [index for index in shown if self._columns[index].drop]
            if _total(least) <= width or not droppable:
                break
            shown.remove(max(droppable, key=lambda index: (self._columns[index].drop, index)))
        for index in sorted(shown, key=lambda index: -least[index]):  # values wrap between words
            if _total(least) > width and not self._columns[index].name:
                least[index] = self._longest_word(index)
        if _total(least) > width:
            least |= {index: self._least(index, SHORTEST_NAME) for index in shown if self._columns[index].name}
        while _total(least) > width and max(least.values()) > 1:  # and within them
            least[max(least, key=least.__getitem__)] -= 1
        spare = width - _total(least)
        names = [index for index in shown if self._columns[index].name]
        for index in (*names, *(index for index in shown if index not in names)):
            more = min(spare, max(0, self._most(index) - least[index]))
            least[index], spare = least[index] + more, spare - more
        return shown, least

    def _values(self, index: int) -> int:
        return max((max(map(cell_len, row[index].plain.splitlines()), default=0) for row in self._rows), default=0)

    def _longest_word(self, index: int) -> int:
        texts = (self._columns[index].title, *(row[index].plain for row in self._rows))
        return max((cell_len(word) for text in texts for word in text.split()), default=1)

    def _most(self, index: int) -> int:
        return max(self._values(index), cell_len(self._columns[index].title), 1)

    def _least(self, index: int, name: int) -> int:
        column = self._columns[index]
        limit = name if column.name else SHORT_TEXT if column.wraps else self._values(index)
        return max(min(limit, self._values(index)), max(map(cell_len, column.title.split()), default=0), 1)


def _total(widths: dict[int, int]) -> int:
    return sum(widths.values()) + GAP * max(0, len(widths) - 1)


def _cut(cell: Text, width: int, column: Column) -> Text:
    return Text(cut_middle(cell.plain, width), style=cell.style) if column.name else cell


def cut_middle(name: str, width: int) -> str:
    """``name`` in at most ``width`` columns of a terminal, its middle replaced by two dots where it is longer."""
    if cell_len(name) <= width:
        return name
    head, tail = "", ""
    while True:
        longer = (name[: len(head) + 1], tail) if len(head) <= len(tail) else (head, name[-len(tail) - 1 :])
        if cell_len(longer[0]) + cell_len(longer[1]) + 2 > width:
            return f"{head}..{tail}"
        head, tail = longer


# The table of what devices compared at the end of a run.

MODELS = {
    "before": "before", "global_model": "global model", "own": "own", "device": "this device", "alone": "alone",
}  # fmt: skip
"""Fields of a `Comparison` and the titles of their columns."""


def comparison_table(comparisons: Mapping[str, Comparison]) -> FittedTable:
    """A row for each client: held-out losses on its own text, side by side; below, the means of who compared anything.

    Where clients have models of their own: accuracies, with the loss behind them.
    """
    everyone = comparisons.values()
    own = any(each.accuracies for each in everyone)
    absent = {field for field in MODELS if all(getattr(each, field) is None for each in everyone)}
    shown = {
        field: title for field, title in MODELS.items() if field not in absent or not (own or field in ("own", "alone"))
    }
    table = FittedTable(
        Column("client", name=True), *(Column(title) for title in shown.values()),
        Column("examples" if own else "tokens", drop=1),
        title="held-out examples answered correctly, and loss in nats"
        if own else "held-out loss on each client's own text, nats per token",
    )  # fmt: skip
    for name, comparison in comparisons.items():
        cells = [_cell(getattr(comparison, field), comparison.accuracies.get(field)) for field in shown]
        table.add_row(name, *cells, f"{comparison.num_tokens:,}")
    if len(comparisons) > 1:
        table.add_section()
        compared = [each for each in everyone if each.num_tokens]
        losses = {field: _mean([getattr(each, field) for each in compared]) for field in shown}
        shares = {field: _mean([each.accuracies.get(field) for each in compared]) for field in shown}
        table.add_row("mean", *(_cell(losses[field], shares[field]) for field in shown), "")
    return table


def print_comparisons(console: Console, comparisons: Mapping[str, Comparison], *, own: bool) -> None:
    """Print the table and what it means, unless nothing was compared. ``own``: it is the comparison of this device."""
    from edgefed.protocol.comparison import overall_verdict, verdict

    if comparisons:
        console.print(comparison_table(comparisons))
        console.print(verdict(*comparisons.values()) if own else overall_verdict(comparisons.values()), markup=False)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if one is unknown, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _cell(loss: float | None, share: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.3f}" if share is None else f"{100 * share:.1f} %, {loss:.3f}"
