"""What methods share: averages weighted by examples, selection under a budget, and scheduling by tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ExpertPlan, LayerProfile
from edgefed.methods.interface import Array, Contribution, ExpertMethod, UnitMerge
from edgefed.protocol.messages import ExpertReport, UnitInfo


def in_client_order(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Contributions sorted by client id, so that results do not depend on the order of arrival."""
    return sorted(contributions, key=lambda contribution: contribution.client_id)


def merge_by_examples(contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
    """The weights of FedAvg: each uploaded unit is averaged over the clients that sent it, by ``num_examples``."""
    ordered = in_client_order(contributions)
    merges = {}
    for unit in units:
        weights = tuple((c.client_id, float(c.num_examples)) for c in ordered if unit.key in c.units)
        if weights:
            merges[unit.key] = UnitMerge(weights)
    return merges


def merge_by_tokens(
    contributions: Sequence[Contribution], units: Sequence[UnitInfo], counts: Callable[[ExpertReport, int], bool]
) -> dict[str, UnitMerge]:
    """The weights of experts whose report ``counts`` (`ExpertMethod.counts`): the tokens that trained them."""
    sizes = Counter(unit.layer for unit in units if unit.kind == "expert" and ":" not in unit.key)
    merges = {}
    for unit in (unit for unit in units if unit.kind == "expert"):
        weights = []
        for c in in_client_order(contributions):
            report = c.experts.get((unit.layer, unit.expert))
            if unit.key in c.units and report is not None and counts(report, sizes[unit.layer]):
                weights.append((c.client_id, float(report.tokens)))
        if weights:
            merges[unit.key] = UnitMerge(tuple(weights))
    return merges


def check_budget(resident_experts: int, experts_per_layer: Sequence[int]) -> None:
    """Raise BudgetTooSmall unless one expert per layer fits; without one, a layer passes no gradient."""
    if resident_experts < len(experts_per_layer):
        raise BudgetTooSmall(
            f"the budget is {resident_experts} experts; the model has {len(experts_per_layer)} MoE layers, each of "
            "which needs at least one"
        )


def select_by_score(
    scores: Sequence[Array], eligible: Sequence[npt.NDArray[np.bool_]], resident_experts: int
) -> tuple[tuple[int, ...], ...]:
    """The ``resident_experts`` best experts over all layers, at least one in each layer.

    Args:
        scores: (E_l,) per layer.
        eligible: bool (E_l,) per layer. An ineligible expert is selected only in a layer without eligible ones.
        resident_experts: number of experts to select.

    Returns:
        Expert ids per layer, ascending. Ties go to the lower layer, then to the lower expert.

    Raises:
        BudgetTooSmall: fewer experts than layers.
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
    """A plan with the chosen experts, all of them trainable."""
    return ExpertPlan.of(experts_per_layer, chosen)


def busiest(batch: LayerProfile, trainable: Array, limit: int) -> Array:
    """At most ``limit`` of the ``trainable`` expert ids: those with the most tokens in the batch."""
    chosen: Array = trainable[np.argsort(-batch.tokens_per_expert[trainable], kind="stable")[:limit]]
    return chosen


class MeanOfHolders(ExpertMethod, Protocol):
    """Base of methods that schedule the busiest experts and average each unit over its senders, by examples."""

    def schedule_experts(self, batch: LayerProfile, trainable: Array, limit: int) -> Array:
        """The trainable experts with the most tokens in the batch."""
        return busiest(batch, trainable, limit)

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Average each unit over the clients that sent it, weighted by examples."""
        return merge_by_examples(contributions, units)
