"""Findings about what surrounds the device: processor, battery, container, clock, disk and the way to the server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path

import edgefed
from edgefed.agent.channel import Channel
from edgefed.doctor.finding import Finding, Group, State
from edgefed.errors import EdgefedError, MalformedMessage, Unauthorized
from edgefed.hardware.facts import DeviceFacts
from edgefed.hardware.memory import GIB, format_bytes
from edgefed.protocol import PROTOCOL_VERSION, routes
from edgefed.protocol.messages import Message, Status

PROBE_BYTES = 16 * 2**20
"""Written once with fsync to see how fast the disk is: a slow SD card needs about two seconds."""
SLOW_BYTES_PER_S = 20e6
"""Below this, fetching the experts waits for the disk and not for a 200 Mbit/s line."""
LITTLE_ROOM_BYTES = 2 * GIB
CLOCK_TOLERANCE_S = 86400.0
"""Files may have been written with the clock of another time zone."""


@dataclasses.dataclass(frozen=True)
class DiskProbe:
    """``folder`` is the nearest one that exists. ``bytes_per_s`` None when not measured; ``error`` says why not."""

    folder: Path
    free_bytes: int | None
    bytes_per_s: float | None
    error: str = ""


def probe_disk(state: Path, *, write: bool) -> DiskProbe:
    """Look at the disk where ``state`` is or will be; with ``write`` put 16 MiB there and remove them again."""
    folder = state.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = None
    try:
        free = shutil.disk_usage(folder).free
        if not write:
            return DiskProbe(folder, free, None, "" if os.access(folder, os.W_OK) else "Permission denied")
        handle, name = tempfile.mkstemp(prefix=".edgefed-doctor-", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                block = os.urandom(2**20)  # a compressing disk shall not look fast
                started = time.perf_counter()
                for _ in range(PROBE_BYTES // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                seconds = time.perf_counter() - started
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)
    except OSError as error:
        return DiskProbe(folder, free, None, error.strerror or str(error))
    return DiskProbe(folder, free, PROBE_BYTES / max(seconds, 1e-9))


def disk_finding(probe: DiskProbe, state: Path) -> Finding:
    """Room and speed of the state folder's disk."""
    room = "free room unknown" if probe.free_bytes is None else f"{format_bytes(probe.free_bytes)} free"
    if probe.error:
        return Finding(
            Group.HOST, "state folder", State.PROBLEM, f"{probe.folder}: {probe.error}, {room}",
            f"Downloads and pending updates must be written to {state}.",
            "Choose a folder that you may write to, on a disk with room.", "edgefed join SERVER --state FOLDER ...",
        )  # fmt: skip
    speed = "" if probe.bytes_per_s is None else f", writes {probe.bytes_per_s / 1e6:.0f} MB/s"
    found = f"{probe.folder}: {room}{speed}"
    if probe.free_bytes is not None and probe.free_bytes < LITTLE_ROOM_BYTES:
        return Finding(
            Group.HOST, "state folder", State.WARNING, found,
            "The experts of a model are kept there: 13 GiB for OLMoE-1B-7B, megabytes for `tiny`.",
            "Free space, or put the state on another disk.", "edgefed join SERVER --state FOLDER ...",
        )  # fmt: skip
    if probe.bytes_per_s is not None and probe.bytes_per_s < SLOW_BYTES_PER_S:
        return Finding(
            Group.HOST, "state folder", State.WARNING, found,
            "Profiling streams every expert from this disk.", "Use an SSD instead of a card or a network folder.",
            "edgefed join SERVER --state FOLDER ...",
        )  # fmt: skip
    return Finding(Group.HOST, "state folder", State.OK, found)


def clock_finding(now_s: float, installed_s: float) -> Finding:
    """Whether the clock stands before edgefed's own files were written, as on a board without a clock battery."""
    said = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    if now_s < installed_s - CLOCK_TOLERANCE_S:
        return Finding(
            Group.HOST, "clock", State.WARNING, f"{said}, before edgefed was installed",
            "HTTPS certificates look invalid, and log times are wrong.", "Set the clock.",
            "sudo timedatectl set-ntp true",
        )  # fmt: skip
    return Finding(Group.HOST, "clock", State.OK, said)


