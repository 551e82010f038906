"""FedAvg (McMahan et al., arXiv 1602.05629, Algorithm 1): every client trains the whole model.

The global model is the mean of the clients' models, weighted by examples. FedAvg needs every expert on every device,
which makes it the upper bound for quality and the reference for memory and traffic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import merge_by_examples
from edgefed.methods.interface import (
    FIRST_ROUND,
    Array,
    Contribution,
    DeviceBudget,
    ExpertMethod,
    Requirements,
    RoundContext,
    UnitMerge,
)
from edgefed.protocol.messages import UnitInfo


@dataclasses.dataclass(frozen=True)
class FedAvg(ExpertMethod):
    """Train all experts on every device. Without options."""

    name = "fedavg"
    requirements = Requirements(all_experts=True)

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """All experts, trainable. Raises BudgetTooSmall if they do not fit."""
        if budget.resident_experts < sum(experts_per_layer):
            raise BudgetTooSmall(
                f"{self.name} trains all {sum(experts_per_layer)} experts, this device holds {budget.resident_experts}",
                remedy="Use a method that needs only some experts (hfedmoe, random), or raise `memory` or `experts`.",
            )
        return ExpertPlan.full(experts_per_layer)

    def schedule_experts(self, batch: LayerProfile, trainable: Array, limit: int) -> Array:
        """All of them: FedAvg has no compute budget."""
        return trainable

    def expert_importance(self, layer: LayerProfile) -> Array:
        """The mean gate probability; reported only."""
        return layer.mean_gate

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """w_{t+1} = sum_c n_c w_c / sum_c n_c for each unit."""
        return merge_by_examples(contributions, units)
