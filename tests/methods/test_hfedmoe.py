"""HFedMoE against numbers worked out by hand, with 2-3 clients and 2 experts."""

import itertools
import math

import numpy as np
import pytest

from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.expert_records import ActivationProfile, LayerProfile
from edgefed.methods.fedavg import FedAvg
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import Contribution, DeviceBudget, RoundContext
from edgefed.protocol.messages import ExpertReport, TensorInfo, UnitInfo

RNG = np.random.default_rng(0)


def record_of(gates: list[list[float]], top_k: int = 1) -> LayerProfile:
    """Return the profile of a layer from the gate probabilities of each token, by a slow, plain computation."""
    table = np.array(gates, dtype=np.float64)
    chosen = np.argsort(-table, axis=1, kind="stable")[:, :top_k]
    routed = np.zeros_like(table)
    np.put_along_axis(routed, chosen, np.take_along_axis(table, chosen, 1), 1)
    log_table = [[g * math.log(g) if g else 0.0 for g in row] for row in gates]
    complement = [[(1 - g) * math.log(1 - g) if g < 1 else 0.0 for g in row] for row in gates]
    return LayerProfile(
        num_tokens=len(gates),
        tokens_per_expert=(routed > 0).sum(0).astype(np.float64),
        gate_sum=table.sum(0),
        gate_max=table.max(0),
        gate_log_sum=np.sum(log_table, axis=0),
        gate_complement_log_sum=np.sum(complement, axis=0),
        routed_gate_sum=routed.sum(0),
    )


def unit(key: str, kind: str, layer: int = -1, expert: int = -1) -> UnitInfo:
    tensors = (TensorInfo(name="value", dtype="F32", shape=(2,)),)
    return UnitInfo(
        key=key, kind=kind, layer=layer, expert=expert, trainable=True, sha256="", size_bytes=8, tensors=tensors
    )


UNITS = (unit("e0", "expert", 0, 0), unit("e1", "expert", 0, 1), unit("router", "router", 0), unit("dense", "dense"))


def contribution(
    client: str, examples: int, usage: dict[int, float], *, importance: float = 0.5, steps: int = 1, units=None
) -> Contribution:
    reports = {
        (0, e): ExpertReport(layer=0, expert=e, usage=u, importance=importance, steps=steps, tokens=10)
        for e, u in usage.items()
    }
    keys = units if units is not None else [f"e{e}" for e in usage] + ["router", "dense"]
    return Contribution(client_id=client, num_examples=examples, experts=reports, units=frozenset(keys))


def weights_of(merges, key):
    return {client: pytest.approx(weight) for client, weight in merges[key].weights}


def test_importance_is_equation_5():
    record = record_of([[0.9, 0.1], [0.5, 0.5]])
    # mean 0.7, 0.3; max 0.9, 0.5
    np.testing.assert_allclose(HFedMoE(lambda_=0.25).expert_importance(record), [0.25 * 0.7 + 0.75 * 0.9, 0.45])


def test_information_cost_is_equation_11():
    record = record_of([[0.9, 0.1], [0.5, 0.5]])
    expected = [
        (0.9 * math.log(0.9 / 0.7) + 0.5 * math.log(0.5 / 0.7)) / 2,
        (0.1 * math.log(0.1 / 0.3) + 0.5 * math.log(0.5 / 0.3)) / 2,
    ]
    np.testing.assert_allclose(HFedMoE().information_cost(record), expected, rtol=1e-12)


def test_bernoulli_cost_is_the_mutual_information_and_the_same_for_both_of_two_experts():
    cost = HFedMoE(mi="bernoulli").information_cost(record_of([[0.9, 0.1], [0.5, 0.5]]))
    by_hand = sum(g * math.log(g / m) for g, m in ((0.9, 0.7), (0.5, 0.7), (0.1, 0.3), (0.5, 0.3))) / 2
    np.testing.assert_allclose(cost, [by_hand, by_hand], rtol=1e-12)


def test_a_constant_gate_carries_no_information():
    assert HFedMoE().information_cost(record_of([[0.7, 0.3]] * 5)).max() < 1e-12


def test_information_cost_never_exceeds_1_over_e():
    gates = [[1.0, 0.0]] + [[0.0, 1.0]] * 2  # the worst case is a hard router with share 1/e
    assert 0.3 < HFedMoE().information_cost(record_of(gates)).max() <= 1 / math.e


def test_bottleneck_is_equation_14_and_beta_0_is_equation_5():
    record = record_of([[0.9, 0.1], [0.5, 0.5]])
    method = HFedMoE(beta=2.0)
    np.testing.assert_allclose(
        method.bottleneck_score(record), method.expert_importance(record) - 2 * method.information_cost(record)
    )
    np.testing.assert_array_equal(
        HFedMoE(beta=0.0).bottleneck_score(record), HFedMoE(score="importance").bottleneck_score(record)
    )


