"""Plots of simulations.

Simulated devices: quality over virtual time, time by activity, use of experts and of budgets. Personal federations:
accuracy over rounds and per client, gate weights per class. matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgefed.hardware.memory import GIB
from edgefed.plots import COLOURS, DPI, legend_beside, new_figure, save_figure, set_loss_limits, tidy_axes
from edgefed.simulation.result import LEDGER, WAYS, MethodRun, SimulationResult
from edgefed.simulation.virtual_clock import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array: TypeAlias = npt.NDArray[Any]

Outcome: TypeAlias = tuple[Sequence[tuple[int, float]], Sequence[float]]
"""Of one run: (round, mean accuracy) of each evaluation, and the final accuracy of each client."""

PERSONAL_DPI = 110
BINS = 20

PART_COLOURS = {
    "download": "#1b6ca8", "load": "#7fb2d6", "profile": "#edae49", "merge": "#8d6a9f", "train": "#66a182",
    "offload": "#d1495b", "explore": "#b8d8ba", "evaluate": "#00798c", "upload": "#2e4057", "late": "#e8998d",
    "waits": "#e4e4e4", "hidden": "#f4dfae",
}  # fmt: skip
MOST_BARS = 16
"""Devices with a bar of their own; of a larger fleet, one for each kind of device, its mean."""


def save_pictures(folder: Path, result: SimulationResult) -> list[Path]:
    """Write ``quality.png``, ``time.png``, ``budget.png``, ``traffic.png`` and, if a method profiles, ``experts.png``.

    Returns the paths. A method without a finished round has no bars.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(draw_quality, "quality.png"), (draw_time, "time.png"), (draw_budget, "budget.png"),
             (draw_traffic, "traffic.png")]  # fmt: skip
    if any(run.usage for run in result.runs):
        drawn.append((draw_experts, "experts.png"))
    paths = []
    for draw, name in drawn:
        figure = draw(result)
        figure.savefig(folder / name, dpi=DPI)
        paths.append(folder / name)
    return paths


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds of a unit, its name) in which a length of time is best read."""
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, name
    return 1.0, "seconds"


def draw_quality(result: SimulationResult) -> Figure:
    """Held-out loss of the global model over virtual time, a line a method; a large dot where the target is reached."""
    figure: Figure = new_figure(8.5, 4.4)
    axes = figure.add_subplot()
    size, unit = time_unit(max((run.curve[-1][0] for run in result.runs), default=0.0))
    every_loss = [loss for run in result.runs for _, loss in run.curve]
    target = result.target_loss
    if target is not None and not (every_loss and min(every_loss) <= target <= max(every_loss)):
        target = None  # nobody reaches it, or everybody from the beginning: a line would only stretch the axis
    for index, run in enumerate(result.runs):
        colour = COLOURS[index % len(COLOURS)]
        times, losses = zip(*run.curve, strict=True)
        axes.plot(
            np.array(times) / size, losses, color=colour, marker="o", markersize=2.5, linewidth=1.5, label=run.label
        )
        reached = None if target is None else run.seconds_to(target)
        if reached is not None:
            at = next(loss for seconds, loss in run.curve if seconds == reached)
            axes.plot([reached / size], [at], "o", color=colour, markersize=9, markeredgecolor="white", zorder=5)
    if target is not None:
        axes.axhline(target, color="#333333", linestyle="--", linewidth=1)
        axes.text(0.995, target, "target ", ha="right", va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_xlabel(f"virtual time, {unit}", fontsize=9)
    axes.set_ylabel("held-out loss, nats per token", fontsize=9)
    missed = "" if target == result.target_loss else f"\nno run crosses the target of {result.target_loss:g} nats"
    axes.set_title(_title(result, "quality over virtual time") + missed, fontsize=10, loc="left")
    set_loss_limits([axes], every_loss)
    legend_beside(axes)
    tidy_axes(axes)
    return figure


def draw_time(result: SimulationResult) -> Figure:
    """Mean seconds of a round by part and device, stacked; one panel a method."""
    runs = [run for run in result.runs if run.rounds]
    bars = {run.label: _mean_seconds(result, run) for run in runs}
    rows = max((len(each) for each in bars.values()), default=1)
    figure: Figure = new_figure(10, 1.3 + len(runs) * (0.55 + 0.24 * rows))
    shown = [part for part in (*PARTS, "late", "hidden", "waits")
             if any(seconds.get(part, 0.0) > 0 for each in bars.values() for seconds in each.values())]  # fmt: skip
    longest = max((sum(seconds.values()) for each in bars.values() for seconds in each.values()), default=1.0)
    size, unit = time_unit(longest)
    panels = figure.subplots(len(runs) or 1, 1, sharex=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, runs, strict=False):
        names = list(bars[run.label])
        left = np.zeros(len(names))
        for part in shown:
            widths = np.array([bars[run.label][name].get(part, 0.0) for name in names]) / size
            axes.barh(range(len(names)), widths, left=left, color=PART_COLOURS[part], label=part, height=0.75)
            left += widths
        axes.set_yticks(range(len(names)), labels=names, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(run.label, fontsize=9, loc="left")
        tidy_axes(axes)
    panels[-1].set_xlabel(f"mean of a round, {unit} of virtual time", fontsize=9)
    figure.suptitle(_title(result, "where the time of a round goes"), fontsize=10, x=0.01, ha="left")
    if runs:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def draw_budget(result: SimulationResult) -> Figure:
    """What a step needs at its peak against what the device has for it, last round; one group a device."""
    runs = [run for run in result.runs if run.rounds]
    devices = _representatives(result)
    figure: Figure = new_figure(max(6.0, 1.6 + len(devices) * (0.35 + 0.22 * len(runs))), 4.0)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(runs))
    for index, run in enumerate(runs):
        at = [position - 0.4 + width * (index + 0.5) for position in range(len(devices))]
        last = run.rounds[-1].clients
        heights = [last[name].memory_bytes / GIB if name in last else 0.0 for name in devices]
        axes.bar(at, heights, width=width * 0.92, color=COLOURS[index % len(COLOURS)], label=run.label)
        for x, name in zip(at, devices, strict=True):
            if name in run.refused:
                axes.text(x, 0, " too small", rotation=90, ha="center", va="bottom", fontsize=7, color="#666666")
    for position, name in enumerate(devices):
        budget = result.budgets[name] / GIB
        axes.plot([position - 0.45, position + 0.45], [budget, budget], color="#1a1a1a", linewidth=1.6,
                  label="budget" if position == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(devices)), labels=[_wrapped(result.profiles[name]) for name in devices], fontsize=7)
    axes.set_ylabel("GiB at the peak of a step", fontsize=9)
    axes.set_title(_title(result, "budget use"), fontsize=10, loc="left")
    legend_beside(axes)
    tidy_axes(axes)
    return figure


def draw_traffic(result: SimulationResult) -> Figure:
    """Bytes of each round, down and up, and what compression left for later; a line a method."""
    runs = [run for run in result.runs if run.rounds]
    compressed = any(each.traffic.keys() & set(LEDGER) for run in runs for each in run.rounds)
    figure: Figure = new_figure(12 if compressed else 9, 3.6)
    panels = figure.subplots(1, 3 if compressed else 2, squeeze=False)[0]
    for index, run in enumerate(runs):
        rounds, look = (
            [each.server_round for each in run.rounds],
            {"color": COLOURS[index % len(COLOURS)], "marker": "o"},
        )
        for axes, way in zip(panels, WAYS, strict=False):
            axes.plot(
                rounds,
                np.array([each.bytes_of(way) for each in run.rounds]) / 1e6,
                label=run.label,
                markersize=2.5,
                linewidth=1.5,
                **look,
            )
        for of, line in (("updates", "-"), ("step", ":")) if compressed else ():
            shares = [100 * each.left(of) for each in run.rounds]
            if not all(map(math.isnan, shares)):
                label = f"{run.label}, {of}"
                panels[-1].plot(rounds, shares, linestyle=line, label=label, markersize=2.5, linewidth=1.5, **look)
    for axes, text in zip(panels, ("MB down", "MB up", "left for later, % of the L2 norm"), strict=False):
        axes.set_xlabel("round", fontsize=9)
        axes.set_ylabel(text, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        tidy_axes(axes)
    legend_beside(panels[-1])
    figure.suptitle(_title(result, "bytes of a round"), fontsize=10, x=0.01, ha="left")
    return figure


def draw_experts(result: SimulationResult) -> Figure:
    """Share of each device's tokens that each expert gets, of the first method that profiles; a row is a layer."""
    run = next(run for run in result.runs if run.usage)
    names = list(run.usage)[:MOST_BARS]
    columns = 2 if len(names) > 1 else 1
    rows = math.ceil(len(names) / columns)
    layers, experts = len(run.usage[names[0]]), max(len(row) for row in run.usage[names[0]])
    figure: Figure = new_figure(10, 0.8 + rows * (0.75 + 0.14 * layers))
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    grids = {}
    for name in names:
        grid = np.full((layers, experts), np.nan)
        for layer, row in enumerate(run.usage[name]):
            grid[layer, : len(row)] = np.array(row) * 100
        grids[name] = grid
    most = max(float(np.nanmax(grid)) for grid in grids.values())
    for axes, name in zip(panels, names, strict=False):
        image = axes.imshow(grids[name], cmap="viridis", aspect="auto", vmin=0, vmax=most)
        axes.set_title(name, fontsize=8, loc="left")
        axes.set_ylabel("layer, by index", fontsize=7)
        axes.tick_params(labelsize=6)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("expert, by index", fontsize=7)
    bar = figure.colorbar(image, ax=list(panels), pad=0.01, aspect=40)
    bar.set_label("% of tokens", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        _title(result, f"experts that each device's text uses ({run.label})"), fontsize=10, x=0.01, ha="left"
    )
    return figure


