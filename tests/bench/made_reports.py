"""Reports made up for tests: one that is complete, and a way to change it."""

from __future__ import annotations

import msgspec

from edgefed.bench.report import Device, Fit, Host, Memory, MemoryTerm, Report, Sustain, SustainPoint, Tool
from edgefed.bench.statistics import Entry

GIB = 2**30


def made_entry(name="copy", unit="GB/s", median=100.0, spread=0.0, **more):
    """Seven samples with this median and relative spread (scaled MAD / median)."""
    step = median * spread / 1.4826
    return Entry.of(name, unit, [median, median - step, median + step] * 2 + [median], **more)


def made_report(**changes) -> Report:
    report = Report(
        created="2026-11-21T08:00:00+00:00",
        tool=Tool(version="0.3.0", commit="abc1234", mode="quick"),
        host=Host(
            os="linux", kernel="6.1", machine="x86_64", cpu="A processor", cores=8, cpu_quota=None,
            memory_bytes=32 * GIB, python="3.11", torch="2.13", cuda=None, driver=None, l4t=None, wsl=False,
            container=None, load_before=0.2, plugged=True,
        ),
        device=Device(id="cpu", name="A processor", kind="cpu", speed_on="cpu"),
        memory=Memory(
            kind="cpu", now_bytes=20 * GIB, ideal_bytes=26 * GIB, origin="20 GiB of 32",
            terms=(
                MemoryTerm(name="total", size_bytes=32 * GIB, origin="meminfo"),
                MemoryTerm(name="used by others", size_bytes=-12 * GIB, origin="meminfo"),
            ),
        ),
        tests=(
            made_entry(params={"size_bytes": 64}),
            made_entry("matmul float32", "TFLOPS", 2.0, 0.01, paper=2.5, paper_source="a table"),
            made_entry("train step", "tokens/s", 300.0, 0.05, derived=True, params={"model": "tiny"}),
            Entry.skipped("energy", "J/token", "energy is not readable", better="lower"),
            Entry.failed("disk write", "MB/s", "no permission"),
        ),
        fits=(
            Fit(model="OLMoE-1B-7B", budget="now", mode="lora", storage="bfloat16", experts=32, of=64, upload_s=3.0),
        ),
        planning={"device": "cpu", "optimizer": "adamw", "process_bytes": GIB // 2},
    )  # fmt: skip
    return msgspec.structs.replace(report, **changes)


def made_sustain(**changes) -> Sustain:
    run = Sustain(
        name="matmul float32", unit="TFLOPS", seconds=10.0, first=2.0, last=1.5, change=-0.25, throttled=True,
        power_limited=False, reasons=("software thermal limit",), points=(SustainPoint(t_s=1.0, rate=2.0),),
    )  # fmt: skip
    return msgspec.structs.replace(run, **changes)