def test_beta_can_turn_the_ranking_around():
    """Layer 0 is used in bursts (important, but costly in information), layer 1 steadily."""
    bursts = record_of([[0.98, 0.02], [0.02, 0.98], [0.02, 0.98], [0.5, 0.5]])
    steady = record_of([[0.51, 0.49], [0.49, 0.51]] * 2)
    both = ActivationProfile((bursts, steady))
    budget = DeviceBudget(resident_experts=3)
    free = HFedMoE(beta=0.0, layer_scale=False, exploration=0).plan_experts(both, (2, 2), budget, RNG)
    costly = HFedMoE(beta=5.0, layer_scale=False, exploration=0).plan_experts(both, (2, 2), budget, RNG)
    assert [len(free.resident(layer)) for layer in (0, 1)] == [2, 1]
    assert [len(costly.resident(layer)) for layer in (0, 1)] == [1, 2]


def test_residency_takes_the_best_over_all_layers_with_one_in_each():
    strong = record_of([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0]])
    weak = record_of([[0.4, 0.3, 0.3]] * 2)
    method = HFedMoE(beta=0.0, layer_scale=False, exploration=0)
    plan = method.plan_experts(ActivationProfile((strong, weak)), (3, 3), DeviceBudget(3), RNG)
    assert [plan.resident(0).tolist(), plan.resident(1).tolist()] == [[0, 1], [0]]
    assert plan.num_trainable == 3


def test_a_layer_with_a_flat_router_has_its_share_unless_the_plain_ranking_is_requested():
    sharp = record_of([[0.9, 0.1, 0.0, 0.0], [0.1, 0.8, 0.1, 0.0], [0.0, 0.1, 0.8, 0.1]], top_k=2)
    flat = record_of([[0.4, 0.4, 0.1, 0.1]] * 3, top_k=2)
    both, budget = ActivationProfile((sharp, flat)), DeviceBudget(4)
    plain = HFedMoE(layer_scale=False, exploration=0).plan_experts(both, (4, 4), budget, RNG)
    scaled = HFedMoE(exploration=0).plan_experts(both, (4, 4), budget, RNG)
    assert [len(plain.resident(layer)) for layer in (0, 1)] == [3, 1]
    assert [len(scaled.resident(layer)) for layer in (0, 1)] == [2, 2]


def test_experts_that_no_token_chose_are_left_out_even_if_they_fit():
    record = record_of([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0]])
    plan = HFedMoE().plan_experts(ActivationProfile((record,)), (3,), DeviceBudget(3), RNG)
    assert plan.resident(0).tolist() == [0]


def test_exploration_draws_in_proportion_to_the_score():
    """One of two experts per draw, with scores 3 : 1, is the better one in three of four draws."""
    record = ActivationProfile((record_of([[0.75, 0.25], [0.75, 0.25]], top_k=2),))
    method = HFedMoE(beta=0.0, exploration=1.0)
    draws = [
        method.plan_experts(record, (2,), DeviceBudget(1), np.random.default_rng(seed)).resident(0).tolist()
        for seed in range(2000)
    ]
    assert draws.count([0]) / len(draws) == pytest.approx(0.75, abs=0.03)
    last = [
        method.plan_experts(record, (2,), DeviceBudget(1), np.random.default_rng(seed), RoundContext(progress=1.0))
        .resident(0)
        .tolist()
        for seed in range(50)
    ]
    assert last == [[0]] * 50  # the last round takes the best
    assert method.plans_every_round
    assert method.profiling.when == "once"
    assert not HFedMoE(exploration=0).plans_every_round


def test_budget_below_one_expert_per_layer_is_refused():
    record = ActivationProfile((record_of([[0.6, 0.4]]),) * 3)
    with pytest.raises(BudgetTooSmall, match="is 2 experts.*3 MoE layers"):
        HFedMoE().plan_experts(record, (2, 2, 2), DeviceBudget(2), RNG)


def test_schedule_takes_the_best_routed_trainable_experts_of_the_batch():
    batch = record_of([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.7, 0.0], [0.6, 0.3, 0.1, 0.0]])
    method = HFedMoE(beta=0.0)
    assert method.schedule_experts(batch, np.array([0, 2, 3]), 1).tolist() == [2]
    assert sorted(method.schedule_experts(batch, np.array([0, 1, 2, 3]), 3).tolist()) == [0, 2]  # 1 and 3: no token


