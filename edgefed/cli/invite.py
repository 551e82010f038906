"""``edgefed invite``: make a link with which a device joins a run, list the links, or revoke one."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from edgefed.cli.options import command
from edgefed.config import Setting
from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.aggregator.access import Access, Invitation

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclasses.dataclass
class InviteSettings:
    """What `edgefed invite` takes."""

    state: Annotated[Path, Setting("Folder of the run, on the server's machine.")] = Path("edgefed-run")
    uses: Annotated[int, Setting("Devices that can join with the link.", minimum=1)] = 1
    expires: Annotated[str, Setting("How long the link works, such as 30m, 12h, 7d, or never.", metavar="TIME")] = "7d"
    label: Annotated[str, Setting("A name for the list, such as the person that it is for.")] = ""
    address: Annotated[
        str | None, Setting("Address of the server for the device; default: the one that it had last.")
    ] = None
    list: Annotated[bool, Setting("List the invitations instead.")] = False
    revoke: Annotated[str | None, Setting("Revoke this invitation instead.", metavar="ID")] = None
    json: Annotated[bool, Setting("Print JSON.")] = False


@command("invite", InviteSettings)
def invite_command(settings: InviteSettings) -> None:
    """Make a join link for a device.

    The link has the server's address, the fingerprint of its certificate, and a secret. The server may be running or
    not. It keeps only a hash of the secret: the link is shown once.
    """
    from edgefed.aggregator.access import open_access
    from edgefed.cli.output import print_json

    if settings.list and settings.revoke:
        raise ConfigError("`list` and `revoke` cannot be combined")
    with open_access(settings.state) as access:
        if settings.list:
            _print_list(access, settings.json)
        elif settings.revoke:
            revoked = access.revoke(settings.revoke)
            print_json({"revoked": revoked.id}) if settings.json else print(f"invitation {revoked.id} is revoked")
        else:
            link, invitation = make_link(access, settings)
            if settings.json:
                print_json({"link": link, **_facts(invitation)})
            else:
                print(f"edgefed join {shlex.quote(link)} --data FILE")


def make_link(access: Access, settings: InviteSettings) -> tuple[str, Invitation]:
    """A new invitation as a link. Raises ConfigError where the address of the server is unknown or invalid."""
    from edgefed.agent.addresses import check_base_url, parse_link

    known = parse_link(access.address())
    if not settings.address and not known.address:
        raise ConfigError(
            "the address of the server is unknown: it has not run yet",
            remedy="Start it with `edgefed serve`, or set `address`.",
        )
    given = parse_link(settings.address or known.address)
    check_base_url(given.address)
    if settings.uses > 1 and not settings.label:
        settings.label = f"{settings.uses} devices"
    invitation, secret = access.invite(uses=settings.uses, expires_s=_seconds(settings.expires), label=settings.label)
    pin = given.pin or (known.pin if given.address.startswith("https:") else "")
    fragment = ",".join([*([f"sha256:{pin}"] if pin else []), f"invite:{secret}"])
    return f"{given.address.rstrip('/')}#{fragment}", invitation


def _seconds(text: str) -> float | None:
    if text == "never":
        return None
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * UNITS_S[unit]
    except (KeyError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"invalid `expires`: {text!r}; expected a time such as 30m, 12h or 7d, or never")
    return seconds


def _facts(invitation: Invitation) -> dict[str, object]:
    facts = dataclasses.asdict(invitation)
    del facts["secret_sha256"]
    return facts


def _print_list(access: Access, as_json: bool) -> None:
    from edgefed.cli.output import print_json, stdout_console
    from edgefed.cli.tables import Column, FittedTable

    invitations = sorted(access.invitations.values(), key=lambda invitation: invitation.created_at)
    if as_json:
        print_json([_facts(invitation) for invitation in invitations])
        return
    if not invitations:
        print("no invitations")
        return
    table = FittedTable(
        Column("invitation", name=True), Column("label", drop=1, left=True), Column("used"),
        Column("state", left=True), Column("expires", drop=2, left=True),
    )  # fmt: skip
    now = time.time()
    for each in invitations:
        expires = (
            "never" if each.expires_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(each.expires_at))
        )
        table.add_row(each.id, each.label, f"{each.used} of {each.uses}", each.problem(now) or "open", expires)
    stdout_console().print(table)
