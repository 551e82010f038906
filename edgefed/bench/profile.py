"""A device profile from a report: what was measured here, beside what is known of this kind of device."""

from __future__ import annotations

from edgefed.bench.report import Report
from edgefed.bench.speed import FIGURES
from edgefed.bench.statistics import UNUSABLE
from edgefed.hardware.facts import DeviceFacts
from edgefed.hardware.profile_files import Figure, to_toml
from edgefed.hardware.profiles import profile_of


def profile_text(name: str, facts: DeviceFacts, report: Report | None) -> str:
    """The TOML of a profile called ``name`` for the device of ``facts``; without a report, of what needs no measuring.

    Tests whose samples disagree too much, and speeds that were not measured on the device itself, are left out. Raises
    ConfigError for a name that is no id, and where the device's memory is unknown.
    """
    measured = {}
    if report is not None and report.device.speed_on == report.device.id:
        for entry in report.tests:
            key, unit = FIGURES.get(entry.name, ("", ""))
            if key and entry.measured and entry.verdict != UNUSABLE and entry.median:
                spread = f"{len(entry.samples)} samples, spread {100 * (entry.spread or 0):.1f} %, {entry.verdict}"
                measured[key] = Figure(
                    round(entry.median, 4), unit, "measured", f"edgefed bench {report.tool.version}, {report.created}",
                    note=spread,
                )  # fmt: skip
    return to_toml(profile_of(name, facts, measured))
