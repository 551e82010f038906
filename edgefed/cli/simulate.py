"""``edgefed simulate``: a fleet of devices on this machine, with real training and a virtual clock."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from edgefed.cli.options import command
from edgefed.config import Setting
from edgefed.progress import format_seconds

if TYPE_CHECKING:
    from edgefed.cli.tables import FittedTable
    from edgefed.simulation.result import MethodRun, SimulationResult
    from edgefed.simulation.simulate import SimulationEvent


@dataclasses.dataclass
class SimulateSettings:
    """What `edgefed simulate` takes."""

    config: Annotated[Path, Setting("TOML file of the fleet.", positional=True)]
    out: Annotated[Path, Setting("Folder for results and pictures; an interrupted simulation continues from it.")] = (
        Path("edgefed-simulation")
    )
    method: Annotated[tuple[str, ...], Setting("Run only this method of the file, by its label; repeatable.")] = ()
    rounds: Annotated[int | None, Setting("Number of rounds, instead of the file's.", minimum=1)] = None
    seed: Annotated[int | None, Setting("Seed, instead of the file's.", minimum=0)] = None
    compression: Annotated[
        Literal["none", "int8", "int4", "int2", "topk12", "topk6", "topk3", "topk", "auto"] | None,
        Setting("How updates are sent, instead of the file's."),
    ] = None
    engine: Annotated[
        Literal["built-in", "ray"],
        Setting("Train the devices of a round one after another, or side by side in processes of Ray; the results are "
                "the same."),
    ] = "built-in"  # fmt: skip
    workers: Annotated[
        int | None, Setting("With `engine=ray`: processes.", default="as many as there is room for", minimum=1)
    ] = None
    no_pictures: Annotated[bool, Setting("Write no PNG files.")] = False
    json: Annotated[bool, Setting("Print the results as JSON.")] = False


@command("simulate", SimulateSettings)
def simulate_command(settings: SimulateSettings) -> None:
    """Simulate a fleet of devices on this machine.

    CONFIG is a TOML file. Devices train one after another; their time is computed from their profiles. An interrupted
    simulation continues when it is started again with the same --out.
    """
    from edgefed.api.runs import simulate, simulation_settings
    from edgefed.cli.output import print_json, stdout_console

    config = simulation_settings(
        settings.config, methods=settings.method, rounds=settings.rounds, seed=settings.seed,
        compression=settings.compression,
    )  # fmt: skip
    from edgefed.simulation.simulate import RESULT_FILE

    logging.getLogger("edgefed.aggregator").setLevel(logging.WARNING)  # it logs every update of every client

    with SimulationDisplay(config.rounds) as display:
        result = simulate(config, settings.out, on_event=display, engine=settings.engine, workers=settings.workers)
    paths = []
    if not settings.no_pictures:
        from edgefed.simulation.pictures import save_pictures

        paths = save_pictures(settings.out, result)
    if settings.json:
        print_json(result.to_dict())
        return
    console = stdout_console()
    console.print(render_methods(result))
    refusals: dict[tuple[str, str], list[str]] = {}
    for run in result.runs:
        for refusal in run.refused.items():
            refusals.setdefault(refusal, []).append(run.label)
    for (device, reason), labels in refusals.items():
        console.print(f"{device} did not take part in {', '.join(labels)}: {reason}", markup=False)
    for run in result.runs:
        if run.stopped:
            console.print(f"{run.label} stopped: {run.stopped}", markup=False)
    console.print(f"results   {settings.out / RESULT_FILE}", markup=False)
    if paths:
        console.print(f"pictures  {', '.join(str(path) for path in paths)}", markup=False)


class SimulationDisplay:
    """Progress on stderr: a line that changes on a terminal, a line per finished round elsewhere."""

    def __init__(self, rounds: int) -> None:
        from edgefed.cli.output import stderr_console

        self._console, self._rounds = stderr_console(), rounds
        self._status = self._console.status("starting") if self._console.is_terminal else None

    def __enter__(self) -> SimulationDisplay:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, event: SimulationEvent) -> None:
        """Show one event."""
        where = f"{event.label}: round {event.server_round} of {self._rounds}"
        if event.message:
            self._console.print(f"{where}: {event.message}", markup=False)
        elif event.ended is not None:
            loss = "not evaluated" if math.isnan(event.ended.loss) else f"held-out loss {event.ended.loss:.4f}"
            self._console.print(
                f"{where}: {loss}, {format_seconds(event.ended.ends)} on the virtual clock, slowest: "
                f"{event.ended.slowest}", markup=False,
            )  # fmt: skip
        elif self._status:
            self._status.update(f"{where}: {event.client} trains, {event.clients_done} of {event.clients} done")


def render_methods(result: SimulationResult) -> FittedTable:
    """A table with a row per method: quality, virtual time, and what the slowest devices spent most time on."""
    from edgefed.cli.tables import Column, FittedTable
    from edgefed.hardware.memory import format_bytes

    target = result.target_loss
    columns = [
        Column("method", name=True), Column("rounds", drop=3), Column("held-out loss"), Column("accuracy", drop=4),
        Column("virtual time"),
    ]  # fmt: skip
    columns += [Column(f"to loss {target:g}")] if target is not None else []
    columns += [
        Column("devices", drop=2), Column("down", drop=6), Column("up", drop=5),
        Column("most time of the slowest goes to", drop=1, wraps=True),
    ]  # fmt: skip
    count = len(result.budgets)
    devices = "device" if count == 1 else "devices"
    table = FittedTable(*columns, title=f"{count} {devices}, charged as {result.cost_shape or result.model}")
    for run in result.runs:
        last = run.rounds[-1] if run.rounds else run.first
        parts: dict[str, float] = {}
        for each in run.rounds:
            for part, seconds in each.clients[each.slowest].seconds.items():
                parts[part] = parts.get(part, 0.0) + seconds
        largest = sorted(parts, key=parts.__getitem__, reverse=True)[:2]
        total = sum(parts.values()) or 1.0
        row = [
            run.label, str(len(run.rounds)), f"{run.first.loss:.4f} -> {run.curve[-1][1]:.4f}",
            f"{100 * last.accuracy:.1f} %",
            format_seconds(last.ends),
        ]  # fmt: skip
        if target is not None:
            reached = run.seconds_to(target)
            row.append("never" if reached is None else format_seconds(reached))
        row += [
            f"{len(last.clients)} of {len(result.budgets)}",
            format_bytes(round(sum(each.bytes_of("down") for each in run.rounds))),
            format_bytes(round(sum(each.bytes_of("up") for each in run.rounds))) + _compressed(run),
            ", ".join(f"{part} {100 * parts[part] / total:.0f} %" for part in largest),
        ]
        table.add_row(*row)
    return table


def _compressed(run: MethodRun) -> str:
    """How much smaller the updates of a run were than whole ones; "" if they were not."""
    ratios = [ratio for each in run.rounds if (ratio := each.traffic.get("upload_ratio"))]
    return f", 1/{len(ratios) / sum(1 / ratio for ratio in ratios):.0f}" if ratios else ""
