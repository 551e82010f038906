"""``edgefed simulate``: a fleet of devices on this machine, with real training and a virtual clock."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import click


@click.command("simulate")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default="edgefed-simulation", show_default=True,
    help="Folder for results, pictures and what an interrupted simulation goes on from.",
)  # fmt: skip
@click.option("--method", "methods", multiple=True, help="Only this method of the file, by its label; repeatable.")
@click.option("--rounds", type=click.IntRange(min=1), help="Instead of the file's.")
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the file's.")
@click.option("--no-pictures", is_flag=True, help="Write no PNG files.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def simulate_command(
    config: Path, out: Path, methods: tuple[str, ...], rounds: int | None, seed: int | None, no_pictures: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Simulate the fleet of CONFIG (TOML): every device trains here in turn, its time is taken from its profile.

    Started again with the same --out, an interrupted simulation goes on where it stopped.
    """
    from edgefed.cli.output import print_json, stdout_console
    from edgefed.errors import ConfigError
    from edgefed.simulation.config_file import load_simulation

    settings = load_simulation(config)
    chosen = tuple(choice for choice in settings.methods if not methods or choice.label in methods)
    unknown = [name for name in methods if name not in {choice.label for choice in settings.methods}]
    if unknown:
        raise ConfigError(
            f"{config} has no method {', '.join(unknown)}; it has {', '.join(c.label for c in settings.methods)}"
        )
    changes = {name: value for name, value in (("rounds", rounds), ("seed", seed)) if value is not None}
    settings = dataclasses.replace(settings, methods=chosen, **changes)

    from edgefed.simulation.simulate import RESULT_FILE, simulate

    logging.getLogger("edgefed.aggregator").setLevel(logging.WARNING)  # every update of every client is no news here

    with SimulationDisplay(settings.rounds) as display:
        result = simulate(settings, out, display)
    paths = []
    if not no_pictures:
        from edgefed.simulation.pictures import save_pictures

        paths = save_pictures(out, result)
    if as_json:
        print_json(result.to_dict())
        return
    console = stdout_console()
    console.print(render_methods(result))
    for run in result.runs:
        for device, reason in run.refused.items():
            console.print(f"{run.label}: {device} took no part: {reason}", markup=False)
        if run.stopped:
            console.print(f"{run.label} stopped: {run.stopped}", markup=False)
    console.print(f"results   {out / RESULT_FILE}", markup=False)
    if paths:
        console.print(f"pictures  {', '.join(str(path) for path in paths)}", markup=False)


class SimulationDisplay:
    """Progress on stderr: a line that changes on a terminal, a line per finished round elsewhere."""

    def __init__(self, rounds: int):
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

    def __call__(self, event) -> None:
        where = f"{event.label}: round {event.server_round} of {self._rounds}"
        if event.message:
            self._console.print(f"{where}: {event.message}", markup=False)
        elif event.ended is not None:
            self._console.print(
                f"{where}: held-out loss {event.ended.loss:.4f}, {format_seconds(event.ended.ends)} on the virtual "
                f"clock, slowest was {event.ended.slowest}", markup=False,
            )  # fmt: skip
        elif self._status:
            self._status.update(f"{where}: {event.client} trains, {event.clients_done} of {event.clients} done")


def format_seconds(seconds: float) -> str:
    """``95 s``, ``12.5 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def render_methods(result):
    """A table: quality, virtual time, and where the time of the slowest devices went, a line per method."""
    from edgefed.cli.output import make_table
    from edgefed.hardware.memory import format_bytes

    target = result.target_loss
    columns = ["method", "rounds", "held-out loss", "accuracy", "virtual time"]
    columns += [f"to loss {target:g}"] if target is not None else []
    columns += ["devices", "down", "up", "most time of the slowest goes to"]
    table = make_table(*columns, title=f"{len(result.budgets)} devices, charged as {result.cost_shape or result.model}")
    for run in result.runs:
        last = run.rounds[-1] if run.rounds else run.first
        parts: dict[str, float] = {}
        for each in run.rounds:
            for part, seconds in each.clients[each.slowest].seconds.items():
                parts[part] = parts.get(part, 0.0) + seconds
        largest = sorted(parts, key=parts.__getitem__, reverse=True)[:2]
        total = sum(parts.values()) or 1.0
        row = [
            run.label, str(len(run.rounds)), f"{run.first.loss:.4f} > {last.loss:.4f}", f"{100 * last.accuracy:.1f} %",
            format_seconds(last.ends),
        ]  # fmt: skip
        if target is not None:
            reached = run.seconds_to(target)
            row.append("never" if reached is None else format_seconds(reached))
        row += [
            f"{len(last.clients)} of {len(result.budgets)}",
            format_bytes(round(sum(c.bytes_down for each in run.rounds for c in each.clients.values()))),
            format_bytes(round(sum(c.bytes_up for each in run.rounds for c in each.clients.values()))),
            ", ".join(f"{part} {100 * parts[part] / total:.0f} %" for part in largest),
        ]
        table.add_row(*row)
    return table
