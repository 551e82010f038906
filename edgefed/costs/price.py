"""What a step plan is expected to cost in loss, and the plan of least expected loss in a given memory. Arithmetic only.

The price of a plan is in nats per token above a device that holds every expert in full precision and trains them all:

    price = F q^P                        left out: experts, or neurons of experts
          + S f                          quantized: frozen experts in INT8 or NF4
          + G (1 - g^A)                  untrained: what training fewer experts gains less
          + G k log2(R / r)              rank: adapters of rank r instead of R
          + G h log2(L / l)              context: sequences of l instead of L tokens

    q   mean over layers of the share of routed tokens whose expert is not resident; with slices, of the square roots of
        the layer's energy whose neurons are not
    f   the same share for frozen experts; with adapters for all resident ones
    g   the same share for trainable ones
    m   1 for training in full, `ADAPTERS` for adapters

q, f and g are of the device's activation profile; without one, all experts are taken to be used equally. The constants
are from the packaged model (`benchmarks/bench_plan_price.py`): a model that is trained for longer, or whose experts are
more alike, has others, but the order of plans depends on their ratios alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefed.costs.step_setup import StepSetup
from edgefed.expert_records import ActivationProfile, ExpertPlan, Role

EXPERTS_LEFT_OUT = (3.06, 1.74)
"""(F, P) for whole experts."""
NEURONS_LEFT_OUT = (1.83, 2.27)
"""(F, P) for slices."""
QUANTIZED = {"int8": 0.0, "nf4": 0.008}
"""S by storage; INT8 changed the loss by less than 0.001."""
GAIN = 0.24
"""G: what 30 steps with every expert gain."""
TRAINED_POWER = 0.41
"""A."""
ADAPTERS = 0.76
"""Share of that gain with adapters of all experts."""
RANK_HALVING = 0.077
"""k: share of G that each halving of the rank of adapters costs (`benchmarks/results/plan_price_rank.json`)."""
HALVING = 0.26
"""h: share of G that each halving of the sequences costs."""

GRID = 2**0.25
"""Ratio of the numbers of experts that a search tries before it looks closer."""
COARSE = 4
"""Of these numbers, it tries each fourth, then all around the best, and at last `CLOSER` between its neighbours."""
CLOSER = 8

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class LossPrice:
    """Expected loss of plans for one device.

    Attributes:
        mass: (E,) per layer, share of the layer's routed tokens that each expert serves.
        sequence_length: L, tokens of a block as the run asks for.
        neurons: (E, I) per layer, share of the layer's root energy of each neuron; () without a profile that has them.
        slices: The method's plans have slices. Before there is a profile, plans of whole experts stand for them.
        lora_rank: R, rank of adapters as the run asks for; 0: any rank costs nothing.
    """

    mass: tuple[Array, ...]
    sequence_length: int
    neurons: tuple[Array, ...] = ()
    slices: bool = False
    lora_rank: int = 0

    @classmethod
    def of(
        cls,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        sequence_length: int,
        slices: bool = False,
        lora_rank: int = 0,
    ) -> LossPrice:
        """From the profile of a device; without one, every expert is used equally."""
        if profile is None:
            even = tuple(np.full(count, 1 / count) for count in experts_per_layer)
            return cls(even, sequence_length, slices=slices, lora_rank=lora_rank)
        mass = tuple(_shares(layer.tokens_per_expert) for layer in profile.layers)
        energies = [layer.neuron_energy for layer in profile.layers]
        neurons = tuple(_shares(np.sqrt(energy)) for energy in energies if energy is not None)
        return cls(mass, sequence_length, neurons if len(neurons) == len(mass) else (), slices, lora_rank)

    def parts(self, setup: StepSetup, plan: ExpertPlan) -> dict[str, float]:
        """The price in parts: "left out", "quantized", "untrained", "rank", "context"; nats per token."""
        resident, trainable = self._shares_of(plan)
        factor, power = NEURONS_LEFT_OUT if plan.neurons or self.slices else EXPERTS_LEFT_OUT
        stored = resident if setup.experts == "lora" else resident - trainable
        most = {"full": 1.0, "lora": ADAPTERS, "none": 1.0}[setup.experts]
        trained = min(1.0, trainable) ** TRAINED_POWER if setup.experts != "none" else 1.0
        return {
            "left out": factor * max(0.0, 1 - resident) ** power,
            "quantized": QUANTIZED.get(setup.expert_storage or "", 0.0) * max(0.0, stored),
            "untrained": GAIN * (1 - most * trained),
            "rank": GAIN * RANK_HALVING * math.log2(max(1.0, self.lora_rank / setup.lora_rank)),
            "context": GAIN * HALVING * math.log2(max(1.0, self.sequence_length / setup.sequence_length)),
        }

    def __call__(self, setup: StepSetup, plan: ExpertPlan) -> float:
        """The price in nats per token, at least 0."""
        return sum(self.parts(setup, plan).values())

    def describe(self, setup: StepSetup, plan: ExpertPlan) -> str:
        """In words: ``least expected loss in this memory, 0.31 nats above a full plan (0.30 untrained, 0.01 ...)``."""
        parts = sorted(self.parts(setup, plan).items(), key=lambda part: -part[1])
        named = ", ".join(f"{value:.2f} {name}" for name, value in parts if value >= 0.005)
        words = f"least expected loss in this memory, {self(setup, plan):.2f} nats above a full plan"
        return words + (f" ({named})" if named else "")

    def _shares_of(self, plan: ExpertPlan) -> tuple[float, float]:
        """(resident, trainable) share of what the model computes, mean over layers. Merged experts count as absent."""
        resident, trainable = 0.0, 0.0
        for layer, roles in enumerate(plan.roles):
            weights = self.mass[layer]
            if plan.neurons:
                mask = plan.neurons[layer]
                weights = (self.neurons[layer] * mask).sum(axis=1) if self.neurons else weights * mask.mean(axis=1)
            trains = float(weights[roles == Role.TRAINABLE].sum())
            resident += trains + float(weights[roles == Role.FROZEN].sum())
            trainable += trains
        return resident / plan.num_layers, trainable / plan.num_layers


def _shares(values: Array) -> Array:
    total = float(values.sum())
    return np.asarray(values / total) if total > 0 else np.full(values.shape, 1 / values.size)


def possible_storages(setup: StepSetup, problems: Collection[str]) -> list[str | None]:
    """``setup``'s storage of frozen experts, and those that take less. ``problems``: of `FallbackSearch`."""
    if setup.expert_storage is not None or "nf4_experts" in problems:
        return [setup.expert_storage]
    return [None, "nf4"] if "int8_experts" in problems else [None, "int8", "nf4"]


