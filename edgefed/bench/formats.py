"""What a report is written as: CSV rows, Markdown tables, a device profile; and how numbers look in all of them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from edgefed.bench.report import Report
from edgefed.bench.statistics import UNUSABLE
from edgefed.errors import StorageError
from edgefed.hardware.facts import DeviceFacts
from edgefed.hardware.memory import GIB
from edgefed.hardware.profile_files import Figure, to_toml
from edgefed.hardware.profiles import profile_of

STORAGES = {"bfloat16": "bf16", "nf4": "NF4"}
MODES = {"profile": "profile", "lora": "LoRA", "full": "full"}
CSV_COLUMNS = (
    "created", "device", "speed_on", "section", "name", "unit", "median", "mad", "best", "verdict", "samples",
    "paper", "share", "derived", "note", "reason",
)  # fmt: skip

FIGURES = {
    "copy": ("bandwidth", "GB/s"),
    "matmul bfloat16": ("bf16_tflops", "TFLOPS"),
    "matmul float16": ("fp16_tflops", "TFLOPS"),
    "matmul float32": ("fp32_tflops", "TFLOPS"),
    "disk read": ("disk_read", "MB/s"),
    "disk write": ("disk_write", "MB/s"),
}
"""Test -> key and unit of the figure in a device profile. Disks vary from machine to machine: their figures are written
to a new profile, but measurements are not compared with them."""


# --- numbers ----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Format with three significant digits: 0.0123, 1.23, 12.3, 1230."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ") if abs(value) >= 10000 else f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def gib(size: int | None) -> str:
    """Format bytes in GiB, None as unknown."""
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def duration(seconds: float) -> str:
    """Format a duration: 0.24 s, 10 s, 4.0 min, 2.1 h."""
    if seconds < 60:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# --- documents --------------------------------------------------------------------------------------------------


def to_csv(report: Report) -> str:
    """Return one CSV row per test, network tests included; samples are separated by spaces."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section, entries in (("tests", report.tests), ("network", report.network)):
        for entry in entries:
            writer.writerow([
                report.created, report.device.name, report.device.speed_on, section, entry.name, entry.unit,
                *(_cell(value) for value in (entry.median, entry.mad, entry.best)), entry.verdict,
                " ".join(_cell(sample) for sample in entry.samples), _cell(entry.paper), _cell(entry.share),
                int(entry.derived), entry.note, entry.reason,
            ])  # fmt: skip
    return out.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def to_markdown(report: Report) -> str:
    """Return memory, speed and the experts that fit as Markdown tables, for an issue or a README."""
    lines = [f"**{report.device.name}** ({report.device.kind}), edgefed {report.tool.version}, {report.tool.mode} run, "
             f"{report.created}", ""]  # fmt: skip
    lines += [f"Usable memory: {gib(report.memory.now_bytes)} now, {gib(report.memory.ideal_bytes)} idle.", ""]
    if report.tests:
        lines += ["| test | median | spread | unit | of paper | verdict | note |", "|---|---:|---:|---|---:|---|---|"]
    for entry in (*report.tests, *report.network):
        median = "-" if entry.median is None else number(entry.median) + ("*" if entry.derived else "")
        spread = "" if entry.spread is None else f"{100 * entry.spread:.1f} %"
        share = "-" if entry.share is None else f"{100 * entry.share:.0f} %"
        cells = (entry.name, median, spread, entry.unit, share, entry.verdict, entry.note or entry.reason)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    columns = [(storage, mode) for storage in STORAGES for mode in MODES]
    titles = [f"{STORAGES[storage]} {MODES[mode]}" for storage, mode in columns]
    for budget in ("now", "ideal"):
        found = {(fit.model, fit.storage, fit.mode): fit for fit in report.fits if fit.budget == budget}
        if not found:
            continue
        lines += ["", f"| experts per layer that fit, {budget} | of | {' | '.join(titles)} |"]
        lines.append(f"|---|---:|{'---:|' * len(titles)}")
        for model in dict.fromkeys(name for name, _, _ in found):
            fits = [found[model, storage, mode] for storage, mode in columns]
            lines.append(f"| {model} | {fits[0].of} | {' | '.join(str(fit.experts) for fit in fits)} |")
    return "\n".join(lines) + "\n"


def to_profile(name: str, facts: DeviceFacts, report: Report | None) -> str:
    """Return a device profile in TOML, called ``name``, for the device of ``facts``.

    Without a report it has only what needs no measurement. Unusable tests and speeds measured on another device are
    left out. Raises ConfigError for an invalid name and where the device's memory is unknown.
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


# --- files ------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: a full disk leaves no partial file. Raises StorageError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raise StorageError before a long measurement if ``path`` cannot be written."""
    if path.is_dir():
        raise StorageError(f"cannot write {path}: it is a directory")
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
