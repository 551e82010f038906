"""``edgefed backup``: a complete copy of a run, also while it is served."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from edgefed.cli.options import command
from edgefed.config import Setting


@dataclasses.dataclass
class BackupSettings:
    """What `edgefed backup` takes."""

    target: Annotated[Path, Setting("Folder for the copy; it must not exist or be empty.", positional=True)]
    state: Annotated[Path, Setting("Folder of the run, on the server's machine.")] = Path("edgefed-run")
    json: Annotated[bool, Setting("Print round, files and size as JSON.")] = False


@command("backup", BackupSettings)
def backup_command(settings: BackupSettings) -> None:
    """Copy a run, also while it is served.

    TARGET becomes the folder of a run like any other: `edgefed serve --state TARGET` continues it. Every file is
    checked. It has the token and the keys of the server, so keep it as safe as the run itself.
    """
    from edgefed.aggregator.backup import back_up
    from edgefed.cli.output import print_json, print_note
    from edgefed.hardware.memory import format_bytes
    from edgefed.progress import counted

    found = back_up(settings.state, settings.target)
    if settings.json:
        print_json({"path": str(settings.target), **dataclasses.asdict(found)})
        return
    print_note(
        f"wrote {settings.target}: round {found.server_round}, {counted(found.files, 'file')}, "
        f"{format_bytes(found.size_bytes)}"
    )
