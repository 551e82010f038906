"""A plan whose leftover experts are merged into the slots that are left: what Flux puts on a device.

While a load is looked for, only the number of groups counts: experts are dealt out in order (`with_stand_in_groups`).
The plan that is really applied gets its groups by similarity (`RestMerger.merge`), for which every expert is read once
in the life of the process: what experts are like to each other hardly changes in fine-tuning, and groups that stay
need not be merged again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgefed.agent.progress import ProgressSink
from edgefed.experts import ExpertPlan, MergedGroup, Role, RouterRecord
from edgefed.methods.interface import Method
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.expert_sketch import expert_points
from edgefed.moe.merging import MergingOptions, merge_slots, plan_merging
from edgefed.moe.sources import ExpertSource


def left_over(plan: ExpertPlan, held: int) -> int:
    """Slots for merged experts of a device with ``held`` slots; 0 where a layer would go without, or nothing is left.

    Then tokens of absent experts go to the next best ones that are held.
    """
    layers = sum(bool((roles == Role.ABSENT).any()) for roles in plan.roles)
    free = held - plan.num_resident
    return free if layers and free >= layers else 0


def with_stand_in_groups(plan: ExpertPlan, held: int, record: RouterRecord, sizes: str) -> ExpertPlan:
    """``plan`` with groups of the right number in each layer, whoever is in them."""
    slots = left_over(plan, held)
    if not slots:
        return plan
    ids = [np.flatnonzero(roles == Role.ABSENT) for roles in plan.roles]
    counts = merge_slots(record, [len(own) for own in ids], slots, sizes)
    groups = tuple(
        tuple(_even(members) for members in np.array_split(own, count)) if count else ()
        for own, count in zip(ids, counts, strict=True)
    )
    return ExpertPlan(_merged_roles(plan), groups)


def _even(members: np.ndarray) -> MergedGroup:
    return MergedGroup(tuple(int(e) for e in members), (1 / len(members),) * len(members))


def _merged_roles(plan: ExpertPlan) -> tuple[np.ndarray, ...]:
    return tuple(np.where(roles == Role.ABSENT, Role.MERGED, roles).astype(np.int8) for roles in plan.roles)


def without_groups(plan: ExpertPlan) -> ExpertPlan:
    """``plan`` before anything was merged: members are absent again."""
    return ExpertPlan(tuple(np.where(roles == Role.MERGED, Role.ABSENT, roles).astype(np.int8) for roles in plan.roles))


class RestMerger:
    """Merges what a plan leaves out, by the similarity of the experts. Lives as long as the process."""

    def __init__(self) -> None:
        self._points: tuple[np.ndarray, ...] | None = None

    def merge(
        self,
        plan: ExpertPlan,
        method: Method,
        record: RouterRecord,
        layers: Sequence[ExpertLayer],
        source: ExpertSource,
        previous: ExpertPlan | None,
        progress: ProgressSink,
    ) -> ExpertPlan:
        """``plan`` with as many groups as its stand-ins, filled by similarity. ``source`` has every expert.

        ``previous``: the plan of the round before, whose groups stay where they nearly fit. Raises CheckpointError.
        """
        slots = sum(len(plan.groups(layer)) for layer in range(plan.num_layers))
        if not slots:
            return plan
        if self._points is None:
            progress.phase("compare experts", len(layers), "layer")
            self._points = expert_points(layers, source, on_layer=lambda ordinal: progress.advance(1))
            progress.done()
        options = MergingOptions(sizes=method.merge_sizes, importance=method.merge_weights)
        if previous is not None and not any(previous.groups(layer) for layer in range(previous.num_layers)):
            previous = None
        return plan_merging(record, without_groups(plan), self._points, slots, options, previous)
