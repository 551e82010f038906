"""Comparison of two reports: what is faster, and whether the two can be compared at all.

A ratio gets a verdict only if both numbers are reliable. The reasons against it concern a whole report (throttled, on
battery, stopped) or a single test (noisy samples, other parameters).
"""

from __future__ import annotations

import dataclasses
import math

from edgefed.bench.report import Report
from edgefed.bench.statistics import NOISY, UNUSABLE, Entry

BUSY_LOAD = 0.5
"""Load average per core, before the run, above which other programs were running."""
SPREADS = 3.0
"""Combined spreads that a difference must exceed."""
NEVER_BELOW = 0.02
"""Smallest difference that counts: clocks and memory layout alone vary by 2 % from run to run."""
NOT_COMPARABLE = "not comparable"
SAME_PARAMS = ("n", "dtype", "size_bytes", "batch_size", "sequence_length", "tokens", "model", "experts", "block_bytes")
"""Parameters that must be equal for two tests of one name to be comparable."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One test in both reports. ``ratio`` is b / a.

    ``verdict`` is faster or slower (b than a), same, or not comparable, for ``reasons``.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    verdict: str
    reasons: tuple[str, ...] = ()


def conditions(report: Report) -> tuple[str, ...]:
    """Return the reasons against comparing a report with another; empty without any."""
    found = []
    if report.device.stand_in:
        found.append("nothing was measured: planned for a device profile")
    if report.interrupted:
        found.append("stopped by Ctrl-C")
    if report.sustain is not None and report.sustain.throttled:
        found.append(f"throttled ({', '.join(report.sustain.reasons)})")
    if report.host.plugged is False:
        found.append("on battery")
    load, cores = report.host.load_before, report.host.cores
    if load is not None and cores and load / cores > BUSY_LOAD:
        found.append(f"busy before the start (load {load:.1f} on {cores} cores)")
    if report.memory.check is not None and report.memory.check.spilled:
        found.append("GPU memory spilled into system memory")
    return tuple(found)


def differences(a: Report, b: Report) -> tuple[str, ...]:
    """Return the differences between the machines or their software, to know when reading ratios."""
    pairs = (
        ("device", a.device.name, b.device.name),
        ("speed measured on", a.device.speed_on, b.device.speed_on),
        ("power mode", a.device.power_mode, b.device.power_mode),
        ("torch", a.host.torch, b.host.torch),
        ("driver", a.host.driver, b.host.driver),
        ("edgefed", a.tool.version + a.tool.commit, b.tool.version + b.tool.commit),
    )
    return tuple(
        f"{name}: {first or 'unknown'} and {second or 'unknown'}" for name, first, second in pairs if first != second
    )


def compare_reports(a: Report, b: Report) -> list[Comparison]:
    """Compare every test of either report, in the order of ``a``."""
    spoiled = tuple(f"{label}: {reason}" for label, report in (("A", a), ("B", b)) for reason in conditions(report))
    first = {entry.name: entry for entry in (*a.tests, *a.network)}
    second = {entry.name: entry for entry in (*b.tests, *b.network)}
    return [
        _compare(name, first.get(name), second.get(name), spoiled)
        for name in [*first, *(name for name in second if name not in first)]
    ]


def _compare(name: str, a: Entry | None, b: Entry | None, spoiled: tuple[str, ...]) -> Comparison:
    reasons = [reason for label, entry in (("A", a), ("B", b)) if (reason := _problem(label, entry))]
    first, second = (entry.median if entry is not None else None for entry in (a, b))
    if a is None or b is None:
        unit = a.unit if a is not None else b.unit if b is not None else ""
        return Comparison(name, unit, first, second, None, NOT_COMPARABLE, (*reasons, *spoiled))
    if a.unit != b.unit:
        reasons.append(f"units differ: {a.unit} and {b.unit}")
    reasons += [
        f"{key} differs: {a.params[key]} and {b.params[key]}"
        for key in SAME_PARAMS
        if key in a.params and key in b.params and a.params[key] != b.params[key]
    ]
    reasons += spoiled
    ratio = second / first if first and second is not None and a.unit == b.unit else None
    if ratio is None or reasons:
        return Comparison(name, a.unit, first, second, ratio, NOT_COMPARABLE, tuple(reasons))
    noise = max(NEVER_BELOW, SPREADS * math.hypot(a.spread or 0.0, b.spread or 0.0))
    if abs(ratio - 1) <= noise:
        return Comparison(name, a.unit, first, second, ratio, "same", (f"within {100 * noise:.0f} %",))
    better = ratio > 1 if a.better == "higher" else ratio < 1
    return Comparison(name, a.unit, first, second, ratio, "faster" if better else "slower")


def _problem(label: str, entry: Entry | None) -> str:
    if entry is None:
        return f"{label}: not measured"
    if not entry.measured:
        return f"{label}: {entry.verdict} ({entry.reason})"
    return f"{label}: {entry.verdict}" if entry.verdict in (NOISY, UNUSABLE) else ""
