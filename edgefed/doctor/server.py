"""The way to an aggregator: does it answer, does it speak our protocol, does it accept our token? Only when asked."""

from __future__ import annotations

import time

from edgefed.agent.channel import Channel
from edgefed.doctor.finding import Finding, Group, State
from edgefed.errors import EdgefedError, MalformedMessage, Unauthorized
from edgefed.protocol import PROTOCOL_VERSION, routes
from edgefed.protocol.messages import Message, Status

TIMEOUT_S = 10.0


class Health(Message):
    """Reply of the aggregator's health route, which needs no token."""

    status: str
    protocol_version: int


def server_findings(url: str, token: str | None) -> list[Finding]:
    """Ask the aggregator at ``url``. Raises ConfigError for an address or a token that cannot be one."""
    channel = Channel(url, "", token, connect_s=TIMEOUT_S, read_s=TIMEOUT_S, write_s=TIMEOUT_S, verify=True)
    try:
        health = channel.ask("GET", routes.HEALTH, Health)
        started = time.perf_counter()
        channel.ask("GET", routes.HEALTH, Health)
        trip_ms = (time.perf_counter() - started) * 1e3
    except EdgefedError as error:
        channel.close()
        return [Finding(Group.NETWORK, "server", State.PROBLEM, str(error), "", error.remedy)]
    with_answer = Finding(Group.NETWORK, "server", State.OK, f"{channel.base_url} answers in {trip_ms:.1f} ms")
    try:
        return [with_answer, _version(health), _token(channel, token)]
    finally:
        channel.close()


def _version(health: Health) -> Finding:
    if health.protocol_version == PROTOCOL_VERSION:
        return Finding(Group.NETWORK, "protocol", State.OK, f"version {PROTOCOL_VERSION} on both sides")
    older = "server" if health.protocol_version < PROTOCOL_VERSION else "device"
    return Finding(
        Group.NETWORK, "protocol", State.PROBLEM,
        f"the server speaks version {health.protocol_version}, this device {PROTOCOL_VERSION}",
        "They cannot work together.", f"Update edgefed on the {older}.", "pip install --upgrade edgefed",
    )  # fmt: skip


def _token(channel: Channel, token: str | None) -> Finding:
    had = "the token is accepted" if token else "it wants no token"
    try:
        status = channel.ask("GET", routes.STATUS, Status)
    except Unauthorized as error:
        missing = "a token is needed and none was given" if not token else "the token is not the server's"
        return Finding(Group.NETWORK, "token", State.PROBLEM, missing, str(error), error.remedy)
    except MalformedMessage as error:  # another version's status; the version finding has the remedy
        return Finding(Group.NETWORK, "token", State.NOTE, f"{had}, but its status cannot be read", str(error))
    except EdgefedError as error:
        return Finding(Group.NETWORK, "token", State.PROBLEM, str(error), "", error.remedy)
    run = status.run
    return Finding(
        Group.NETWORK, "token", State.OK, f"{had}; run of {run.model}, round {status.server_round} of {run.rounds}"
    )
