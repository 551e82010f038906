"""Random experts: the control group for methods that select experts.

Each client draws as many experts as its budget allows, at least one per layer. Training, scheduling and traffic are the
same as those of HFedMoE at the same budget; only the selection differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import MeanOfHolders, plan_trainable, select_by_score
from edgefed.methods.interface import FIRST_ROUND, Array, DeviceBudget, RoundContext


@dataclasses.dataclass(frozen=True)
class RandomExperts(MeanOfHolders):
    """A random selection of experts."""

    redraw: bool = False
    """Draw again in each round instead of once. This covers more experts and downloads more."""

    name = "random"

    @property
    def plans_every_round(self) -> bool:
        """As ``redraw`` says."""
        return self.redraw

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Draw uniformly, at least one expert per layer. Raises BudgetTooSmall below that."""
        scores = [rng.random(count) for count in experts_per_layer]
        eligible = [np.ones(count, dtype=bool) for count in experts_per_layer]
        return plan_trainable(experts_per_layer, select_by_score(scores, eligible, budget.resident_experts))

    def expert_importance(self, layer: LayerProfile) -> Array:
        """The mean gate probability; reported only."""
        return layer.mean_gate
