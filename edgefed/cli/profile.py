"""``edgefed profile``: which experts does this text use?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from rich.text import Text

from edgefed.cli.options import command
from edgefed.cli.tables import Column, FittedTable
from edgefed.config import Setting
from edgefed.expert_records import ActivationProfile
from edgefed.plots import coverage_text, experts_covering


@dataclasses.dataclass(kw_only=True)
class ProfileSettings:
    """What `edgefed profile` takes."""

    model: Annotated[str, Setting("`tiny`, a Hugging Face checkpoint folder, or a hub id.")] = "tiny"
    data: Annotated[str, Setting("Text, as `edgefed join` takes it: a file, a folder, or silo:NAME.")]
    prompt_field: Annotated[
        str | None, Setting("Field of a record with the prompt.", default="instruction, prompt, question, ...")
    ] = None
    response_field: Annotated[
        str | None, Setting("Field of a record with the response.", default="response, output, answer, ...")
    ] = None
    text_field: Annotated[str | None, Setting("Field of a record with plain text.", default="text")] = None
    tokens: Annotated[int, Setting("Most tokens to read; 0 means all.")] = 16384
    sequence_length: Annotated[int, Setting("Tokens in a sequence.")] = 128
    batch_size: Annotated[int, Setting("Sequences in a batch.")] = 8
    storage: Annotated[
        Literal["full", "int8", "nf4"],
        Setting(
            "Storage of experts: unchanged, or quantized, which needs less memory and gives an approximate profile."
        ),
    ] = "full"
    attention: Annotated[bool, Setting("Also record the attention that each expert's tokens receive; slower.")] = False
    memory: Annotated[
        str | None,
        Setting(
            "Memory that the model may take, e.g. 6GiB; a larger one is read layer by layer. Default: what is free."
        ),
    ] = None
    plot: Annotated[Path | None, Setting("Also write the heat map as a PNG file.")] = None
    json: Annotated[bool, Setting("Print the router statistics as JSON.")] = False


@command("profile", ProfileSettings)
def profile_command(settings: ProfileSettings) -> None:
    """Show which experts a text uses.

    Runs the text through a model and records which experts its router chooses.
    """
    from edgefed.api.models import profile
    from edgefed.cli.output import TerminalProgress, print_json, stdout_console
    from edgefed.training.records import RecordFields

    model, data, attention = settings.model, settings.data, settings.attention
    record = profile(
        model, data, tokens=settings.tokens, sequence_length=settings.sequence_length, batch_size=settings.batch_size,
        storage=settings.storage, attention=attention, memory=settings.memory, progress=TerminalProgress(),
        fields=RecordFields(settings.prompt_field, settings.response_field, settings.text_field),
    )  # fmt: skip
    if settings.plot:
        from edgefed.plots import save_heat_map

        save_heat_map(settings.plot, record, f"{model} on {data}: {record.num_tokens:,} tokens")
    if settings.json:
        covering = {"experts_covering_80_percent": experts_covering(record)}
        print_json({"model": model, "data": data, "num_tokens": record.num_tokens, **covering, **record.to_dict()})
        return
    console = stdout_console()
    console.print(
        f"{model} on {data}: {record.num_tokens:,} tokens, {sum(record.experts_per_layer)} experts",
        markup=False,
        emoji=False,
    )
    for line in render_heat_map(record, colour=console.is_terminal and not console.no_color):
        console.print(line)
    console.print(busiest_table(record))
    console.print(coverage_text(record), markup=False, emoji=False)
    if settings.plot:
        console.print(f"heat map: {settings.plot}", markup=False, emoji=False)


def busiest_table(record: ActivationProfile) -> FittedTable:
    """The eight experts that most tokens are routed to."""
    attention = any(layer.mean_attention is not None for layer in record.layers)
    titles = ("layer", "expert", "tokens", "share of tokens", "mean gate", *(("attention",) if attention else ()))
    table = FittedTable(*map(Column, titles), title="busiest experts")
    ranked = sorted(
        ((layer.frequency[e], index, e) for index, layer in enumerate(record.layers) for e in range(layer.num_experts)),
        reverse=True,
    )
    for share, index, expert in ranked[:8]:
        layer = record.layers[index]
        received = layer.mean_attention if attention else None
        table.add_row(
            str(index), str(expert), f"{layer.tokens_per_expert[expert]:.0f}", f"{100 * share:.1f} %",
            f"{layer.mean_gate[expert]:.3f}", *(() if received is None else (f"{100 * received[expert]:.2f} %",)),
        )  # fmt: skip
    return table


SHADES = " .:-=+*#%@"
"""From no token to the busiest expert of the model, for output without colour."""
MAX_CELLS = 64


def render_heat_map(record: ActivationProfile, *, colour: bool) -> list[Text]:
    """Lines to print. Cells are two columns wide; layers with more than `MAX_CELLS` experts are summed in groups."""
    covering = experts_covering(record)
    busiest = max(float(layer.frequency.max()) for layer in record.layers) or 1.0
    lines = []
    for index, layer in enumerate(record.layers):
        line = Text(f"layer {index:>3} ")
        group = -(-layer.num_experts // MAX_CELLS)
        for start in range(0, layer.num_experts, group):
            level = min(1.0, float(layer.frequency[start : start + group].max()) / busiest)
            if colour:
                line.append(
                    "  ", style=f"on rgb({int(30 + 220 * level)},{int(30 + 150 * level**2)},{int(90 - 60 * level)})"
                )
            else:
                line.append(SHADES[round(level * (len(SHADES) - 1))] * 2)
        used = int((layer.tokens_per_expert > 0).sum())
        line.append(f"  {used:>3} of {layer.num_experts} used, {covering[index]} cover 80 %")
        lines.append(line)
    low, high = ("dark", "bright") if colour else ("blank", SHADES[-1])
    lines.append(Text(f"          {low}: no token, {high}: {100 * busiest:.0f} % of the tokens", style="dim"))
    return lines
