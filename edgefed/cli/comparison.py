"""The table of what devices compared at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
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
    """A row for each client: held-out losses on its own text, side by side; their means below."""
    shown = {
        field: title
        for field, title in MODELS.items()
        if field != "alone" or any(each.alone is not None for each in comparisons.values())
    }
    table = FittedTable(
        Column("client", name=True), *(Column(title) for title in shown.values()), Column("tokens", drop=1),
        title="held-out loss on each client's own text, nats per token",
    )  # fmt: skip
    for name, comparison in comparisons.items():
        losses = [_loss(getattr(comparison, field)) for field in shown]
        table.add_row(name, *losses, f"{comparison.num_tokens:,}")
    if len(comparisons) > 1:
        table.add_section()
        means = []
        for field in shown:
            known = [loss for each in comparisons.values() if (loss := getattr(each, field)) is not None]
            means.append(_loss(sum(known) / len(known) if len(known) == len(comparisons) else None))
        table.add_row("mean", *means, "")
    return table


def print_comparisons(console: Console, comparisons: Mapping[str, Comparison], *, own: bool) -> None:
    """Print the table and what it means, unless nothing was compared. ``own``: it is the comparison of this device."""
    from edgefed.protocol.comparison import overall_verdict, verdict

    if comparisons:
        console.print(comparison_table(comparisons))
        console.print(verdict(*comparisons.values()) if own else overall_verdict(comparisons.values()), markup=False)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"
