"""When a profile has seen enough text: a sequential test of the plan that would be made from it.

Blocks of text are profiled in a random order, in stages. After a stage, with n of N blocks, the test asks how far the
plan of these n is from the plan of all N. The latter is unknown, but it can be seen how a plan moves when blocks are
drawn at random. With s^2 the variance between blocks, the mean of n of N blocks, drawn without replacement, has the
variance s^2 (1/n - 1/N) (Cochran, Sampling Techniques, 1977, section 2.6). So a random part of m of the n blocks is as
far from the n as those are from all N if

    1/m - 1/n = 1/n - 1/N,     m = n N / (2 N - n)

For N much larger than n these are half-samples (McCarthy, 1969). `NUM_PARTS` random parts estimate the agreement of the
two plans, and the error of the activation frequencies. A profile ends when both keep their limits with a margin of one
standard deviation between parts.

A part consists of blocks, or of groups of them where the statistics of each block would be too large: energies of
neurons. A plan of slices agrees with another as far as its neurons add as much to the outputs of the layers
(`slice_agreement`): neurons of the same energy are interchangeable, and most are near the boundary.

The agreement is estimated somewhat too high where many experts are close to the boundary: the gaps between them that
the n blocks show are larger than the real ones. Nothing is assumed of the method: its choice is a function from a
profile to a plan. The test is deterministic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, Role
from edgefed.training.profiling import activation_error

Choice = Callable[[ActivationProfile], ExpertPlan]
"""The plan that would be made from a profile."""

MAX_FREQUENCY_ERROR = 0.08
"""Largest estimated `activation_error` with which a profile ends."""
FIRST_TOKENS, FIRST_BLOCKS = 2048, 8
"""The first stage has at least so many of each: the spread of fewer blocks says little."""
NUM_PARTS = 32
"""Random parts in a test."""
FEWEST_PARTS = 4
"""Fewer say nothing."""
MIN_GROWTH, MAX_GROWTH = 1.25, 2.0
"""Limits of the growth of the text in a stage. Each stage may read all experts again; text beyond need is lost time."""


@dataclasses.dataclass(frozen=True)
class Sufficiency:
    """How much text a profile used, and how close it is to a profile of all of it.

    Attributes:
        num_tokens: Tokens in the profile.
        total_tokens: Tokens that there were.
        agreement: Estimated `plan_agreement` with the plan of all tokens; 1 if all were used.
        frequency_error: Estimated `activation_error` against all tokens; 0 if all were used.
        agreement_spread, error_spread: Standard deviations of the two between parts.
    """

    num_tokens: int
    total_tokens: int
    agreement: float = 1.0
    frequency_error: float = 0.0
    agreement_spread: float = 0.0
    error_spread: float = 0.0

    @property
    def uses_all(self) -> bool:
        """Whether every token was used."""
        return self.num_tokens >= self.total_tokens

    def __str__(self) -> str:
        """For a person."""
        if self.uses_all:
            return f"all {self.total_tokens:,} tokens"
        return (
            f"{self.num_tokens:,} of {self.total_tokens:,} tokens (estimated from these: the plan agrees to "
            f"{100 * self.agreement:.0f} % with that of all tokens, frequencies to {100 * self.frequency_error:.1f} %)"
        )


def plan_agreement(found: ExpertPlan, expected: ExpertPlan) -> float:
    """Share of the trainable and frozen experts of ``expected`` that have the same role in ``found``, 0 to 1.

    Merged experts do not count: they are those that a plan leaves out.
    """
    same = total = 0
    for mine, theirs in zip(found.roles, expected.roles, strict=True):
        counted = (theirs == Role.TRAINABLE) | (theirs == Role.FROZEN)
        same += int((counted & (mine == theirs)).sum())
        total += int(counted.sum())
    return same / total if total else 1.0


def slice_agreement(found: ExpertPlan, expected: ExpertPlan, profile: ActivationProfile) -> float:
    """Amplitude of the neurons of ``found`` relative to that of ``expected``, at most 1.

    The amplitude of neurons is the sum over layers of their share of the layer's sum of square roots of the energies in
    ``profile``: what they add to the layer's output, as `edgefed.methods.slices` ranks it by default.
    """
    mine = theirs = 0.0
    for layer, own, other in zip(profile.layers, found.neurons, expected.neurons, strict=True):
        assert layer.neuron_energy is not None, "slices are planned from the energies of neurons"
        amplitude = np.sqrt(layer.neuron_energy)
        total = max(float(amplitude.sum()), float(np.finfo(np.float64).tiny))
        mine += float(amplitude[own].sum()) / total
        theirs += float(amplitude[other].sum()) / total
    return min(1.0, mine / theirs) if theirs else 1.0


def num_first_blocks(num_blocks: int, block_tokens: int) -> int:
    """Blocks of the first stage, of ``num_blocks`` with ``block_tokens`` tokens each."""
    return min(num_blocks, max(FIRST_BLOCKS, math.ceil(FIRST_TOKENS / block_tokens)))


class SequentialTest:
    """Ends a profile when the plan made from it is stable: an `Enough` for `profile_blocks`.

    Args:
        num_blocks: Blocks of text, N, in random order.
        block_tokens: Tokens in a block.
        choice: The plan that is made from a profile.
        agreement: The limit of the agreement, above 0; from 1 on, all blocks are profiled.
        seed: Of the random parts.
        on_stage: Called with the number of tokens when a stage begins.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        choice: Choice,
        agreement: float,
        seed: int = 0,
        on_stage: Callable[[int], None] = lambda tokens: None,
    ):
        self._num_blocks, self._block_tokens = num_blocks, block_tokens
        self._choice, self._agreement, self._seed = choice, agreement, seed
        self._on_stage = on_stage
        self.result = Sufficiency(0, num_blocks * block_tokens)
        """Of the stages so far."""

    def __call__(self, parts: Sequence[ActivationProfile]) -> int:
        """Blocks to profile next, after these parts of whole blocks each; 0 to end."""
        more = self._more(parts)
        if more:
            self._on_stage(more * self._block_tokens)
        return more

    def _more(self, parts: Sequence[ActivationProfile]) -> int:
        done, total = sum(part.num_tokens for part in parts) // self._block_tokens, self._num_blocks
        if not done:
            return num_first_blocks(total, self._block_tokens) if self._agreement < 1 else total
        self.result = self._estimate(parts, done)
        if done >= total:
            return 0
        result = self.result
        missing = max(
            (1 - result.agreement + result.agreement_spread) / (1 - self._agreement),
            (result.frequency_error + result.error_spread) / MAX_FREQUENCY_ERROR,
        )
        if missing <= 1:
            return 0
        # Both errors fall with the square root of the number of blocks.
        growth = min(MAX_GROWTH, max(MIN_GROWTH, missing**2))
        return min(total, math.ceil(done * growth)) - done

    def _estimate(self, parts: Sequence[ActivationProfile], done: int) -> Sufficiency:
        total = self._num_blocks
        tokens = done * self._block_tokens, total * self._block_tokens
        if done >= total:
            return Sufficiency(*tokens)
        if len(parts) < FEWEST_PARTS:
            return Sufficiency(*tokens, agreement=0.0, frequency_error=1.0)
        rng = np.random.default_rng([self._seed, done])
        size = round(len(parts) * total / (2 * total - done))
        size = max(1, min(size, len(parts) - 1))
        stacked = _Stacked(parts)
        current = stacked.sum_of(np.arange(len(parts)))
        plan = self._choice(current)
        agreements, errors = [], []
        for _ in range(NUM_PARTS):
            part = stacked.sum_of(rng.permutation(len(parts))[:size])
            found = self._choice(part)
            agreements.append(slice_agreement(found, plan, current) if plan.neurons else plan_agreement(found, plan))
            errors.append(activation_error(part, current))
        estimates = (np.mean(agreements), np.mean(errors), np.std(agreements), np.std(errors))
        return Sufficiency(*tokens, *map(float, estimates))


class _Stacked:
    """Profiles of blocks as arrays (n, E) for each layer and statistic, which are added faster than one by one.

    Energies stay apart: another copy of them would be large.
    """

    def __init__(self, blocks: Sequence[ActivationProfile]):
        names = [field.name for field in dataclasses.fields(LayerProfile)]
        self._layers: list[dict[str, Any]] = []
        for layers in zip(*(block.layers for block in blocks), strict=True):
            columns = {name: [getattr(layer, name) for layer in layers] for name in names}
            self._layers.append(
                {
                    name: None if column[0] is None else column if name == "neuron_energy" else np.stack(column)
                    for name, column in columns.items()
                }
            )

    def sum_of(self, rows: npt.NDArray[np.int64]) -> ActivationProfile:
        """The profile of the blocks ``rows`` together."""

        def added(name: str, values: Any) -> Any:
            if values is None:
                return None
            if name == "neuron_energy":
                energy = np.zeros(values[0].shape)
                for row in rows:
                    energy += values[row]
                return energy
            return values[rows].max(axis=0) if name == "gate_max" else values[rows].sum(axis=0)

        return ActivationProfile(
            tuple(
                LayerProfile(**{name: added(name, values) for name, values in layer.items()}) for layer in self._layers
            )
        )
