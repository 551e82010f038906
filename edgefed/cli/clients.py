"""``edgefed clients``: list, remove or ban the clients of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from edgefed.cli.options import command
from edgefed.config import Setting
from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.aggregator.access import Access
    from edgefed.aggregator.records import ClientRecord


@dataclasses.dataclass
class ClientsSettings:
    """What `edgefed clients` takes."""

    action: Annotated[
        Literal["list", "remove", "ban", "unban"],
        Setting("list; remove: forget a client, which has to be admitted again; ban: refuse it from now on; unban.",
                positional=True),
    ] = "list"  # fmt: skip
    client: Annotated[str, Setting("Name, id, or the beginning of an id.", positional=True)] = ""
    state: Annotated[Path, Setting("Folder of the run, on the server's machine.")] = Path("edgefed-run")
    json: Annotated[bool, Setting("With `list`: print JSON.")] = False


@command("clients", ClientsSettings)
def clients_command(settings: ClientsSettings) -> None:
    """List, remove or ban the clients of a run.

    The server may be running or not. What a client has contributed to earlier rounds stays; the update of a banned
    client in the round in progress does not count.
    """
    from edgefed.aggregator.access import open_access
    from edgefed.aggregator.store import Store

    store = Store(settings.state, read_only=True)
    try:
        clients = store.clients()
    finally:
        store.close()
    with open_access(settings.state) as access:
        if settings.action == "list":
            _print_list(clients, access, settings.json)
            return
        client_id, name = find_client(clients, access, settings.client)
        if settings.action == "remove":
            access.remove(client_id)
        else:
            access.ban(client_id, settings.action == "ban")
        done = {"remove": "removed", "ban": "banned", "unban": "no longer banned"}[settings.action]
        print(f"{name} ({client_id[:8]}) is {done}")


def find_client(clients: list[ClientRecord], access: Access, wanted: str) -> tuple[str, str]:
    """(id, name) of the client that is meant. Raises ConfigError unless there is exactly one."""
    if not wanted:
        raise ConfigError("missing `client`: a name or an id", remedy="`edgefed clients list` shows them.")
    names = {device: device for device in access.devices} | {client.client_id: client.name for client in clients}
    found = [client_id for client_id, name in names.items() if wanted in (name, client_id)]
    found = found or [client_id for client_id in names if client_id.startswith(wanted)]
    if len(found) != 1:
        several = f"{len(found)} clients are" if found else "no client is"
        raise ConfigError(f"{several} called {wanted!r}", remedy="Pass an id; `edgefed clients list` shows them.")
    return found[0], names[found[0]]


def _print_list(clients: list[ClientRecord], access: Access, as_json: bool) -> None:
    from edgefed.cli.output import print_json, stdout_console
    from edgefed.cli.tables import Column, FittedTable

    rows = []
    for client in clients:
        device = access.devices.get(client.client_id)
        state = "lost" if client.lost else "joined" if client.joined else "left"
        rows.append(
            {
                "client_id": client.client_id,
                "name": client.name,
                "state": "banned" if device is not None and device.banned else state,
                "device_key": device.public_key if device is not None else "",
                "invitation": device.invitation if device is not None else "",
                "rounds_done": client.rounds_done,
            }
        )
    if as_json:
        print_json(rows)
        return
    if not rows:
        print("no clients")
        return
    table = FittedTable(
        Column("client", name=True), Column("id"), Column("state", left=True), Column("rounds", drop=1),
        Column("device key", drop=2, left=True), Column("admitted by", drop=3, left=True),
    )  # fmt: skip
    for row in rows:
        key = str(row["device_key"])[:8] or "none"
        admitted = f"invitation {row['invitation']}" if row["invitation"] else "token"
        table.add_row(
            str(row["name"]), str(row["client_id"])[:8], str(row["state"]), str(row["rounds_done"]), key, admitted
        )
    stdout_console().print(table)
