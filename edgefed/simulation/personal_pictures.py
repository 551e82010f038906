"""Plots of a personal federation: accuracy over rounds, accuracy per client, and gate weights per class.

matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgefed.plots import new_figure, save_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array: TypeAlias = npt.NDArray[Any]

DPI = 110
BINS = 20

Outcome: TypeAlias = tuple[Sequence[tuple[int, float]], Sequence[float]]
"""Of one run: (round, mean accuracy) of each evaluation, and the final accuracy of each client."""


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
        curves.legend(fontsize=7)
        clients.set(xlabel="client", ylabel="accuracy, %", title=f"{split}: clients after the last round")
        clients.set_xticks(range(_clients(methods)))
        low = min(float(np.min(accuracy)) for outcomes in methods.values() for _, accuracy in outcomes)
        clients.set_ylim(max(0.0, 100 * low - 10), None)
        tidy_axes(curves, clients)
    save_figure(figure, path, DPI)


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
    columns = min(5, max(1, len(clients)))
    rows = -(-len(clients) // columns)
    figure = new_figure(2.9 * columns, 2.5 * rows)
    edges = np.linspace(0, 1, BINS + 1)
    for number, (name, (weights, labels)) in enumerate(clients.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        shares = gate_histograms(weights, labels, len(classes))
        for label in np.unique(labels):
            mean = float(weights[labels == label].mean())
            axes.stairs(100 * shares[label], edges, color=f"C{label % 10}", label=f"{classes[label]} ({mean:.2f})")
        axes.set_title(name, fontsize=9)
        axes.set_xlim(0, 1)
        axes.legend(fontsize=6)
        if number % columns == 0:
            axes.set_ylabel("% of the class", fontsize=8)
        if number // columns == rows - 1:
            axes.set_xlabel("weight of the shared extractor", fontsize=8)
        tidy_axes(axes)
    save_figure(figure, path, DPI)


def _clients(methods: Mapping[str, Sequence[Outcome]]) -> int:
    return max(len(accuracy) for outcomes in methods.values() for _, accuracy in outcomes)
