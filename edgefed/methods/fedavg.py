"""FedAvg (McMahan et al., arXiv 1602.05629, Algorithm 1): every client trains the whole model; the aggregate is the
mean weighted by examples. Here it is the ceiling and the reference for memory and bytes: it needs every expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import merge_by_examples
from edgefed.methods.interface import FIRST_ROUND, Contribution, DeviceBudget, Method, RoundContext, UnitMerge
from edgefed.protocol.messages import UnitInfo


@dataclasses.dataclass(frozen=True)
class FedAvg(Method):
    """Train all experts everywhere. No hyper-parameters of its own."""

    name = "fedavg"
    needs_profile = False
    holds_all_experts = True

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """All experts, trainable. Raises BudgetTooSmall when the device cannot hold them."""
        if budget.resident_experts < sum(experts_per_layer):
            raise BudgetTooSmall(
                f"{self.name} trains all {sum(experts_per_layer)} experts, this device holds {budget.resident_experts}",
                remedy="Use a method that needs only some experts (hfedmoe, random), or raise `memory` or `experts`.",
            )
        return ExpertPlan.full(experts_per_layer)

    def schedule_experts(self, batch: LayerProfile, trainable: np.ndarray, limit: int) -> np.ndarray:
        """All of them: FedAvg has no notion of a compute budget."""
        return trainable

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """The mean gate probability; reported, not used."""
        return record.mean_gate

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """w_{t+1} = sum_c n_c w_c / sum_c n_c, unit by unit."""
        return merge_by_examples(contributions, units)
