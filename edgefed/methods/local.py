"""No federation: each client trains the experts that its budget holds on its own data and sends nothing.

The baseline that a federation must beat to be worth its bytes. Experts are chosen as in HFedMoE, so that the only
difference is the exchange.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import FIRST_ROUND, Contribution, DeviceBudget, Method, RoundContext, UnitMerge
from edgefed.protocol.messages import UnitInfo


@dataclasses.dataclass(frozen=True)
class Local(Method):
    """HFedMoE's best experts, without its exchange."""

    selection: HFedMoE = dataclasses.field(default_factory=lambda: HFedMoE(exploration=0))

    name = "local"
    needs_profile = True
    exchanges = False

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """As `HFedMoE.plan_experts`."""
        return self.selection.plan_experts(record, experts_per_layer, budget, rng, context)

    def schedule_experts(self, batch: LayerProfile, trainable: np.ndarray, limit: int) -> np.ndarray:
        """As `HFedMoE.schedule_experts`."""
        return self.selection.schedule_experts(batch, trainable, limit)

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """As `HFedMoE.expert_importance`."""
        return self.selection.expert_importance(record)

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Nothing is merged: the global model stays as it was."""
        return {}
