"""Plan which experts are merged into one frozen expert: Flux's adaptive layer-aware merging (arXiv 2508.19078, sec. 4).

    B_non(l)   slots      merge_slots        (1)  B_non(l) = b_l / sum_k b_k * B_non,  b_l = (L - l + 1) / v_l
    alpha_e    importance expert_importance  f_e * a_e, frequency times mean attention received
    clusters              edgefed.moe.merging.clustering, on the embeddings of the experts' weights
    W_merged              MergedGroup.weights  (2)  alpha_e / sum alpha of the cluster

Departures from the paper: v_l includes the sampling variance of f_e; slots are apportioned by largest remainder within
1 <= B_non(l) <= n_non(l) instead of rounded down, so no slot is lost; a cluster whose alphas are all zero is averaged
with equal weights; clusters, slots and weights of the previous round are reused while they nearly fit, so that merged
experts can be cached; other slot sizes and a K-means weighted by alpha are available.

`plan_merging` and what it calls decide on statistics and embeddings only. `ExpertMerger` is the part that reads
weights: it computes the embeddings once per process, because fine-tuning barely changes how similar experts are, and
because groups that stay the same do not need to be merged again. While a device searches for a plan that fits, only
the number of groups matters, so `with_placeholder_groups` assigns experts to groups in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, MergedGroup, Role
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.merging.clustering import cluster_layers, expert_embeddings
from edgefed.moe.units import ExpertSource
from edgefed.progress import ProgressSink

SIZES = ("adaptive", "deviation", "depth", "uniform", "one")
IMPORTANCE = ("attention", "frequency")


@dataclasses.dataclass(frozen=True)
class MergingOptions:
    """Options of merging. Defaults are the paper's choices; "ours" marks an addition."""

    sizes: str = "adaptive"
    """Slots per layer: "adaptive" is (1), "uniform" the same for each layer, "one" one slot per layer. Ours:
    "deviation", b_l = (L - l + 1) / sqrt(v_l), and "depth", b_l = L - l + 1.
    `benchmarks/results/merging.json` compares them."""
    importance: str = "attention"
    """alpha_e: "attention" is f_e * a_e, "frequency" is f_e."""
    weigh_clusters: bool = False
    """Ours: K-means weights each expert by its alpha. In `benchmarks/results/merging.json` this lowers the error in
    some settings and raises it in as many, mostly with importance "attention"."""
    restarts: int = 4
    """Ours: number of K-means starts per layer."""
    keep_weights: float = 0.05
    """Ours: a group with the same members keeps its previous weights unless more than this share of them changed."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("sizes", self.sizes, SIZES), ("importance", self.importance, IMPORTANCE)):
            if value not in known:
                raise ConfigError(f"merging option {name} must be one of {', '.join(known)}; found {value!r}")


def merge_slots(
    profile: ActivationProfile, to_merge: Sequence[int], total_slots: int, sizes: str = "adaptive"
) -> tuple[int, ...]:
    """Return the number of slots for merged experts of each layer: B_non(l), (L,).

    ``to_merge[l]`` is n_non(l), the number of experts of the layer to merge. The result satisfies
    1 <= B_non(l) <= n_non(l), or 0 if n_non(l) is 0, and is otherwise proportional to b_l (see `MergingOptions.sizes`).
    The sum is min(total_slots, sum n_non). With "one" it is the number of layers with experts to merge.

    Raises BudgetTooSmall if there are fewer slots than layers with experts to merge.
    """
    most = np.asarray(to_merge, dtype=np.int64)
    least = np.minimum(most, 1)
    if sizes == "one":
        return tuple(least.tolist())
    if total_slots < least.sum():
        raise BudgetTooSmall(
            f"not enough slots for merged experts: {int(least.sum())} layers need one each, found {total_slots}"
        )
    depth = np.arange(len(most), 0, -1, dtype=np.float64)  # L - l + 1
    spread = np.asarray([_spread(layer) for layer in profile.layers])
    shares = {
        "adaptive": depth / spread,
        "deviation": depth / np.sqrt(spread),
        "depth": depth,
        "uniform": np.ones(len(most)),
    }[sizes]
    return tuple(_apportion(shares, least, most, min(int(total_slots), int(most.sum()))).tolist())


def _spread(layer: LayerProfile) -> float:
    """Return v_l plus the sampling variance of T tokens, the mean of f (1 - f) / T. Never 0."""
    frequency = layer.frequency
    noise = float((frequency * (1 - frequency).clip(0)).mean()) / max(layer.num_tokens, 1)
    return max(float(frequency.var()) + noise, 1e-12)


def _apportion(shares: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Return integers between ``least`` and ``most`` that sum to ``total``, proportional to ``shares`` (> 0).

    The quotas are clip(level * shares, least, most), with the level that gives the sum. They are rounded by largest
    remainder; ties go to the first. O(L log L).
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
    slots: np.ndarray = np.clip(np.floor(quotas + 1e-9), least, most).astype(np.int64)
    for place in np.argsort(-(quotas - slots), kind="stable"):
        if slots.sum() >= total:
            break
        slots[place] += slots[place] < most[place]
    return slots


def expert_importance(layer: LayerProfile, importance: str = "attention") -> np.ndarray:
    """Return alpha (E,) float64: f_e * a_e with a_e = attention_sum / tokens_per_expert, or f_e; 0 if unused.

    Raises ConfigError if ``importance`` is "attention" and the profile has no attention.
    """
    frequency: np.ndarray = layer.frequency
    if importance == "frequency":
        return frequency
    if layer.mean_attention is None:
        raise ConfigError(
            "merging by attention needs a profile with attention, and this profile has none",
            remedy='Record the profile with attention, or merge with the importance "frequency".',
        )
    weighted: np.ndarray = frequency * layer.mean_attention
    return weighted


def plan_merging(
    profile: ActivationProfile,
    plan: ExpertPlan,
    embeddings: Sequence[np.ndarray],
    total_slots: int,
    options: MergingOptions | None = None,
    previous: ExpertPlan | None = None,
) -> ExpertPlan:
    """Return ``plan`` with every absent expert merged into one of ``total_slots`` groups.

    Trainable and frozen experts do not change. Deterministic.

    Args:
        profile: the activation profile of all experts.
        plan: the plan without groups: which experts are trainable or frozen on their own.
        embeddings: (E_l, d_l) per layer, from `edgefed.moe.merging.clustering.expert_embeddings`.
        total_slots: B_non, see `merge_slots`.
        options: how to merge. None: the defaults.
        previous: the plan of the previous round, whose groups are reused where they are nearly as good: slots stay if
            the same experts are to be merged and no layer would change by more than one slot, clusters stay unless
            others cost over 2 % less, and weights stay within ``options.keep_weights``. A slightly changed input then
            mostly gives the same groups, whose weights are already merged.

    Raises:
        BudgetTooSmall: fewer slots than layers with experts to merge.
        ConfigError: profile, plan and embeddings belong to different models, the plan already has groups, or the
            profile has no attention.

    """
    options = options or MergingOptions()
    shape = plan.experts_per_layer
    found = (profile.experts_per_layer, tuple(len(p) for p in embeddings))
    if found != (shape, shape) or (previous is not None and previous.experts_per_layer != shape):
        raise ConfigError(
            f"plan, profile and embeddings must have the same experts per layer; "
            f"found {shape}, {found[0]} and {found[1]}"
        )
    if any(plan.groups(layer) for layer in range(plan.num_layers)):
        raise ConfigError("the plan to extend must not have merged experts yet")
    ids = [np.flatnonzero(roles == Role.ABSENT) for roles in plan.roles]
    slots = merge_slots(profile, [len(i) for i in ids], total_slots, options.sizes)
    if previous is not None:
        slots = _settled(slots, previous, ids)
    alphas = [expert_importance(layer, options.importance) for layer in profile.layers]
    labels = cluster_layers(
        [p[i] for p, i in zip(embeddings, ids, strict=True)],
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
    return ExpertPlan(_merged_roles(plan), tuple(groups))


def merged_group(experts: np.ndarray, alpha: np.ndarray) -> MergedGroup:
    """Return the group of these experts (ascending ids) with weights alpha_e / sum alpha (2), or equal if all are 0."""
    own = alpha[experts]
    weights = own / own.sum() if own.sum() > 0 else np.full(len(own), 1 / len(own))
    return MergedGroup(tuple(int(e) for e in experts), tuple(float(w) for w in weights))


def _settled(slots: tuple[int, ...], previous: ExpertPlan, ids: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Return the previous slots if the same experts are to be merged and no layer would change by more than one."""
    before = tuple(len(previous.groups(layer)) for layer in range(previous.num_layers))
    same = all(
        np.array_equal(own, np.flatnonzero(roles == Role.MERGED))
        for own, roles in zip(ids, previous.roles, strict=True)
    )
    near = all(abs(a - b) <= 1 for a, b in zip(slots, before, strict=True))
    return before if same and near and sum(before) == sum(slots) else slots


