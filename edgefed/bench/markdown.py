"""A report as Markdown tables, for an issue or a README."""

from __future__ import annotations

from edgefed.bench.report import Report
from edgefed.bench.wording import MODES, STORAGES, gib, number


def to_markdown(report: Report) -> str:
    """Memory, speed and what fits as Markdown tables."""
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
    modes = [(storage, mode) for storage in STORAGES for mode in MODES]
    titles = [f"{STORAGES[storage]} {MODES[mode]}" for storage, mode in modes]
    for budget in ("now", "ideal"):
        found = {(fit.model, fit.storage, fit.mode): fit for fit in report.fits if fit.budget == budget}
        if not found:
            continue
        lines += ["", f"| experts per layer that fit, {budget} | of | {' | '.join(titles)} |"]
        lines.append(f"|---|---:|{'---:|' * len(titles)}")
        for model in dict.fromkeys(name for name, _, _ in found):
            fits = [found[(model, *mode)] for mode in modes]
            lines.append(f"| {model} | {fits[0].of} | {' | '.join(str(fit.experts) for fit in fits)} |")
    return "\n".join(lines) + "\n"