def lossy_setups(setup: StepSetup, shortest: int, problems: Collection[str]) -> Iterator[StepSetup]:
    """Yield ``setup`` with every storage of frozen experts and every length of sequences, the least change first.

    ``shortest``: fewest tokens of a sequence. ``problems``: of `FallbackSearch`.
    """
    storages = possible_storages(setup, problems)
    length = setup.sequence_length
    while length == setup.sequence_length or length >= shortest:
        for storage in storages:
            yield dataclasses.replace(setup, expert_storage=storage, sequence_length=length)
        length //= 2


Fits = Callable[[int, int], bool]
Price = Callable[[int, int], float]


def cheapest_counts(
    fits: Fits, price: Price, least: int, resident: int, trainable: int, limit: float = math.inf
) -> tuple[float, int, int] | None:
    """(price, resident, trainable): the numbers of experts of least price that fit; None if none is at most ``limit``.

    Args:
        fits: ``fits(resident, trainable)``; a plan with fewer of either fits where one with more does.
        price: Its price, which falls with the trainable ones.
        least: Fewest resident and trainable experts.
        resident: Most resident experts.
        trainable: Most trainable experts.
        limit: Highest price of interest.
    """
    grid = _grid(least, resident)
    best: tuple[float, int, int] | None = None

    def consider(counts: Sequence[int], options: Sequence[int]) -> None:
        """Try each of ``counts`` resident experts with the most trainable ones among ``options``."""
        nonlocal best
        for count in counts:
            at_most = limit if best is None else min(limit, best[0])
            top = min(count, trainable)
            fewer = [value for value in options if value < top]
            if price(count, top) > at_most or not fits(count, fewer[0] if fewer else top):
                continue
            trains = _last([*fewer, top], functools.partial(fits, count))
            found = price(count, trains), count, trains
            if found[0] <= at_most and (best is None or found < best):
                best = found

    if not fits(least, least):
        return None
    widest = _last(range(least, resident + 1), lambda count: fits(count, least))
    grid = sorted({*(count for count in grid if count < widest), widest})
    consider(sorted({*grid[::-COARSE], least}, reverse=True), grid)
    if best is None:
        return None
    at = grid.index(best[1])
    consider(grid[max(0, at - COARSE + 1) : at + COARSE], grid)
    at, trains = grid.index(best[1]), best[2]
    low, high = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
    closer = range(max(least, math.floor(trains / GRID**2)), math.ceil(trains * GRID**2) + 1)
    consider(range(low, high + 1, max(1, (high - low) // CLOSER)), closer)
    _, count, trains = best
    count = _last(range(count, high + 1), lambda value: fits(value, trains))
    return price(count, trains), count, trains


def _grid(low: int, high: int) -> list[int]:
    """Numbers from ``low`` to ``high`` in about equal ratios, ascending."""
    found, value = {low, high}, float(high)
    while value > low:
        found.add(max(low, round(value)))
        value /= GRID
    return sorted(found)


def _last(values: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of ``values`` that fits; the first one does, and none after one that does not."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(values[middle]) else (low, middle - 1)
    return values[low]
