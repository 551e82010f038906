"""The tables of `edgefed bench` about a model: experts that fit, and where a training step's memory goes."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from edgefed.bench.formats import MODES, STORAGES, duration
from edgefed.bench.report import Fit, Report
from edgefed.cli.bench_style import WIDE, Justify, Style, table_of
from edgefed.hardware.memory import format_bytes


def print_fits(console: Console, style: Style, report: Report) -> None:
    """Print how many experts per layer of each model fit."""
    wide = console.width >= WIDE
    storages = list(STORAGES) if wide else ["bfloat16"]
    console.print("\nExperts per layer that fit", style="bold", end="")
    both = any(fit.budget == "now" for fit in report.fits) and any(fit.budget == "ideal" for fit in report.fits)
    console.print(" now (and on an idle machine)" if both else "", style="dim", markup=False)
    columns: list[tuple[str, Justify]] = [("\nmodel", "left"), ("\nof", "right")]
    columns += [(f"{STORAGES[storage]}\n{label}", "right") for storage in storages for label in MODES.values()]
    columns.append((_upload_title(report), "right"))
    table = table_of(*columns)
    found: dict[tuple[str, ...], Fit] = {(f.model, f.storage, f.mode, f.budget): f for f in report.fits}
    for model in dict.fromkeys(fit.model for fit in report.fits):
        cells, of = [], 0
        for storage in storages:
            for mode in MODES:
                now, ideal = (found.get((model, storage, mode, budget)) for budget in ("now", "ideal"))
                if (shown := now or ideal) is not None:
                    of = shown.of
                    cells.append(_fit_cell(now, ideal, shown))
        lora = found.get((model, "bfloat16", "lora", "now")) or found.get((model, "bfloat16", "lora", "ideal"))
        seconds = lora.upload_s if lora else None
        table.add_row(model, str(of), *cells, "-" if seconds is None else duration(seconds))
    console.print(table)
    notes = [
        "predicted: 512 tokens a step, checkpointing, chunked loss",
        "profile = forward; LoRA = rank 16 on all resident experts; full = one expert per layer trains in full",
    ]
    if wide:
        notes.append("NF4 = frozen experts in 4 bits, as `edgefed join` stores them where memory is short")
    for note in notes:
        console.print(f"  {note}", style="dim", markup=False)


def _upload_title(report: Report) -> str:
    line = report.uplink
    return f"LoRA up,\n{line['name']}" if line else "LoRA up"


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
            console.print(
                f"    measured{part}: {format_bytes(found['measured_bytes'])}, predicted "
                f"{format_bytes(found['predicted_bytes'])} ({100 * ratio:+.0f} %), after correction by this step "
                f"{format_bytes(found['corrected_bytes'])}",
                markup=False,
            )
