"""Pictures as PNG files: expert heat maps, loss curves, partitions. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 144
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#6d597a", "#2e4057", "#8d6a9f", "#00798c")
"""Distinct on white and for the colour-blind in the first four."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches wide and high, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy_axes(*all_axes: Axes) -> None:
    """Small labels, a faint grid behind what is drawn, no frame above and to the right."""
    for axes in all_axes:
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)


def save_figure(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a figure in the format of its suffix, PNG without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, format=path.suffix.lstrip(".") or "png")


def heat_map_rows(record: ActivationProfile) -> np.ndarray:
    """Share of tokens routed to each expert, (L, E_max); NaN where a layer has fewer experts."""
    width = max(record.experts_per_layer)
    rows = np.full((len(record.layers), width), np.nan)
    for index, layer in enumerate(record.layers):
        rows[index, : layer.num_experts] = layer.frequency
    return rows


MARKERS: dict[Role, dict[str, Any]] = {
    Role.TRAINABLE: {"marker": "o", "markersize": 3},
    Role.FROZEN: {"marker": "o", "markersize": 4, "markerfacecolor": "none"},
    Role.MERGED: {"marker": "x", "markersize": 2.5, "alpha": 0.6},
}

LARGEST_DOT = 22.0
"""Area in square points of a dot for all neurons of an expert."""


def _padded(marks: np.ndarray, width: int) -> np.ndarray:
    return np.pad(marks, (0, width - len(marks)))


