"""Flux (arXiv 2508.19078): roles by utility, assigned by the aggregator; experts without a role are merged and frozen.

Paper symbol -> our name
    u_c(e)        utility: ExpertSurvey.utility, in the first round the normalised frequency
    B_tune(c)     ExpertSurvey.tune_slots: experts that the device holds unmerged
    B_non(c)      slots of merged experts, `merged_slots`
    x_c^e   (4)   `assign_experts`: the best tune_slots experts by utility
    eps           `exploitation`: share of them that is trained; as many other experts are explored as slots are left
    alpha_e       frequency x mean attention, the weight within a merged expert (`edgefed.moe.merging.plan`)

A device profiles with quantized experts and one round late, and trains the trainable experts. It measures the gradient
norms of trainable experts during training, and estimates those of explored experts by forward passes alone
(`edgefed.training.utility`). It uploads the trainable experts and the utilities.

Departs from the paper
    * (4) is separable by client: the best experts of each are the solution. Every layer trains at least one, except on
      devices that are limited by pace or ``first_share``: these train the most useful experts of the model.
    * The paper's devices compute for most of a round; on home connections they upload. With ``pace="fleet"`` a device
      trains no more experts than it can download and upload in about the time that the others need
      (`edgefed.methods.pace`). Its other slots hold the experts next in utility, which are explored and not
      uploaded. A client whose upload rate is unknown is not limited.
    * (4) does not ensure coverage. With ``coverage="balanced"``, an expert that no client trained for
      ``coverage_rounds`` rounds goes to the client with the largest utility for it, in place of the least useful
      expert of that client.
    * Frequencies and gradient norms have different scales. The utility of an expert that was never measured is its
      frequency times the median, over the measured experts of its layer, of utility per frequency.
    * A device with room for every expert trains all of them with ``pace="own"``. One with less than two slots per layer
      merges nothing; its tokens go to the next best experts that it holds.
    * The default of ``merge_sizes`` is not the paper's; see there.
    * The weight of a client in the mean of an expert is the number of tokens that trained it there. An expert that no
      client trained is unchanged.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
from msgspec import Meta

from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import busiest, check_budget, merge_by_examples, merge_by_tokens, select_by_score
from edgefed.methods.interface import (
    FIRST_ROUND,
    Array,
    Assigning,
    Contribution,
    Coverage,
    DeviceBudget,
    ExpertMethod,
    MergeSizes,
    MergeWeights,
    Merging,
    Profiling,
    RoundContext,
    UnitMerge,
)
from edgefed.methods.options import check_options
from edgefed.methods.pace import own_count, paced_limits
from edgefed.protocol.messages import ExpertAssignment, ExpertReport, ExpertSurvey, UnitInfo

Scores: TypeAlias = Sequence[Array]
Pairs: TypeAlias = list[tuple[int, int]]
"""Experts as (layer, expert)."""


@dataclasses.dataclass(frozen=True)
class Flux(ExpertMethod):
    """Hyper-parameters. The paper gives no values; the defaults are ours."""

    eps_start: Annotated[float, Meta(gt=0, le=1)] = 0.3
    """Share of the selected experts that is trained in the first round."""
    eps_step: Annotated[float, Meta(ge=0)] = 0.05
    """Increase of the trained share per round."""
    eps_max: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Maximum of the trained share."""
    merged_share: Annotated[float, Meta(ge=0, le=1)] = 0.25
    """Slots for merged experts, as a share of all experts of the model; at most half of the device's slots."""
    merge_sizes: MergeSizes = "depth"
    """Slots per layer: "adaptive" is the paper's (L - l + 1) / v_l, "depth" omits the variance v_l of the frequencies,
    "deviation" takes its root, "uniform" gives every layer the same number, "one" gives each a single slot. With few
    slots the variance leaves almost none for the last layers; "depth" had the lowest loss in five of six settings
    (benchmarks/results/merging.json)."""
    merge_weights: MergeWeights = "attention"
    """Weights within a merged expert: frequency x mean attention, or the frequency."""
    align: bool = False
    """Bring the neurons of merged experts into a common order before averaging."""
    stale: bool = True
    """Profile one round late, while other clients train and the aggregator aggregates; False: before each round."""
    probes: Annotated[int, Meta(ge=0)] = 4
    """Random directions per explored expert; each costs two forward passes of one batch. 0: utilities of explored
    experts are not measured."""
    explored: Annotated[int, Meta(ge=0)] = 8
    """Maximum number of experts that a device explores in a round, drawn from those that it holds frozen."""
    coverage: Literal["none", "balanced"] = "none"
    """Whether experts that no client trains are assigned to one."""
    coverage_rounds: Annotated[int, Meta(ge=1)] = 5
    """Rounds without training after which ``coverage="balanced"`` assigns an expert."""
    pace: Literal["own", "fleet"] = "fleet"
    """"own": a device trains what its memory and eps allow. "fleet": at most what it can upload in the fleet's time.
    With probes=0 and pace_factor=0.8 the target of experiments/time_to_accuracy.py is reached in half the time."""
    pace_factor: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Multiplies the fleet's time. Below 1, rounds are shorter and train less, and equal devices are limited too."""
    first_share: Annotated[float, Meta(gt=0, le=1)] = 0.02
    """Maximum share of all experts that a device trains, at least one, before the aggregator knows its upload rate.
    Only with pace "fleet"; 1: no limit."""
    refresh_rounds: Annotated[int, Meta(ge=1)] = 4
    """Maximum age in rounds of an expert that a device does not train; 1: it is downloaded whenever it changed."""

    name = "flux"
    plans_every_round = True

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def profiling(self) -> Profiling:
        """While waiting, or in each round without ``stale``; with attention if merging needs it."""
        return Profiling("while_waiting" if self.stale else "each_round", attention=self.merge_weights == "attention")

    @property
    def merging(self) -> Merging:
        """As the options say."""
        return Merging(self.merge_sizes, self.merge_weights, self.align)

    @property
    def assigning(self) -> Assigning:
        """Utilities of explored experts are measured with ``probes`` directions."""
        return Assigning(self.probes if self.explored else 0, self.explored)

    def exploitation(self, server_round: int) -> float:
        """eps_t = min(eps_max, eps_start + eps_step t), t = 0 in round 1."""
        return min(self.eps_max, self.eps_start + self.eps_step * (server_round - 1))

    def _eps(self, slots: int, total: int, server_round: int) -> float:
        """eps_t; 1 for a device with room for every expert (with pace "own", `plan_experts` handles that case)."""
        return 1.0 if self.pace == "fleet" and slots >= total else self.exploitation(server_round)

    # --- client half ----------------------------------------------------------------------------------------------

    def merged_slots(self, slots: int, experts_per_layer: Sequence[int]) -> int:
        """B_non of a device with ``slots`` slots: 0 if it can hold every expert, or has less than two per layer."""
        layers, total = len(experts_per_layer), sum(experts_per_layer)
        if slots >= total or slots < 2 * layers:
            return 0
        return min(max(layers, round(self.merged_share * total)), slots // 2)

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Trainable and explored (frozen) experts; the others are left out, to be merged. Raises BudgetTooSmall."""
        check_budget(budget.resident_experts, experts_per_layer)
        total, paced = sum(experts_per_layer), self.pace == "fleet"
        if budget.resident_experts >= total and not paced:
            return ExpertPlan.full(experts_per_layer)
        slots = budget.resident_experts - self.merged_slots(budget.resident_experts, experts_per_layer)
        if context.assignment is not None:
            fit = _first_that_fit if paced else _fit_in_proportion
            trainable, explored = fit(context.assignment, experts_per_layer, slots)
        else:
            if profile is None:
                raise ValueError("flux needs a profile")
            shares = [layer.frequency / max(layer.frequency.sum(), 1e-12) for layer in profile.layers]
            limit = max(1, math.floor(self.first_share * total)) if paced else None
            trainable, explored = _split(shares, slots, self._eps(slots, total, context.server_round), rng, limit)
        return ExpertPlan.of(
            experts_per_layer, _by_layer(trainable, experts_per_layer), _by_layer(explored, experts_per_layer)
        )

    def schedule_experts(self, batch: LayerProfile, trainable: Array, limit: int) -> Array:
        """The trainable experts with the most tokens in the batch."""
        return busiest(batch, trainable, limit)

    def expert_importance(self, layer: LayerProfile) -> Array:
        """The frequency; reported only: assignments use the survey."""
        return layer.frequency

    # --- server half ----------------------------------------------------------------------------------------------

    def counts(self, report: ExpertReport, num_experts: int) -> bool:
        """Tokens have trained it: they are its weight."""
        return report.steps > 0 and report.tokens > 0

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Average experts by the tokens that trained them, everything else by examples."""
        merges = merge_by_examples(contributions, [unit for unit in units if unit.kind != "expert"])
        return merges | merge_by_tokens(contributions, units, self.counts)

    def assign_experts(
        self, surveys: Mapping[str, ExpertSurvey], coverage: Coverage, server_round: int, seed: int
    ) -> dict[str, ExpertAssignment]:
        """(4) for each client, split by eps and limited by pace; then coverage."""
        utilities = {client: complete_utilities(survey) for client, survey in surveys.items()}
        eps = {
            client: self._eps(survey.tune_slots, sum(map(len, survey.frequency)), server_round)
            for client, survey in surveys.items()
        }
        limits = paced_limits(surveys, eps, self.pace_factor) if self.pace == "fleet" else {}
        chosen: dict[str, tuple[Pairs, Pairs]] = {}
        for client, survey in surveys.items():
            # The frequencies, unlike the random client id, are the same when a run is repeated.
            rng = np.random.default_rng([seed, server_round, zlib.crc32(repr(survey.frequency).encode())])
            chosen[client] = _split(utilities[client], survey.tune_slots, eps[client], rng, limits.get(client))
        if self.coverage == "balanced":
            self._cover(chosen, utilities, coverage, limits)
        return {
            client: ExpertAssignment(tune=tuple(tune), explore=tuple(explore))
            for client, (tune, explore) in chosen.items()
        }

    def _cover(
        self,
        chosen: Mapping[str, tuple[Pairs, Pairs]],
        utilities: Mapping[str, Scores],
        coverage: Coverage,
        limits: Mapping[str, int],
    ) -> None:
        """Assign each expert that was idle too long to the client with the largest utility for it; changes ``chosen``.

        Every layer keeps a trainable expert, except on clients in ``limits``, where layers without one are allowed.
        """
        trainable = {pair for tune, _ in chosen.values() for pair in tune}
        idle = [
            (-int(rounds[expert]), layer, int(expert))
            for layer, rounds in enumerate(coverage.idle_rounds)
            for expert in np.flatnonzero(rounds >= self.coverage_rounds)
        ]
        assigned: set[tuple[int, int]] = set()
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
                spare = [p for p in tune if p not in assigned and (layers.count(p[0]) > 1 or client in limits)]
                if spare:
                    tune[tune.index(spare[-1])] = (layer, expert)
                    if (layer, expert) in explore:
                        explore[explore.index((layer, expert))] = spare[-1]
                    assigned.add((layer, expert))
                    break


def complete_utilities(survey: ExpertSurvey) -> list[Array]:
    """A utility for every expert, (E_l,) per layer: measured, or estimated from the frequency (see the module).

    A layer without measurements takes the median of all layers. Without any measurement, utilities are frequencies.
    """
    measured = [np.array([np.nan if u is None else u for u in row], dtype=np.float64) for row in survey.utility]
    frequency = [np.asarray(row, dtype=np.float64) for row in survey.frequency]

    def ratios(utility: Array, share: Array) -> Array:
        known = np.isfinite(utility) & (share > 0)
        known_ratios: Array = utility[known] / share[known]
        return known_ratios

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
) -> tuple[Pairs, Pairs]:
    """(trainable, explored), together ``slots``: the best experts for a share ``eps``, the others drawn at random.

    At most ``limit`` are trainable; the less useful of the best then come first among the explored.
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


def _fit_in_proportion(
    assignment: ExpertAssignment, experts_per_layer: Sequence[int], slots: int
) -> tuple[Pairs, Pairs]:
    """The part of an assignment that fits, in its proportions, with a trainable expert in every layer.

    Raises ConfigError for an expert that the model does not have.
    """
    tune, explore = _checked(assignment, experts_per_layer)
    wanted = len(tune) + len(explore)
    count = len(tune) if wanted <= slots else max(len(experts_per_layer), slots * len(tune) // wanted)
    count = min(max(count, len(experts_per_layer)), slots)
    first = _first_of(tune + explore, experts_per_layer, count)
    rest = [pair for pair in dict.fromkeys(tune + explore) if pair not in first]
    return sorted(first), rest[: slots - len(first)]


def _first_that_fit(assignment: ExpertAssignment, experts_per_layer: Sequence[int], slots: int) -> tuple[Pairs, Pairs]:
    """The first experts of an assignment that fit, with one in every layer, each in its assigned role.

    Fewer slots do not reduce the trainable experts as long as they fit: their number depends on the uplink. Raises as
    `_fit_in_proportion` does.
    """
    tune, explore = _checked(assignment, experts_per_layer)
    first = _first_of(tune + explore, experts_per_layer, slots)
    trainable = sorted(first & set(tune)) or sorted(first)[:1]
    return trainable, sorted(first - set(trainable))


def _first_of(pairs: Pairs, experts_per_layer: Sequence[int], count: int) -> set[tuple[int, int]]:
    """The first ``count`` of ``pairs``, with at least one expert in each layer."""
    scores: list[Array] = [np.zeros(size) for size in experts_per_layer]
    for rank, (layer, expert) in enumerate(reversed(pairs), start=1):
        scores[layer][expert] = rank
    chosen = select_by_score(scores, [row > 0 for row in scores], count)
    return {(layer, expert) for layer, ids in enumerate(chosen) for expert in ids}


def _checked(assignment: ExpertAssignment, experts_per_layer: Sequence[int]) -> tuple[Pairs, Pairs]:
    """(trainable, explored) of an assignment. Raises ConfigError for an expert that the model does not have."""
    for layer, expert in assignment.tune + assignment.explore:
        if not (0 <= layer < len(experts_per_layer) and 0 <= expert < experts_per_layer[layer]):
            raise ConfigError(f"invalid assignment: expert {expert} of layer {layer} does not exist in the model")
    return list(assignment.tune), list(assignment.explore)


def _by_layer(pairs: Pairs, experts_per_layer: Sequence[int]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in experts_per_layer]
    for layer, expert in pairs:
        rows[layer].append(expert)
    return rows
