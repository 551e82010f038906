"""HFedMoE (arXiv 2601.00583): importance-ranked experts under a budget, aggregated where they are used.

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
    * (15) is linear under a cardinality bound, so the best C experts are taken; every layer keeps at least one, or no
      gradient would pass it.
    * The paper masks the backward pass only, which bounds no memory. Here (15) is used twice: on the profile under the
      memory budget (*residency*: which experts are on the device at all) and on each batch under the compute budget
      (*schedule*: which resident experts get gradients). The schedule splits the compute budget evenly over layers, so
      that it is decided inside the same forward pass.
    * ``layer_scale``: scores are divided by the mean importance of their layer before layers are ranked against each
      other. Layers differ in how sharp their routers are; the plain ranking gives a layer with a flat router almost no
      expert, and the layer is lost (benchmarks/results/sweep_hfedmoe.json: worse than a random choice).
    * ``exploration``: clients whose text is alike rank alike, so a fixed choice of the best trains the same few experts
      everywhere and the full global model hardly learns. Here the choice is drawn anew each round, experts with higher
      scores more often: Gumbel-top-k (Kool et al., arXiv 1903.06059) on the profile of the first round. The
      temperature falls linearly to 0 in the last round, so a device ends with its best experts. 0 is the paper.
    * Usage >= tau does not mean trained: (17) also asks for at least one optimizer step. Nobody left: the old expert.
    * (20)-(21) are not normalised and would shrink the router each round; here the weights are divided by their sum,
      and fall back to example weights when all are zero.
    * ``router_aggregation="row"``: row e of a router belongs to expert e and is averaged over the clients that use e,
      with weights p_c(e); rows that nobody uses stay.
    * ``mi="bernoulli"``: the exact mutual information of "e is chosen" and the token, instead of (11)'s half of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import in_client_order, merge_by_examples, plan_trainable, select_by_score
from edgefed.methods.interface import FIRST_ROUND, Contribution, DeviceBudget, Method, RoundContext, UnitMerge
from edgefed.protocol.messages import UnitInfo

SMALLEST_SCORE = 1e-6
"""A score at or below 0 (an expert whose information costs more than it is worth) is drawn as good as never."""


@dataclasses.dataclass(frozen=True)
class HFedMoE(Method):
    """Hyper-parameters. The paper states none of the values; the defaults are ours, from sweep_hfedmoe.json."""

    lambda_: float = 0.5
    """Weight of s_cumul against s_specific in (5), 0..1."""
    beta: float = 0.25
    """Price of information in (14), >= 0. KL lies in [0, 1/e], so only values of order 1 matter; 0 gives (5)."""
    tau: float = 0.5
    """Usage threshold of (17) in units of 1/E, the usage of a perfectly balanced expert; >= 0."""
    score: str = "ib"
    """Rank by "ib", I_b (14), or by "importance", s (5)."""
    mi: str = "paper"
    """Information cost: "paper" (11) or "bernoulli"."""
    layer_scale: bool = True
    """Rank experts of different layers relative to their layer; False ranks the plain scores, as in the paper."""
    exploration: float = 1.0
    """Temperature of the first round's draw of experts, >= 0: at 1 in proportion to the score, at 0 simply the best."""
    router_aggregation: str = "row"
    """"row" or "client" (21)."""
    reprofile: bool = False
    """Profile all experts again in each round instead of once; downloads every expert that changed."""

    name = "hfedmoe"
    needs_profile = True

    def __post_init__(self) -> None:
        for option, allowed in (
            ("score", ("ib", "importance")),
            ("mi", ("paper", "bernoulli")),
            ("router_aggregation", ("client", "row")),
        ):
            if getattr(self, option) not in allowed:
                raise ConfigError(f"hfedmoe: {option} is {getattr(self, option)!r}, allowed are {', '.join(allowed)}")
        if not 0 <= self.lambda_ <= 1:
            raise ConfigError(f"hfedmoe: lambda is {self.lambda_}, allowed is 0 to 1")
        for option in ("beta", "tau", "exploration"):
            if not getattr(self, option) >= 0:
                raise ConfigError(f"hfedmoe: {option} is {getattr(self, option)}, allowed is 0 or more")

    @property
    def profiles_every_round(self) -> bool:
        return self.reprofile

    @property
    def plans_every_round(self) -> bool:
        return self.reprofile or self.exploration > 0

    # --- client half ----------------------------------------------------------------------------------------------

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """(5) s(e) = lambda mean G_e + (1 - lambda) max G_e, (E,)."""
        return self.lambda_ * record.mean_gate + (1 - self.lambda_) * record.gate_max

    def information_cost(self, record: LayerProfile) -> np.ndarray:
        """I(z_e; x), (E,), in nats.

        (11) KL(e) = 1/B sum_i G_e(x_i) ln(G_e(x_i) / m) = gate_log_sum / B - m ln m, with m = mean_gate.
        "bernoulli" adds the same sum for 1 - G_e, which makes it a mutual information.
        """
        tokens, mean = max(record.num_tokens, 1), record.mean_gate
        cost = record.gate_log_sum / tokens - _x_ln_x(mean)
        if self.mi == "bernoulli":
            cost = cost + record.gate_complement_log_sum / tokens - _x_ln_x(1 - mean)
        return np.maximum(cost, 0.0)  # rounding can leave -1e-17 where the gate is constant

    def bottleneck_score(self, record: LayerProfile) -> np.ndarray:
        """(14) I_b(e) = s(e) - beta KL(e), (E,); with score="importance" just s(e)."""
        importance = self.expert_importance(record)
        return importance if self.score == "importance" else importance - self.beta * self.information_cost(record)

    def _comparable_score(self, record: LayerProfile) -> np.ndarray:
        """`bottleneck_score`, in units of the layer's mean importance if ``layer_scale``."""
        mean = float(self.expert_importance(record).mean())  # never 0 where a token was seen: the gates sum to 1
        return self.bottleneck_score(record) / mean if self.layer_scale and mean > 0 else self.bottleneck_score(record)

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Residency: (15) on the profile under the memory budget. Raises BudgetTooSmall."""
        if record is None:
            raise ValueError("hfedmoe plans from a profile")
        scores = [self._comparable_score(layer) for layer in record.layers]
        temperature = self.exploration * (1 - context.progress)
        if temperature > 0:
            scores = [
                np.log(np.maximum(score, SMALLEST_SCORE)) + temperature * rng.gumbel(size=len(score))
                for score in scores
            ]
        union = [layer.tokens_per_expert > 0 for layer in record.layers]
        return plan_trainable(experts_per_layer, select_by_score(scores, union, budget.resident_experts))

    def schedule_experts(self, batch: LayerProfile, trainable: np.ndarray, limit: int) -> np.ndarray:
        """Schedule: (15) on one batch of one layer, over the trainable experts that the batch is routed to."""
        routed = trainable[batch.tokens_per_expert[trainable] > 0]
        return routed[np.argsort(-self.bottleneck_score(batch)[routed], kind="stable")[:limit]]

    # --- server half ----------------------------------------------------------------------------------------------

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """(17) for experts, (19)-(21) for routers, example weights for everything else."""
        ordered = in_client_order(contributions)
        experts_per_layer = Counter(unit.layer for unit in units if unit.kind == "expert" and ":" not in unit.key)
        used = {
            c.client_id: {
                key: report
                for key, report in c.experts.items()
                if report.usage >= self.tau / experts_per_layer[report.layer] and report.steps > 0
            }
            for c in ordered
        }
        merges = merge_by_examples(contributions, [unit for unit in units if unit.kind == "dense"])
        for unit in units:
            holders = [c for c in ordered if unit.key in c.units]
            if unit.kind == "expert":
                holders = [c for c in holders if (unit.layer, unit.expert) in used[c.client_id]]
                weights = tuple((c.client_id, float(c.num_examples)) for c in holders)
            elif unit.kind == "router":
                # An adapter has no row per expert, so it always takes the client's weight.
                by_row = self.router_aggregation == "row" and not unit.key.endswith(":lora")
                rows = experts_per_layer[unit.layer] if by_row else None
                weights = self._router_weights(holders, used, unit.layer, rows)
            else:
                continue
            if weights:
                merges[unit.key] = UnitMerge(weights)
        return merges

    def _router_weights(
        self, holders: Sequence[Contribution], used: dict[str, dict], layer: int, rows: int | None
    ) -> tuple[tuple[str, float | np.ndarray], ...]:
        """(19) p_c(e) = u_c(e) s_c(e); summed over the client's experts (20), or kept per row of this layer."""
        if rows is not None:
            by_row = []
            for c in holders:
                weights = np.zeros(rows)
                for (at, expert), report in used[c.client_id].items():
                    if at == layer:
                        weights[expert] = report.usage * report.importance
                by_row.append((c.client_id, weights))
            return tuple(by_row)
        # The division by |S_global| in (20) is the same for all clients and falls out of the normalisation.
        alpha = {c.client_id: sum(r.usage * r.importance for r in used[c.client_id].values()) for c in holders}
        if not any(alpha.values()):
            alpha = {c.client_id: float(c.num_examples) for c in holders}
        return tuple(alpha.items())


def _x_ln_x(x: np.ndarray) -> np.ndarray:
    """X ln x with its limit 0 at 0."""
    return np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0)), 0.0)
