"""HFedMoE (arXiv 2601.00583): experts ranked by importance under a budget, and aggregated where they are used.

Paper symbol -> our name
    G_e(x)          router probability of expert e for token x; `LayerProfile` holds its sums
    B               num_tokens of a batch, or of the profile
    s_cumul(e)      mean_gate                       (3)
    s_specific(e)   gate_max                        (4)
    lambda          lambda_                         (5)
    KL(e)           information_cost, mi="paper"    (11)
    beta            beta                            (14)
    I_b(e)          bottleneck_score                (14)
    C_budget(c)     DeviceBudget.resident_experts   (15)
    E_union(c)      experts with tokens_per_expert > 0
    u_c(e)          ExpertReport.usage              (16)
    tau             tau / E                         (17)
    p_c(e)          usage * importance              (19)
    alpha(c)        client weight of a router       (20)

Departs from the paper
    * (15) is linear under a cardinality bound, so the best C experts solve it. Every layer keeps at least one expert;
      without one it would pass no gradient.
    * The paper masks only the backward pass, which does not limit memory. Here (15) is used twice: on the profile under
      the memory budget (*residency*: which experts are on the device) and on each batch under the compute budget
      (*schedule*: which resident experts get gradients). The schedule divides the compute budget evenly among layers,
      so that the choice is made within the forward pass.
    * ``layer_scale``: scores are divided by the mean importance of their layer before experts of different layers are
      compared. Routers differ in sharpness; without the scale, a layer with a flat router gets almost no expert and its
      output is lost (experiments/results/sweep_hfedmoe.json: worse than a random selection).
    * ``exploration``: clients with similar text rank experts alike, so a fixed selection trains the same few experts
      everywhere and most of the global model stays untrained. Here each round draws a new selection, in which higher
      scores are more likely: Gumbel-top-k (Kool et al., arXiv 1903.06059) on the profile of the first round. The
      temperature falls linearly to 0 in the last round, so each device ends with its best experts. 0 is the paper.
    * An expert with usage >= tau need not have been trained: (17) also requires at least one optimizer step here. An
      expert that no client trained keeps its old value.
    * (20)-(21) are not normalised and would shrink the router each round; here the weights are divided by their sum.
      If all of them are zero, examples are the weights.
    * ``router_aggregation="row"``: row e of a router belongs to expert e and is averaged over the clients that use e,
      with weights p_c(e); rows that no client uses keep their value.
    * ``mi="bernoulli"``: the exact mutual information of "e is chosen" and the token; (11) is one of its two terms.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import in_client_order, merge_by_examples, plan_trainable, select_by_score
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
from edgefed.methods.options import check_options
from edgefed.protocol.messages import ExpertReport, UnitInfo

SMALLEST_SCORE = 1e-6
"""Lower bound of scores in a draw: experts with a score of 0 or below are almost never drawn."""


@dataclasses.dataclass(frozen=True)
class HFedMoE(ExpertMethod):
    """Hyper-parameters. The paper gives no values; the defaults are ours, from sweep_hfedmoe.json."""

    lambda_: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Weight of s_cumul in (5); s_specific has the rest."""
    beta: Annotated[float, Meta(ge=0)] = 0.25
    """Price of information in (14). KL lies in [0, 1/e], so only values of order 1 matter; 0 gives (5)."""
    tau: Annotated[float, Meta(ge=0)] = 0.5
    """Usage threshold of (17) in units of 1/E, the usage of every expert under a balanced router."""
    score: Literal["ib", "importance"] = "ib"
    """Rank by I_b (14), or by the importance s (5)."""
    mi: Literal["paper", "bernoulli"] = "paper"
    """Information cost: (11), or the exact mutual information."""
    layer_scale: bool = True
    """Compare experts of different layers relative to their layer; False compares the scores, as in the paper."""
    exploration: Annotated[float, Meta(ge=0)] = 1.0
    """Temperature of the draw in the first round: 1 draws in proportion to the score, 0 takes the best."""
    router_aggregation: Literal["row", "client"] = "row"
    """Average each row of a router over the clients that use its expert, or the whole router by client (21)."""
    reprofile: bool = False
    """Profile in each round instead of once. This downloads every expert that changed."""

    name = "hfedmoe"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def profiling(self) -> Profiling:
        """Once, or in each round with ``reprofile``."""
        return Profiling("each_round" if self.reprofile else "once")

    @property
    def plans_every_round(self) -> bool:
        """True where the profile or the draw changes."""
        return self.reprofile or self.exploration > 0

    # --- client half ----------------------------------------------------------------------------------------------

    def expert_importance(self, layer: LayerProfile) -> Array:
        """(5) s(e) = lambda mean G_e + (1 - lambda) max G_e, (E,)."""
        return self.lambda_ * layer.mean_gate + (1 - self.lambda_) * layer.gate_max

    def information_cost(self, layer: LayerProfile) -> Array:
        """I(z_e; x), (E,), in nats.

        (11) KL(e) = 1/B sum_i G_e(x_i) ln(G_e(x_i) / m) = gate_log_sum / B - m ln m, with m = mean_gate.
        "bernoulli" adds the same sum for 1 - G_e, which gives the mutual information.
        """
        tokens, mean = max(layer.num_tokens, 1), layer.mean_gate
        cost: Array = layer.gate_log_sum / tokens - _x_ln_x(mean)
        if self.mi == "bernoulli":
            cost = cost + layer.gate_complement_log_sum / tokens - _x_ln_x(1 - mean)
        floor: Array = np.maximum(cost, 0.0)  # rounding can give -1e-17 for a constant gate
        return floor

    def bottleneck_score(self, layer: LayerProfile) -> Array:
        """(14) I_b(e) = s(e) - beta KL(e), (E,); s(e) with score="importance"."""
        importance = self.expert_importance(layer)
        return importance if self.score == "importance" else importance - self.beta * self.information_cost(layer)

    def _comparable_score(self, layer: LayerProfile) -> Array:
        """`bottleneck_score`, with ``layer_scale`` in units of the layer's mean importance."""
        mean = float(self.expert_importance(layer).mean())  # 0 only without tokens: the gates of a token sum to 1
        return self.bottleneck_score(layer) / mean if self.layer_scale and mean > 0 else self.bottleneck_score(layer)

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Residency: (15) on the profile under the memory budget. Raises BudgetTooSmall."""
        if profile is None:
            raise ValueError("hfedmoe needs a profile")
        scores = [self._comparable_score(layer) for layer in profile.layers]
        temperature = self.exploration * (1 - context.progress)
        if temperature > 0:
            scores = [
                np.log(np.maximum(score, SMALLEST_SCORE)) + temperature * rng.gumbel(size=len(score))
                for score in scores
            ]
        union = [layer.tokens_per_expert > 0 for layer in profile.layers]
        return plan_trainable(experts_per_layer, select_by_score(scores, union, budget.resident_experts))

    def schedule_experts(self, batch: LayerProfile, trainable: Array, limit: int) -> Array:
        """Schedule: (15) on one batch of one layer, over the trainable experts that the batch is routed to."""
        routed: Array = trainable[batch.tokens_per_expert[trainable] > 0]
        chosen: Array = routed[np.argsort(-self.bottleneck_score(batch)[routed], kind="stable")[:limit]]
        return chosen

    # --- server half ----------------------------------------------------------------------------------------------

    def counts(self, report: ExpertReport, num_experts: int) -> bool:
        """(17) u_c(e) >= tau, and it was trained."""
        return report.usage >= self.tau / num_experts and report.steps > 0

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """(17) for experts, (19)-(21) for routers, examples for everything else."""
        ordered = in_client_order(contributions)
        experts_per_layer = Counter(unit.layer for unit in units if unit.kind == "expert" and ":" not in unit.key)
        used = {
            c.client_id: {
                key: report for key, report in c.experts.items() if self.counts(report, experts_per_layer[report.layer])
            }
            for c in ordered
        }
        merges = merge_by_examples(contributions, [unit for unit in units if unit.kind == "dense"])
        for unit in units:
            weights: tuple[tuple[str, float | Array], ...]
            holders = [c for c in ordered if unit.key in c.units]
            if unit.kind == "expert":
                holders = [c for c in holders if (unit.layer, unit.expert) in used[c.client_id]]
                weights = tuple((c.client_id, float(c.num_examples)) for c in holders)
            elif unit.kind == "router":
                # An adapter has no row per expert, so it has one weight per client.
                by_row = self.router_aggregation == "row" and not unit.key.endswith(":lora")
                rows = experts_per_layer[unit.layer] if by_row else None
                weights = self._router_weights(holders, used, unit.layer, rows)
            else:
                continue
            if weights:
                merges[unit.key] = UnitMerge(weights)
        return merges

    def _router_weights(
        self, holders: Sequence[Contribution], used: Mapping[str, Mapping[tuple[int, int], ExpertReport]], layer: int,
        rows: int | None,
    ) -> tuple[tuple[str, float | Array], ...]:  # fmt: skip
        """(19) p_c(e) = u_c(e) s_c(e), summed over the client's experts (20) or, with ``rows``, one for each row."""
        if rows is not None:
            by_row = []
            for c in holders:
                weights: Array = np.zeros(rows)
                for (at, expert), report in used[c.client_id].items():
                    if at == layer:
                        weights[expert] = report.usage * report.importance
                by_row.append((c.client_id, weights))
            return tuple(by_row)
        # The division by |S_global| in (20) is the same for all clients and cancels when weights are normalised.
        alpha = {c.client_id: sum(r.usage * r.importance for r in used[c.client_id].values()) for c in holders}
        if not any(alpha.values()):
            alpha = {c.client_id: float(c.num_examples) for c in holders}
        return tuple(alpha.items())


def _x_ln_x(x: Array) -> Array:
    """X ln x with its limit 0 at 0."""
    result: Array = np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0)), 0.0)
    return result
