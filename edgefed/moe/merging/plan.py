"""Flux's adaptive layer-aware merging (arXiv 2508.19078, section 4): which experts share one frozen expert.

    B_non(l)   slots      merge_slots        (1)  B_non(l) = b_l / sum_k b_k * B_non,  b_l = (L - l + 1) / v_l
    alpha_e    importance expert_importance  f_e * a_e, frequency times mean attention received
    clusters              edgefed.moe.merging.clustering, on the principal components of the experts' weights
    W_merged              MergedGroup.weights  (2)  alpha_e / sum alpha of the cluster

Departs from the paper: v_l plus the variance that f_e has from counting so few tokens; slots by largest remainder
within 1 <= B_non(l) <= n_non(l) instead of floor, so none is lost; a cluster whose alphas are all zero is averaged
evenly; clusters, slots and weights of the round before are kept while they nearly fit, so that merged experts can be
cached; other sizes and a K-means weighted by alpha are offered.

Pure: decides on statistics and points, reads no weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, MergedGroup, Role
from edgefed.methods.interface import Merging
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.merging.clustering import cluster_layers, expert_embeddings
from edgefed.moe.units import ExpertSource
from edgefed.progress import ProgressSink

SIZES = ("adaptive", "deviation", "depth", "uniform", "one")
IMPORTANCE = ("attention", "frequency")


@dataclasses.dataclass(frozen=True)
class MergingOptions:
    """How to merge. The paper's choices, unless it says ours."""

    sizes: str = "adaptive"
    """Slots per layer: "adaptive" (1); ours "deviation", b_l = (L - l + 1) / sqrt(v_l), and "depth", b_l = L - l + 1;
    "uniform" the same for each layer, "one" per layer. `benchmarks/results/merging.json` compares them."""
    importance: str = "attention"
    """alpha_e: "attention" is f_e * a_e, "frequency" is f_e."""
    weigh_clusters: bool = False
    """Ours: K-means counts an expert by its alpha. Measured, it lowers the error in some settings and raises it in as
    many, most with importance "attention": see `benchmarks/results/merging.json`."""
    restarts: int = 4
    """Ours: starts of K-means per layer."""
    keep_weights: float = 0.05
    """Ours: a group with the same members keeps the weights of the round before while no more than this share of
    them has moved."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("sizes", self.sizes, SIZES), ("importance", self.importance, IMPORTANCE)):
            if value not in known:
                raise ConfigError(f"{name} of merging can be {', '.join(known)}; asked for {value!r}")


def merge_slots(
    record: ActivationProfile, to_merge: Sequence[int], total_slots: int, sizes: str = "adaptive"
) -> tuple[int, ...]:
    """Slots for the merged experts of each layer: B_non(l), (L,).

    ``to_merge[l]`` is n_non(l), how many experts of the layer are to be merged. 1 <= B_non(l) <= n_non(l), 0 where
    n_non(l) is 0; within that in proportion to b_l, see `MergingOptions.sizes`. The sum is min(total_slots, sum n_non);
    with "one" it is the number of layers, whatever ``total_slots``.
    Raises BudgetTooSmall where there are fewer slots than layers with experts to merge.
    """
    most = np.asarray(to_merge, dtype=np.int64)
    least = np.minimum(most, 1)
    if sizes == "one":
        return tuple(least.tolist())
    if total_slots < least.sum():
        raise BudgetTooSmall(
            f"{int(least.sum())} layers have experts to merge and need a slot each, there are {total_slots}"
        )
    depth = np.arange(len(most), 0, -1, dtype=np.float64)  # L - l + 1
    spread = np.asarray([_spread(layer) for layer in record.layers])
    shares = {
        "adaptive": depth / spread,
        "deviation": depth / np.sqrt(spread),
        "depth": depth,
        "uniform": np.ones(len(most)),
    }[sizes]
    return tuple(_apportion(shares, least, most, min(int(total_slots), int(most.sum()))).tolist())


def _spread(layer: LayerProfile) -> float:
    """v_l, plus the variance that counting T tokens alone gives: mean of f (1 - f) / T. Never 0."""
    frequency = layer.frequency
    noise = float((frequency * (1 - frequency).clip(0)).mean()) / max(layer.num_tokens, 1)
    return max(float(frequency.var()) + noise, 1e-12)


def _apportion(shares: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers between ``least`` and ``most`` with the sum ``total``, in proportion to ``shares`` (> 0).

    The quotas are clip(level * shares, least, most) with the one level that gives the sum; then largest remainder, ties
    to the first. O(L log L).
    """
    edges = np.sort(np.concatenate([least / shares, most / shares]))
    sums = np.clip(edges[:, None] * shares, least, most).sum(axis=1)  # grows from sum least to sum most
    above = int(np.searchsorted(sums, total))
    if above >= len(edges) or sums[above] == total:
        level = edges[min(above, len(edges) - 1)]
    else:  # between two edges the sum is linear in the level
        low = above - 1
        level = edges[low] + (edges[above] - edges[low]) * (total - sums[low]) / (sums[above] - sums[low])
    quotas = np.clip(level * shares, least, most)
    slots = np.clip(np.floor(quotas + 1e-9), least, most).astype(np.int64)
    for place in np.argsort(-(quotas - slots), kind="stable"):
        if slots.sum() >= total:
            break
        slots[place] += slots[place] < most[place]
    return slots


