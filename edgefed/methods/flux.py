"""Flux (arXiv 2508.19078): roles by utility, assigned by the aggregator; what has no role is merged and frozen.

Paper symbol -> our name
    u_c(e)        utility: ExpertSurvey.utility, in the first round the normalised frequency
    B_tune(c)     ExpertSurvey.tune_slots: experts that the device holds as themselves
    B_non(c)      slots of merged experts, `merged_slots`
    x_c^e   (4)   `assign_experts`: the best tune_slots experts by utility
    eps           `exploitation`: share of them that is trained; as many others as are left over are explored
    alpha_e       frequency x mean attention, the weight within a merged expert (`edgefed.moe.merging.plan`)

A device profiles quantised and one round late (`profiles_while_waiting`), trains the trainable experts, measures the
gradient norm of trainable experts as it trains and of explored ones by forward passes alone (`edgefed.training.utility`),
and uploads the trainable experts and the utilities.

Departs from the paper
    * (4) is separable by client: the best experts of each are taken. Every layer tunes at least one, but on devices
      that pace or ``first_share`` limits: these tune the most useful ones, wherever they are.
    * The paper's devices compute for most of a round; on home connections they upload. ``pace="fleet"``: a device tunes
      no more than it can fetch and send in about the time that the others need (`edgefed.methods.flux_pace`). Its
      other slots hold what is next in utility, as it is; it is explored, not uploaded. Whoever told no upload rate yet
      goes at its own pace.
    * (4) gives no coverage. ``coverage="balanced"``: an expert that nobody trained for ``coverage_rounds`` rounds goes
      to the client with the largest utility for it, in place of that client's least useful one.
    * Frequencies and gradient norms are no common scale. An expert that was never measured counts as its frequency
      times the median of utility per frequency of those that were, in its layer.
    * A device with room for every expert trains them all, at its own pace; one with less than two slots per layer
      merges nothing, and its tokens go to the next best experts that it holds.
    * ``merge_sizes`` is not the paper's by default; see there.
    * Weight of a client in the mean of an expert: the tokens that trained it there. Nobody: unchanged.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import busiest, check_budget, in_client_order, merge_by_examples, select_by_score
from edgefed.methods.flux_pace import own_count, paced_limits
from edgefed.methods.interface import (
    FIRST_ROUND,
    Contribution,
    Coverage,
    DeviceBudget,
    Method,
    RoundContext,
    UnitMerge,
)
from edgefed.protocol.messages import ExpertAssignment, ExpertSurvey, UnitInfo

Scores = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Flux(Method):
    """Hyper-parameters; the paper gives none of the values, the defaults are ours."""

    eps_start: float = 0.3
    """Share of the chosen experts that is trained in the first round."""
    eps_step: float = 0.05
    """What it grows by in each round."""
    eps_max: float = 0.9
    merged_share: float = 0.25
    """Slots for merged experts, as a share of all experts of the model; at most half of what the device holds."""
    merge_sizes: str = "depth"
    """Slots of a layer: "adaptive" is the paper's (L - l + 1) / v_l, "depth" leaves out the variance of the
    frequencies, "deviation" takes its root, "uniform" gives each layer as many, "one" just one. With few slots the
    variance leaves the last layers next to nothing; "depth" lost least in five of six settings
    (benchmarks/results/merging.json)."""
    merge_weights: str = "attention"
    """Weights within a merged expert: "attention" (frequency x mean attention) or "frequency"."""
    align: bool = False
    """Bring the neurons of merged experts into one order before they are averaged."""
    stale: bool = True
    """Profile while others train and the aggregator aggregates, one round late; False: at the start of each round."""
    probes: int = 4
    """Random directions per explored expert; each costs two forward passes of one batch. 0: utilities of explored
    experts are not refreshed."""
    explored: int = 8
    """Most experts of a device that are explored in a round, drawn from those that it holds and does not train."""
    coverage: str = "none"
    """"none" or "balanced"."""
    coverage_rounds: int = 5
    pace: str = "fleet"
    """"own": a device tunes what its memory and eps allow. "fleet": at most what it can send in that of the fleet;
    without probes and with a factor of 0.8 the target of benchmarks/time_to_accuracy.py comes in half the time."""
    pace_factor: float = 1.0
    """Multiplies that pace: below 1 rounds are shorter and train less. Then devices that are alike are limited too."""
    first_share: float = 0.02
    """Share of all experts that a device tunes at most, at least one, before the aggregator knows what it uploads in a
    second. Only with pace "fleet"; 1 is no limit."""

    refresh_rounds: int = 4
    """Rounds after which what a device does not train is fetched anew at the latest (`Method.refresh_rounds`)."""

    name = "flux"
    needs_profile = True
    plans_every_round = True
    merges_rest = True
    assigns_experts = True

    def __post_init__(self) -> None:
        for option, allowed in (
            ("merge_sizes", ("adaptive", "deviation", "depth", "uniform", "one")),
            ("merge_weights", ("attention", "frequency")),
            ("coverage", ("none", "balanced")),
            ("pace", ("own", "fleet")),
        ):
            if getattr(self, option) not in allowed:
                raise ConfigError(f"flux: {option} is {getattr(self, option)!r}, allowed are {', '.join(allowed)}")
        for option in ("eps_start", "eps_max", "first_share"):
            if not 0 < getattr(self, option) <= 1:
                raise ConfigError(f"flux: {option} is {getattr(self, option)}, allowed is above 0 up to 1")
        if not 0 <= self.merged_share <= 1:
            raise ConfigError(f"flux: merged_share is {self.merged_share}, allowed is 0 to 1")
        if not 0 < self.pace_factor <= 1e3:
            raise ConfigError(f"flux: pace_factor is {self.pace_factor}, allowed is above 0 up to 1000")
        least = {"eps_step": 0, "probes": 0, "explored": 0, "coverage_rounds": 1, "refresh_rounds": 1}
        for option, bound in least.items():
            if not getattr(self, option) >= bound:
                raise ConfigError(f"flux: {option} is {getattr(self, option)}, it must be at least {bound}")

    @property
    def profiles_every_round(self) -> bool:
        return not self.stale

    @property
    def profiles_while_waiting(self) -> bool:
        return self.stale

    @property
    def profiles_attention(self) -> bool:
        return self.merge_weights == "attention"

    @property
    def merge_aligned(self) -> bool:
        return self.align

    @property
    def utility_probes(self) -> int:
        return self.probes if self.explored else 0

    @property
    def most_explored(self) -> int:
        return self.explored

    def exploitation(self, server_round: int) -> float:
        """eps_t = min(eps_max, eps_start + eps_step t), t = 0 in round 1."""
        return min(self.eps_max, self.eps_start + self.eps_step * (server_round - 1))

    def _eps(self, slots: int, total: int, server_round: int) -> float:
        """eps_t, or 1 for a device with room for every expert, where the plan does not see to that (pace "own")."""
        return 1.0 if self.pace == "fleet" and slots >= total else self.exploitation(server_round)

    # --- client half ----------------------------------------------------------------------------------------------

    def merged_slots(self, held: int, experts_per_layer: Sequence[int]) -> int:
        """B_non of a device with ``held`` slots: 0 where it holds every expert, or too few for both."""
        layers, total = len(experts_per_layer), sum(experts_per_layer)
        if held >= total or held < 2 * layers:
            return 0
        return min(max(layers, round(self.merged_share * total)), held // 2)

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Trainable and explored (frozen) experts; the rest is left out, to be merged. Raises BudgetTooSmall."""
        check_budget(budget.resident_experts, experts_per_layer)
        total, paced = sum(experts_per_layer), self.pace == "fleet"
        if budget.resident_experts >= total and not paced:
            return ExpertPlan.full(experts_per_layer)
        slots = budget.resident_experts - self.merged_slots(budget.resident_experts, experts_per_layer)
        if context.assignment is not None:
            take = _first_taken if paced else _taken
            trainable, explored = take(context.assignment, experts_per_layer, slots)
        else:
            if record is None:
                raise ValueError("flux plans from a profile")
            shares = [layer.frequency / max(layer.frequency.sum(), 1e-12) for layer in record.layers]
            limit = max(1, math.floor(self.first_share * total)) if paced else None
            trainable, explored = _split(shares, slots, self._eps(slots, total, context.server_round), rng, limit)
        return ExpertPlan.of(
            experts_per_layer, _by_layer(trainable, experts_per_layer), _by_layer(explored, experts_per_layer)
        )

    def schedule_experts(self, batch: LayerProfile, trainable: np.ndarray, limit: int) -> np.ndarray:
        """The busiest trainable experts of the batch."""
        return busiest(batch, trainable, limit)

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """The frequency; reported, not used: what counts is in the survey."""
        return record.frequency

    # --- server half ----------------------------------------------------------------------------------------------

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Experts by the tokens that trained them, everything else by examples."""
        merges = merge_by_examples(contributions, [unit for unit in units if unit.kind != "expert"])
        for unit in units:
            if unit.kind != "expert":
                continue
            weights = []
            for contribution in in_client_order(contributions):
                report = contribution.experts.get((unit.layer, unit.expert))
                if unit.key in contribution.units and report is not None and report.steps > 0 and report.tokens > 0:
                    weights.append((contribution.client_id, float(report.tokens)))
            if weights:
                merges[unit.key] = UnitMerge(tuple(weights))
        return merges

    def assign_experts(
        self, surveys: Mapping[str, ExpertSurvey], coverage: Coverage, server_round: int, seed: int
    ) -> dict[str, ExpertAssignment]:
        """(4) for each client, split by eps and limited by pace; with coverage, what nobody trained lately is given to
        somebody.
        """
        utilities = {client: complete_utilities(survey) for client, survey in surveys.items()}
        eps = {
            client: self._eps(survey.tune_slots, sum(map(len, survey.frequency)), server_round)
            for client, survey in surveys.items()
        }
        limits = paced_limits(surveys, eps, self.pace_factor) if self.pace == "fleet" else {}
        chosen: dict[str, tuple[list, list]] = {}
        for client, survey in surveys.items():
            # A client's id differs from run to run; what its data look like does not.
            rng = np.random.default_rng([seed, server_round, zlib.crc32(repr(survey.frequency).encode())])
            chosen[client] = _split(utilities[client], survey.tune_slots, eps[client], rng, limits.get(client))
        if self.coverage == "balanced":
            self._cover(chosen, utilities, coverage, limits)
        return {
            client: ExpertAssignment(tune=tuple(tune), explore=tuple(explore))
            for client, (tune, explore) in chosen.items()
        }

    def _cover(
        self, chosen: dict[str, tuple[list, list]], utilities: Mapping[str, Scores], coverage: Coverage, limits: Mapping
    ) -> None:
        """Give each expert that was idle too long to the client that it is most useful to; see the top of this file.

        No layer is left without a trainable expert by that, but on clients in ``limits``, where there may be such layers.
        """
        trainable = {pair for tune, _ in chosen.values() for pair in tune}
        idle = [
            (-int(rounds[expert]), layer, int(expert))
            for layer, rounds in enumerate(coverage.idle_rounds)
            for expert in np.flatnonzero(rounds >= self.coverage_rounds)
        ]
        given: set[tuple[int, int]] = set()
        for _, layer, expert in sorted(idle):
            if (layer, expert) in trainable:
                continue
            shares = {
                client: scores[layer][expert] / max(float(scores[layer].sum()), 1e-30)
                for client, scores in utilities.items()
            }
            for client in sorted(shares, key=lambda name: (-shares[name], utilities[name][layer].tobytes())):
                tune, explore = chosen[client]
                layers = [at for at, _ in tune]
                spare = [p for p in tune if p not in given and (layers.count(p[0]) > 1 or client in limits)]
                if spare:
                    tune[tune.index(spare[-1])] = (layer, expert)
                    if (layer, expert) in explore:
                        explore[explore.index((layer, expert))] = spare[-1]
                    given.add((layer, expert))
                    break


def complete_utilities(survey: ExpertSurvey) -> list[np.ndarray]:
    """A utility for every expert, per layer (E_l,): measured, or estimated from the frequency (top of this file).

    A layer where nothing was measured takes the median of all layers; without any measurement the frequencies count.
    """
    measured = [np.array([np.nan if u is None else u for u in row], dtype=np.float64) for row in survey.utility]
    frequency = [np.asarray(row, dtype=np.float64) for row in survey.frequency]

    def ratios(utility: np.ndarray, share: np.ndarray) -> np.ndarray:
        known = np.isfinite(utility) & (share > 0)
        return utility[known] / share[known]

    per_layer = [ratios(*pair) for pair in zip(measured, frequency, strict=True)]
    overall = np.concatenate(per_layer) if per_layer else np.zeros(0)
    fallback = float(np.median(overall)) if len(overall) else 1.0
    found = []
    for utility, share, ratio in zip(measured, frequency, per_layer, strict=True):
        scale = float(np.median(ratio)) if len(ratio) else fallback
        found.append(np.where(np.isfinite(utility), utility, share * scale))
    return found


def _split(
    scores: Scores, slots: int, eps: float, rng: np.random.Generator, limit: int | None = None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(trainable, explored), together ``slots``: the best ``eps`` of the slots, and the rest drawn from all others.

    Above ``limit``, the least useful of the best are not trainable; they come first among the explored.
    """
    layers, total = len(scores), sum(len(row) for row in scores)
    slots = min(slots, total)
    count = own_count(slots, layers, eps)
    everything = [np.ones(len(row), dtype=bool) for row in scores]
    best = select_by_score(scores, everything, count)
    trainable = sorted(
        ((layer, expert) for layer, ids in enumerate(best) for expert in ids),
        key=lambda pair: (-float(scores[pair[0]][pair[1]]), pair),
    )
    others = [(layer, e) for layer, row in enumerate(scores) for e in range(len(row)) if e not in best[layer]]
    drawn = rng.permutation(len(others))[: slots - count]
    trainable, spared = (trainable, []) if limit is None else (trainable[:limit], trainable[limit:])
    return trainable, spared + [others[index] for index in drawn]


