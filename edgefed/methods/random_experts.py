"""Random resident experts: the control group of every expert-selection method.

Each client holds as many experts as its budget allows, drawn at random, at least one per layer. Training, masking and
bytes are those of HFedMoE at the same budget; only the choice differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import MeanOfHolders, plan_trainable, select_by_score
from edgefed.methods.interface import FIRST_ROUND, DeviceBudget, RoundContext


@dataclasses.dataclass(frozen=True)
class RandomExperts(MeanOfHolders):
    """``redraw``: choose anew in each round (covers more experts, downloads more) instead of once."""

    redraw: bool = False

    name = "random"
    needs_profile = False

    @property
    def plans_every_round(self) -> bool:
        return self.redraw

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Uniform over experts, one per layer first. Raises BudgetTooSmall below one expert per layer."""
        scores = [rng.random(count) for count in experts_per_layer]
        eligible = [np.ones(count, dtype=bool) for count in experts_per_layer]
        return plan_trainable(experts_per_layer, select_by_score(scores, eligible, budget.resident_experts))

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """The mean gate probability; reported, not used."""
        return record.mean_gate