def _mean_seconds(result: SimulationResult, run: MethodRun) -> dict[str, dict[str, float]]:
    """{device, or kind of device: {part: mean seconds over rounds and devices}}."""
    groups: dict[str, list[str]] = {}
    for name, profile in result.profiles.items():
        groups.setdefault(name if len(result.profiles) <= MOST_BARS else profile, []).append(name)
    found: dict[str, dict[str, float]] = {}
    for group, names in groups.items():
        spans = [each.clients[name] for each in run.rounds for name in names if name in each.clients]
        if not spans:
            continue
        totals: dict[str, float] = {}
        for span in spans:
            for part, seconds in {
                **span.seconds,
                "late": span.late,
                "hidden": span.hidden,
                "waits": span.waits,
            }.items():
                totals[part] = totals.get(part, 0.0) + seconds / len(spans)
        found[group if len(names) == 1 else f"{group} x {len(names)}"] = totals
    return found


def _representatives(result: SimulationResult) -> list[str]:
    """The first device of each kind."""
    first: dict[str, str] = {}
    for name, profile in result.profiles.items():
        first.setdefault(profile, name)
    return list(first.values())


def _title(result: SimulationResult, what: str) -> str:
    charged = f" charged as {result.cost_shape}" if result.cost_shape else ""
    rounds = max((len(run.rounds) for run in result.runs), default=0)
    return f"{what}: {len(result.profiles)} devices, {Path(result.model).name}{charged}, {rounds} rounds"


