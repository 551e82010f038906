"""What methods share: data-weighted averages, choosing experts under a budget, scheduling the busiest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ExpertPlan, LayerProfile
from edgefed.methods.interface import Contribution, Method, UnitMerge
from edgefed.protocol.messages import UnitInfo


def in_client_order(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Contributions sorted by client id, so that no result depends on who arrived first."""
    return sorted(contributions, key=lambda contribution: contribution.client_id)


def merge_by_examples(contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
    """FedAvg's weights: each uploaded unit is averaged over the clients that sent it, weighted by ``num_examples``."""
    ordered = in_client_order(contributions)
    merges = {}
    for unit in units:
        weights = tuple((c.client_id, float(c.num_examples)) for c in ordered if unit.key in c.units)
        if weights:
            merges[unit.key] = UnitMerge(weights)
    return merges


def check_budget(resident_experts: int, experts_per_layer: Sequence[int]) -> None:
    """Raise BudgetTooSmall unless one expert per layer fits: a layer without experts passes no gradient."""
    if resident_experts < len(experts_per_layer):
        raise BudgetTooSmall(
            f"the budget holds {resident_experts} experts; the model has {len(experts_per_layer)} MoE layers and "
            "each needs at least one"
        )


def select_by_score(
    scores: Sequence[np.ndarray], eligible: Sequence[np.ndarray], resident_experts: int
) -> tuple[tuple[int, ...], ...]:
    """The ``resident_experts`` best experts over all layers, at least one in each layer.

    scores: per layer (E_l,). eligible: per layer bool (E_l,); an expert that is not eligible is taken only where its
    layer has no eligible one. Ties go to the lower layer, then the lower expert, so the choice is deterministic.
    Returns expert ids per layer, ascending. Raises BudgetTooSmall below one expert per layer.
    """
    check_budget(resident_experts, [len(row) for row in scores])
    chosen: list[set[int]] = []
    ranking: list[tuple[float, int, int]] = []
    for layer, (row, allowed) in enumerate(zip(scores, eligible, strict=True)):
        candidates = np.flatnonzero(allowed) if allowed.any() else np.arange(len(row))
        best = int(candidates[np.argmax(row[candidates])])
        chosen.append({best})
        ranking += [(-float(row[e]), layer, int(e)) for e in np.flatnonzero(allowed) if e != best]
    for _, layer, expert in sorted(ranking)[: resident_experts - len(scores)]:
        chosen[layer].add(expert)
    return tuple(tuple(sorted(ids)) for ids in chosen)


def plan_trainable(experts_per_layer: Sequence[int], chosen: Sequence[Sequence[int]]) -> ExpertPlan:
    """A plan that trains every chosen expert and holds no other."""
    return ExpertPlan.of(experts_per_layer, chosen)


def busiest(batch: LayerProfile, trainable: np.ndarray, limit: int) -> np.ndarray:
    """At most ``limit`` of the ``trainable`` expert ids, those with the most tokens of the batch."""
    return trainable[np.argsort(-batch.tokens_per_expert[trainable], kind="stable")[:limit]]


class MeanOfHolders(Method):
    """Schedules the busiest experts and averages each unit over the clients that sent it, weighted by examples."""

    def schedule_experts(self, batch: LayerProfile, trainable: np.ndarray, limit: int) -> np.ndarray:
        """The busiest trainable experts of the batch: a schedule needs no importance to save compute."""
        return busiest(batch, trainable, limit)

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Each unit over the clients that hold it, weighted by examples; nobody: unchanged."""
        return merge_by_examples(contributions, units)