def _labels(previous: ExpertPlan, layer: int, experts: np.ndarray) -> np.ndarray:
    """Return the group of each expert in the previous plan, -1 for an expert that was not merged."""
    labels = np.full(previous.experts_per_layer[layer], -1, dtype=np.int64)
    for number, group in enumerate(previous.groups(layer)):
        labels[list(group.experts)] = number
    return np.asarray(labels[experts])


def _moved(before: MergedGroup, after: MergedGroup) -> float:
    """Return the share of the weights that differs: half the sum of the absolute differences."""
    return sum(abs(a - b) for a, b in zip(before.weights, after.weights, strict=True)) / 2


def num_merge_slots(plan: ExpertPlan, resident: int) -> int:
    """Return the slots for merged experts of a device with ``resident`` slots in all.

    0 if some layer would get none, or if no slot is free: tokens of absent experts then go to the next best resident
    experts.
    """
    layers = sum(bool((roles == Role.ABSENT).any()) for roles in plan.roles)
    free = resident - plan.num_resident
    return free if layers and free >= layers else 0


def with_placeholder_groups(plan: ExpertPlan, resident: int, profile: ActivationProfile, sizes: str) -> ExpertPlan:
    """Return ``plan`` with the right number of groups in each layer, filled with experts in order."""
    slots = num_merge_slots(plan, resident)
    if not slots:
        return plan
    ids = [np.flatnonzero(roles == Role.ABSENT) for roles in plan.roles]
    counts = merge_slots(profile, [len(own) for own in ids], slots, sizes)
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
    """Return ``plan`` without merged experts: members of groups become absent."""
    return ExpertPlan(tuple(np.where(roles == Role.MERGED, Role.ABSENT, roles).astype(np.int8) for roles in plan.roles))


