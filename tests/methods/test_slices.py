"""The choice of neurons and the server half of `slices`, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, Role
from edgefed.methods.interface import Contribution, DeviceBudget, RoundContext
from edgefed.methods.registry import make_method
from edgefed.methods.slices import Slices, block_size, choose_neurons
from edgefed.protocol.messages import ExpertReport, UnitInfo
from edgefed.trainer.expert_choice import even_layout, freeze_others, paced, trainable_worth

RNG = np.random.default_rng(0)


def profile_of(*energies: np.ndarray) -> ActivationProfile:
    layers = []
    for energy in energies:
        ones = np.ones(len(energy))
        layers.append(LayerProfile(10, ones, ones, ones, -ones, -ones, ones, neuron_energy=np.asarray(energy, float)))
    return ActivationProfile(tuple(layers))


def test_the_best_blocks_are_chosen_within_the_budget():
    scores = [np.array([[1.0, 9.0, 2.0, 8.0], [5.0, 5.0, 0.0, 0.0]]), np.array([[3.0, 0.5, 0.5, 3.0], [0.0] * 4])]
    (first, second) = choose_neurons(scores, 0.5, 2)  # 8 of 16 neurons: four blocks
    assert first.tolist() == [[True] * 4, [True, True, False, False]]
    assert second.tolist() == [[True, False, False, True], [False] * 4]


def test_every_layer_keeps_a_block_and_everything_fits_into_everything():
    scores = [np.full((2, 6), 10.0), np.zeros((2, 6))]
    (first, second) = choose_neurons(scores, 4 / 24, 2)
    assert (first.sum(), second.sum()) == (2, 2)
    assert all(mask.all() for mask in choose_neurons(scores, 1.0, 4)), "the last block is shorter"


@pytest.mark.parametrize("allocation", ["sqrt", "energy", "uniform"])
def test_more_memory_adds_neurons_and_takes_none_away(allocation):
    profile = profile_of(RNG.gamma(0.3, size=(8, 96)), 100 * RNG.gamma(0.3, size=(8, 96)))
    method, before = Slices(allocation=allocation), None
    for budget in range(2, 17):
        plan = method.plan_experts(profile, (8, 8), DeviceBudget(budget), RNG)
        held = sum(int(mask.sum()) for mask in plan.neurons)
        assert budget * 96 - 8 < held <= budget * 96
        assert all(width % 8 == 0 for mask in plan.neurons for width in mask.sum(axis=1))
        if before is not None:
            assert all((mask >= old).all() for mask, old in zip(plan.neurons, before.neurons, strict=True))
        before = plan
    assert before.num_trainable == 16


def test_a_share_of_the_neurons_is_drawn_anew_in_every_round():
    profile = profile_of(RNG.gamma(0.3, size=(8, 96)), RNG.gamma(0.3, size=(8, 96)))
    method = Slices(exploration=0.4)

    def plan(seed: int, progress: float, budget: int = 4) -> np.ndarray:
        context = RoundContext(progress=progress)
        found = method.plan_experts(profile, (8, 8), DeviceBudget(budget), np.random.default_rng(seed), context)
        return np.concatenate([mask.ravel() for mask in found.neurons])

    best = np.concatenate([m.ravel() for m in Slices().plan_experts(profile, (8, 8), DeviceBudget(4), RNG).neurons])
    first, second = plan(1, 0.0), plan(2, 0.0)
    assert method.plans_every_round
    assert not Slices().plans_every_round
    assert first.sum() == second.sum() == best.sum() == 4 * 96
    assert (first & best).sum() >= 0.6 * best.sum() - 8, "the others are chosen as without a draw"
    assert (first != second).any()
    assert (plan(1, 0.0) == first).all()
    assert (plan(1, 0.0, budget=6) >= first).all(), "more memory takes no neuron away"
    assert (plan(1, 1.0) == best).all(), "the last round has the best"


def test_uniform_gives_every_expert_the_same_width():
    profile = profile_of(RNG.gamma(0.3, size=(4, 96)), RNG.gamma(0.3, size=(4, 96)))
    plan = Slices(allocation="uniform").plan_experts(profile, (4, 4), DeviceBudget(4), RNG)
    assert {width for mask in plan.neurons for width in mask.sum(axis=1).tolist()} == {48}


def test_blocks_are_halved_in_narrow_experts():
    assert [block_size(16, width) for width in (1024, 192, 191, 96, 16, 3)] == [16, 16, 8, 8, 1, 1]


def test_a_budget_below_an_expert_per_layer_and_wrong_options_are_refused():
    profile = profile_of(np.ones((2, 4)), np.ones((2, 4)))
    with pytest.raises(BudgetTooSmall):
        Slices().plan_experts(profile, (2, 2), DeviceBudget(1), RNG)
    with pytest.raises(ConfigError, match="block"):
        make_method("slices", {"block": 0})
    without = ActivationProfile(tuple(dataclasses.replace(each, neuron_energy=None) for each in profile.layers))
    with pytest.raises(ValueError, match="neuron energies"):
        Slices().plan_experts(without, (2, 2), DeviceBudget(2), RNG)


def contribution(client: str, examples: int, reports: list[tuple[int, int, int]], units: set[str]) -> Contribution:
    found = {
        (0, expert): ExpertReport(layer=0, expert=expert, usage=0.1, importance=0.1, steps=steps, tokens=tokens)
        for expert, steps, tokens in reports
    }
    return Contribution(client, examples, found, frozenset(units))


def test_neurons_are_weighted_by_the_tokens_that_trained_them():
    units = [
        UnitInfo(key="e0", kind="expert", layer=0, expert=0, trainable=True),
        UnitInfo(key="e1", kind="expert", layer=0, expert=1, trainable=True),
        UnitInfo(key="r", kind="router", layer=0, trainable=True),
    ]
    sent = [
        contribution("b", 5, [(0, 2, 70), (1, 0, 0)], {"e0", "e1", "r"}),
        contribution("a", 3, [(0, 2, 10), (1, 0, 9)], {"e0", "e1", "r"}),
    ]
    found = Slices().plan_merge(sent, units)
    assert found == Slices().plan_merge(sent[::-1], units)
    assert found["e0"].weights == (("a", 10.0), ("b", 70.0))
    assert "e1" not in found, "no step changed it anywhere"
    assert found["r"].weights == (("a", 3.0), ("b", 5.0))
    assert Slices(weights="examples").plan_merge(sent, units)["e0"].weights == (("a", 3.0), ("b", 5.0))


def test_fewer_trainable_slices_are_the_most_used_ones():
    profile = profile_of(np.vstack([np.full(96, 9.0), np.full(96, 1.0), np.full(96, 5.0)]))
    method = Slices()
    wide = method.plan_experts(profile, (3,), DeviceBudget(3), RNG)
    narrow = method.plan_experts(profile, (3,), DeviceBudget(2), RNG)
    plan = freeze_others(wide, narrow)
    assert plan.trainable(0).tolist() == [0, 2]
    assert plan.frozen(0).tolist() == [1]
    assert plan.counts() == ((3,), (2,))


def test_sliced_plans_survive_json_and_wrong_ones_are_refused():
    import json

    plan = Slices().plan_experts(profile_of(RNG.gamma(0.3, size=(5, 37))), (5,), DeviceBudget(2), RNG)
    again = ExpertPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert hash(again) == hash(plan)
    assert plan != dataclasses.replace(plan, neurons=tuple(~mask | mask for mask in plan.neurons))
    with pytest.raises(ValueError, match="absent experts"):
        ExpertPlan((np.array([Role.TRAINABLE, Role.ABSENT], np.int8),), neurons=(np.ones((2, 4), bool),))
    with pytest.raises(ValueError, match=r"bool \(2, I\)"):
        ExpertPlan((np.array([2, 2], np.int8),), neurons=(np.ones((3, 4), bool),))


def test_profiles_with_energies_survive_json_and_add_up():
    profile = profile_of(RNG.gamma(0.3, size=(5, 37)))
    again = ActivationProfile.from_dict(profile.to_dict())
    np.testing.assert_allclose(again.layers[0].neuron_energy, profile.layers[0].neuron_energy, rtol=1e-6)
    both = profile + profile
    np.testing.assert_allclose(both.layers[0].neuron_energy, 2 * profile.layers[0].neuron_energy)
    without = ActivationProfile(tuple(dataclasses.replace(each, neuron_energy=None) for each in profile.layers))
    with pytest.raises(ValueError, match="neuron energies"):
        profile + without


def test_a_paced_run_freezes_what_is_beyond_the_limit_and_holds_the_same():
    profile = profile_of(RNG.gamma(0.3, size=(8, 96)), RNG.gamma(0.3, size=(8, 96)))

    def layout(resident: int, trainable: int) -> ExpertPlan:
        assert resident == trainable
        return Slices().plan_experts(profile, (8, 8), DeviceBudget(resident), RNG)

    plan = layout(8, 8)
    assert trainable_worth(plan) == 8
    assert paced(plan, layout, None) is plan is paced(plan, layout, 8)
    limited = paced(plan, layout, 4)
    assert limited.num_resident == plan.num_resident > limited.num_trainable
    assert trainable_worth(limited) in (3, 4)
    assert trainable_worth(paced(plan, layout, 1)) == 2, "at least one expert of each layer trains"
    whole = ExpertPlan.full((4, 4))
    assert paced(whole, even_layout((4, 4)), 3).counts() == ((4, 4), (2, 1))
