"""The expert heat map in a terminal: a row per MoE layer, a cell per expert."""

from __future__ import annotations

from rich.text import Text

from edgefed.expert_records import ActivationProfile

SHADES = " .:-=+*#%@"
"""From no token to the busiest expert of the model, for output without colour."""
MAX_CELLS = 64


def render_heat_map(record: ActivationProfile, *, colour: bool) -> list[Text]:
    """Lines to print. Cells are two columns wide; layers with more than `MAX_CELLS` experts are summed in groups."""
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
        line.append(f"  {(layer.tokens_per_expert > 0).sum():>3} of {layer.num_experts} used")
        lines.append(line)
    low, high = ("dark", "bright") if colour else ("blank", SHADES[-1])
    lines.append(Text(f"          {low}: no token, {high}: {100 * busiest:.0f} % of the tokens", style="dim"))
    return lines
