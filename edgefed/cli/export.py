"""``edgefed export``: the global model of a run as a checkpoint that transformers loads."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--state", type=click.Path(path_type=Path), default="edgefed-run", show_default=True, help="Folder of the run."
)
@click.option(
    "--to", "form", type=click.Choice(["hf"]), default="hf", show_default=True, help="Hugging Face checkpoint."
)
@click.option(
    "--round", "server_round", type=click.IntRange(min=1), help="The model at the start of this round; default: newest."
)
@click.option("--json", "as_json", is_flag=True)
def export_command(target: Path, state: Path, form: str, server_round: int | None, as_json: bool) -> None:
    """Write the global model to the folder TARGET."""
    from edgefed.cli.output import print_json, print_note
    from edgefed.hardware.memory import format_bytes
    from edgefed.runs import export_model

    folder = export_model(state, target, server_round)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        print_json({"path": str(folder), "form": form, "size_bytes": size})
        return
    print_note(f"wrote {folder} ({format_bytes(size)}): AutoModelForCausalLM.from_pretrained({str(folder)!r})")
