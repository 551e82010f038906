"""Baselines: methods that select experts in a simpler way, train the whole model, or exchange nothing."""

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
from edgefed.methods.fedavg import FedAvg
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import (
    FIRST_ROUND,
    Array,
    Contribution,
    DeviceBudget,
    ExpertMethod,
    Profiling,
    Requirements,
    RoundContext,
    UnitMerge,
)
from edgefed.protocol.messages import UnitInfo


@dataclasses.dataclass(frozen=True)
class FrequentExperts(MeanOfHolders):
    """FMES (named in arXiv 2508.19078): train the experts that the device's tokens use most, discard the others.

    The selection is made once, from the profile of the first round.
    """

    name = "fmes"
    profiling = Profiling()

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """The most frequent experts of all layers, at least one in each. Raises BudgetTooSmall."""
        if profile is None:
            raise ValueError(f"{self.name} needs a profile")
        scores = [layer.frequency for layer in profile.layers]
        used = [layer.tokens_per_expert > 0 for layer in profile.layers]
        return plan_trainable(experts_per_layer, select_by_score(scores, used, budget.resident_experts))

    def expert_importance(self, layer: LayerProfile) -> Array:
        """The frequency; reported only."""
        return layer.frequency


@dataclasses.dataclass(frozen=True)
class Submodel(FrequentExperts):
    """The submodels of FedMoE by Mei et al. (arXiv 2408.11304); not the FedMoE of arXiv 2402.01350.

    Each layer keeps its most used experts until their share of all uses reaches theta, with the largest theta whose
    submodel fits. The paper finds theta by bisection; an expert joins at one of finitely many shares, so sorting them
    gives the exact value. Each expert is averaged by examples over the clients that hold it, and so is its row of the
    router; an expert that no client holds stays as it is.
    """

    name = "fedmoe_submodel"

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """The submodel of the largest theta that fits. Raises BudgetTooSmall below one expert per layer."""
        if profile is None:
            raise ValueError(f"{self.name} needs a profile")
        check_budget(budget.resident_experts, experts_per_layer)
        joins: list[tuple[float, int, int]] = []  # (smallest theta with the expert, layer, expert)
        for layer, statistics in enumerate(profile.layers):
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
        """Average experts over their holders, and row e of a router over the holders of e."""
        merges = merge_by_examples(contributions, units)
        sizes = Counter(unit.layer for unit in units if unit.kind == "expert" and ":" not in unit.key)
        for unit in units:
            if unit.kind != "router" or unit.key.endswith(":lora") or unit.key not in merges:
                continue
            rows = []
            for contribution in in_client_order(contributions):
                if unit.key in contribution.units:
                    holds: Array = np.zeros(sizes[unit.layer])
                    holds[[expert for layer, expert in contribution.experts if layer == unit.layer]] = 1.0
                    rows.append((contribution.client_id, holds * contribution.num_examples))
            merges[unit.key] = UnitMerge(tuple(rows))
        return merges


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


@dataclasses.dataclass(frozen=True)
class OffloadedExperts(FedAvg):
    """FMD: the whole model; experts are offloaded and loaded when a token is routed to them."""

    name = "fmd"
    requirements = Requirements(all_experts=True, offloading=True)


@dataclasses.dataclass(frozen=True)
class QuantizedExperts(FedAvg):
    """FMQ: the whole model, with experts in NF4 and a trained LoRA adapter for each."""

    name = "fmq"
    requirements = Requirements(all_experts=True, expert_storage="nf4", train_experts="lora")


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
