"""The figure of a report: how the memory is used, and how much of each model fits in which budget.

Labels stand beside what they name instead of in a legend. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgefed.bench.planning import fit_curve
from edgefed.bench.report import Report
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.errors import StorageError
from edgefed.hardware.memory import GIB
from edgefed.plots import COLOURS, DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_SHOWN = 0.012
"""A term of the budget below this share of the total is drawn without a label."""
CHARACTERS = 56
"""Characters of a label that fit over the whole bar."""
GREYS = ("#8d99ae", "#c9d1dc", "#adb5bd", "#d9dfe6", "#98a4b3")
MOST_GIB, LEAST_GIB = 192.0, 4.0
LABEL_GAP = 0.055
"""Smallest distance of two labels at the right edge, as a share of experts."""


def save_picture(path: Path, report: Report) -> None:
    """Write a PNG or SVG file: memory on the left, experts that fit on the right. Raises StorageError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    figure.suptitle(_title(report), fontsize=11, x=0.01, ha="left")
    draw_memory(left, report)
    draw_fits(right, report)
    part = path.with_name(path.name + ".part")
    try:
        figure.savefig(part, dpi=DPI, format=path.suffix.lstrip(".").lower())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _title(report: Report) -> str:
    words = [report.device.name]
    words.append("planned, not measured" if report.device.stand_in else report.created[:10])
    return ", ".join(words)


def draw_memory(axes: Axes, report: Report) -> None:
    """Draw one stacked bar from 0 to the total.

    A name stands in its segment if there is room, else at the end of a line: above the bar and left of the line, or
    below the bar and right of it, so that names never overlap.
    """
    terms = [term for term in report.memory.terms if term.size_bytes < 0]
    total = sum(term.size_bytes for term in report.memory.terms if term.size_bytes > 0)
    axes.set_title("memory\n", fontsize=10, loc="left")
    if not total or report.memory.now_bytes is None:
        words = "the budget is unknown:\n" + _wrapped(report.memory.origin, 50)
        axes.text(0.5, 0.5, words, ha="center", va="center", fontsize=9, transform=axes.transAxes)
        axes.set_axis_off()
        return
    pieces = [("usable", report.memory.now_bytes, COLOURS[2])]
    pieces += [(term.name, -term.size_bytes, GREYS[index % len(GREYS)]) for index, term in enumerate(reversed(terms))]
    start = 0
    above: list[tuple[float, str]] = []
    below: list[tuple[float, str]] = []
    for name, size, colour in pieces:
        axes.barh(0, size / GIB, left=start / GIB, color=colour, edgecolor="white", height=0.5)
        middle, size_text = (start + size / 2) / GIB, f"{size / GIB:.1f} GiB"
        lines = _wrapped(name, max(1, int(CHARACTERS * size / total))).split("\n")
        if len(lines) <= 2 and max(map(len, [*lines, size_text])) <= CHARACTERS * size / total:
            axes.text(middle, 0, "\n".join([*lines, size_text]), ha="center", va="center", fontsize=9)
        elif size / total > LEAST_SHOWN:
            (above if middle > 0.45 * total / GIB else below).append((middle, f"{name} {size_text}"))
        start += size
    ideal = report.memory.ideal_bytes
    if ideal and abs(ideal - report.memory.now_bytes) > 0.02 * total:
        axes.plot([ideal / GIB] * 2, [-0.25, 0.25], color="#1a1a1a", linestyle="--", linewidth=1.2)
        group = above if ideal > 0.45 * total else below
        group.append((ideal / GIB, f"usable when idle {ideal / GIB:.1f} GiB"))
    for group, sign, side in ((sorted(above), 1, "right"), (sorted(below, reverse=True), -1, "left")):
        for index, (x, label) in enumerate(group):
            y = sign * (0.42 + 0.2 * index)
            axes.plot([x, x], [sign * 0.25, y], color="#666666", linewidth=0.7)
            gap = 0.008 * total / GIB
            axes.text(x - gap if side == "right" else x + gap, y, label, ha=side, va="center", fontsize=8)
    axes.set_xlim(0, total / GIB)
    axes.set_ylim(-0.5 - 0.2 * len(below), 0.5 + 0.2 * max(3, len(above)))
    axes.set_yticks([])
    axes.set_xlabel("GiB", fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def draw_fits(axes: Axes, report: Report) -> None:
    """Draw one line per model: share of resident experts while one per layer trains, over the budget."""
    planning = report.planning
    now = report.memory.now_bytes
    most = min(MOST_GIB, max(LEAST_GIB, 2.2 * (max(now or 0, report.memory.ideal_bytes or 0) / GIB)))
    arguments = (int(most * GIB), planning["optimizer"], planning["device"], planning["process_bytes"])
    curves = [fit_curve(shape, *arguments) for shape in KNOWN_SHAPES.values()]
    ends = _spread([curve.shares[-1] for curve in curves])
    for index, (curve, end) in enumerate(zip(curves, ends, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot([size / GIB for size in curve.budgets_bytes], curve.shares, color=colour, linewidth=1.8)
        axes.text(
            1.015, end, curve.model, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=colour
        )  # fmt: skip
    budgets = [(now, "now", "-"), (report.memory.ideal_bytes, "idle", "--")]
    lines = [(size / GIB, label, style) for size, label, style in budgets if size is not None]
    if len(lines) == 2 and abs(lines[0][0] - lines[1][0]) < 0.02 * most:
        lines.pop()
    sides = ("right", "left") if len(lines) == 2 else ("center",)
    for (size, label, style), side in zip(sorted(lines), sides, strict=False):
        axes.axvline(size, color="#1a1a1a", linestyle=style, linewidth=1.2)
        axes.text(size, 1.06, f"{label} {size:.1f} GiB", ha=side, va="bottom", fontsize=8)
    axes.set_xlim(0, most)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_title("experts that fit, in bfloat16, one per layer trained in full\n", fontsize=10, loc="left")
    axes.set_xlabel("usable memory, GiB", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _spread(values: Sequence[float]) -> list[float]:
    """Return label heights near ``values``, in the same order, at least `LABEL_GAP` apart and at most 1."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    heights = [0.0] * len(values)
    low = 0.0
    for index in order:
        heights[index] = max(values[index], low)
        low = heights[index] + LABEL_GAP
    high = 1.03
    for index in reversed(order):  # pushed down from the top
        heights[index] = min(heights[index], high)
        high = heights[index] - LABEL_GAP
    return heights
