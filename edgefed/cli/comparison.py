"""The table of what devices compared at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgefed.cli.tables import Column, FittedTable

if TYPE_CHECKING:
    from rich.console import Console

    from edgefed.protocol.comparison import Comparison

MODELS = {
    "before": "before", "global_model": "global model", "device": "this device", "alone": "alone",
}  # fmt: skip
"""Fields of a `Comparison` and the titles of their columns."""


def comparison_table(comparisons: Mapping[str, Comparison]) -> FittedTable:
    """A row for each client: held-out losses on its own text, side by side; their means below.

    Where clients have models of their own: accuracies, with the loss behind them.
    """
    everyone = comparisons.values()
    own = any(each.accuracies for each in everyone)
    absent = {field for field in MODELS if all(getattr(each, field) is None for each in everyone)}
    shown = {field: title for field, title in MODELS.items() if field not in absent or not (own or field == "alone")}
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
        losses = {field: _mean([getattr(each, field) for each in everyone]) for field in shown}
        shares = {field: _mean([each.accuracies.get(field) for each in everyone]) for field in shown}
        table.add_row("mean", *(_cell(losses[field], shares[field]) for field in shown), "")
    return table


def print_comparisons(console: Console, comparisons: Mapping[str, Comparison], *, own: bool) -> None:
    """Print the table and what it means, unless nothing was compared. ``own``: it is the comparison of this device."""
    from edgefed.protocol.comparison import overall_verdict, verdict

    if comparisons:
        console.print(comparison_table(comparisons))
        console.print(verdict(*comparisons.values()) if own else overall_verdict(comparisons.values()), markup=False)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if one is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _cell(loss: float | None, share: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.3f}" if share is None else f"{100 * share:.1f} %, {loss:.3f}"
