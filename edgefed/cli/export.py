"""``edgefed export``: the global model of a run as a checkpoint that transformers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from edgefed.cli.options import command
from edgefed.config import Setting


@dataclasses.dataclass
class ExportSettings:
    """What `edgefed export` takes."""

    target: Annotated[Path, Setting("Folder to write to.", positional=True)]
    state: Annotated[Path, Setting("Folder of the run.")] = Path("edgefed-run")
    format: Annotated[Literal["hf"], Setting("Hugging Face checkpoint.", flag="to")] = "hf"
    server_round: Annotated[
        int | None, Setting("The model at the start of this round; default: the newest.", flag="round", minimum=1)
    ] = None
    json: Annotated[bool, Setting("Print path and size as JSON.")] = False


@command("export", ExportSettings)
def export_command(settings: ExportSettings) -> None:
    """Write the global model of a run as a checkpoint.

    The folder TARGET must not exist or be empty; transformers loads it without edgefed.
    """
    from edgefed.api.runs import export
    from edgefed.cli.output import print_json, print_note
    from edgefed.hardware.memory import format_bytes

    folder = export(settings.state, settings.target, format=settings.format, server_round=settings.server_round)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if settings.json:
        print_json({"path": str(folder), "form": settings.format, "size_bytes": size})
        return
    print_note(f"wrote {folder} ({format_bytes(size)}): AutoModelForCausalLM.from_pretrained({str(folder)!r})")
