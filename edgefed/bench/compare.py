"""Two reports beside each other: what is faster, and whether that may be said at all.

A ratio is only given a verdict when both numbers deserve it. What spoils a whole report (throttled, on battery,
stopped) or a single test (noisy samples, other parameters) is named.
"""

from __future__ import annotations

import dataclasses
import math

from edgefed.bench.report import Report
from edgefed.bench.statistics import NOISY, UNUSABLE, Entry

BUSY_LOAD = 0.5
"""Load average per core, before the run, above which something else was at work."""
SPREADS = 3.0
"""A difference below so many combined spreads is none."""
NEVER_BELOW = 0.02
"""Nor is one of two per cent: clocks and memory layout alone do that from run to run."""
SAME_PARAMS = ("n", "dtype", "size_bytes", "batch_size", "sequence_length", "tokens", "model", "experts", "block_bytes")
"""Parameters that must agree for two tests of one name to be the same test."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One test in both reports. ``ratio`` is b / a. ``verdict``: faster, slower (of b), same, or not comparable, with
    the ``reasons``.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    verdict: str
    reasons: tuple[str, ...] = ()


def conditions(report: Report) -> tuple[str, ...]:
    """Why the numbers of a whole report should not be compared; empty when they may be."""
    found = []
    if report.device.stand_in:
        found.append("nothing was measured: a profile stood in for the device")
    if report.interrupted:
        found.append("stopped by Ctrl-C")
    if report.sustain is not None and report.sustain.throttled:
        found.append(f"throttled ({', '.join(report.sustain.reasons)})")
    if report.host.plugged is False:
        found.append("on battery")
    load, cores = report.host.load_before, report.host.cores
    if load is not None and cores and load / cores > BUSY_LOAD:
        found.append(f"busy before it began (load {load:.1f} on {cores} cores)")
    if report.memory.check is not None and report.memory.check.spilled:
        found.append("GPU memory spilled into system memory")
    return tuple(found)


def differences(a: Report, b: Report) -> tuple[str, ...]:
    """What differs between the machines or the set-ups: not wrong, but to be known when reading ratios."""
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
    """Every test of either report, in the order of ``a``."""
    spoiled = tuple(f"{label}: {reason}" for label, report in (("A", a), ("B", b)) for reason in conditions(report))
    first = {entry.name: entry for entry in (*a.tests, *a.network)}
    second = {entry.name: entry for entry in (*b.tests, *b.network)}
    return [
        _compare(name, first.get(name), second.get(name), spoiled)
        for name in [*first, *(name for name in second if name not in first)]
    ]


def _compare(name: str, a: Entry | None, b: Entry | None, spoiled: tuple[str, ...]) -> Comparison:
    unit = (a or b).unit
    reasons = []
    for label, entry in (("A", a), ("B", b)):
        if entry is None:
            reasons.append(f"{label}: not measured")
        elif not entry.measured:
            reasons.append(f"{label}: {entry.verdict} ({entry.reason})")
        elif entry.verdict in (NOISY, UNUSABLE):
            reasons.append(f"{label}: {entry.verdict}")
    values = [entry.median if entry is not None and entry.measured else None for entry in (a, b)]
    if a is not None and b is not None:
        if a.unit != b.unit:
            reasons.append(f"units differ: {a.unit} and {b.unit}")
        reasons += [
            f"{key} differs: {a.params[key]} and {b.params[key]}"
            for key in SAME_PARAMS
            if key in a.params and key in b.params and a.params[key] != b.params[key]
        ]
    ratio = values[1] / values[0] if None not in values and values[0] and a.unit == b.unit else None
    reasons += spoiled
    if ratio is None or reasons:
        return Comparison(name, unit, *values, ratio, "not comparable", tuple(reasons))
    noise = max(NEVER_BELOW, SPREADS * math.hypot(a.spread or 0.0, b.spread or 0.0))
    if abs(ratio - 1) <= noise:
        return Comparison(name, unit, *values, ratio, "same", (f"within {100 * noise:.0f} %",))
    better = ratio > 1 if a.better == "higher" else ratio < 1
    return Comparison(name, unit, *values, ratio, "faster" if better else "slower")