def installed_time_s() -> float:
    """When edgefed's files were written here."""
    return Path(edgefed.__file__).stat().st_mtime


def host_findings(facts: DeviceFacts) -> list[Finding]:
    """Findings about processor, container, WSL and battery."""
    return [_processor(facts), *_container(facts), *_wsl(facts), *_battery(facts)]


def _processor(facts: DeviceFacts) -> Finding:
    host = facts.host
    kernel = f" {host.kernel.value}" if host.kernel.known else ""
    parts = [f"{host.system}{kernel} on {host.machine}", host.cpu_name.value or "processor unknown"]
    if host.cpu_count.known:
        quota = f", {host.cpu_quota.value:g} of them allowed" if host.cpu_quota.known else ""
        count = host.cpu_count.value
        parts.append(f"{count} logical processor{'' if count == 1 else 's'}{quota}")
    load, allowed = host.load_average.value, host.cpu_quota.value or host.cpu_count.value
    if load is not None:
        parts.append(f"load {load:.1f}")
    found = ", ".join(parts)
    if load is not None and allowed and load > 1.5 * allowed:
        return Finding(Group.HOST, "processor", State.NOTE, found, "Other programs use it: rounds take longer.")
    return Finding(Group.HOST, "processor", State.OK, found)


def _container(facts: DeviceFacts) -> list[Finding]:
    if not facts.host.container.known:
        return []
    return [
        Finding(
            Group.HOST, "container", State.NOTE, facts.host.container.require(),
            "A container sees only what is mounted and allowed: GPUs need --gpus all, the state folder a volume.",
        )
    ]  # fmt: skip


def _wsl(facts: DeviceFacts) -> list[Finding]:
    if not facts.host.is_wsl:
        return []
    return [
        Finding(
            Group.HOST, "WSL2", State.NOTE, "Linux under Windows",
            "Windows shares the GPU and may move its memory to system RAM without an error: speed collapses instead. "
            "Linux sees half of the machine's memory unless .wslconfig says otherwise.",
            "Verify the budget by allocating it.", "edgefed bench --verify",
        )
    ]  # fmt: skip


def _battery(facts: DeviceFacts) -> list[Finding]:
    battery = facts.host.battery.value
    if battery is None:
        return []
    level = f"{battery.percent:.0f} %"
    if battery.plugged is False:
        return [
            Finding(
                Group.HOST, "battery", State.WARNING, f"{level}, not plugged in",
                "Training drains it, and most machines run slower on battery power.", "Plug the charger in.",
            )
        ]  # fmt: skip
    return [Finding(Group.HOST, "battery", State.OK, f"{level}{', plugged in' if battery.plugged else ''}")]


TIMEOUT_S = 10.0


class Health(Message, frozen=True):
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
        "Both sides must use the same version.", f"Update edgefed on the {older}.", "pip install --upgrade edgefed",
    )  # fmt: skip


def _token(channel: Channel, token: str | None) -> Finding:
    had = "the token is accepted" if token else "no token is needed"
    try:
        status = channel.ask("GET", routes.STATUS, Status)
    except Unauthorized as error:
        missing = "the server needs a token, and none was given" if not token else "the token is not the server's"
        return Finding(Group.NETWORK, "token", State.PROBLEM, missing, str(error), error.remedy)
    except MalformedMessage as error:  # another version's status; the version finding has the remedy
        return Finding(Group.NETWORK, "token", State.NOTE, f"{had}, but its status cannot be read", str(error))
    except EdgefedError as error:
        return Finding(Group.NETWORK, "token", State.PROBLEM, str(error), "", error.remedy)
    run = status.run
    return Finding(
        Group.NETWORK, "token", State.OK, f"{had}; run of {run.model}, round {status.server_round} of {run.rounds}"
    )