def _taken(
    assignment: ExpertAssignment, experts_per_layer: Sequence[int], slots: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What fits of an assignment, in its proportions, with a trainable expert in every layer.

    Raises ConfigError on an expert that the model does not have.
    """
    tune, explore = _checked(assignment, experts_per_layer)
    wanted = len(tune) + len(explore)
    count = len(tune) if wanted <= slots else max(len(experts_per_layer), slots * len(tune) // wanted)
    count = min(max(count, len(experts_per_layer)), slots)
    kept = _first_of(tune + explore, experts_per_layer, count)
    rest = [pair for pair in dict.fromkeys(tune + explore) if pair not in kept]
    return sorted(kept), rest[: slots - len(kept)]


def _first_taken(
    assignment: ExpertAssignment, experts_per_layer: Sequence[int], slots: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first experts of an assignment that fit, with one in every layer, as what they are assigned.

    Fewer slots do not lower what is trainable as long as it fits: its number was chosen by what the uplink can send. Raises
    as `_taken` does.
    """
    tune, explore = _checked(assignment, experts_per_layer)
    kept = _first_of(tune + explore, experts_per_layer, slots)
    trainable = sorted(kept & set(tune)) or sorted(kept)[:1]
    return trainable, sorted(kept - set(trainable))


def _first_of(pairs: Sequence[tuple[int, int]], experts_per_layer: Sequence[int], count: int) -> set[tuple[int, int]]:
    """The first ``count`` of ``pairs``, with at least one expert in each layer."""
    scores = [np.zeros(size) for size in experts_per_layer]
    for rank, (layer, expert) in enumerate(reversed(pairs), start=1):
        scores[layer][expert] = rank
    chosen = select_by_score(scores, [row > 0 for row in scores], count)
    return {(layer, expert) for layer, ids in enumerate(chosen) for expert in ids}


def _checked(
    assignment: ExpertAssignment, experts_per_layer: Sequence[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(tune, explore). Raises ConfigError on an expert that the model does not have."""
    for layer, expert in assignment.tune + assignment.explore:
        if not (0 <= layer < len(experts_per_layer) and 0 <= expert < experts_per_layer[layer]):
            raise ConfigError(f"the aggregator assigns expert {expert} of layer {layer}; the model has no such expert")
    return list(assignment.tune), list(assignment.explore)


def _by_layer(pairs: Sequence[tuple[int, int]], experts_per_layer: Sequence[int]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in experts_per_layer]
    for layer, expert in pairs:
        rows[layer].append(expert)
    return rows