def _wrapped(profile: str) -> str:
    words = profile.split("-")
    half = math.ceil(len(words) / 2)
    return profile if len(words) < 3 else "-".join(words[:half]) + "-\n" + "-".join(words[half:])


__all__: Sequence[str] = (
    "draw_budget",
    "draw_experts",
    "draw_quality",
    "draw_time",
    "draw_traffic",
    "save_pictures",
    "time_unit",
)


def save_comparison(path: Path, splits: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> None:
    """Plot a row per split: accuracy over rounds (mean and range over runs), and the accuracy of each client.

    ``splits`` is {split: {method: one outcome per seed}}; all runs of a method have the same rounds and clients.
    """
    figure = new_figure(12, 3.8 * len(splits))
    for row, (split, methods) in enumerate(splits.items()):
        curves = figure.add_subplot(len(splits), 2, 2 * row + 1)
        clients = figure.add_subplot(len(splits), 2, 2 * row + 2)
        for index, (label, outcomes) in enumerate(methods.items()):
            draw_curve(curves, label, [curve for curve, _ in outcomes], f"C{index}")
            values = np.mean([accuracy for _, accuracy in outcomes], axis=0)
            width = 0.8 / len(methods)
            places = np.arange(len(values)) + (index - (len(methods) - 1) / 2) * width
            clients.bar(places, 100 * values, width, color=f"C{index}", label=label)
        curves.set(xlabel="round", ylabel="mean accuracy of clients, %", title=f"{split}: held-out accuracy")
        curves.set_ylim(0, 100)
        legend_beside(clients)
        clients.set(xlabel="client, by index", ylabel="accuracy, %", title=f"{split}: clients after the last round")
        clients.set_xticks(range(_clients(methods)))
        clients.set_ylim(0, 100)
        tidy_axes(curves, clients)
    save_figure(figure, path, PERSONAL_DPI)


def draw_curve(axes: Axes, label: str, curves: Sequence[Sequence[tuple[int, float]]], colour: str) -> None:
    """Draw one method: the mean over its runs as a line, their range as a band."""
    rounds = [server_round for server_round, _ in curves[0]]
    values = 100 * np.asarray([[mean for _, mean in curve] for curve in curves])  # (runs, evaluations)
    axes.plot(rounds, values.mean(0), color=colour, label=label, linewidth=1.4)
    if len(values) > 1:
        axes.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)


