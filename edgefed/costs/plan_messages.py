"""The error where no step plan fits the memory of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgefed.costs.step_setup import StepPlan
from edgefed.errors import BudgetTooSmall
from edgefed.hardware.memory import format_bytes

if TYPE_CHECKING:
    from edgefed.costs.fallbacks import FallbackSearch


def nothing_fits(search: FallbackSearch, least: StepPlan, usable_bytes: int) -> BudgetTooSmall:
    """The error where ``least`` needs more than ``usable_bytes``."""
    memory = search.memory(least)
    need, setup = memory.total_bytes, least.setup
    one_each = f"one expert in each of the {search.num_layers} MoE layers"
    what = f"all {least.resident} experts" if search.all_experts else one_each
    largest = sorted(memory.parts, key=lambda part: memory.parts[part], reverse=True)[:2]
    breakdown = ", ".join(f"{format_bytes(memory.parts[part])} {part}" for part in largest)
    without = "".join(f"; without {name.replace('_', ' ')}: {why}" for name, why in sorted(search.problems.items()))
    return BudgetTooSmall(
        f"{what} needs {format_bytes(need)} with every saving ({breakdown}; {setup.batch_size} sequences of "
        f"{setup.sequence_length} tokens), the device offers the model {format_bytes(max(0, usable_bytes))}{without}",
        remedy=f"Give the device {format_bytes(need - usable_bytes)} more (`memory`, or close other programs), lower "
        f"`batch_size` ({setup.batch_size}) or `sequence_length` on the server, or use a smaller model"
        + (" or a method that needs only some experts (hfedmoe, random)." if search.all_experts else "."),
    )