class ExpertMerger:
    """Merges the absent experts of plans by similarity.

    ``embeddings`` describes the experts of every layer, (E_l, d_l); None until the first merge computes it.
    """

    def __init__(self, embeddings: tuple[np.ndarray, ...] | None = None) -> None:
        self.embeddings = embeddings

    def merge(
        self,
        plan: ExpertPlan,
        options: MergingOptions,
        profile: ActivationProfile,
        layers: Sequence[ExpertLayer],
        source: ExpertSource,
        previous: ExpertPlan | None,
        progress: ProgressSink,
    ) -> ExpertPlan:
        """Return ``plan`` with its placeholder groups filled by similarity. ``source`` has every expert.

        ``previous`` is the plan of the previous round; its groups are reused where they nearly fit. Raises
        CheckpointError.
        """
        slots = sum(len(plan.groups(layer)) for layer in range(plan.num_layers))
        if not slots:
            return plan
        if self.embeddings is None:
            progress.phase("compare experts", len(layers), "layer")
            self.embeddings = expert_embeddings(layers, source, on_layer=lambda ordinal: progress.advance(1))
            progress.done()
        if previous is not None and not any(previous.groups(layer) for layer in range(previous.num_layers)):
            previous = None
        return plan_merging(profile, without_groups(plan), self.embeddings, slots, options, previous)