def gate_histograms(shared_weight: Array, labels: Array, num_classes: int, bins: int = BINS) -> Array:
    """Histograms of a_G over 0..1, (num_classes, bins); a row sums to 1, or to 0 for a class without examples."""
    found = np.zeros((num_classes, bins))
    for label in range(num_classes):
        counts, _ = np.histogram(shared_weight[labels == label], bins=bins, range=(0.0, 1.0))
        found[label] = counts / max(1, counts.sum())
    return found


def save_gate_histograms(path: Path, clients: Mapping[str, tuple[Array, Array]], classes: Sequence[str]) -> None:
    """Plot a panel per client with the distribution of a_G, the weight of the shared extractor, for each class.

    ``clients`` is {name: (a_G (N,), labels (N,))} of held-out examples, as in `Evaluation`.
    """
    columns = min(3, max(1, len(clients)))
    rows = -(-len(clients) // columns)
    figure = new_figure(3.9 * columns, 2.5 * rows)
    figure.suptitle("How much each client's gate relies on the shared extractor", fontsize=10, x=0.01, ha="left")
    edges = np.linspace(0, 1, BINS + 1)
    for number, (name, (weights, labels)) in enumerate(clients.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        shares = gate_histograms(weights, labels, len(classes))
        for label in np.unique(labels):
            mean = float(weights[labels == label].mean())
            axes.stairs(100 * shares[label], edges, color=f"C{label % 10}", label=f"{classes[label]} ({mean:.2f})")
        axes.set_title(name, fontsize=9)
        axes.set_xlim(0, 1)
        axes.legend(fontsize=6, frameon=False, title="class (mean weight)", title_fontsize=6, loc="upper left",
                    bbox_to_anchor=(1.0, 1.0))  # fmt: skip
        if number % columns == 0:
            axes.set_ylabel("% of the class", fontsize=8)
        if number // columns == rows - 1:
            axes.set_xlabel("weight of the shared extractor", fontsize=8)
        tidy_axes(axes)
    save_figure(figure, path, PERSONAL_DPI)


def _clients(methods: Mapping[str, Sequence[Outcome]]) -> int:
    return max(len(accuracy) for outcomes in methods.values() for _, accuracy in outcomes)
