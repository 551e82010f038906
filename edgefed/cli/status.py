"""``edgefed status``: how a run is going, once or continuously."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

from edgefed.cli.options import command
from edgefed.cli.phrasing import to_flags
from edgefed.config import Setting
from edgefed.progress import counted, format_seconds, round_range

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from edgefed.protocol.messages import ClientStatus, RoundStatus, Status

BAR_CELLS = 12
SHOWN_ROUNDS = 10
HEADER_LINES, TABLE_LINES = 3, 3
"""Lines of the header on a narrow terminal, and of a table beside its rows: a blank one and two of titles."""
STALE_PHASES = ("", "waiting", "train", "upload")
"""Phases that say nothing of a client that is not training: the last heartbeat may be from before."""


@dataclasses.dataclass
class StatusSettings:
    """What `edgefed status` takes."""

    server: Annotated[str, Setting("Address of the server.", positional=True)] = "http://127.0.0.1:8470"
    watch: Annotated[bool, Setting("Refresh until the run is finished or Ctrl-C.")] = False
    interval: Annotated[float, Setting("Seconds between refreshes.", minimum=0.1)] = 1.0
    token: Annotated[str | None, Setting("Token of the server.", variable="EDGEFED_TOKEN", secret=True)] = None
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
        console.print(render_status(status))


def _watch(fetch: Callable[[], Status], console: Console, interval: float, as_json: bool) -> None:
    """Show the run until it is finished: redrawn on a terminal, a line a refresh elsewhere."""
    import msgspec
    from rich.live import Live

    # The last state stays on the screen whole, however long it is.
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal and not as_json else None
    status = None
    with contextlib.ExitStack() as stack:
        if live:
            stack.callback(lambda: status and console.print(render_status(status)))
            stack.enter_context(live)
        while True:
            status = fetch()
            if live:
                live.update(render_status(status, console.height), refresh=True)
            else:
                print(msgspec.json.encode(status).decode() if as_json else one_line(status), flush=True)
            if status.state == "finished":
                return
            time.sleep(interval)


def one_line(status: Status) -> str:
    """The run in one line, for a log."""
    phases = ", ".join(f"{client.name} {client.phase} {100 * client.fraction:.0f}%" for client in status.clients)
    updates = counted(status.updates_received, "update")
    return f"round {status.server_round}/{status.run.rounds} {status.state}: {updates}; {phases}"


def render_status(status: Status, height: int | None = None, *, devices: bool = True) -> RenderableType:
    """Header, clients and finished rounds as tables, which fit the terminal's width.

    ``height``: lines that may be used. Devices go first, then rounds, then clients. Where clients have no experts,
    their accuracy is shown instead. ``devices``: also show what the clients' devices are.
    """
    from rich.console import Group
    from rich.text import Text

    from edgefed.cli.tables import comparison_table
    from edgefed.methods.registry import is_personal
    from edgefed.protocol.comparison import comparisons_by_name, overall_verdict

    personal = is_personal(status.run.method)
    left = (height or 10**6) - HEADER_LINES
    clients, used = _clients(status, personal, left)
    parts: list[RenderableType] = [_header(status), Text(""), clients]
    left -= used
    compared = comparisons_by_name(status.clients)
    if compared and left > len(compared) + TABLE_LINES + 3:  # title, mean, verdict
        parts += [Text(""), comparison_table(compared), Text(overall_verdict(compared.values()))]
        left -= len(compared) + TABLE_LINES + 3
    if status.history and left > TABLE_LINES:
        shown = status.history[-min(SHOWN_ROUNDS, left - TABLE_LINES) :]
        incidents = _incidents(shown) + _traffic(shown[-1])
        room = max(0, left - len(shown) - TABLE_LINES) // 2  # a long one takes two lines
        incidents = incidents[max(0, len(incidents) - room) :]
        parts += [Text(""), _rounds(shown, personal), *incidents]
        left -= len(shown) + TABLE_LINES + 2 * len(incidents)
    known = [client for client in status.clients if client.device and devices]
    lines = 2 * len(status.clients) + TABLE_LINES  # the names of devices wrap
    if known and left > lines:
        parts += [Text(""), _devices(status.clients)]
        left -= lines
        origins = [
            Text(f"{client.name}: {to_flags(client.device.budget_origin)}", style="dim")
            for client in known
            if client.device
            and client.device.budget_origin
            and client.device.budget_bytes == client.memory_bytes  # else it tells of an older budget
        ]
        parts += origins if left > len(origins) * 3 else []
    return Group(*parts)


def _header(status: Status) -> RenderableType:
    from rich.text import Text

    from edgefed.hardware.memory import format_bytes

    shown_round = min(status.server_round, status.run.rounds)
    num_in = Counter(client.state for client in status.clients)
    gone = [f"{number} {state}" for state in ("lost", "left") if (number := num_in[state])]
    here = counted(num_in.total() - num_in["lost"] - num_in["left"], "client")
    header = Text()
    header.append(f"{status.run.method} on {status.run.model}", style="bold")
    header.append(
        f"   round {shown_round} of {status.run.rounds}, {status.state}   {counted(status.updates_received, 'update')}"
        f"   {', '.join([here, *gone])} (at least {status.min_clients})"
        f"   server peak {format_bytes(status.memory_peak_bytes)}"
    )
    if spent := next((done.privacy for done in reversed(status.history) if done.privacy), None):
        header.append(f"   privacy: {spent}")
    return header


def _clients(status: Status, personal: bool, lines: int) -> tuple[RenderableType, int]:
    """The table of clients in at most ``lines`` lines, and how many it takes: the busy ones where not all fit."""
    from edgefed.cli.tables import Column, FittedTable
    from edgefed.hardware.memory import format_bytes

    sliced = any("neuron_share" in client.metrics for client in status.clients)
    share = "accuracy" if personal else "neurons" if sliced else "experts"
    table = FittedTable(
        Column("client", name=True), Column("state", left=True), Column("doing", drop=2, left=True),
        Column("", drop=4, left=True), Column(share, drop=0 if personal else 1),
        Column("held-out loss"), Column("rounds", drop=5), Column("down", drop=6), Column("up", drop=6),
        Column("seen", drop=3),
    )  # fmt: skip
    clients = list(status.clients)
    room = max(1, lines - 2)
    if len(clients) > room:
        order = ("training", "done", "waiting", "finished", "lost", "left")
        clients.sort(key=lambda client: order.index(client.state) if client.state in order else len(order))
    for client in clients[: room if len(clients) <= room else room - 1]:
        busy = client.state == "training" or (
            client.state in ("done", "waiting", "finished") and client.phase not in STALE_PHASES
        )
        table.add_row(
            client.name,
            client.state,
            client.phase if busy else "-",
            _bar(client.fraction) if busy else "",
            _accuracy(client.metrics) if personal else _share(client),
            _loss(client.metrics),
            f"{client.rounds_done} of {max(client.rounds_done, len(status.history))}",
            format_bytes(client.downloaded_bytes),
            format_bytes(client.uploaded_bytes),
            f"{client.last_seen_s:.0f} s ago",
        )
    if len(clients) > room:
        table.add_row(f"{len(clients) - table.num_rows} more", *[""] * 9)
    return table, 2 + table.num_rows


def _rounds(history: Iterable[RoundStatus], personal: bool) -> RenderableType:
    from edgefed.cli.tables import Column, FittedTable
    from edgefed.hardware.memory import format_bytes

    changed = "accuracy" if personal else "experts changed"
    table = FittedTable(
        Column("round"), Column("train loss", drop=2), Column("held-out loss"), Column("updates"),
        Column(changed, drop=0 if personal else 3), Column("up", drop=4), Column("time", drop=1),
    )  # fmt: skip
    for done in history:
        train = done.metrics.get("train_loss")
        table.add_row(
            str(done.server_round), "-" if train is None else f"{train:.3f}", _loss(done.metrics),
            f"{done.updates} of {done.participants}",
            _accuracy(done.metrics) if personal else str(done.experts_changed),
            format_bytes(done.uploaded_bytes), format_seconds(done.seconds),
        )  # fmt: skip
    return table


def _incidents(history: Iterable[RoundStatus]) -> list[Text]:
    """A line for each update that did not count, and for each round that was undone."""
    from rich.text import Text

    lines = []
    for done in history:
        if done.undone is not None:
            undone = round_range(done.undone, done.server_round - 1)
            lines.append(Text(f"round {done.server_round}: the held-out loss jumped, {undone} undone"))
        if (best := done.metrics.get("restored_round")) is not None:
            text = f"the held-out loss no longer improved, the run ended with the model of round {best:.0f}"
            lines.append(Text(f"round {done.server_round}: {text}"))
        if done.damaged:
            names = ", ".join(done.damaged[:3]) + (" and more" if len(done.damaged) > 3 else "")
            lines.append(Text(f"round {done.server_round}: damaged on the server's disk and left as it was: {names}"))
        lines += [
            Text(f"round {done.server_round}: the update of {each.name} was set aside: {each.reason}")
            for each in done.set_aside
        ]
    return lines


def _traffic(done: RoundStatus) -> list[Text]:
    """A line of the bytes of a round by kind, if changes were sent in either direction."""
    from rich.text import Text

    from edgefed.aggregator.metrics import KINDS, LEFT
    from edgefed.hardware.memory import format_bytes

    found = done.metrics
    if not {"bytes_up_changes", "bytes_down_changes"} & found.keys():
        return []
    up = [f"{kind} {format_bytes(int(found[name]))}" for kind in KINDS if (name := f"bytes_up_{kind}") in found]
    if ratio := found.get("upload_ratio"):
        up[-1] += f" (1/{ratio:.0f} of whole ones)"
    changes, saved = (int(found.get(f"bytes_down_{name}", 0)) for name in ("changes", "saved"))
    down = [f"whole {format_bytes(done.downloaded_bytes - changes)}"]
    down += [f"changes {format_bytes(changes)} in place of {format_bytes(changes + saved)}"] if changes else []
    left = [
        f"{100 * found[part] / found[whole]:.0f} % of the {what}"
        for what, (part, whole) in LEFT.items()
        if found.get(whole) and part in found
    ]
    text = f"round {done.server_round}: up {', '.join(up)}; down {', '.join(down)}"
    return [Text(text + (f"; left for later (L2 norm) {', '.join(left)}" if left else ""))]


def _devices(clients: Iterable[ClientStatus]) -> RenderableType:
    """What each device is and can afford: its budget as last measured, with nothing else running, and in all."""
    from edgefed.cli.tables import Column, FittedTable
    from edgefed.hardware.memory import format_bytes

    def size(size_bytes: int | None) -> str:
        return "unknown" if size_bytes is None else format_bytes(size_bytes)

    table = FittedTable(
        Column("client", name=True), Column("device", wraps=True, drop=3), Column("memory", drop=4, left=True),
        Column("trains on", drop=2, left=True), Column("budget"), Column("if idle", drop=1), Column("of"),
    )  # fmt: skip
    for client in clients:
        if (device := client.device) is None:
            table.add_row(client.name, "unknown", "", "", size(client.memory_bytes), "", "")
            continue
        name = f"{device.name} ({device.power_mode})" if device.power_mode else device.name
        sizes = (client.memory_bytes, device.ideal_budget_bytes, device.total_bytes)
        table.add_row(client.name, name, device.kind, device.trains_on, *map(size, sizes))
    return table


def _bar(fraction: float) -> str:
    full = round(max(0.0, min(1.0, fraction)) * BAR_CELLS)
    return "#" * full + "." * (BAR_CELLS - full)


def _share(client: ClientStatus) -> str:
    """The share of the neurons that a client has, of whole experts the largest that it takes."""
    return f"{100 * client.metrics.get('neuron_share', client.expert_share):.0f} %"


def _accuracy(metrics: Mapping[str, float]) -> str:
    found = metrics.get("held_out_accuracy_after")
    return "-" if found is None else f"{100 * found:.1f} %"


def _loss(metrics: Mapping[str, float]) -> str:
    before, after = metrics.get("held_out_loss_before"), metrics.get("held_out_loss_after")
    return "-" if before is None or after is None else f"{before:.3f} -> {after:.3f}"
