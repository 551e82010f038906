"""``edgefed status``: how a run is going, once or continuously."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

from edgefed.cli.options import command
from edgefed.cli.phrasing import to_flags
from edgefed.config import Setting

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from edgefed.protocol.messages import ClientStatus, RoundStatus, Status

BAR_CELLS = 12
NARROW = {122: ("",), 106: ("rounds",), 98: ("down", "up")}
"""Columns of a terminal below which columns of the table of clients are left out, so that values keep their units."""
WIDE_ROUNDS = 98
"""Columns of a terminal from which the table of rounds has the training loss."""


@dataclasses.dataclass
class StatusSettings:
    """What `edgefed status` takes."""

    server: Annotated[str, Setting("Address of the server.", positional=True)] = "http://127.0.0.1:8470"
    watch: Annotated[bool, Setting("Refresh until the run is finished or Ctrl-C.")] = False
    interval: Annotated[float, Setting("Seconds between refreshes.", minimum=0.1)] = 1.0
    token: Annotated[str | None, Setting("Token of the server.", variable="EDGEFED_TOKEN")] = None
    json: Annotated[bool, Setting("Print JSON; with `watch` one line for each refresh.")] = False


@command("status", StatusSettings)
def status_command(settings: StatusSettings) -> None:
    """Show the progress of a run.

    Shows the round, the clients and what they are doing at SERVER.
    """
    from edgefed.agent.transport import AggregatorClient
    from edgefed.cli.output import stdout_console

    with AggregatorClient(settings.server, "status", "status", settings.token) as client:
        if settings.watch:
            _watch(client.status, stdout_console(), settings.interval, settings.json)
        else:
            _print_status(client.status(), stdout_console(), settings.json)


def _print_status(status: Status, console: Console, as_json: bool) -> None:
    from edgefed.cli.output import print_json

    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(status))
    else:
        console.print(render_status(status, console.width))


def _watch(fetch: Callable[[], Status], console: Console, interval: float, as_json: bool) -> None:
    """Show the run until it is finished: redrawn on a terminal, a line a refresh elsewhere."""
    import msgspec
    from rich.live import Live

    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    with live or contextlib.nullcontext():
        while True:
            status = fetch()
            if live:
                live.update(render_status(status, console.width), refresh=True)
            else:
                print(msgspec.json.encode(status).decode() if as_json else one_line(status), flush=True)
            if status.state == "finished":
                return
            time.sleep(interval)


def one_line(status: Status) -> str:
    """The run in one line, for a log."""
    phases = ", ".join(f"{client.name} {client.phase} {100 * client.fraction:.0f}%" for client in status.clients)
    return (
        f"round {status.server_round}/{status.run.rounds} {status.state}: {status.updates_received} updates; {phases}"
    )


def render_status(status: Status, width: int = 140) -> RenderableType:
    """Header, clients and finished rounds as tables, for a terminal of ``width`` columns.

    Where clients have no experts, their accuracy is shown instead.
    """
    from rich.console import Group
    from rich.text import Text

    from edgefed.cli.output import make_table
    from edgefed.hardware.memory import format_bytes
    from edgefed.methods.registry import is_personal

    personal = is_personal(status.run.method)
    shown_round = min(status.server_round, status.run.rounds)
    header = Text()
    header.append(f"{status.run.method} on {status.run.model}", style="bold")
    header.append(
        f"   round {shown_round} of {status.run.rounds}, {status.state}   {status.updates_received} updates"
        f"   {len(status.clients)} clients (at least {status.min_clients})"
        f"   server peak {format_bytes(status.memory_peak_bytes)}"
    )
    share, changed = ("accuracy", "accuracy") if personal else ("experts", "experts changed")
    columns = ("client", "state", "doing", "", share, "rounds", "down", "up", "held-out loss", "seen")
    left_out = {name for limit, names in NARROW.items() if width < limit for name in names}
    shown = [index for index, name in enumerate(columns) if name not in left_out]
    clients = make_table(*(columns[index] for index in shown))
    for client in status.clients:
        busy = client.state != "finished"  # the last heartbeat of a finished client is out of date
        row: tuple[RenderableType, ...] = (
            Text(client.name),
            client.state,
            client.phase if busy else "-",
            _bar(client.fraction) if busy else "",
            _accuracy(client.metrics) if personal else f"{100 * client.expert_share:.0f} %",
            str(client.rounds_done),
            format_bytes(client.downloaded_bytes),
            format_bytes(client.uploaded_bytes),
            _loss(client),
            f"{client.last_seen_s:.0f} s ago",
        )
        clients.add_row(*(row[index] for index in shown))
    parts: list[RenderableType] = [header, Text(""), clients]
    if any(client.device for client in status.clients):
        parts += [Text(""), _devices(status.clients)]
        parts += [
            Text(f"{client.name}: {to_flags(client.device.budget_origin)}", style="dim")
            for client in status.clients
            if client.device and client.device.budget_origin
        ]
    if status.history:
        wide = width >= WIDE_ROUNDS
        titles = ("train loss", "held-out before", "after") if wide else ("before", "after")
        rounds = make_table("round", "updates", changed, "up", "seconds", *titles)
        for done in status.history[-10:]:
            losses = ("train_loss",) * wide + ("held_out_loss_before", "held_out_loss_after")
            metrics = [done.metrics.get(name) for name in losses]
            rounds.add_row(
                str(done.server_round), f"{done.updates} of {done.participants}",
                _accuracy(done.metrics) if personal else str(done.experts_changed),
                format_bytes(done.uploaded_bytes), f"{done.seconds:.1f}",
                *("-" if value is None else f"{value:.3f}" for value in metrics),
            )  # fmt: skip
        parts += [Text(""), rounds, *_incidents(status.history[-10:])]
    return Group(*parts)


def _incidents(history: Iterable[RoundStatus]) -> list[Text]:
    """A line for each update that did not count, and for each round that was undone."""
    from rich.text import Text

    lines = []
    for done in history:
        if done.undone is not None:
            lines.append(Text(f"round {done.server_round}: the held-out loss jumped, round {done.undone} was undone"))
        lines += [
            Text(f"round {done.server_round}: the update of {each.name} was set aside: {each.reason}")
            for each in done.set_aside
        ]
    return lines


def _devices(clients: Iterable[ClientStatus]) -> Table:
    """What each device is and can afford: its budget as last measured, with nothing else running, and in all."""
    from rich.text import Text

    from edgefed.cli.output import make_table
    from edgefed.hardware.memory import format_bytes

    def size(size_bytes: int | None) -> str:
        return "unknown" if size_bytes is None else format_bytes(size_bytes)

    table = make_table("client", "device", "memory", "trains on", "budget", "if idle", "of")
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    for client in clients:
        if (device := client.device) is None:
            table.add_row(Text(client.name), "unknown", "", "", size(client.memory_bytes))
            continue
        name = f"{device.name} ({device.power_mode})" if device.power_mode else device.name
        sizes = (client.memory_bytes, device.ideal_budget_bytes, device.total_bytes)
        table.add_row(Text(client.name), Text(name), device.kind, device.trains_on, *map(size, sizes))
    return table


def _bar(fraction: float) -> str:
    full = round(max(0.0, min(1.0, fraction)) * BAR_CELLS)
    return "#" * full + "." * (BAR_CELLS - full)


def _accuracy(metrics: Mapping[str, float]) -> str:
    found = metrics.get("held_out_accuracy_after")
    return "-" if found is None else f"{100 * found:.1f} %"


def _loss(client: ClientStatus) -> str:
    before, after = client.metrics.get("held_out_loss_before"), client.metrics.get("held_out_loss_after")
    return "-" if before is None or after is None else f"{before:.3f} > {after:.3f}"
