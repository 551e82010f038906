"""Training without federation: each client trains the experts that fit its budget on its own data and sends nothing.

This is the baseline that a federation must beat to be worth its traffic. Experts are selected as in HFedMoE, so only
the exchange differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import (
    FIRST_ROUND,
    Array,
    Contribution,
    DeviceBudget,
    ExpertMethod,
    Profiling,
    RoundContext,
    UnitMerge,
)
from edgefed.protocol.messages import UnitInfo


@dataclasses.dataclass(frozen=True)
class Local(ExpertMethod):
    """The best experts by HFedMoE's score, without an exchange."""

    selection: HFedMoE = dataclasses.field(default_factory=lambda: HFedMoE(exploration=0))

    name = "local"
    profiling = Profiling()
    exchanges = False

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """As `HFedMoE.plan_experts`."""
        return self.selection.plan_experts(profile, experts_per_layer, budget, rng, context)

    def schedule_experts(self, batch: LayerProfile, trainable: Array, limit: int) -> Array:
        """As `HFedMoE.schedule_experts`."""
        return self.selection.schedule_experts(batch, trainable, limit)

    def expert_importance(self, layer: LayerProfile) -> Array:
        """As `HFedMoE.expert_importance`."""
        return self.selection.expert_importance(layer)

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Merge nothing; the global model stays as it is."""
        return {}
