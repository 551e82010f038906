"""Plans of merged experts: members, number of slots and weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, MergedGroup, Role
from edgefed.moe.merging.plan import SIZES, MergingOptions, expert_importance, merge_slots, merged_group, plan_merging


def layer_record(counts, tokens=100, attention=None):
    counts = np.asarray(counts, dtype=np.float64)
    zero = np.zeros_like(counts)
    return LayerProfile(
        num_tokens=tokens,
        tokens_per_expert=counts,
        gate_sum=zero,
        gate_max=zero,
        gate_log_sum=zero,
        gate_complement_log_sum=zero,
        routed_gate_sum=zero,
        attention_sum=None if attention is None else np.asarray(attention, dtype=np.float64),
    )


def random_record(sizes, seed=0, tokens=400):
    rng = np.random.default_rng(seed)
    layers = []
    for size in sizes:
        counts = rng.multinomial(2 * tokens, rng.dirichlet(np.ones(size)))
        layers.append(layer_record(counts, tokens, counts * rng.uniform(0.5, 1.5, size)))
    return ActivationProfile(tuple(layers))


def random_points(sizes, dimensions=6, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((size, dimensions)) for size in sizes)


def members(plan):
    return [[group.experts for group in plan.groups(layer)] for layer in range(plan.num_layers)]


# --- slots ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.data()), min_size=1, max_size=6),
    st.integers(0, 80),
    st.sampled_from([sizes for sizes in SIZES if sizes != "one"]),
)
def test_slots_are_exact_and_within_their_bounds(layers, total, sizes):
    records = [layer_record(data.draw(st.lists(st.integers(0, 100), min_size=n, max_size=n))) for n, data in layers]
    to_merge = [data.draw(st.integers(0, n)) for n, data in layers]
    record = ActivationProfile(tuple(records))
    needed = sum(n > 0 for n in to_merge)
    if total < needed:
        with pytest.raises(BudgetTooSmall, match=str(needed)):
            merge_slots(record, to_merge, total, sizes)
        return
    slots = merge_slots(record, to_merge, total, sizes)
    assert sum(slots) == min(total, sum(to_merge))
    assert all(min(n, 1) <= slot <= n for slot, n in zip(slots, to_merge, strict=True))


def test_slots_follow_depth_and_variance():
    """Two layers of equal variance share 3 : 3 - 1 by depth; v and 2 v by 1 / v. Many tokens: no sampling noise."""
    same = [20, 40, 60, 80] * 3
    equal = ActivationProfile((layer_record(same, 10**9), layer_record(same, 10**9)))
    assert merge_slots(equal, [12, 12], 12) == (8, 4)
    wide = [50 + 2**0.5 * (n - 50) for n in same]
    tokens = 10**4
    unequal = ActivationProfile((layer_record(wide, tokens), layer_record(same, tokens), layer_record(same, tokens)))
    noise = np.mean([(n / tokens) * (1 - n / tokens) for n in same]) / tokens
    low, high = np.var(np.asarray(same) / tokens) + noise, np.var(np.asarray(wide) / tokens) + noise
    quotas = np.array([3 / high, 2 / low, 1 / low])
    quotas *= 18 / quotas.sum()
    assert np.abs(np.asarray(merge_slots(unequal, [12, 12, 12], 18)) - quotas).max() < 1


def test_equal_router_frequencies_cause_no_division_by_zero():
    flat, uneven = layer_record([50, 50, 50, 50]), layer_record([5, 5, 90, 100])
    assert merge_slots(ActivationProfile((uneven, flat)), [4, 4], 5) == (1, 4)
    unused = layer_record([0, 0, 0, 0], tokens=0)
    assert merge_slots(ActivationProfile((unused, unused)), [4, 4], 6) == (4, 2)


def test_one_slot_per_layer_and_layers_without_any():
    record = random_record([4, 4, 4])
    assert merge_slots(record, [3, 0, 1], 2, "one") == (1, 0, 1)
    assert merge_slots(record, [0, 0, 0], 0) == (0, 0, 0)
    assert merge_slots(record, [4, 4, 4], 6, "uniform") == (2, 2, 2)
    assert merge_slots(record, [4, 4, 4], 6, "depth") == (3, 2, 1)


def test_deviation_is_less_extreme_than_variance():
    """Four times the variance, at equal depth of b: a quarter of the slots, or half of them."""
    narrow, wide = [40, 48, 52, 60] * 6, [30, 46, 54, 70] * 6
    millions = [
        [10**6 * count for count in layer] for layer in (narrow, wide)
    ]  # sampling noise is negligible compared with v
    record = ActivationProfile(tuple(layer_record(counts, 10**9) for counts in millions))
    assert np.var(wide) == 4 * np.var(narrow)
    assert merge_slots(record, [24, 24], 18) == (16, 2)  # 2 : 1/4
    assert merge_slots(record, [24, 24], 20, "deviation") == (16, 4)  # 2 : 1/2


# --- importance ----------------------------------------------------------------------------------------------------


def test_importance_is_frequency_times_mean_attention():
    layer = layer_record([10, 0, 30], tokens=100, attention=[20, 0, 15])
    np.testing.assert_allclose(expert_importance(layer), [0.1 * 2, 0, 0.3 * 0.5])
    np.testing.assert_allclose(expert_importance(layer, "frequency"), [0.1, 0, 0.3])


def test_attention_that_was_not_recorded_is_refused():
    with pytest.raises(ConfigError, match="needs a profile with attention"):
        expert_importance(layer_record([1, 2]))
    with pytest.raises(ConfigError, match="found 'gate'"):
        MergingOptions(importance="gate")


def test_weights_of_a_group():
    alpha = np.array([0.0, 0.3, 0.0, 0.1])
    assert merged_group(np.array([1, 3]), alpha) == MergedGroup((1, 3), (0.3 / 0.4, 0.1 / 0.4))
    assert merged_group(np.array([0, 2]), alpha).weights == (0.5, 0.5)


# --- plans ---------------------------------------------------------------------------------------------------------


def test_every_absent_expert_is_merged_and_the_others_stay():
    sizes = (6, 3, 8)
    record = random_record(sizes)
    plan = ExpertPlan.of(sizes, trainable=[[1], [0, 1, 2], []], frozen=[[4], [], [7]])
    merged = plan_merging(record, plan, random_points(sizes), 5)
    assert [len(merged.groups(layer)) for layer in range(3)][1] == 0
    assert sum(len(merged.groups(layer)) for layer in range(3)) == 5
    for layer in range(3):
        for role in (Role.TRAINABLE, Role.FROZEN):
            np.testing.assert_array_equal(merged.roles[layer] == role, plan.roles[layer] == role)
        assert not (merged.roles[layer] == Role.ABSENT).any()
    assert merged.num_resident == 4 + 2 + 5
    for group in merged.groups(0):
        alpha = expert_importance(record.layers[0])[list(group.experts)]
        np.testing.assert_allclose(group.weights, alpha / alpha.sum())


def test_similar_experts_are_grouped_whatever_their_number():
    sizes = (9, 4)
    centres = np.eye(3) * 10
    rng = np.random.default_rng(0)
    kinds = [np.array([0, 1, 2, 0, 1, 2, 0, 1, 2]), np.array([0, 0, 1, 1])]
    points = tuple(centres[kind] + 0.1 * rng.standard_normal((len(kind), 3)) for kind in kinds)
    record = random_record(sizes)
    merged = plan_merging(record, ExpertPlan.of(sizes, [[], []]), points, 5, MergingOptions(sizes="adaptive"))
    slots = [len(merged.groups(0)), len(merged.groups(1))]
    assert sum(slots) == 5
    even = plan_merging(record, ExpertPlan.of(sizes, [[], []]), points, 5, MergingOptions(sizes="uniform"))
    assert [len(even.groups(0)), len(even.groups(1))] == [3, 2]
    assert members(even) == [[(0, 3, 6), (1, 4, 7), (2, 5, 8)], [(0, 1), (2, 3)]]


def test_unused_experts_have_equal_weights():
    record = ActivationProfile((layer_record([0, 0, 50, 0], attention=[0, 0, 9, 0]),))
    points = (np.array([[0.0], [0.1], [5.0], [0.2]]),)
    merged = plan_merging(record, ExpertPlan.of((4,), [[]]), points, 2)
    assert members(merged) == [[(0, 1, 3), (2,)]]
    assert merged.groups(0)[0].weights == pytest.approx((1 / 3,) * 3)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_input_gives_the_same_plan_again(weighted):
    sizes = (12, 7, 12)
    options = MergingOptions(weigh_clusters=weighted)
    record, points, plan = random_record(sizes), random_points(sizes), ExpertPlan.of(sizes, [[3], [], [5, 6]])
    first = plan_merging(record, plan, points, 9, options)
    assert plan_merging(record, plan, points, 9, options) == first
    assert plan_merging(record, plan, points, 9, options, previous=first) == first


def test_a_slightly_different_profile_preserves_clusters_and_weights():
    """Merged experts of the previous round can be reused."""
    sizes = (16, 16)
    record, points, plan = random_record(sizes, tokens=4000), random_points(sizes), ExpertPlan.of(sizes, [[], []])
    first = plan_merging(record, plan, points, 10)
    nearly = ActivationProfile(
        tuple(
            dataclasses.replace(
                layer,
                tokens_per_expert=layer.tokens_per_expert * (1 + 0.01 * np.cos(np.arange(16))),
                attention_sum=layer.attention_sum * (1 + 0.01 * np.sin(np.arange(16))),
            )
            for layer in record.layers
        )
    )
    assert plan_merging(nearly, plan, points, 10, previous=first) == first
    other = random_record(sizes, seed=9, tokens=4000)
    changed = plan_merging(other, plan, points, 10, previous=first)
    assert changed != first
    assert sum(len(changed.groups(layer)) for layer in range(2)) == 10


def test_a_new_choice_of_trainable_experts_starts_from_the_previous_clusters():
    sizes = (16,)
    rng = np.random.default_rng(3)
    points = (np.repeat(rng.standard_normal((5, 4)) * 8, [4, 3, 3, 3, 3], axis=0) + 0.1 * rng.standard_normal((16, 4)),)
    record = random_record(sizes)
    first = plan_merging(record, ExpertPlan.of(sizes, [[0]]), points, 5)
    second = plan_merging(record, ExpertPlan.of(sizes, [[1]]), points, 5, previous=first)
    unchanged = {group for group in first.groups(0)} & {group for group in second.groups(0)}
    assert len(unchanged) == 4  # only the group that lost one expert and gained another is new


def test_inputs_that_do_not_match_are_refused():
    record, points = random_record((4, 4)), random_points((4, 4))
    with pytest.raises(ConfigError, match=r"\(4, 5\)"):
        plan_merging(record, ExpertPlan.of((4, 5), [[], []]), points, 2)
    merged = plan_merging(record, ExpertPlan.of((4, 4), [[], []]), points, 2)
    with pytest.raises(ConfigError, match="must not have merged experts"):
        plan_merging(record, merged, points, 2)
    with pytest.raises(BudgetTooSmall, match="2 layers"):
        plan_merging(record, ExpertPlan.of((4, 4), [[], []]), points, 1)