def test_experts_merge_by_examples_where_usage_reaches_tau_and_a_step_was_made():
    """Equation 17 with tau = 0.5/E = 0.25."""
    merges = HFedMoE(tau=0.5).plan_merge(
        [
            contribution("a", 30, {0: 0.8, 1: 0.2}),
            contribution("b", 10, {0: 0.25, 1: 0.75}),
            contribution("c", 50, {0: 0.9, 1: 0.9}, steps=0),
        ],
        UNITS,
    )
    assert weights_of(merges, "e0") == {"a": 30, "b": 10}
    assert weights_of(merges, "e1") == {"b": 10}
    assert weights_of(merges, "dense") == {"a": 30, "b": 10, "c": 50}


def test_an_unused_expert_does_not_change():
    merges = HFedMoE(tau=1.0).plan_merge([contribution("a", 1, {0: 0.9, 1: 0.1})], UNITS)
    assert "e1" not in merges
    assert "e0" in merges


def test_a_client_has_weight_only_where_it_uploaded():
    merges = HFedMoE(tau=0).plan_merge([contribution("a", 1, {0: 0.5, 1: 0.5}, units=["e0"])], UNITS)
    assert set(merges) == {"e0"}


def test_client_router_weights_are_equation_20():
    merges = HFedMoE(tau=0.5, router_aggregation="client").plan_merge(
        [
            contribution("a", 1, {0: 0.8, 1: 0.2}, importance=0.5),
            contribution("b", 99, {0: 0.4, 1: 0.6}, importance=1.0),
        ],
        UNITS,
    )
    # a uses expert 0 only (0.2 < tau/E): 0.8 * 0.5. b uses both: 0.4 * 1 + 0.6 * 1
    assert weights_of(merges, "router") == {"a": 0.4, "b": 1.0}


def test_client_router_weights_fall_back_to_examples():
    merges = HFedMoE(router_aggregation="client").plan_merge(
        [contribution("a", 3, {0: 0.0}), contribution("b", 5, {1: 0.0})], UNITS
    )
    assert weights_of(merges, "router") == {"a": 3.0, "b": 5.0}


def test_row_router_weights_are_p_of_the_experts_used():
    merges = HFedMoE(tau=0.5, router_aggregation="row").plan_merge(
        [contribution("a", 1, {0: 0.8, 1: 0.2}, importance=0.5), contribution("b", 99, {1: 0.6}, importance=1.0)], UNITS
    )
    weights = dict(merges["router"].weights)
    np.testing.assert_allclose(weights["a"], [0.4, 0.0])
    np.testing.assert_allclose(weights["b"], [0.0, 0.6])


@pytest.mark.parametrize("router_aggregation", ["row", "client"])
def test_arrival_order_does_not_matter(router_aggregation):
    method = HFedMoE(router_aggregation=router_aggregation)
    clients = [contribution(name, n, {0: 0.3 + n / 100, 1: 0.4}) for name, n in (("c", 1), ("a", 2), ("b", 3))]
    results = []
    for order in itertools.permutations(clients):
        merges = method.plan_merge(order, UNITS)
        results.append({key: [(c, np.asarray(w).tolist()) for c, w in merge.weights] for key, merge in merges.items()})
    assert all(result == results[0] for result in results)
    assert [client for client, _ in results[0]["e0"]] == ["a", "b", "c"]


def test_full_budget_and_no_threshold_reduce_to_fedavg():
    """Same experts, same weights; routers too when usage and importance agree between clients."""
    clients = [contribution(name, 20, {0: 0.5, 1: 0.5}) for name in ("a", "b")]
    ours, fedavg = (
        HFedMoE(tau=0, router_aggregation="client").plan_merge(clients, UNITS),
        FedAvg().plan_merge(clients, UNITS),
    )
    assert set(ours) == set(fedavg)
    for key in ours:
        total_ours, total_fedavg = (sum(w for _, w in m[key].weights) for m in (ours, fedavg))
        assert [(c, w / total_ours) for c, w in ours[key].weights] == [
            (c, w / total_fedavg) for c, w in fedavg[key].weights
        ]
    record = ActivationProfile((record_of([[0.6, 0.4], [0.4, 0.6]]),))
    full = DeviceBudget(resident_experts=2)
    assert HFedMoE().plan_experts(record, (2,), full, RNG) == FedAvg().plan_experts(None, (2,), full, RNG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_": 1.5}, "lambda must be at least 0 and at most 1, found 1.5"),
        ({"beta": -1}, "beta must be at least 0, found -1"),
        ({"tau": math.nan}, "tau must be at least 0, found nan"),
        ({"mi": "exact"}, "mi must be paper or bernoulli, found 'exact'"),
        ({"router_aggregation": "mean"}, "must be row or client"),
    ],
)
def test_bad_hyper_parameters_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        HFedMoE(**options)
