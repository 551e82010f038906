"""``edgefed doctor``: what is missing or wrong here, with the fix."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from edgefed.cli.options import command
from edgefed.cli.phrasing import to_flags
from edgefed.config import Setting

if TYPE_CHECKING:
    from edgefed.doctor.finding import Diagnosis, Finding

MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "problem": "PROBLEM"}
STYLES = {"ok": "green", "note": "cyan", "warning": "bold yellow", "problem": "bold red"}
MARK_CELLS, NAME_CELLS = 8, 20
NARROWEST = 40
"""Below this many columns, lines run over instead of breaking after every word."""


@dataclasses.dataclass
class DoctorSettings:
    """What `edgefed doctor` takes."""

    device: Annotated[
        str | None, Setting("cpu, cuda, cuda:1, or the UUID of a GPU or MIG instance; default: the best one.")
    ] = None
    quick: Annotated[bool, Setting("Run no kernel and write nothing to the disk.")] = False
    prove: Annotated[bool, Setting("Prove the device's kernels again: results, gradients, speed.")] = False
    state: Annotated[Path, Setting("Folder that `edgefed join` will use: its disk is examined.")] = Path(
        "edgefed-client"
    )
    server: Annotated[str | None, Setting("Also try the connection to this server, http://host:port.")] = None
    token: Annotated[str | None, Setting("Token of the server.", variable="EDGEFED_TOKEN", secret=True)] = None
    record: Annotated[Path | None, Setting("Only write every raw reading to this file, with identifiers hashed.")] = (
        None
    )
    replay: Annotated[Path | None, Setting("Only judge the readings in such a file.")] = None
    force: Annotated[bool, Setting("Let `record` replace a file.")] = False
    json: Annotated[bool, Setting("Print the findings as JSON.")] = False


@command("doctor", DoctorSettings)
def doctor_command(settings: DoctorSettings) -> None:
    """Check this device and name what to fix.

    Examines packages, driver, arithmetic, memory and disk. Exits with status 0 when the device can train.
    """
    from rich.text import Text

    from edgefed.cli.output import TerminalProgress, print_json, print_note, stdout_console
    from edgefed.doctor.diagnosis import Options, examine, examine_recording

    _check_options(settings)
    if settings.record is not None:
        from edgefed.doctor.diagnosis import record_to

        recorded = record_to(settings.record, settings.device, force=settings.force)
        if settings.json:
            print_json({"recorded": str(settings.record), **dataclasses.asdict(recorded)})
            return
        if recorded.without_torch:
            print_note(f"without what torch knows: {recorded.without_torch}")
        print_note(
            f"{settings.record}: {recorded.size_bytes} bytes; serials, UUIDs, addresses and names in it are hashed"
        )
        return
    if settings.replay is not None:
        from edgefed.hardware.recording import replay as replay_facts

        diagnosis = examine_recording(replay_facts(settings.replay, settings.device))
    else:
        progress = TerminalProgress(quiet_s=float("inf"))
        try:
            diagnosis = examine(
                Options(
                    settings.device, settings.state, settings.server, settings.token, settings.quick, settings.prove
                ),
                progress.phase,
            )
        finally:
            progress.done()
    if settings.json:
        print_json(to_json(diagnosis))
    else:
        console = stdout_console()
        width = console.width if sys.stdout.isatty() else shutil.get_terminal_size((100, 24)).columns
        for style, line in render(diagnosis, width):
            console.print(Text(line, style or ""), soft_wrap=True)
    click.get_current_context().exit(0 if diagnosis.can_train else 1)


def _check_options(settings: DoctorSettings) -> None:
    recording = settings.record is not None or settings.replay is not None
    if settings.record is not None and settings.replay is not None:
        raise click.UsageError("--record and --replay exclude each other")
    if settings.prove and (recording or settings.quick):
        raise click.UsageError("--prove goes with neither --quick, --record nor --replay")
    if recording and settings.server is not None:
        raise click.UsageError("--server goes with neither --record nor --replay")
    if settings.force and settings.record is None:
        raise click.UsageError("--force goes with --record only")


def render(diagnosis: Diagnosis, width: int) -> Iterator[tuple[str | None, str]]:
    """The report as (style, line), at most ``width`` columns wide except for commands, which stay in one piece."""
    from edgefed.doctor.finding import Group

    for line in _wrap(f"edgefed doctor: {diagnosis.device}", "", "", width):
        yield "bold", line
    for group in Group:
        findings = diagnosis.in_group(group)
        if findings:
            yield None, ""
            yield "bold", str(group)
            for finding in findings:
                yield from _render_finding(finding, width)
    yield None, ""
    for sentence in diagnosis.left_out:
        for line in _wrap(sentence[0].upper() + sentence[1:] + ".", "", "", width):
            yield "dim", line
    for line in _wrap(diagnosis.summary(), "", "", width):
        yield ("bold green" if diagnosis.can_train else "bold red"), line


def _render_finding(finding: Finding, width: int) -> Iterator[tuple[str | None, str]]:
    style = STYLES[finding.state]
    head = f"  {MARKS[finding.state]:<{MARK_CELLS}}{finding.name:<{NAME_CELLS}} "
    indent = " " * (len(head) if width >= 90 else 2 + MARK_CELLS)
    if width >= 90 and len(finding.name) <= NAME_CELLS:
        lines = _wrap(finding.found, head, indent, width)
    else:
        lines = _wrap(f"{finding.name}: {finding.found}", head[: 2 + MARK_CELLS], indent, width)
    for line in lines:
        yield (None if finding.state == "ok" else style), line
    if finding.state == "ok" and not finding.fix:
        return
    if finding.why:
        for line in _wrap(finding.why, indent, indent, width):
            yield None, line
    if finding.fix:
        for line in _wrap(f"fix: {finding.fix}", indent, indent + " " * 5, width):
            yield None, line
    if finding.command:
        yield "bold", f"{indent}{'     ' if finding.fix else 'fix: '}$ {finding.command}"


def _wrap(text: str, first: str, later: str, width: int) -> list[str]:
    return textwrap.wrap(
        to_flags(text), max(width, NARROWEST), initial_indent=first, subsequent_indent=later, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def to_json(diagnosis: Diagnosis) -> dict[str, object]:
    """The diagnosis for programs on this machine, with identifiers: what is to be shared is made by --record."""
    import msgspec

    from edgefed.doctor.finding import State

    return {
        "schema": "edgefed.doctor/1",
        "device": diagnosis.device,
        "can_train": diagnosis.can_train,
        "counts": {str(state): diagnosis.count(state) for state in State},
        "findings": [
            {name: to_flags(str(value)) for name, value in dataclasses.asdict(finding).items()}
            for finding in diagnosis.findings
        ],
        "left_out": [to_flags(sentence) for sentence in diagnosis.left_out],
        "facts": msgspec.to_builtins(diagnosis.facts),
    }