def draw_heat_map(axes: Axes, record: ActivationProfile, title: str, plan: ExpertPlan | None = None) -> None:
    """Draw experts as columns, layers as rows, routed share as colour.

    What ``plan`` trains has a dot, what it holds unchanged a ring, and what is only there within a merged expert a
    small cross. Of a slice, the area of the dot is the share of the expert's neurons.
    """
    rows = heat_map_rows(record)
    image = axes.imshow(rows * 100, cmap="viridis", aspect="auto", vmin=0)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("expert, by index", fontsize=8)
    axes.set_ylabel("MoE layer, by index", fontsize=8)
    axes.set_yticks(
        range(len(rows)), labels=[str(row) if len(rows) <= 32 else "" for row in range(len(rows))], fontsize=7
    )
    axes.tick_params(axis="x", labelsize=7)
    if plan is not None and plan.neurons:
        for layer, mask in enumerate(plan.neurons):
            shares = mask.mean(axis=1)
            axes.scatter(range(len(shares)), [layer] * len(shares), s=LARGEST_DOT * shares, color="white", linewidths=0)
    elif plan is not None:
        for role, marker in MARKERS.items():
            layers, experts = np.nonzero([_padded(roles == role, rows.shape[1]) for roles in plan.roles])
            axes.plot(experts, layers, linestyle="none", color="white", **marker)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("% of tokens", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def save_heat_map(path: Path, record: ActivationProfile, title: str) -> None:
    """Write the heat map of one profile to ``path``, with the number of experts that cover most of its tokens."""
    figure = new_figure(max(5.5, 0.22 * max(record.experts_per_layer) + 2.0), max(2.6, 0.3 * len(record.layers) + 1.6))
    axes = figure.add_subplot()
    draw_heat_map(axes, record, f"{title}\n{coverage_text(record)}")
    save_figure(figure, path)


COVERED_SHARE = 0.8


def experts_covering(record: ActivationProfile, share: float = COVERED_SHARE) -> list[int]:
    """For each layer, the fewest experts that get ``share`` of the places that its router gives to tokens."""
    found = []
    for layer in record.layers:
        tokens = np.sort(layer.tokens_per_expert)[::-1]
        reached = np.cumsum(tokens) >= share * tokens.sum() - 1e-9
        found.append(int(np.argmax(reached)) + 1 if tokens.sum() else 0)
    return found


def coverage_text(record: ActivationProfile) -> str:
    """``80 % of the tokens go to 5 to 9 of 16 experts a layer``."""
    counts, sizes = experts_covering(record), record.experts_per_layer

    def span(values: Sequence[int]) -> str:
        return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

    return f"{100 * COVERED_SHARE:.0f} % of the tokens go to {span(counts)} of {span(sizes)} experts a layer"


def set_loss_limits(axes: Sequence[Axes], losses: Iterable[float]) -> None:
    """Give all ``axes`` one range, at least a quarter of the largest loss, so that a small change looks small."""
    known = [loss for loss in losses if np.isfinite(loss)]
    if known:
        low, high = min(known), max(known)
        spread = max(high - low, 0.25 * high)
        middle = (low + high) / 2
        for each in axes:
            each.set_ylim(middle - 0.55 * spread, middle + 0.55 * spread)


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, off the data."""
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2)


def save_federation_picture(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[float]],
    client_curves: Mapping[str, Sequence[float]],
    profiles: Mapping[str, tuple[ActivationProfile, ExpertPlan | None]],
    alone: Mapping[str, float] | None = None,
) -> None:
    """Write loss curves (left: one line a method; right: one a client) and a heat map per client below.

    curves, client_curves: {label: held-out loss after round 0, 1, ...}. profiles: {client: (record, plan)}. alone:
    {client: held-out loss after training without the federation}.
    """
    alone = alone or {}
    rows = (len(profiles) + 1) // 2
    figure = new_figure(11, 3.6 + 2.4 * rows)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    # Two figures in one: the legends of one do not push the other's axes aside.
    curves_part: Any = figure
    maps_part: Any = figure
    if rows:
        curves_part, maps_part = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.6, 2.4 * rows])[:, 0]
    panels = []
    for column, (lines, heading) in enumerate(
        ((curves, "global model on held-out text, mean over clients"), (client_curves, "the same, by client"))
    ):
        axes = curves_part.add_subplot(1, 2, column + 1)
        panels.append(axes)
        for index, (label, values) in enumerate(lines.items()):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(range(len(values)), values, marker="o", markersize=3, color=colour, label=label)
            if label in alone:
                last = len(values) - 1
                axes.plot([last], [alone[label]], marker="x", markersize=7, linestyle="none", color=colour)
        if alone and column == 0:
            mean = sum(alone.values()) / len(alone)
            axes.axhline(mean, color="#333333", linestyle="--", linewidth=1, label="alone, at the end")
        elif alone:
            axes.plot([], [], marker="x", linestyle="none", color="#333333", label="alone, at the end")
        axes.set_title(heading, fontsize=9, loc="left")
        axes.set_xlabel("rounds done", fontsize=8)
        axes.set_ylabel("loss, nats per token", fontsize=8)
        axes.locator_params(axis="x", integer=True)
        tidy_axes(axes)
        legend_beside(axes)
    losses = [loss for lines in (curves, client_curves) for values in lines.values() for loss in values]
    set_loss_limits(panels, [*losses, *alone.values()])
    for index, (client, (record, plan)) in enumerate(profiles.items()):
        axes = maps_part.add_subplot(rows, 2, index + 1)
        draw_heat_map(axes, record, f"{client} ({_legend(plan)})\n{coverage_text(record)}", plan)
    if profiles:
        maps_part.supxlabel(
            "The area of a dot is the share of the expert's neurons that the device holds and trains."
            if any(plan and plan.neurons for _, plan in profiles.values())
            else "Bright without a dot: many tokens choose this expert, but the method's own ranking puts others "
            "first, and the device's budget ends before it.",
            fontsize=8, x=0.01, ha="left",
        )  # fmt: skip
    save_figure(figure, path)


def save_partition_picture(path: Path, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Write how many examples each client has of each class, ``counts`` (clients, classes), as areas of bubbles."""
    clients, num_classes = counts.shape
    width, height = (min(2.0 + 0.32 * cells, 24.0) for cells in (clients, num_classes))
    figure = new_figure(max(width, 5.0), max(height, 2.6))
    axes = figure.add_subplot()
    client, label = np.nonzero(counts)
    cell_points = 72 * min(0.32, (width - 2) / clients, (height - 2) / num_classes)
    largest = max(int(counts.max(initial=0)), 1)
    axes.scatter(client, label, s=counts[client, label] / largest * (0.9 * cell_points) ** 2, color=COLOURS[0])
    axes.set_title(f"{title}\nlargest bubble: {largest:,}", fontsize=9, loc="left", parse_math=False)
    axes.set_xlabel("client, by index", fontsize=8)
    axes.set_ylabel("class (area: examples)", fontsize=8)
    axes.set_xlim(-0.7, clients - 0.3)
    axes.set_ylim(num_classes - 0.3, -0.7)
    axes.locator_params(axis="x", integer=True)
    if num_classes <= 70:
        names = [name if len(name) <= 24 else name[:23] + "..." for name in classes]
        axes.set_yticks(range(num_classes), labels=names, fontsize=7, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    save_figure(figure, path)


def _legend(plan: ExpertPlan | None) -> str:
    if plan and plan.neurons:
        return f"dots: {plan.neuron_share:.0%} of the neurons"
    meanings = {Role.TRAINABLE: "dot: trained", Role.FROZEN: "ring: resident", Role.MERGED: "cross: merged"}
    here = [text for role, text in meanings.items() if plan and any((roles == role).any() for roles in plan.roles)]
    return ", ".join(here) or "no resident experts"