def expert_importance(layer: LayerProfile, importance: str = "attention") -> np.ndarray:
    """Alpha (E,) float64: f_e * a_e with a_e = attention_sum / tokens_per_expert, or f_e. 0 for an unused expert.

    Raises ConfigError where attention is asked for and the record has none.
    """
    frequency = layer.frequency
    if importance == "frequency":
        return frequency
    if layer.mean_attention is None:
        raise ConfigError(
            "merging by attention needs the attention that tokens receive, which this profile did not record",
            remedy="Profile with attention, or merge with importance = frequency.",
        )
    return frequency * layer.mean_attention


def plan_merging(
    record: ActivationProfile,
    plan: ExpertPlan,
    points: Sequence[np.ndarray],
    total_slots: int,
    options: MergingOptions | None = None,
    previous: ExpertPlan | None = None,
) -> ExpertPlan:
    """``plan`` with every absent expert merged: ``total_slots`` groups in all. Trainable and frozen experts stay.

    Args:
        record: the profile, over all experts.
        plan: who is trainable or frozen as itself; it has no groups.
        points: (E_l, d_l) per layer, near to each other where experts are alike: `edgefed.moe.merging.clustering`.
        total_slots: B_non, see `merge_slots`.
        previous: the plan of the round before. It is returned again, group by group, where that is nearly as good:
            slots that would change by no more than one per layer stay if the same experts are to be merged, clusters
            stay unless others cost over 2 % less, weights stay within ``keep_weights``. So the same input gives the
            same plan, and a slightly changed one mostly the same groups, whose weights need not be merged again
            unless a member's weights were replaced.

    Deterministic. Raises BudgetTooSmall, ConfigError (record, plan and points of different models; no attention).

    """
    options = options or MergingOptions()
    shape = plan.experts_per_layer
    found = (record.experts_per_layer, tuple(len(p) for p in points))
    if found != (shape, shape) or (previous is not None and previous.experts_per_layer != shape):
        raise ConfigError(
            f"the plan is for layers of {shape} experts; record and points are of {found[0]} and {found[1]}"
        )
    if any(plan.groups(layer) for layer in range(plan.num_layers)):
        raise ConfigError("the plan to merge by has merged experts already")
    ids = [np.flatnonzero(roles == Role.ABSENT) for roles in plan.roles]
    slots = merge_slots(record, [len(i) for i in ids], total_slots, options.sizes)
    if previous is not None:
        slots = _settled(slots, previous, ids)
    alphas = [expert_importance(layer, options.importance) for layer in record.layers]
    labels = cluster_layers(
        [p[i] for p, i in zip(points, ids, strict=True)],
        slots,
        weights=[alpha[i] for alpha, i in zip(alphas, ids, strict=True)] if options.weigh_clusters else None,
        previous=None if previous is None else [_labels(previous, layer, i) for layer, i in enumerate(ids)],
        seed=options.seed,
        restarts=options.restarts,
    )
    groups = []
    for layer, (own, label) in enumerate(zip(ids, labels, strict=True)):
        old = {} if previous is None else {group.experts: group for group in previous.groups(layer)}
        found_groups = []
        for cluster in range(slots[layer]):
            group = merged_group(own[label == cluster], alphas[layer])
            before = old.get(group.experts)
            if before is not None and _moved(before, group) <= options.keep_weights:
                group = before
            found_groups.append(group)
        groups.append(tuple(found_groups))
    roles = tuple(np.where(row == Role.ABSENT, Role.MERGED, row).astype(np.int8) for row in plan.roles)
    return ExpertPlan(roles, tuple(groups))


