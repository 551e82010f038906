"""What a search for a step plan knows of its run, model and device, and the error where no plan fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from edgefed.costs.memory import MemoryEstimate
from edgefed.costs.price import LossPrice
from edgefed.costs.step_setup import StepPlan
from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.memory import format_bytes

SHORTEST_SEQUENCE = 32
"""Tokens. A shorter block rarely contains a sentence, and its first token gives no loss."""

SEQUENCE_SHARE = 4
"""Blocks are at least a quarter of the run's sequence length, so that all devices train on similar contexts."""


@dataclasses.dataclass(frozen=True)
class FallbackSearch:
    """The search for one run, model and device.

    Attributes:
        estimate: ``estimate(setup, resident, trainable)`` is the peak of a step; experts per layer. For a sliced plan
            a fourth argument has the mean share of their neurons that the resident experts of each layer have.
        layout: ``layout(resident, trainable)`` is the expert plan for these totals.
        price: Expected loss of a plan.
        num_layers: MoE layers.
        run_sequence_length: Tokens of a block, as the run asks for.
        problems: Savings that do not work here, {"chunked_loss" | "checkpointing" | "adamw_8bit" | "nf4_experts" |
            "int8_experts": reason}. What prevents NF4 prevents INT8, too.
        all_experts: The method needs every expert, so fallbacks 6 and 7 do not exist.
        may_offload: Experts may be moved to host memory or disk.
        may_stream: Frozen experts may be streamed from there.
        smaller_ranks: Ranks below the wanted one that adapters may have, largest first.
        slowdown: Time of a step with streamed experts, as a multiple of the same step with all of them in memory.
    """

    estimate: Callable[..., MemoryEstimate]
    layout: Callable[[int, int], ExpertPlan]
    price: LossPrice
    num_layers: int
    run_sequence_length: int
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    all_experts: bool = False
    may_offload: bool = False
    may_stream: bool = False
    smaller_ranks: tuple[int, ...] = ()
    slowdown: Callable[[StepPlan], float] = lambda step_plan: 1.0

    def memory(self, step_plan: StepPlan) -> MemoryEstimate:
        """The peak of a training step under ``step_plan``, in parts."""
        plan = self.layout(step_plan.resident, step_plan.trainable)
        resident, trainable = plan.counts()
        if plan.neurons:
            return self.estimate(step_plan.setup, resident, trainable, plan.slice_shares())
        return self.estimate(step_plan.setup, resident, trainable)

    def needs_bytes(self, step_plan: StepPlan) -> int:
        """The peak of a training step under ``step_plan``, in bytes."""
        return self.memory(step_plan).total_bytes

    def cost(self, step_plan: StepPlan) -> float:
        """The expected loss of ``step_plan``, in nats above a full plan."""
        return self.price(step_plan.setup, self.layout(step_plan.resident, step_plan.trainable))

    def standing(self, step_plan: StepPlan) -> tuple[float, ...]:
        """Sort key: a plan of less expected loss stands higher, then one with fewer savings."""
        return (-round(self.cost(step_plan), 3), *step_plan.rank())

    def rank_note(self, step_plan: StepPlan) -> str:
        """Says that ``step_plan`` has adapters of a smaller rank than the run; "" if it has not."""
        rank, full = step_plan.setup.lora_rank, self.price.lora_rank
        return f"adapters of rank {rank} instead of {full}" if rank < full else ""

    @property
    def shortest_sequence(self) -> int:
        """Fewest tokens of a block that fallback 5 may use."""
        return min(self.run_sequence_length, max(SHORTEST_SEQUENCE, self.run_sequence_length // SEQUENCE_SHARE))


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
