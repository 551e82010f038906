"""Slices: every device keeps the router and, of all experts, the neurons that its text uses most. Ours.

An expert is a sum over its neurons, y = sum_j h_j(x) d_j, so a subset of them is an expert of the same kind that costs
less memory, time and traffic in proportion. Methods that drop whole experts change the routing of every token that the
router sent there; a slice keeps it.

    symbol      here
    S_j         `LayerProfile.neuron_energy`: sum over the device's tokens of (gate weight x h_j)^2 ||d_j||^2
    N           neurons that fit into the device's memory, over all layers
    B           ``block``: widths are multiples of it, as kernels need; halved while an expert has fewer than 12 blocks

Choice: neurons are ranked within their expert by S_j and cut into blocks of B. A block's score is the sum over its
neurons of S_j^p divided by the sum over the layer; the blocks with the best scores are taken until N. p = 1/2
(``allocation="sqrt"``) spreads neurons over experts and layers more evenly than p = 1: energies of different layers are
not comparable, and the errors of dropped neurons add up along the layers. An expert without a block contributes
nothing; routing does not change. With ``exploration`` a share of the neurons is drawn in every round instead of chosen.

Server: each neuron is averaged over the clients that sent it, weighted by the tokens that trained it there; a neuron
that nobody trained stays. Routers and dense tensors are averaged by examples.

Neighbours: HeteroFL (arXiv 2010.01264) gives every client the first channels of each layer, whatever its data; FlexMoE
(2606.27866) and REAP (2510.13999) prune experts once, before training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, Role
from edgefed.methods.averaging import MeanOfHolders, check_budget, merge_by_examples, merge_by_tokens
from edgefed.methods.interface import (
    FIRST_ROUND,
    Array,
    Contribution,
    DeviceBudget,
    Profiling,
    Requirements,
    RoundContext,
    UnitMerge,
)
from edgefed.methods.options import check_options
from edgefed.protocol.messages import ExpertReport, UnitInfo

POWERS = {"sqrt": 0.5, "energy": 1.0}
FEWEST_BLOCKS = 12
"""Blocks of an expert below which they are halved: with 6 blocks of 16 the packaged model at 12 % loses .827 nats, with
12 blocks of 8 .781, with single neurons .757."""


@dataclasses.dataclass(frozen=True)
class Slices(MeanOfHolders):
    """Train a slice of every expert."""

    block: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Widths of slices are multiples of this many neurons; kernels are fastest with multiples of 16."""
    allocation: Literal["sqrt", "energy", "uniform"] = "sqrt"
    """Compare neurons by the square root of their share of the layer's energy, by the share, or give every expert the
    same width."""
    weights: Literal["tokens", "examples"] = "tokens"
    """Average a neuron by the tokens that trained it on each client, or by the client's examples."""

    exploration: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Share of a device's neurons that each round draws anew, in proportion to their scores; it falls linearly to 0 in
    the last round. Costs the download of the neurons that are drawn; 0 keeps the slices of the first round."""

    name = "slices"
    profiling = Profiling(neurons=True)
    requirements = Requirements(neurons=True)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def plans_every_round(self) -> bool:
        """True where neurons are drawn."""
        return self.exploration > 0

    # --- client half ----------------------------------------------------------------------------------------------

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Slices that together have as many neurons as ``budget.resident_experts`` experts. Raises BudgetTooSmall."""
        if profile is None:
            raise ValueError(f"{self.name} needs a profile")
        check_budget(budget.resident_experts, experts_per_layer)
        energies = [self._energy(layer) for layer in profile.layers]
        share = min(1.0, budget.resident_experts / sum(experts_per_layer))
        narrowest = min(energy.shape[1] for energy in energies)
        scores = [self._scores(energy) for energy in energies]
        block, drawn = block_size(self.block, narrowest), self.exploration * (1 - context.progress)
        if drawn > 0:
            chosen = choose_neurons(scores, share * (1 - drawn), block)
            scores = [
                np.where(mask, np.inf, score / rng.exponential(size=score.shape))  # Gumbel-top-k on log scores
                for mask, score in zip(chosen, scores, strict=True)
            ]
        masks = choose_neurons(scores, share, block)
        roles = tuple(np.where(mask.any(axis=1), Role.TRAINABLE, Role.ABSENT).astype(np.int8) for mask in masks)
        return ExpertPlan(roles, neurons=masks)

    def expert_importance(self, layer: LayerProfile) -> Array:
        """The frequency; reported only."""
        return layer.frequency

    def _energy(self, layer: LayerProfile) -> Array:
        if layer.neuron_energy is None:
            raise ValueError(f"{self.name} needs a profile with neuron energies")
        return layer.neuron_energy

    def _scores(self, energy: Array) -> Array:
        """Scores (E, I) that are comparable between the layers."""
        if self.allocation == "uniform":  # the first block of every expert, then the second of every expert, ...
            ranks = np.argsort(np.argsort(-energy, axis=1, kind="stable"), axis=1, kind="stable")
            even: Array = 1.0 / (1.0 + ranks)
            return even
        scores: Array = energy ** POWERS[self.allocation]
        total = max(float(scores.sum()), float(np.finfo(np.float64).tiny))
        return np.asarray(scores / total)

    # --- server half ----------------------------------------------------------------------------------------------

    def counts(self, report: ExpertReport, num_experts: int) -> bool:
        """With weights by tokens: some have trained it."""
        return self.weights == "examples" or (report.steps > 0 and report.tokens > 0)

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Experts by the tokens that trained them on each client, everything else by examples."""
        if self.weights == "examples":
            return merge_by_examples(contributions, units)
        merges = merge_by_examples(contributions, [unit for unit in units if unit.kind != "expert"])
        return merges | merge_by_tokens(contributions, units, self.counts)


def block_size(block: int, num_neurons: int) -> int:
    """``block``, halved until an expert of ``num_neurons`` has `FEWEST_BLOCKS`."""
    while block > 1 and num_neurons < FEWEST_BLOCKS * block:
        block //= 2
    return block


def choose_neurons(scores: Sequence[Array], share: float, block: int) -> tuple[np.ndarray, ...]:
    """The best blocks of neurons of all layers, at least one in each layer.

    Args:
        scores: (E_l, I_l) per layer, at least 0.
        share: share (0, 1] of all neurons to choose, rounded down to whole blocks.
        block: neurons of a block; the last block of an expert may be smaller.

    Returns:
        bool (E_l, I_l) per layer. Ties go to the lower layer, then the lower expert, then the lower neuron.
    """
    orders = [np.argsort(-layer, axis=1, kind="stable") for layer in scores]
    found = []  # (score of the block, layer, expert, block, neurons) of every block
    for number, (layer, order) in enumerate(zip(scores, orders, strict=True)):
        num_experts, width = layer.shape
        starts = np.arange(0, width, block)
        ranked = np.take_along_axis(layer, order, axis=1)
        sums = np.add.reduceat(ranked, starts, axis=1)  # (E, blocks), descending but for a short last block
        sizes = np.diff(np.append(starts, width))
        means = sums / sizes
        means[np.unravel_index(np.argmax(means), means.shape)] = np.inf  # a layer without a neuron passes no gradient
        expert, at = np.indices(means.shape)
        columns = (-means, np.full_like(at, number), expert, at, np.broadcast_to(sizes, at.shape))
        found.append(np.stack([column.astype(np.float64).ravel() for column in columns]))
    blocks = np.concatenate(found, axis=1)
    blocks = blocks[:, np.lexsort(blocks[3::-1])]
    budget = np.floor(share * sum(layer.size for layer in scores) + 1e-6)
    fits = np.cumsum(blocks[4]) <= budget
    fits |= np.isinf(blocks[0])
    masks = tuple(np.zeros(layer.shape, dtype=np.bool_) for layer in scores)
    for number, expert, at in blocks[1:4, fits].T.astype(np.int64):
        masks[number][expert, orders[number][expert, at * block : (at + 1) * block]] = True
    return masks