def merged_group(experts: np.ndarray, alpha: np.ndarray) -> MergedGroup:
    """The group of these experts (ascending ids) with weights alpha_e / sum alpha (2); even where all are zero."""
    own = alpha[experts]
    weights = own / own.sum() if own.sum() > 0 else np.full(len(own), 1 / len(own))
    return MergedGroup(tuple(int(e) for e in experts), tuple(float(w) for w in weights))


def _settled(slots: tuple[int, ...], previous: ExpertPlan, ids: Sequence[np.ndarray]) -> tuple[int, ...]:
    """The slots of the round before, where the same experts are to be merged and none would change by more than 1."""
    before = tuple(len(previous.groups(layer)) for layer in range(previous.num_layers))
    same = all(
        np.array_equal(own, np.flatnonzero(roles == Role.MERGED))
        for own, roles in zip(ids, previous.roles, strict=True)
    )
    near = all(abs(a - b) <= 1 for a, b in zip(slots, before, strict=True))
    return before if same and near and sum(before) == sum(slots) else slots


def _labels(previous: ExpertPlan, layer: int, experts: np.ndarray) -> np.ndarray:
    """The group of each expert in the plan of the round before, -1 for one that was not merged."""
    labels = np.full(previous.experts_per_layer[layer], -1, dtype=np.int64)
    for number, group in enumerate(previous.groups(layer)):
        labels[list(group.experts)] = number
    return labels[experts]


def _moved(before: MergedGroup, after: MergedGroup) -> float:
    """Share of the weights that differs: half the sum of the absolute differences."""
    return sum(abs(a - b) for a, b in zip(before.weights, after.weights, strict=True)) / 2


# A plan whose leftover experts are merged into the slots that are left: what Flux puts on a device.
#
# While a load is looked for, only the number of groups counts: experts are dealt out in order (`with_placeholder_groups`).
# The plan that is really applied gets its groups by similarity (`ExpertMerger.merge`), for which every expert is read once
# in the life of the process: what experts are like to each other hardly changes in fine-tuning, and groups that stay
# need not be merged again.


def num_merge_slots(plan: ExpertPlan, held: int) -> int:
    """Slots for merged experts of a device with ``held`` slots; 0 where a layer would go without, or nothing is left.

    Then tokens of absent experts go to the next best ones that are held.
    """
    layers = sum(bool((roles == Role.ABSENT).any()) for roles in plan.roles)
    free = held - plan.num_resident
    return free if layers and free >= layers else 0


def with_placeholder_groups(plan: ExpertPlan, held: int, record: ActivationProfile, sizes: str) -> ExpertPlan:
    """``plan`` with groups of the right number in each layer, whoever is in them."""
    slots = num_merge_slots(plan, held)
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


class ExpertMerger:
    """Merges what a plan leaves out, by the similarity of the experts. Lives as long as the process."""

    def __init__(self) -> None:
        self._points: tuple[np.ndarray, ...] | None = None

    def merge(
        self,
        plan: ExpertPlan,
        merging: Merging,
        record: ActivationProfile,
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
            self._points = expert_embeddings(layers, source, on_layer=lambda ordinal: progress.advance(1))
            progress.done()
        options = MergingOptions(sizes=merging.sizes, importance=merging.weights)
        if previous is not None and not any(previous.groups(layer) for layer in range(previous.num_layers)):
            previous = None
        return plan_merging(record, without_groups(plan), self._points, slots, options, previous)
