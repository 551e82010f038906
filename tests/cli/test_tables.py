"""Every table of the command line at four widths, as it was looked at once: ``snapshots/NAME.txt``.

EDGEFED_UPDATE_SNAPSHOTS=1 writes them anew. Look at what changed.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from sample_status import DEVICE, client_of, status_of

from edgefed.bench.compare import Comparison as Change
from edgefed.bench.report import Fit
from edgefed.bench.statistics import Entry
from edgefed.cli.bench_tables import Style, changes_table, entries_table, fits_table, print_explain, profiles_table
from edgefed.cli.demo import render_clients, render_results
from edgefed.cli.partition import counts_table
from edgefed.cli.profile import busiest_table
from edgefed.cli.simulate import render_methods
from edgefed.cli.status import render_status
from edgefed.cli.tables import Column, FittedTable, comparison_table, cut_middle
from edgefed.expert_records import ActivationProfile, LayerProfile
from edgefed.hardware.profiles import load_profiles
from edgefed.personal.partition import Partition
from edgefed.plots import coverage_text, experts_covering
from edgefed.protocol.comparison import Comparison
from edgefed.simulation.demo import ClientResult, MethodResult
from edgefed.simulation.personal_demo import PersonalClientResult
from edgefed.simulation.result import ClientRound, MethodRun, RoundResult, SimulationResult

WIDTHS = (60, 80, 100, 140)
SNAPSHOTS = Path(__file__).parent / "snapshots"
LONG = "laptop-of-the-accountant-in-building-7"


def drawn(renderables, width):
    console = Console(width=width, emoji=False, highlight=False, record=True, file=io.StringIO())
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


def comparisons():
    return {
        "kitchen": Comparison(server_round=6, num_tokens=4096, before=5.26, global_model=4.45, device=4.28, alone=4.87),
        LONG: Comparison(server_round=6, num_tokens=2048, before=5.541, device=4.9, skipped="13 GiB to download"),
    }


def own_models():
    return {
        name: Comparison(
            server_round=6, num_tokens=60, before=2.303, device=0.912, alone=1.1,
            accuracies={"before": 0.1, "device": 0.812, "alone": 0.71},
        )
        for name in ("kitchen", LONG)
    }  # fmt: skip


def status(method):
    compared = comparisons() if method == "hfedmoe" else {}
    clients = [
        client_of("kitchen", 1, device=DEVICE, comparison=compared.get("kitchen")),
        client_of(LONG, 2, state="lost", last_seen_s=4000.0, comparison=compared.get(LONG)),
        client_of("vm", 3, state="waiting", phase="profile", metrics={}),
    ]
    return [render_status(status_of(method, clients, rounds=2))]


def demo():
    clients = tuple(
        ClientResult(
            name=name, silo=name, expert_share=share, held=(16, 16, 16, 16), trained=(16, 9, 16, 16),
            bytes_down=71 << 20, bytes_up=35 << 20, peak_expert_bytes=40 << 20, peak_rss_bytes=635 << 20,
            global_losses=(3.9, 3.6, 3.455), device_before=3.95, device_after=3.5, alone=alone, own=alone - 0.1,
            neuron_shares=shares,
        )
        for name, share, alone, shares in (
            ("asyncio", 1.0, 3.61, (1.0,) * 4), ("multiprocessing", 0.12, 3.9, (0.13, 0.1, 0.14, 0.11)),
        )
    )  # fmt: skip
    return render_results([MethodResult(method, 31.0, 90 << 20, clients) for method in ("hfedmoe", "fedmoe_submodel")])


def personal():
    others = {"standalone": 0.71, "static": 0.7, "fedproto": 0.69, "lg-fedavg": 0.66, "fml": 0.64}
    result = PersonalClientResult(
        name="glyphs-0", model="cnn1", parameters=1_234_567, classes=2, examples=240, bytes_up=12 << 20,
        bytes_down=12 << 20, peak_rss_bytes=400 << 20, accuracy=(0.5, 0.812), shared_weight=0.37, others=others,
    )  # fmt: skip
    return [render_clients([result, result])]


def simulation():
    span = ClientRound(
        seconds={"download": 40.0, "train": 900.0, "upload": 200.0}, late=0.0, waits=0.0, hidden=0.0, resident=(8,),
        trainable=(8,), merged=(), memory_bytes=1 << 30, bytes_down=5e9, bytes_up=2e9, train_loss=3.0,
    )  # fmt: skip

    def ended(number, loss):
        return RoundResult(
            server_round=number, ends=1140.0 * number, aggregation=1.0, slowest="phone", loss=loss, accuracy=0.31,
            losses={}, metrics={}, clients={"phone": span} if number else {}, traffic={"upload_ratio": 36.0},
        )  # fmt: skip

    runs = tuple(
        MethodRun(
            label=label, method="hfedmoe", first=ended(0, 3.9), rounds=(ended(1, 3.6), ended(2, loss)), refused={},
            usage={},
        )
        for label, loss in (("hfedmoe", 3.41), ("flux with the pace of its own", 3.55))
    )  # fmt: skip
    return [render_methods(SimulationResult(
        model="tiny", cost_shape="OLMoE-1B-7B", seed=0, rounds=2, target_loss=3.5, budgets={"phone": 1 << 30},
        profiles={"phone": "phone"}, runs=runs,
    ))]  # fmt: skip


def profile():
    return [busiest_table(two_layers()), coverage_text(two_layers())]


def two_layers():
    tokens = np.array([600.0, 300.0, 100.0, 0.0])
    return ActivationProfile(
        tuple(
            LayerProfile(1000, each, each / 2, each / 1000, -each / 9, -each / 9, each / 2)
            for each in (tokens, np.array([250.0, 250.0, 250.0, 250.0]))
        )
    )


def partition():
    classes = tuple(f"class number {number}" for number in range(14))
    counts = np.arange(3 * 14).reshape(3, 14)
    return [counts_table(Partition(
        folder=Path("out"), classes=classes, counts=counts, files=tuple(f"client-{i:02}.npz" for i in range(3)),
        source_sha256="", settings={}, cached=False,
    ))]  # fmt: skip


def bench():
    fits = tuple(
        Fit(model=model, budget=budget, mode=mode, storage=storage, experts=64 - 8 * less, of=64, upload_s=59.0)
        for model in ("OLMoE-1B-7B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite")
        for less, budget in enumerate(("ideal", "now"))
        for mode in ("profile", "lora", "full")
        for storage in ("bfloat16", "nf4")
    )
    return [fits_table(SimpleNamespace(fits=fits, uplink={"name": "a home line of 10 Mbit/s"}))]


def entries():
    style = Style(Console(file=io.StringIO()))
    shown = [
        Entry(name="matmul bfloat16", unit="TFLOPS", verdict="stable", samples=(1.0, 1.1, 1.2), median=1.1, mad=0.05,
              best=1.2, paper=40.0, note="4096 x 4096"),
        Entry(name="train step", unit="tokens/s", verdict="skipped", reason="no model was given, see --model"),
    ]  # fmt: skip
    return [entries_table(style, shown)]


class Printed:
    """What a function prints, as a table."""

    def __init__(self, print_to):
        self.print_to = print_to

    def __rich_console__(self, console, options):
        inner = Console(width=options.max_width, emoji=False, highlight=False, record=True, file=io.StringIO())
        self.print_to(inner)
        yield Text(inner.export_text().rstrip("\n"))


def waterfall():
    parts = {"resident experts": 3 << 30, "other weights": 900 << 20, "gradients": 0, "AdamW moments": 300 << 20,
             "activations and workspaces of kernels": 120 << 20, "process": 40 << 20}  # fmt: skip
    total = sum(parts.values())
    measured = {"layers": 2, "layers_of": 16, "predicted_bytes": 700 << 20, "measured_bytes": 650 << 20,
                "corrected_bytes": 655 << 20}  # fmt: skip
    rows = [
        {"model": "OLMoE-1B-7B", "plan": plan, "total_bytes": total, "fits": fits, "resident": 56, "of": 64,
         "trainable": 8, "parts": parts, "phase": "backward", "measured": found}
        for plan, fits, found in (("full training in bf16", False, None), ("LoRA in NF4", True, measured))
    ]  # fmt: skip
    return [Printed(lambda console: print_explain(console, Style(console), SimpleNamespace(explain=rows)))]


def changes():
    report = SimpleNamespace(
        interrupted=False, host=SimpleNamespace(load_before=None, cores=None, plugged=None, battery_percent=None),
        device=SimpleNamespace(stand_in=False), tool=SimpleNamespace(mode="default", repeats=7), sustain=None,
        memory=SimpleNamespace(check=None),
    )  # fmt: skip
    rows = [Change(name="train step", unit="tokens/s", a=100.0, b=131.0, ratio=1.31, verdict="faster")]
    rows += [Change(name="copy", unit="GB/s", a=None, b=9.0, ratio=None, verdict="not comparable",
                    reasons=("not measured in A",))]  # fmt: skip
    return [changes_table(report, report, rows)]


TABLES = {
    "status": (lambda: status("hfedmoe"), ["2.000 -> 1.500", "training", "lost", "round", "5.260", "4.450", "4.870"]),
    "status_personal": (lambda: status("fedmoe"), ["2.000 -> 1.500", "62.5 %", "training"]),
    "comparison": (lambda: [comparison_table(comparisons())], ["5.260", "4.450", "4.280", "4.870", "5.541"]),
    "comparison_personal": (
        lambda: [comparison_table(own_models())],
        ["81.2 %, 0.912", "71.0 %, 1.100", "10.0 %, 2.303"],
    ),
    "demo": (demo, ["3.900", "3.455", "3.500", "3.610", "3.900 -> 3.455", "40.0 MiB", "100 %"]),
    "demo_personal": (personal, ["81.2 %", "71.0 %"]),
    "simulate": (simulation, ["3.9000 -> 3.4100", "38.0 min", "never"]),
    "profile": (profile, ["60.0 %", "600"]),
    "partition": (partition, ["client-00.npz", "examples"]),
    "bench_fits": (bench, ["NF4", "bf16", "profile", "LoRA", "full", "64", "56", "(64)"]),
    "bench_waterfall": (waterfall, ["resident experts", "3.0 GiB", "predicted peak", "measured", "650 MiB", "fits"]),
    "bench_entries": (entries, ["1.10", "TFLOPS", "stable", "skipped"]),
    "bench_changes": (changes, ["1.31", "faster", "not comparable"]),
    "bench_profiles": (lambda: [profiles_table(load_profiles())], ["jetson-orin-nano-8gb", "GiB"]),
}
"""{table: (how to draw it, what is never left out)}."""


@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_and_keep_what_counts(name):
    draw, kept = TABLES[name]
    texts = []
    for width in WIDTHS:
        text = drawn(draw(), width)
        lines = [line.rstrip() for line in text.splitlines()]
        assert max(map(len, lines)) <= width, text
        assert all(each in text for each in kept), (width, [each for each in kept if each not in text], text)
        assert "\N{HORIZONTAL ELLIPSIS}" not in text, text  # nothing is cut but names, in the middle
        texts.append(f"--- {width} columns\n" + "\n".join(lines).rstrip() + "\n")
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("EDGEFED_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(texts))
    assert "\n".join(texts) == path.read_text(), f"{name} looks different from its snapshot"


def test_the_experts_that_cover_most_tokens_are_counted():
    assert experts_covering(two_layers()) == [2, 4]
    assert experts_covering(two_layers(), 0.5) == [1, 2]


def test_the_least_important_columns_go_first_and_names_are_cut_in_the_middle():
    table = FittedTable(Column("client", name=True), Column("loss"), Column("RSS", drop=2), Column("up", drop=1))
    table.add_row("a-name-of-twenty-four-xx", "4.610", "512.0 MiB", "1.0 MiB")
    assert "512.0 MiB" in drawn([table], 60)
    narrow = drawn([table], 30)
    assert "512.0 MiB" not in narrow
    assert "1.0 MiB" in narrow
    assert "a-name..our-xx" in narrow
    assert "1.0 MiB" not in drawn([table], 20)


@pytest.mark.parametrize(
    ("name", "width", "text"),
    [("kitchen", 7, "kitchen"), ("kitchens", 7, "kit..ns"), ("\u4f60\u597d\u4e16\u754c", 6, "\u4f60..\u754c")],
)
def test_names_are_cut_in_the_middle(name, width, text):
    assert cut_middle(name, width) == text


def test_a_title_is_as_wide_as_the_terminal_not_as_its_table():
    table = FittedTable(Column("a"), title="held-out loss on each client's own text")
    table.add_row("1")
    assert drawn([table], 60).splitlines()[0].rstrip() == "held-out loss on each client's own text"
