"""Baselines that keep some experts by how often they are used: Flux's FMES, and FedMoE's submodels (2408.11304)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import (
    MeanOfHolders,
    check_budget,
    in_client_order,
    merge_by_examples,
    plan_trainable,
    select_by_score,
)
from edgefed.methods.interface import FIRST_ROUND, Contribution, DeviceBudget, RoundContext, UnitMerge
from edgefed.protocol.messages import UnitInfo


@dataclasses.dataclass(frozen=True)
class FrequentExperts(MeanOfHolders):
    """FMES (named in arXiv 2508.19078): keep and tune the experts that the device's tokens use most, discard the rest.

    The choice is made once, from the profile of the first round.
    """

    name = "fmes"
    needs_profile = True

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """The most frequent experts over all layers, at least one in each. Raises BudgetTooSmall."""
        if record is None:
            raise ValueError(f"{self.name} plans from a profile")
        scores = [layer.frequency for layer in record.layers]
        used = [layer.tokens_per_expert > 0 for layer in record.layers]
        return plan_trainable(experts_per_layer, select_by_score(scores, used, budget.resident_experts))

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """The frequency; reported, not used."""
        return record.frequency


@dataclasses.dataclass(frozen=True)
class Submodel(FrequentExperts):
    """FedMoE of Mei et al. (arXiv 2408.11304): per layer the most used experts until their share of the use reaches
    theta, with the largest theta whose submodel fits. Not the FedMoE of arXiv 2402.01350.

    Unheld experts stay as they are, one holder's expert is copied, several are averaged by examples; the rows of a
    router follow their experts. The paper searches theta by bisection; the shares at which an expert joins are finitely
    many, so the exact largest one is found by sorting them.
    """

    name = "fedmoe_submodel"

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Raises BudgetTooSmall below one expert per layer."""
        if record is None:
            raise ValueError(f"{self.name} plans from a profile")
        check_budget(budget.resident_experts, experts_per_layer)
        joins: list[tuple[float, int, int]] = []  # theta above which an expert is kept, layer, expert
        for layer, statistics in enumerate(record.layers):
            use = statistics.tokens_per_expert / max(statistics.tokens_per_expert.sum(), 1.0)
            order = np.argsort(-use, kind="stable")
            below = np.concatenate([[0.0], np.cumsum(use[order])[:-1]])
            joins += [(float(share), layer, int(expert)) for share, expert in zip(below, order, strict=True)]
        # The first expert of each layer joins at 0; equal shares go to the lower layer.
        chosen: list[list[int]] = [[] for _ in experts_per_layer]
        for _, layer, expert in sorted(joins)[: budget.resident_experts]:
            chosen[layer].append(expert)
        return plan_trainable(experts_per_layer, chosen)

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Experts by their holders; row e of a router by the holders of e."""
        merges = merge_by_examples(contributions, units)
        sizes = Counter(unit.layer for unit in units if unit.kind == "expert" and ":" not in unit.key)
        for unit in units:
            if unit.kind != "router" or unit.key.endswith(":lora") or unit.key not in merges:
                continue
            rows = []
            for contribution in in_client_order(contributions):
                if unit.key in contribution.units:
                    holds = np.zeros(sizes[unit.layer])
                    holds[[expert for layer, expert in contribution.experts if layer == unit.layer]] = 1.0
                    rows.append((contribution.client_id, holds * contribution.num_examples))
            merges[unit.key] = UnitMerge(tuple(rows))
        return merges
