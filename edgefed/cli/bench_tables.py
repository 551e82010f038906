"""How `edgefed bench` looks: header, memory waterfall, speed, what fits, in tables that fit the terminal.

    under 110 columns  short bars
    under 80 columns   no bars
ASCII alone where nobody looks at a terminal, or NO_COLOR is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgefed.bench.compare import Comparison, conditions, differences
from edgefed.bench.formats import MODES, STORAGES, duration, gib, number
from edgefed.bench.report import Fit, Report, Sustain
from edgefed.bench.statistics import FAILED, INTERRUPTED, NOISY, SKIPPED, STABLE, UNUSABLE, Entry
from edgefed.cli.output import stdout_console
from edgefed.cli.phrasing import to_flags
from edgefed.cli.tables import Column, FittedTable
from edgefed.hardware.memory import GIB, format_bytes
from edgefed.hardware.profile_files import DeviceProfile

Justify = Literal["left", "right"]
BARS = ((110, 22), (80, 12))
"""Columns from which a bar has so many cells; none below. What a number comes from needs the rest of the line."""


class Style:
    """What this console can show."""

    def __init__(self, console: Console) -> None:
        self.fancy = console.is_terminal and not console.no_color and "utf" in (console.encoding or "").lower()
        self.plus_minus = "\N{PLUS-MINUS SIGN}" if self.fancy else "+-"
        self.full, self.empty = ("\N{FULL BLOCK}", "\N{LIGHT SHADE}") if self.fancy else ("#", ".")
        self.dot = "\N{MIDDLE DOT}" if self.fancy else "-"
        self.arrow = "\N{RIGHTWARDS ARROW}" if self.fancy else "->"

    def cells(self, width: int) -> int:
        """Cells of a bar on a console so wide; 0 for no bar."""
        return next((cells for columns, cells in BARS if width >= columns), 0)

    def bar(self, start: float, end: float, cells: int) -> str:
        """The piece from ``start`` to ``end`` (0..1) of a bar; at least one cell, unless it is nothing."""
        first, last = (round(max(0.0, min(1.0, share)) * cells) for share in (start, end))
        if end > start and first == last:
            first = max(0, min(first, cells - 1))
            last = first + 1
        return self.empty * first + self.full * (last - first) + self.empty * (cells - last)


def table_of(*columns: tuple[str, Justify]) -> Table:
    """A table of (title, justify) columns; without any title it has no header."""
    titled = any(title for title, _ in columns)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1), show_header=titled)
    for index, (title, justify) in enumerate(columns):
        last = index == len(columns) - 1 and justify == "left"
        table.add_column(title, justify=justify, no_wrap=not last, overflow="ellipsis" if not last else "fold")
    return table


NOTE_CHARACTERS = 26
COLOURS = {
    STABLE: "green",
    NOISY: "yellow",
    UNUSABLE: "red",
    FAILED: "red",
    INTERRUPTED: "yellow",
    SKIPPED: "dim",
}


def print_report(report: Report, files: Sequence[Path]) -> None:
    """The whole report for people on stdout."""
    console = stdout_console()
    style = Style(console)
    _header(console, style, report)
    _memory(console, style, report)
    if report.tests:
        _speed(console, style, report)
    if report.sustain is not None:
        _sustain(console, style, report.sustain)
    if report.network:
        console.print("\nNetwork", style="bold")
        console.print(entries_table(style, report.network))
    if report.kernels:
        _kernels(console, report)
    if report.explain:
        print_explain(console, style, report)
    if report.fits:
        print_fits(console, style, report)
    for warning in report.warnings:
        console.print(f"[yellow]![/] {escape(to_flags(warning))}")
    if report.verdict:
        console.print(f"\n{report.verdict}", style="bold", markup=False)
    ending = "stopped by Ctrl-C: what was measured until then is above; " if report.interrupted else ""
    went = f"written: {', '.join(map(str, files))}" if files else "nothing written; --json FILE keeps it"
    console.print(f"{ending}{report.seconds:.0f} s {style.dot} {went}", style="dim", markup=False)


def _header(console: Console, style: Style, report: Report) -> None:
    device, host = report.device, report.host
    words = [device.name, {"discrete": "own memory", "unified": "shared memory", "cpu": "CPU"}[device.kind]]
    words += [f"cc {device.compute_capability}"] if device.compute_capability else []
    words += [f"driver {host.driver}"] if host.driver else []
    words += [f"L4T {host.l4t}"] if host.l4t else []
    words += [f"torch {host.torch}"] if host.torch and not device.stand_in else []
    console.print(Text(f"{words[0]}", style="bold") + Text(f"  {f' {style.dot} '.join(words[1:])}"))
    if device.stand_in:
        line = [f"profile {device.profile} stands in", "nothing was measured"]
    else:
        line = [f"{report.tool.mode} run, {report.tool.repeats} samples a test"]
        if host.load_before is not None:
            line.append(f"load {host.load_before:.1f} on {host.cores or '?'} cores")
        if host.plugged is not None:
            line.append("mains" if host.plugged else f"battery {host.battery_percent:.0f} %")
        line += [f"power {device.power_mode}"] if device.power_mode else []
        line += [f"in {host.container}"] if host.container else []
        line += ["WSL2"] if host.wsl else []
        line += [f"profile {device.profile}"] if device.profile else []
        if device.speed_on != device.id:
            line.append("speed measured on the CPU: torch cannot use this GPU")
    console.print(f" {style.dot} ".join(line), style="dim", markup=False)


def _memory(console: Console, style: Style, report: Report) -> None:
    memory = report.memory
    cells = style.cells(console.width)
    bars: list[tuple[str, Justify]] = [("", "left")] if cells else []
    table = table_of(("Memory budget", "left"), ("", "right"), *bars, ("", "left"))
    total = next((term.size_bytes for term in memory.terms if term.size_bytes > 0), 0)
    left = 0

    def row(name: str, size: str, start: float, end: float, origin: str, colour: str = "") -> None:
        bar = [Text(style.bar(start, end, cells), style=colour or "dim")] if cells else []
        table.add_row(Text(name, style=colour), Text(size, style=colour), *bar, Text(origin, style="dim"))

    for term in memory.terms:
        before, left = left, left + term.size_bytes
        sign = "" if term.size_bytes > 0 else "- "
        size = f"{sign}{abs(term.size_bytes) / GIB:.1f} GiB"
        low, high = sorted((before, left))
        row(
            to_flags(f"{term.name} ({term.who})" if term.who else term.name),
            size,
            low / total if total else 0,
            high / total if total else 0,
            to_flags(term.origin),
        )
    origin = "" if memory.terms else to_flags(memory.origin)
    share = memory.now_bytes / total if memory.now_bytes is not None and total else 0.0
    row("usable now", gib(memory.now_bytes), 0, share, origin, "green" if memory.now_bytes else "red")
    ideal = memory.ideal_bytes
    row("on an idle machine", gib(ideal), 0, ideal / total if ideal and total else 0.0, "nothing else running")
    console.print()
    console.print(table)
    check = memory.check
    if check is not None:
        words = [f"{format_bytes(check.verified_bytes)} allocated and written in {check.seconds:.1f} s"]
        words += [f"stopped: {check.stopped}"] if check.stopped else []
        if check.largest_block_bytes is not None:
            words.append(f"largest block at least {format_bytes(check.largest_block_bytes)}")
        if report.device.speed_on == "cpu" and report.device.kind != "cpu":
            words.append("host memory")
        console.print(f"  verified: {', '.join(words)}", style="dim", markup=False)


def _speed(console: Console, style: Style, report: Report) -> None:
    where = "" if report.device.speed_on == report.device.id else f" on {report.device.speed_on}"
    console.print(f"\nSpeed{where}", style="bold", markup=False)
    console.print(entries_table(style, report.tests))
    if report.model:
        train = report.test("train step")
        params = train.params if train else {}
        words = [f"model {report.model['name']}"]
        if train is not None and train.measured:
            words.append(
                f"{params['batch_size']} x {params['sequence_length']} tokens a step, {params['trainable']} of "
                f"{report.model['experts']} experts a layer trained in full, {params['dtype']}"
            )
            if train.derived:
                words.append(f"* = derived from {params['layers'][-1]} of {params['layers_of']} layers, random weights")
        console.print("  " + "; ".join(words), style="dim", markup=False)


def entries_table(style: Style, entries: Sequence[Entry]) -> FittedTable:
    """Measurements, a row each: what was measured stays, paper figures and notes go where the terminal is narrow."""
    paper = any(entry.paper for entry in entries)
    table = FittedTable(
        Column("test", name=True), Column("median"), Column("spread", drop=3), Column("unit", left=True),
        *((Column("paper", drop=4), Column("share", drop=2)) if paper else ()), Column("", left=True),
        Column("note", drop=1, wraps=True),
    )  # fmt: skip
    for entry in entries:
        colour = COLOURS[entry.verdict]
        spread = share = figure = ""
        median: str | Text = Text("-", style=colour)
        note = Text(to_flags(entry.reason), style="dim" if entry.verdict == SKIPPED else colour)
        if entry.measured:
            median = f"{number(entry.median or 0.0)}{'*' if entry.derived else ''}"
            spread = f"{style.plus_minus}{100 * (entry.spread or 0):.1f} %" if len(entry.samples) > 2 else "-"
            share = "-" if entry.share is None else f"{100 * entry.share:.0f} %"
            figure = "-" if entry.paper is None else number(entry.paper)
            text = entry.note or entry.reason
            if entry.reason and entry.note:
                text = entry.reason if entry.verdict != STABLE else entry.note
            note = Text(_short(to_flags(text)), style="dim")
        table.add_row(
            entry.name, median, Text(spread, style=colour), entry.unit, *((figure, share) if paper else ()),
            Text(entry.verdict, style=colour), note,
        )  # fmt: skip
    return table


def _short(note: str) -> str:
    return note if len(note) <= NOTE_CHARACTERS else note[: NOTE_CHARACTERS - 2].rstrip() + ".."


def _sustain(console: Console, style: Style, run: Sustain) -> None:
    console.print(f"\nSustained {run.seconds:.0f} s of {run.name}", style="bold", markup=False)
    colour = "green" if run.change > -0.05 else "yellow" if run.change > -0.15 else "red"
    line = Text(f"  {number(run.first)} {style.arrow} {number(run.last)} {run.unit} ")
    line.append(f"({100 * run.change:+.1f} %)", style=colour)
    for unit, field in (("MHz", "clock_mhz"), ("C", "temperature_celsius"), ("W", "power_watts")):
        values = [value for point in run.points if (value := getattr(point, field)) is not None]
        if values:
            line.append(f" {style.dot} {number(values[0])} {style.arrow} {number(values[-1])} {unit}")
    if run.throttled:
        line.append(f" {style.dot} throttled: {', '.join(run.reasons)}", style="red")
    elif run.power_limited:
        line.append(f" {style.dot} at its power limit", style="dim")
    console.print(line)
    missing = [name.replace("_", " ").rpartition(" ")[0] or name for name in run.unknown if name != "energy_joules"]
    if missing:
        console.print(f"  not readable here: {', '.join(missing)}", style="dim", markup=False)


def _kernels(console: Console, report: Report) -> None:
    """Print which backend runs in each case, when it was proved, and how much faster it is."""
    console.print("\nKernels", style="bold", end="")
    console.print(f" on {report.device.speed_on}", style="dim", markup=False)
    for row in report.kernels:
        found = "proved" if row.speedup >= 1.1 else "measured"
        proof = f", {row.speedup:.2g} times as fast as plain PyTorch, {found} {row.when[:10]}" if row.when else ""
        console.print(f"  {row.case}: {row.backend}{proof}", markup=False)
        for other in row.others:
            console.print(f"    {other}", style="dim", markup=False)
    if any("not proved" in other for row in report.kernels for other in row.others):
        console.print("  `edgefed doctor --prove` proves the others, as does training", style="dim", markup=False)


def print_comparison(first: str, second: str, a: Report, b: Report, rows: Sequence[Comparison]) -> None:
    """Two reports: medians, ratio, and what may be said about it."""
    console = stdout_console()
    style = Style(console)
    for label, name, report in (("A", first, a), ("B", second, b)):
        console.print(
            f"{label}  {name}: {report.device.name} {style.dot} {report.tool.mode} run {style.dot} {report.created}",
            markup=False,
        )
        for reason in conditions(report):
            console.print(f"   [red]not comparable:[/] {escape(reason)}")
    for difference in differences(a, b):
        console.print(f"   differs: {difference}", style="yellow", markup=False)
    console.print()
    console.print(changes_table(a, b, rows))


def changes_table(a: Report, b: Report, rows: Sequence[Comparison]) -> FittedTable:
    """The tests of two reports, with the ratio of their medians."""
    table = FittedTable(
        Column("test", name=True), Column("A", drop=2), Column("B", drop=2), Column("unit", drop=3, left=True),
        Column("B / A"), Column("", left=True), Column("why", drop=1, wraps=True),
    )  # fmt: skip
    colours = {"faster": "green", "slower": "red", "same": "", "not comparable": "yellow"}
    common = {f"{label}: {reason}" for label, report in (("A", a), ("B", b)) for reason in conditions(report)}
    for row in rows:
        shown = ["-" if value is None else number(value) for value in (row.a, row.b)]
        why = [reason for reason in row.reasons if reason not in common]
        if not why and row.reasons:
            why = ["see above"]
        table.add_row(
            row.name, *shown, row.unit, "-" if row.ratio is None else f"{row.ratio:.2f}",
            Text(row.verdict, style=colours[row.verdict]), Text("; ".join(why), style="dim"),
        )  # fmt: skip
    return table


def print_profiles(profiles: Mapping[str, DeviceProfile]) -> None:
    """The shipped device profiles, one a line."""
    console = stdout_console()
    console.print(profiles_table(profiles))
    console.print("edgefed bench --device-profile NAME plans for one of them", style="dim", markup=False)


def profiles_table(profiles: Mapping[str, DeviceProfile]) -> FittedTable:
    """A row for each device profile; its name is what a user types, so it is never cut."""
    table = FittedTable(
        Column("profile", left=True), Column("memory"), Column("GB/s"), Column("bf16 TFLOPS", drop=1),
        Column("device", drop=3, wraps=True), Column("disk", drop=2, left=True),
    )  # fmt: skip
    for name, profile in profiles.items():
        values = [profile.value(key) for key in ("memory_visible", "bandwidth", "bf16_tflops")]
        cells = ["-" if value is None else number(value) for value in values[1:]]
        unit = f"{number(values[0] or 0.0)} GiB {profile.kind}"
        table.add_row(name, unit, *cells, profile.name, profile.typical_disk)
    return table


def print_fits(console: Console, style: Style, report: Report) -> None:
    """Print how many experts per layer of each model fit."""
    console.print("\nExperts per layer that fit", style="bold", end="")
    both = any(fit.budget == "now" for fit in report.fits) and any(fit.budget == "ideal" for fit in report.fits)
    console.print(" now (and on an idle machine)" if both else "", style="dim", markup=False)
    console.print(fits_table(report))
    notes = [
        "predicted: 512 tokens a step, checkpointing, chunked loss",
        "profile = forward; LoRA = rank 16 on all resident experts; full = one expert per layer trains in full",
    ]
    if any(fit.storage == "nf4" for fit in report.fits):
        notes.append("NF4 = frozen experts in 4 bits, as `edgefed join` stores them where memory is short")
    for note in notes:
        console.print(f"  {note}", style="dim", markup=False)


def fits_table(report: Report) -> FittedTable:
    """How many experts per layer of each model fit, a column for each storage and way to train: none is left out."""
    table = FittedTable(
        Column("model", name=True), Column("of"),
        *(Column(f"{STORAGES[storage]} {label}") for storage in STORAGES for label in MODES.values()),
        Column(_upload_title(report), drop=1),
    )  # fmt: skip
    found: dict[tuple[str, ...], Fit] = {(f.model, f.storage, f.mode, f.budget): f for f in report.fits}
    for model in dict.fromkeys(fit.model for fit in report.fits):
        cells: list[Text] = []
        of = 0
        for storage in STORAGES:
            for mode in MODES:
                now, ideal = (found.get((model, storage, mode, budget)) for budget in ("now", "ideal"))
                shown = now or ideal
                of = shown.of if shown is not None else of
                cells.append(Text("-") if shown is None else _fit_cell(now, ideal, shown))
        lora = found.get((model, "bfloat16", "lora", "now")) or found.get((model, "bfloat16", "lora", "ideal"))
        seconds = lora.upload_s if lora else None
        table.add_row(model, str(of), *cells, "-" if seconds is None else duration(seconds))
    return table


def _upload_title(report: Report) -> str:
    line = report.uplink
    return f"LoRA up, {line['name']}" if line else "LoRA up"


def _fit_cell(now: Fit | None, ideal: Fit | None, shown: Fit) -> Text:
    colour = "green" if shown.experts == shown.of else "red" if shown.experts == 0 else ""
    text = Text("?" if now is None else str(now.experts), style=colour if now else "")
    if ideal is not None and (now is None or ideal.experts != now.experts):
        text.append(f" ({ideal.experts})", style="dim")
    return text


def print_explain(console: Console, style: Style, report: Report) -> None:
    """Print how each way to train uses memory, predicted and measured."""
    model = report.explain[0]["model"]
    console.print(f"\nWhere the memory of a training step of {model} goes", style="bold", markup=False)
    cells = style.cells(console.width)
    for row in report.explain:
        total = row["total_bytes"]
        fits = {True: "fits", False: "does not fit", None: "budget unknown"}[row["fits"]]
        head = Text(f"  {row['plan']}", style="bold")
        head.append(f"  {row['resident']} of {row['of']} experts a layer, {row['trainable']} trained")
        console.print(head)
        bars: list[tuple[str, Justify]] = [("", "left")] if cells else []
        parts = table_of(("", "left"), ("", "right"), ("", "right"), *bars)
        start = 0.0
        for name, size in row["parts"].items():
            if not size:
                continue
            bar = [Text(style.bar(start, start + size / total, cells), style="cyan")] if cells else []
            parts.add_row(f"    {name}", format_bytes(size), f"{100 * size / total:.0f} %", *bar)
            start += size / total
        parts.add_row("    predicted peak", Text(format_bytes(total), style="bold"), "", *([""] if cells else []))
        console.print(parts)
        console.print(f"    peak in the {row['phase']} phase; {fits}", style="dim", markup=False)
        found = row.get("measured")
        if found:
            part = "" if found["layers"] == found["layers_of"] else f" of the first {found['layers']} layers"
            ratio = found["predicted_bytes"] / found["measured_bytes"] - 1
            text = (
                f"measured{part}: {format_bytes(found['measured_bytes'])}, predicted "
                f"{format_bytes(found['predicted_bytes'])} ({100 * ratio:+.0f} %), after correction by this step "
                f"{format_bytes(found['corrected_bytes'])}"
            )
            console.print(Padding(Text(text), (0, 0, 0, 4), expand=False))
