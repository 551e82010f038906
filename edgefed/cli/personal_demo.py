"""``edgefed demo --method fedmoe``: its progress and its table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path


def show_personal_demo(out: Path, *, compare: bool, seed: int, as_json: bool, **given: int) -> None:
    """Run the demonstration of FedMoE and print what came of it. ``given``: rounds and clients, where asked for."""
    from edgefed.cli.demo import DemoDisplay
    from edgefed.cli.output import print_json, stdout_console
    from edgefed.simulation.demo import PICTURE_FILE, RESULT_FILE
    from edgefed.simulation.personal_demo import (
        COMPARED,
        GATES_FILE,
        PersonalDemoConfig,
        as_personal_dict,
        run_personal_demo,
    )

    started = time.monotonic()
    config = PersonalDemoConfig(out=out, seed=seed, **given, **({"compared": COMPARED} if compare else {}))
    config.check()
    with DemoDisplay(config.rounds) as display:
        results = run_personal_demo(config, display)
    data = as_personal_dict(config, results)
    (out / RESULT_FILE).write_text(json.dumps(data, indent=2) + "\n")
    if as_json:
        print_json(data)
        return
    console = stdout_console()
    console.print(render_clients(results))
    console.print()
    console.print(f"picture     {out / PICTURE_FILE}, {out / GATES_FILE}", markup=False)
    console.print(f"mixtures    {out / 'fedmoe' / 'clients'}/*/personal: they never left their client", markup=False)
    console.print(f"{time.monotonic() - started:.0f} s in all", markup=False)


def render_clients(results: Sequence):
    """A row for each client, and the mean."""
    from edgefed.cli.output import make_table
    from edgefed.hardware.memory import format_bytes

    others = list(results[0].others)
    table = make_table(
        "client", "model", "weights", "classes", "images", "up", "peak RSS", "shared", *others, "fedmoe",
        title="fedmoe: held-out accuracy of each client's own model (shared: the gate's mean weight of what travels)",
    )  # fmt: skip
    for result in results:
        table.add_row(
            result.name, result.model, f"{result.parameters:,}", str(result.classes), str(result.examples),
            format_bytes(result.bytes_up), format_bytes(result.peak_rss_bytes),
            f"{100 * result.shared_weight:.0f} %", *(f"{100 * result.others[name]:.1f} %" for name in others),
            f"{100 * result.accuracy[-1]:.1f} %",
        )  # fmt: skip
    count = len(results)
    means = [sum(result.others[name] for result in results) / count for name in others]
    means.append(sum(result.accuracy[-1] for result in results) / count)
    table.add_section()
    table.add_row("mean", *[""] * 7, *(f"{100 * mean:.1f} %" for mean in means))
    return table
