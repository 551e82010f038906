"""Which experts a plan has, for so many resident and so many trainable ones. Pure: no model, no device."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, Role
from edgefed.methods.interface import DeviceBudget, ExpertMethod, RoundContext
from edgefed.moe.merging.plan import with_placeholder_groups

Layout = Callable[[int, int], ExpertPlan]
"""``layout(resident, trainable)`` is the plan with these totals over all layers."""


def even_layout(experts_per_layer: Sequence[int]) -> Layout:
    """The same share of each layer: for estimates before anything is known of the experts."""
    sizes = tuple(experts_per_layer)

    def counts(total: int) -> list[int]:
        share = total / sum(sizes)
        found = [max(1, math.floor(share * size)) for size in sizes]
        for layer, size in enumerate(sizes):
            if sum(found) < total and found[layer] < size:
                found[layer] += 1
        return found

    def layout(resident: int, trainable: int) -> ExpertPlan:
        last, first = counts(resident), counts(trainable)
        frozen = [range(low, high) for low, high in zip(first, last, strict=True)]
        return ExpertPlan.of(sizes, [range(count) for count in first], frozen)

    return layout


def method_layout(
    method: ExpertMethod,
    profile: ActivationProfile | None,
    experts_per_layer: Sequence[int],
    context: RoundContext,
    *,
    compute_share: float = 1.0,
    seed: int = 0,
    identity: str = "",
) -> Layout:
    """The choice of ``method`` in the round of ``context``.

    Every call draws from the same random numbers, so the experts of a smaller plan are a subset of a larger one's.
    ``seed`` is the run's, ``identity`` names the device and its data.
    """
    drawn_in = context.server_round if method.plans_every_round else 0

    @functools.lru_cache(maxsize=64)
    def choose(count: int) -> ExpertPlan:
        rng = np.random.default_rng([seed, drawn_in, zlib.crc32(identity.encode())])
        plan = method.plan_experts(profile, experts_per_layer, DeviceBudget(count, compute_share), rng, context)
        if not method.merging:
            return plan
        assert profile is not None, "a method that merges experts makes a profile"
        return with_placeholder_groups(plan, count, profile, method.merging.sizes)

    def layout(resident: int, trainable: int) -> ExpertPlan:
        if trainable < resident:
            return freeze_others(choose(resident), choose(trainable))
        return choose(resident)

    return layout


def freeze_others(plan: ExpertPlan, trainable: ExpertPlan) -> ExpertPlan:
    """``plan`` in which only the trainable experts of ``trainable`` stay so, at least one per layer.

    With slices, those experts stay trainable of which the narrower plan has most, as many neurons as it has.
    """
    if plan.neurons:
        trainable = _widest_slices(plan, trainable)
    roles = []
    for mine, theirs in zip(plan.roles, trainable.roles, strict=True):
        both = (mine == Role.TRAINABLE) & (theirs == Role.TRAINABLE)
        if not both.any():
            both[np.flatnonzero(mine == Role.TRAINABLE)[:1]] = True
        roles.append(np.where((mine == Role.TRAINABLE) & ~both, Role.FROZEN, mine).astype(np.int8))
    return ExpertPlan(tuple(roles), plan.merged, plan.neurons)


def paced(plan: ExpertPlan, layout: Layout, limit: int | None) -> ExpertPlan:
    """``plan`` with at most ``limit`` trainable experts, at least one per layer: those of the layout of that size."""
    if limit is None or limit >= trainable_worth(plan):
        return plan
    limit = max(limit, plan.num_layers)
    return freeze_others(plan, layout(limit, limit))


def trainable_worth(plan: ExpertPlan) -> int:
    """Trainable experts; those of a sliced plan count by their neurons, rounded, as at least one per layer."""
    if not plan.neurons:
        return plan.num_trainable
    wide = sum(int(mask[row == Role.TRAINABLE].sum()) for row, mask in zip(plan.roles, plan.neurons, strict=True))
    share = wide / sum(mask.size for mask in plan.neurons)
    return max(plan.num_layers, round(share * sum(plan.experts_per_layer)))


def _widest_slices(plan: ExpertPlan, narrow: ExpertPlan) -> ExpertPlan:
    """``plan`` without the neurons of the experts that are not to train."""
    widths = [mask.sum(axis=1) for mask in plan.neurons]
    ranking = sorted(
        (-int(mask[expert].sum()) / int(widths[layer][expert]), layer, expert)
        for layer, mask in enumerate(narrow.neurons)
        for expert in np.flatnonzero(widths[layer]).tolist()
    )
    left = sum(int(mask.sum()) for mask in narrow.neurons)
    roles = [np.zeros_like(row) for row in plan.roles]
    for _, layer, expert in ranking:
        width = int(widths[layer][expert])
        if width <= left or not roles[layer].any():
            roles[layer][expert] = Role.TRAINABLE
            left -= width
    neurons = tuple(mask & (row == Role.TRAINABLE)[:, None] for mask, row in zip(plan.neurons, roles, strict=True))
    return ExpertPlan(tuple(roles), neurons=neurons)
